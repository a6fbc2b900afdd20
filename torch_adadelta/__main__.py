"""`python -m torch_adadelta`: what was built, what will run, and why not."""

import platform
import sys

import torch
from torch import Tensor

import torch_adadelta
from torch_adadelta import ops, update
from torch_adadelta.signature import Update

PATHS: dict[str, Update] = {"for-loop": update.for_loop, "foreach": update.foreach, "fused": update.fused}


def _bits_of_one_step(path: Update, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    lists = [[torch.randn(n, generator=generator).to(device, dtype) for n in (1, 7, 1025)] for _ in range(2)]
    lists += [[torch.rand(n, generator=generator).to(device, dtype) for n in (1, 7, 1025)] for _ in range(2)]
    params, grads, square_avgs, acc_deltas = lists
    path(params, grads, square_avgs, acc_deltas, 1.0, 0.95, 1e-7, False)
    return [tensor.cpu() for tensor in (*params, *square_avgs, *acc_deltas)]


def _verdict(path: Update, device: str) -> str:
    """Runs one step of every dtype and compares it, bit by bit, with the for-loop on the CPU."""
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        expected = _bits_of_one_step(update.for_loop, dtype, "cpu")
        if not all(map(torch.equal, _bits_of_one_step(path, dtype, device), expected)):
            return f"WRONG: {dtype} differs from the for-loop on the CPU"
    return "ok, same bits as the for-loop on the CPU"


def _verdicts(device: str) -> list[str]:
    is_fused = ops.is_cuda_loaded if device == "cuda" else ops.is_loaded
    print(f"\nOne step of each path on {device}, float32, float64, float16 and bfloat16:")
    verdicts = []
    for name, path in PATHS.items():
        runs = name != "fused" or is_fused
        verdicts.append(_verdict(path, device) if runs else "cannot run: its library is not loaded")
        print(f"  {name:<9} {verdicts[-1]}")
    return verdicts


def main() -> int:
    """Prints the diagnostics; returns 1 if a path computes something else than the for-loop."""
    print(f"torch_adadelta {torch_adadelta.__version__}")
    print(f"Python         {platform.python_version()} ({platform.system()} {platform.machine()})")
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    print(f"PyTorch        {torch.__version__} ({cuda}), {torch.get_num_threads()} threads")
    if ops.is_loaded:
        print(f"CPU library    {ops.LIBRARY_PATH}")
        print(f"CPU kernels    {ops.cpu_capability()}")
    else:
        print(f"CPU library    not loaded: {type(ops.load_error).__name__}: {ops.load_error}")
    if ops.is_cuda_loaded:
        print(f"CUDA library   {ops.CUDA_LIBRARY_PATH}")
    else:
        print(f"CUDA library   not loaded: {type(ops.cuda_load_error).__name__}: {ops.cuda_load_error}")
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        print(f"GPU {index}          {torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    verdicts = [verdict for device in devices for verdict in _verdicts(device)]
    return int(any(verdict.startswith("WRONG") for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
