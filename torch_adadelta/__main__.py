"""`python -m torch_adadelta`: what was built, what will run, and why not."""

import platform
import sys

import torch
from torch import Tensor

import torch_adadelta
from torch_adadelta import ops, update

PATHS: dict[str, update.Update] = {"for-loop": update.for_loop, "foreach": update.foreach, "fused": update.fused}


def _bits_of_one_step(path: update.Update, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    lists = [[torch.randn(n, generator=generator).to(dtype) for n in (1, 7, 1025)] for _ in range(2)]
    lists += [[torch.rand(n, generator=generator).to(dtype) for n in (1, 7, 1025)] for _ in range(2)]
    path(*lists, 1.0, 0.95, 1e-7, False)
    params, _, square_avgs, acc_deltas = lists
    return [*params, *square_avgs, *acc_deltas]


def _verdict(path: update.Update) -> str:
    """Runs one step of every dtype and compares it, bit by bit, with the for-loop."""
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        expected = _bits_of_one_step(update.for_loop, dtype)
        if not all(map(torch.equal, _bits_of_one_step(path, dtype), expected)):
            return f"WRONG: {dtype} differs from the for-loop"
    return "ok, same bits as the for-loop"


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
    print("\nOne step of each path on the CPU, float32, float64, float16 and bfloat16:")
    verdicts = {
        name: _verdict(path) if name != "fused" or ops.is_loaded else "cannot run: the CPU library is not loaded"
        for name, path in PATHS.items()
    }
    for name, verdict in verdicts.items():
        print(f"  {name:<9} {verdict}")
    return int(any(verdict.startswith("WRONG") for verdict in verdicts.values()))


if __name__ == "__main__":
    sys.exit(main())
