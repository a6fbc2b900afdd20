"""`python -m torch_adadelta`: what was built, what will run, and why not."""

import platform
import sys

import torch
from torch import Tensor

import torch_adadelta
from torch_adadelta.backends import kernels
from torch_adadelta.backends.batch import Backend, Batch, Segment
from torch_adadelta.step import execution


def _bits_of_one_step(backend: Backend, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    lists = [[torch.randn(n, generator=generator).to(device, dtype) for n in (1, 7, 1025)] for _ in range(2)]
    lists += [[torch.rand(n, generator=generator).to(device, dtype) for n in (1, 7, 1025)] for _ in range(2)]
    params, grads, square_avgs, acc_deltas = lists
    segments = [Segment(len(params), 1.0, 0.95, 1e-7)]
    execution.run(Batch(backend, False, False, params, grads, square_avgs, acc_deltas, segments))
    return [tensor.cpu() for tensors in (params, square_avgs, acc_deltas) for tensor in tensors]


def _verdict(backend: Backend, device: str) -> str:
    """Runs one step of every dtype and compares it, bit by bit, with the single-tensor update on the CPU."""
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        expected = _bits_of_one_step(Backend.SINGLE_TENSOR, dtype, "cpu")
        if not all(map(torch.equal, _bits_of_one_step(backend, dtype, device), expected)):
            return f"WRONG: {dtype} differs from single_tensor on the CPU"
    return "ok, same bits as single_tensor on the CPU"


def _verdicts(device: str) -> list[str]:
    is_loaded = kernels.is_cuda_loaded if device == "cuda" else kernels.is_loaded
    print(f"\nOne step of each path on {device}, float32, float64, float16 and bfloat16:")
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
