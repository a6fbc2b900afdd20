"""Trains one small convolutional net on handwritten digits with two optimizers, side by side.

`AdadeltaKeras` and `torch.optim.Adadelta` start from the same weights, see the same batches and have the same learning
rate. The loss curves differ because rho and epsilon do: each has the defaults of its framework. The digits are the 1797
images of 8x8 pixels that come with scikit-learn, so nothing is downloaded.

It prints the test accuracy and the time per optimizer step, and draws the loss curves to output/train_digits.png. On
one machine, the seed determines losses and accuracy. Run it with `make demo` or, where torch_adadelta is installed with
its extra "examples", with

    python examples/train_digits.py
"""

import copy
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import common
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_adadelta import AdadeltaKeras
from torch_adadelta.backends import kernels

REQUIRED_ACCURACY: Final = 0.97


class Digits(NamedTuple):
    """Images of shape (n, 1, 8, 8) with values in [0, 1], and their labels of shape (n,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Run(NamedTuple):
    """What came of one optimizer."""

    name: str
    rho: float
    epsilon: float
    losses: list[float]  # the training loss of every batch
    accuracy: float  # on the test images, in [0, 1]
    step_us: float  # the median time in step(), in microseconds


class Result(NamedTuple):
    """What came of both optimizers."""

    keras: Run
    torch: Run
    batches_per_epoch: int
    threads: int


class _Trainee:
    """A model with its optimizer, and what has been measured of them."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer
        self.losses: list[float] = []
        self.step_ns: list[int] = []

    def train_batch(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()
        start = time.perf_counter_ns()
        self.optimizer.step()
        self.step_ns.append(time.perf_counter_ns() - start)
        self.losses.append(loss.item())

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        return float((self.model(images).argmax(dim=1) == labels).double().mean())

    def run(self, name: str, rho: float, epsilon: float, digits: Digits) -> Run:
        accuracy = self.accuracy(digits.test_images, digits.test_labels)
        return Run(name, rho, epsilon, self.losses, accuracy, statistics.median(self.step_ns) / 1000)


def load() -> Digits:
    """The digits, a quarter of them for testing, always the same."""
    digits = common.load()

    def as_images(pixels: common.Array) -> Tensor:
        return torch.from_numpy(pixels).reshape(-1, 1, 8, 8)

    return Digits(
        as_images(digits.train_images),
        torch.from_numpy(digits.train_labels),
        as_images(digits.test_images),
        torch.from_numpy(digits.test_labels),
    )


def build_model() -> nn.Module:
    """A convolutional net of about 151 000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def train(epochs: int = 20, batch_size: int = 32, learning_rate: float = 1.0, seed: int = 0) -> Result:
    """Trains with both optimizers, batch by batch in turn, and tests both models.

    The batches of an epoch have the same size, give or take one image.
    """
    with common.one_thread():
        return _train(epochs, batch_size, learning_rate, seed)


def _train(epochs: int, batch_size: int, learning_rate: float, seed: int) -> Result:
    digits = load()
    torch.manual_seed(seed)
    model = build_model()
    twin = copy.deepcopy(model)
    ours = AdadeltaKeras(model.parameters(), learning_rate=learning_rate)
    theirs = torch.optim.Adadelta(twin.parameters(), lr=learning_rate)
    trainees = (_Trainee(model, ours), _Trainee(twin, theirs))

    batches_per_epoch = math.ceil(len(digits.train_labels) / batch_size)
    columns = (TextColumn("epoch {task.fields[epoch]}"), BarColumn(), MofNCompleteColumn(), TextColumn("batches"))
    with Progress(*columns, TimeElapsedColumn()) as progress:
        task = progress.add_task("train", total=epochs * batches_per_epoch, epoch=f"0/{epochs}")
        for epoch in range(epochs):
            progress.update(task, epoch=f"{epoch + 1}/{epochs}")
            # Not split(batch_size): a remainder of a few images would make a noisy last batch.
            for indices in torch.randperm(len(digits.train_labels)).tensor_split(batches_per_epoch):
                images, labels = digits.train_images[indices], digits.train_labels[indices]
                for trainee in trainees:
                    trainee.train_batch(images, labels)
                progress.advance(task)

    return Result(
        trainees[0].run("AdadeltaKeras", float(ours.rho), float(ours.epsilon), digits),
        trainees[1].run("torch.optim.Adadelta", theirs.defaults["rho"], theirs.defaults["eps"], digits),
        batches_per_epoch,
        torch.get_num_threads(),
    )


def plot(result: Result, learning_rate: float, path: Path) -> None:
    """Draws the loss of every batch, pale, and its mean over each epoch."""
    n = result.batches_per_epoch
    figure = common.new_figure(9, 5.5)
    axes = figure.subplots()
    for run, colour in ((result.keras, common.BLUE), (result.torch, common.RED)):
        means = common.epoch_means(run.losses, n)
        axes.plot([(i + 0.5) / n for i in range(len(run.losses))], run.losses, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(
            [epoch + 0.5 for epoch in range(len(means))],
            means,
            color=colour,
            marker="o",
            markersize=4,
            linewidth=2,
            label=f"{run.name} (rho {run.rho:g}, epsilon {run.epsilon:.0e}): test accuracy {run.accuracy:.1%}",
        )
    axes.set_yscale("log")
    common.count_epochs(axes, len(result.keras.losses) / n)
    axes.set_ylabel("training loss (cross-entropy)")
    axes.set_title(f"Handwritten digits, same weights and batches, learning rate {learning_rate:g}")
    axes.legend(title="mean over the epoch (pale: every batch)")
    common.save(figure, path)


def report(result: Result) -> None:
    """Prints accuracy and time of both optimizers side by side."""
    table = Table()
    table.add_column("optimizer", no_wrap=True)
    for heading in ("rho", "epsilon", "test accuracy", "median step()"):
        table.add_column(heading, justify="right")
    for run in (result.keras, result.torch):
        table.add_row(run.name, f"{run.rho:g}", f"{run.epsilon:.0e}", f"{run.accuracy:.2%}", f"{run.step_us:.0f} µs")
    Console().print(table)
    path = (
        f"fused kernel ({kernels.cpu_capability()})"
        if kernels.is_loaded
        else "single-tensor operations (no compiled library)"
    )
    print(f"AdadeltaKeras: {path}. torch {torch.__version__}, threads: {result.threads}.")


def main(arguments: Sequence[str] | None = None) -> Result:
    """Runs the example as the command line says, and returns what came of it."""
    parser = common.parser(
        "Train a small convolutional net on handwritten digits with AdadeltaKeras and, beside it, "
        "torch.optim.Adadelta.",
        epochs=20,
        batch_size=32,
    )
    parser.add_argument("--learning-rate", type=float, default=1.0, help="of both optimizers")
    parser.add_argument("--output", type=common.picture, default="output/train_digits.png", help="the picture to write")
    options = parser.parse_args(arguments)

    result = train(options.epochs, options.batch_size, options.learning_rate, options.seed)
    report(result)
    plot(result, options.learning_rate, options.output)
    return result


if __name__ == "__main__":
    accuracy = main().keras.accuracy
    if accuracy < REQUIRED_ACCURACY:
        sys.exit(
            f"AdadeltaKeras reached a test accuracy of {accuracy:.2%}, below the {REQUIRED_ACCURACY:.0%} required. "
            "With other options than the defaults, more epochs may help."
        )
