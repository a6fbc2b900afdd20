"""Trains a small model for very many steps: its memory must not grow, and its numbers must stay finite.

    python scripts/long_run.py [--steps 1000000] [--path fused] [--renew 0]

Prints the resident memory on the way, and fails if it grows by more than 2 MB after the first twentieth of the steps.
With `--renew`, every so many steps the state is replaced by a copy of itself, which the library must then hold instead.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import torch

from torch_adadelta import AdadeltaKeras

PATHS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "single_tensor": {"foreach": False}, "default": {}}
MOST_GROWTH = 2 * 2**20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> int:
    """Runs the steps, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--path", choices=PATHS, default="default")
    parser.add_argument("--renew", type=int, default=0)
    arguments = parser.parse_args()
    steps, renew = arguments.steps, arguments.renew
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = torch.nn.Linear(8, 4)
    optimizer = AdadeltaKeras(model.parameters(), 1.0, **PATHS[arguments.path])
    gradients = [[torch.randn_like(p) for p in model.parameters()] for _ in range(16)]
    begin, start = 0, time.perf_counter()
    for step in range(steps):
        for param, grad in zip(model.parameters(), gradients[step % 16], strict=True):
            param.grad = grad
        optimizer.step()
        if renew and step % renew == 0:
            optimizer.load_state_dict(optimizer.state_dict())
        if step == steps // 20:
            begin = resident_bytes()
        if step > steps // 20 and step % (steps // 10) == 0:
            print(f"{step:>9} steps: {resident_bytes() / 2**20:.1f} MB", flush=True)
    growth = resident_bytes() - begin
    tensors = [x for p in model.parameters() for x in (p, *optimizer.state[p].values())]
    is_finite = all(bool(x.isfinite().all()) for x in tensors)
    took = time.perf_counter() - start
    print(f"{optimizer.iterations} steps in {took:.0f} s; memory grew by {growth / 2**20:.2f} MB; finite: {is_finite}")
    return 0 if growth <= MOST_GROWTH and is_finite and optimizer.iterations == steps else 1


if __name__ == "__main__":
    sys.exit(main())
