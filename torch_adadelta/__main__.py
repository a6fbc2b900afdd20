"""`python -m torch_adadelta`: what was built, what will run, and why not."""

import platform
import sys
from typing import Final

import torch
from torch import Tensor

import torch_adadelta
from torch_adadelta.backends import kernels, masters
from torch_adadelta.backends.batch import STATE_DTYPES, Backend, Batch, Segment
from torch_adadelta.step import execution

# The dtypes of parameters and of their state.
_KINDS: Final = (
    *((dtype, dtype) for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
)


def _bits_of_one_step(
    backend: Backend, dtype: torch.dtype, state_dtype: torch.dtype, has_masters: bool, device: str
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    params, grads = ([torch.randn(n, generator=generator).to(device, dtype) for n in (1, 7, 1025)] for _ in range(2))
    a, u = ([torch.rand(n, generator=generator).to(device, state_dtype) for n in (1, 7, 1025)] for _ in range(2))
    remainders = [masters.new_remainder(param) for param in params] if has_masters else []
    number = 0 if state_dtype is dtype else STATE_DTYPES.index(state_dtype)
    segments = [Segment(len(params), 1.0, 0.95, 1e-7, state_dtype=number, has_masters=has_masters)]
    execution.run(Batch(backend, False, False, params, grads, a, u, segments, remainders=remainders))
    return [tensor.cpu() for tensors in (params, a, u, remainders) for tensor in tensors]


def _verdict(backend: Backend, device: str) -> str:
    """Runs one step of every kind and compares it, bit by bit, with the single-tensor update on the CPU."""
    for dtype, state_dtype in _KINDS:
        for has_masters in {False, dtype is torch.bfloat16}:
            kind = dtype, state_dtype, has_masters
            expected = _bits_of_one_step(Backend.SINGLE_TENSOR, *kind, "cpu")
            if not all(map(torch.equal, _bits_of_one_step(backend, *kind, device), expected)):
                what = f"{dtype}{' with masters' if has_masters else ''} and state of {state_dtype}"
                return f"WRONG: {what} differs from single_tensor on the CPU"
    return "ok, same bits as single_tensor on the CPU"


def _verdicts(device: str) -> list[str]:
    is_loaded = kernels.is_cuda_loaded if device == "cuda" else kernels.is_loaded
    print(f"\nOne step of each path on {device}, of every real dtype, with masters and state of others:")
    verdicts = []
    for backend in Backend:
        runs = backend is not Backend.FUSED or is_loaded
        verdicts.append(_verdict(backend, device) if runs else "cannot run: its library is not loaded")
        print(f"  {backend.value:<13}  {verdicts[-1]}")
    return verdicts


def main() -> int:
    """Prints the diagnostics; returns 1 if a backend computes something else than the reference."""
    print(f"torch_adadelta {torch_adadelta.__version__}")
    print(f"Python         {platform.python_version()} ({platform.system()} {platform.machine()})")
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    print(f"PyTorch        {torch.__version__} ({cuda}), {torch.get_num_threads()} threads")
    if kernels.is_loaded:
        print(f"CPU library    {kernels.LIBRARY_PATH}")
        print(f"CPU kernels    {kernels.cpu_capability()}")
    else:
        print(f"CPU library    not loaded: {type(kernels.load_error).__name__}: {kernels.load_error}")
    if kernels.is_cuda_loaded:
        print(f"CUDA library   {kernels.CUDA_LIBRARY_PATH}")
    else:
        print(f"CUDA library   not loaded: {type(kernels.cuda_load_error).__name__}: {kernels.cuda_load_error}")
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        print(f"GPU {index}          {torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    verdicts = [verdict for device in devices for verdict in _verdicts(device)]
    return int(any(verdict.startswith("WRONG") for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
