"""Trains a convolutional net with the whole train step in one CUDA graph: forward, backward and Adadelta.

A replay launches all kernels of a step at once, which saves the time that the host takes to launch them one by one.
With `capturable=True` the optimizer counts its steps on the device, and a captured step evaluates the learning-rate
schedule there. The same training also runs step by step, for comparison. Without a GPU that is all, and the example
says so.

It prints the losses, the test accuracy and the time of a train step. Run it, where torch_adadelta is installed with its
extra "examples", with

    python examples/train_cuda_graph.py
"""

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import common
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from torch_adadelta import AdadeltaKeras
from torch_adadelta.schedules import PolynomialDecay

# Steps before the capture: they make the optimizer's state, and what libraries allocate when they are first called.
WARM_UP: Final = 3


class Run(NamedTuple):
    """What came of one training."""

    losses: list[float]  # of every batch
    accuracy: float  # on the test images, in [0, 1]
    step_ms: float  # the mean time of a train step after those before the capture


def capture(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A function that replays what `step` does. Capturing runs nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def train(epochs: int, batch_size: int, seed: int, device: torch.device, dtype: torch.dtype, *, in_graph: bool) -> Run:
    """Trains once. Warm-up, capture and replay have one stream, which must not be the default one."""
    is_cuda = device.type == "cuda"
    with torch.cuda.stream(torch.cuda.Stream(device)) if is_cuda else contextlib.nullcontext():
        return _train(epochs, batch_size, seed, device, dtype, in_graph)


def _train(epochs: int, batch_size: int, seed: int, device: torch.device, dtype: torch.dtype, in_graph: bool) -> Run:
    train_images, train_labels, test_images, test_labels = common.load_tensors(device, dtype, (1, 8, 8))
    batch_size = min(batch_size, len(train_labels))
    batches_per_epoch = len(train_labels) // batch_size
    torch.manual_seed(seed)
    model = common.convolutional_net().to(device, dtype)
    schedule = PolynomialDecay(1.0, decay_steps=epochs * batches_per_epoch, end_learning_rate=0.1)
    optimizer = AdadeltaKeras(model.parameters(), schedule, capturable=True)

    # A graph has its memory and sizes for ever: each batch is copied there, and a remainder is left out.
    images, labels = train_images[:batch_size].clone(), train_labels[:batch_size].clone()

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = common.loss(model, images, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    losses: list[Tensor] = []
    for _ in range(epochs):
        order = torch.randperm(len(train_labels)).to(device)
        for indices in order[: batches_per_epoch * batch_size].split(batch_size):
            images.copy_(train_images[indices])
            labels.copy_(train_labels[indices])
            if len(losses) == WARM_UP:
                if in_graph:
                    step = capture(step)
                common.synchronize(device)
                start = time.perf_counter()
            losses.append(step().clone())  # on the device, so that the host need not wait
    common.synchronize(device)
    step_ms = 1000 * (time.perf_counter() - start) / (len(losses) - WARM_UP)
    return Run(torch.stack(losses).tolist(), common.accuracy(model, test_images, test_labels), step_ms)


def report(runs: dict[str, Run]) -> None:
    """Prints the trainings side by side."""
    table = Table()
    table.add_column("train step", no_wrap=True)
    for heading in ("first loss", "last loss", "test accuracy", "time of a step"):
        table.add_column(heading, justify="right")
    for name, run in runs.items():
        figures = (f"{run.losses[0]:.4f}", f"{run.losses[-1]:.4f}", f"{run.accuracy:.2%}", f"{run.step_ms:.3f} ms")
        table.add_row(name, *figures)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main(arguments: Sequence[str] | None = None) -> dict[str, Run]:
    """Runs the example as the command line says, and returns what came of it."""
    parser = common.parser(
        "Train a convolutional net on handwritten digits with the whole train step in a CUDA graph.",
        epochs=10,
        batch_size=32,
        least_epochs=WARM_UP + 1,
    )
    common.add_device(parser, of="the model and its state")
    options = parser.parse_args(arguments)
    settings = (options.epochs, options.batch_size, options.seed, options.device, options.dtype)
    with common.one_thread():
        runs = {"one by one": train(*settings, in_graph=False)}
        if options.device.type == "cuda":
            runs["in a CUDA graph"] = train(*settings, in_graph=True)
    report(runs)
    if options.device.type != "cuda":
        print("There are no CUDA graphs on the CPU: the same train step ran without one.")
    return runs


if __name__ == "__main__":
    main()
