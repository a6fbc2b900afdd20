"""How an update is computed: functional.py by PyTorch's operations, kernels.py by a compiled op. No groups here."""
