"""Peak memory of a training step, with `step()` after the backward pass and with `step_in_backward`.

A stack of equal layers; each way runs in a process of its own, whose largest resident size is compared with what it was
before the first backward pass. With `step()` all gradients exist at once, in the backward pass a layer's at most.

    python benchmarks/in_backward.py [--layers 24] [--width 1024]
"""

import argparse
import json
import resource
import subprocess
import sys

import torch
from torch import nn

from torch_adadelta import AdadeltaKeras, step_in_backward

_MIB = 2**20


def _peak() -> int:
    """The largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(way: str, layers: int, width: int, steps: int = 3) -> dict[str, float]:
    """Bytes of the parameters, and what the steps added to the peak: state, gradients and what they need besides."""
    torch.set_num_threads(1)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    optimizer = AdadeltaKeras(model.parameters(), learning_rate=1.0)
    if way == "in backward":
        step_in_backward(optimizer)
    x = torch.ones(4, width)
    before = _peak()
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    params = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"parameters": params, "added": _peak() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(run(args.way, args.layers, args.width)))
        return
    print(f"{args.layers} layers of {args.width} x {args.width}, float32; PyTorch {torch.__version__}, MiB")
    for way in ("step()", "in backward"):
        command = [sys.executable, __file__, "--way", way, "--layers", str(args.layers), "--width", str(args.width)]
        measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        params, added = measured["parameters"] / _MIB, measured["added"] / _MIB
        beyond = added - 2 * params
        print(f"{way:12s}  parameters {params:7.1f}   state {2 * params:7.1f}   peak beyond both {beyond:7.1f}")


if __name__ == "__main__":
    main()
