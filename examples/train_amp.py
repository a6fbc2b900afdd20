"""Trains a convolutional net in float32, and with automatic mixed precision: autocast, and GradScaler for float16.

Parameters, gradients and the optimizer's state are float32; autocast computes the layers in 16 bits. The gradients of
float16 are small, so GradScaler multiplies the loss, divides the gradients by the same scale, and skips a step whose
gradients are not finite. With `fused=True` the update itself does both in its one pass. bfloat16 needs no scale.

It prints losses, accuracies, skipped steps and times. Run it, where torch_adadelta is installed with its extra
"examples", with

    python examples/train_amp.py [--device cuda] [--dtype float16]
"""

import statistics
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import common
import torch
from rich.console import Console
from rich.table import Table

from torch_adadelta import AdadeltaKeras


class Run(NamedTuple):
    """What came of one training."""

    losses: list[float]  # the mean of each epoch
    accuracy: float  # on the test images, in [0, 1]
    skipped: int  # steps
    batch_ms: float  # the median time of a batch


def train(epochs: int, batch_size: int, seed: int, device: torch.device, dtype: torch.dtype, scale: float) -> Run:
    """Trains once, with layers that compute in `dtype`."""
    images, labels, test_images, test_labels = common.load_tensors(device, torch.float32, (1, 8, 8))
    torch.manual_seed(seed)
    model = common.convolutional_net().to(device)
    optimizer = AdadeltaKeras(model.parameters(), learning_rate=1.0, fused=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=scale, enabled=dtype is torch.float16)
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)

    losses: list[list[float]] = []
    seconds: list[float] = []
    for _ in range(epochs):
        losses.append([])
        for indices in torch.randperm(len(labels)).to(device).split(batch_size):
            start = time.perf_counter()
            optimizer.zero_grad()
            with autocast:
                loss = common.loss(model, images[indices], labels[indices])
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[-1].append(loss.item())  # waits for the device
            seconds.append(time.perf_counter() - start)
    skipped = len(seconds) - optimizer.iterations  # which counts the steps that were taken
    with autocast:
        accuracy = common.accuracy(model, test_images, test_labels)
    return Run([statistics.fmean(epoch) for epoch in losses], accuracy, skipped, 1000 * statistics.median(seconds))


def report(runs: dict[str, Run]) -> None:
    """Prints the trainings side by side."""
    table = Table()
    table.add_column("layers in", no_wrap=True)
    for heading in ("loss, first epoch", "last epoch", "test accuracy", "steps skipped", "median batch"):
        table.add_column(heading, justify="right")
    for name, run in runs.items():
        figures = (f"{run.losses[0]:.4f}", f"{run.losses[-1]:.4f}", f"{run.accuracy:.2%}", str(run.skipped))
        table.add_row(name, *figures, f"{run.batch_ms:.2f} ms")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main(arguments: Sequence[str] | None = None) -> dict[str, Run]:
    """Runs the example as the command line says, and returns what came of it, by the names of the dtypes."""
    parser = common.parser(
        "Train a convolutional net on handwritten digits in float32 and with automatic mixed precision.",
        epochs=10,
        batch_size=32,
    )
    common.add_device(
        parser,
        ("bfloat16", "float16"),
        why="autocast computes in 16 bits, and the training in float32 runs beside it anyway",
        of="the layers under autocast",
    )
    parser.add_argument("--scale", type=float, default=2.0**16, help="of the loss at first, for float16")
    options = parser.parse_args(arguments)
    settings = (options.epochs, options.batch_size, options.seed, options.device)
    with common.one_thread():
        runs = {
            common.name_of(dtype): train(*settings, dtype, options.scale) for dtype in (torch.float32, options.dtype)
        }
    report(runs)
    return runs


if __name__ == "__main__":
    main()
