"""Repeats a training of Keras in PyTorch: the same net, weights and batches, and so the same losses.

`examples/data/keras_run.json` holds the losses of `tf.keras.optimizers.Adadelta` of TensorFlow 2.4 on a small
convolutional net for handwritten digits; `record_keras_run.py` beside it made them. Here `AdadeltaKeras` and
`torch.optim.Adadelta` train the same net from the same weights, on the same batches, with the same learning rate, rho
and epsilon. All three compute one formula, so in float32 their losses differ by rounding alone. `--dtype float64` tells
them apart: Keras rounds rho to float32 whatever the dtype, AdadeltaKeras does too, and torch.optim.Adadelta does not.
TensorFlow is not needed. The digits are the 1797 images of 8x8 pixels that come with scikit-learn, so nothing is
downloaded.

It prints how far the losses are from those of Keras, the test accuracy and the time of an optimizer step, and draws the
loss curves to output/train_digits.png. Run it with `make demo` or, where torch_adadelta is installed with its extra
"examples", with

    python examples/train_digits.py
"""

import argparse
import hashlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import common
import numpy as np
import torch
from common import Array
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_adadelta import AdadeltaKeras
from torch_adadelta.backends import kernels

RECORDED: Final = Path(__file__).resolve().parent / "data" / "keras_run.json"

# The largest relative distance from Keras of an epoch's mean loss that passes for rounding noise. The defaults gave
# 5e-7 and 9e-16; the convolutions of another machine may add to it.
TOLERANCE: Final = {"float32": 1e-4, "float64": 1e-10}

# What the recorded run had, and all runs here have.
EPOCHS: Final = 20
BATCH_SIZE: Final = 32
SEED: Final = 0
LEARNING_RATE: Final = 1.0
RHO: Final = 0.95
EPSILON: Final = 1e-7

OPTIMIZERS: Final[dict[str, Callable[[Any], Optimizer]]] = {
    "AdadeltaKeras": lambda params: AdadeltaKeras(params, LEARNING_RATE, RHO, EPSILON),
    "torch.optim.Adadelta": lambda params: torch.optim.Adadelta(params, LEARNING_RATE, RHO, EPSILON),
    "torch.optim.Adadelta, foreach": lambda params: torch.optim.Adadelta(
        params, LEARNING_RATE, RHO, EPSILON, foreach=True
    ),
}


class Run(NamedTuple):
    """What came of one optimizer."""

    losses: list[float]  # the training loss of every batch
    accuracy: float  # on the test images, in [0, 1]; nan where it is that of another number of epochs
    step_us: float  # the median time in step(), in microseconds; nan where it was not measured


class Result(NamedTuple):
    """What came of all, by the names of `OPTIMIZERS`."""

    keras: Run
    ours: dict[str, Run]
    batches_per_epoch: int
    versions: dict[str, str]  # of what recorded the run of Keras


# ---- What the recorded run and those here have in common ------------------------------------------------------------


class Setting(NamedTuple):
    """The net's initial weights, in the layout of PyTorch, and the indices of the images of each batch."""

    weights: list[Array]
    batches: list[Array]
    batches_per_epoch: int


def setting(count: int) -> Setting:
    """Draws both from the raw bits of PCG64, which no version of NumPy changes."""
    bits = np.random.PCG64(SEED)
    weights = []
    for param in common.convolutional_net().parameters():
        if param.dim() == 1:
            weights.append(np.zeros(len(param), np.float32))
            continue
        # As Keras draws them: uniformly within the limit of Glorot and Bengio.
        receptive_field = math.prod(param.shape[2:])
        limit = math.sqrt(6 / (receptive_field * (param.shape[0] + param.shape[1])))
        uniform = (bits.random_raw(param.numel()) >> np.uint64(40)) * 2.0**-23 - 1
        weights.append((limit * uniform).astype(np.float32).reshape(param.shape))
    batches_per_epoch = math.ceil(count / BATCH_SIZE)
    batches = [
        indices
        for _ in range(EPOCHS)
        # Not in batches of 32: a remainder of a few images would make a noisy last one.
        for indices in np.array_split(bits.random_raw(count).argsort(), batches_per_epoch)
    ]
    return Setting(weights, batches, batches_per_epoch)


def fingerprint(digits: common.Digits, common_setting: Setting) -> str:
    """The SHA-256 of images, labels, weights and batches: a recorded run is for these and no others."""
    result = hashlib.sha256()
    for array in (*digits, *common_setting.weights, *common_setting.batches):
        result.update(np.ascontiguousarray(array).tobytes())
    return result.hexdigest()


def recorded(dtype: str) -> tuple[Run, dict[str, str], str]:
    """The run of Keras in a dtype, what recorded it, and the fingerprint."""
    file = json.loads(RECORDED.read_text())
    return Run(file["losses"][dtype], file["accuracy"][dtype], math.nan), file["versions"], file["sha256"]


# ---- Training -------------------------------------------------------------------------------------------------------


class _Trainee:
    """A model with its optimizer, and what has been measured of them."""

    def __init__(self, make: Callable[[Any], Optimizer], weights: list[Array], digits: common.Digits) -> None:
        self.digits = digits
        self.model = common.convolutional_net().to(digits.train_images)
        with torch.no_grad():
            for param, array in zip(self.model.parameters(), weights, strict=True):
                param.copy_(torch.from_numpy(array))
        self.optimizer = make(self.model.parameters())
        self.losses: list[float] = []
        self.step_ns: list[int] = []

    def train_batch(self, indices: Tensor) -> None:
        images, labels = self.digits.train_images[indices], self.digits.train_labels[indices]
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()
        common.synchronize(images.device)
        start = time.perf_counter_ns()
        self.optimizer.step()
        common.synchronize(images.device)
        self.step_ns.append(time.perf_counter_ns() - start)
        self.losses.append(loss.item())

    def run(self) -> Run:
        accuracy = common.accuracy(self.model, self.digits.test_images, self.digits.test_labels)
        return Run(self.losses, accuracy, statistics.median(self.step_ns) / 1000)


def train(epochs: int, device: torch.device, dtype: torch.dtype) -> Result:
    """Trains with each optimizer, epoch by epoch in turn, and tests the models."""
    with common.one_thread():
        return _train(epochs, device, dtype)


def _train(epochs: int, device: torch.device, dtype: torch.dtype) -> Result:
    arrays = common.load()
    shared = setting(len(arrays.train_labels))
    keras, versions, sha256 = recorded(common.name_of(dtype))
    if fingerprint(arrays, shared) != sha256:
        sys.exit(
            f"{RECORDED.name} was recorded with other images, weights or batches than those here. Record it anew with "
            "data/record_keras_run.py, which needs the extra 'parity', or install the versions that it names"
        )
    digits = common.load_tensors(device, dtype, (1, 8, 8))
    trainees = {name: _Trainee(make, shared.weights, digits) for name, make in OPTIMIZERS.items()}
    if epochs < EPOCHS:
        keras = Run(keras.losses[: epochs * shared.batches_per_epoch], math.nan, math.nan)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        for epoch in progress.track(range(epochs), description="epochs"):
            batches = shared.batches[epoch * shared.batches_per_epoch : (epoch + 1) * shared.batches_per_epoch]
            for trainee in trainees.values():
                for indices in batches:
                    trainee.train_batch(torch.from_numpy(indices).to(device))
    ours = {name: trainee.run() for name, trainee in trainees.items()}
    return Result(keras, ours, shared.batches_per_epoch, versions)


def distances(ours: Run, result: Result) -> list[float]:
    """The relative distances of the epochs' mean losses from those of Keras."""
    pairs = zip(
        *(common.epoch_means(run.losses, result.batches_per_epoch) for run in (ours, result.keras)), strict=True
    )
    return [math.inf if math.isnan(a) else abs(a - b) / b for a, b in pairs]


# ---- Showing it -----------------------------------------------------------------------------------------------------


def report(result: Result) -> None:
    """Prints all runs side by side, and what follows."""
    table = Table(
        title=f"The same weights and batches, learning rate {LEARNING_RATE:g}, rho {RHO:g}, epsilon {EPSILON:g}"
    )
    table.add_column("optimizer", no_wrap=True)
    for heading in ("losses, from Keras'", "test accuracy", "median step()"):
        table.add_column(heading, justify="right")
    accuracy = "" if math.isnan(result.keras.accuracy) else f"{result.keras.accuracy:.2%}"
    table.add_row("Keras, recorded", "", accuracy, "")
    for name, run in result.ours.items():
        table.add_row(name, f"{max(distances(run, result)):.1e}", f"{run.accuracy:.2%}", f"{run.step_us:.0f} µs")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    ours, default, foreach = result.ours.values()
    near, far = (f"{max(distances(run, result)):.0e}" for run in (ours, default))
    times, times_foreach = (f"{run.step_us / ours.step_us:.1f}" for run in (default, foreach))
    print(
        f"The mean loss of an epoch differs from that of Keras by at most {near} of it with AdadeltaKeras,\n"
        f"and by {far} with torch.optim.Adadelta. A step of AdadeltaKeras is {times} times as fast as one of\n"
        f"torch.optim.Adadelta with its defaults, and {times_foreach} times as fast as one with foreach=True.\n"
        f"Keras was recorded with {', '.join(f'{name} {version}' for name, version in result.versions.items())}."
    )


def plot(result: Result, dtype: str, path: Path) -> None:
    """Draws the mean loss of each epoch, one curve on the other, and below how far they are from that of Keras."""
    figure = common.new_figure(9, 7)
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    keras = common.epoch_means(result.keras.losses, result.batches_per_epoch)
    epochs = [epoch + 0.5 for epoch in range(len(keras))]
    above.plot(epochs, keras, color=common.GREY, linewidth=7, alpha=0.5, label="Keras, recorded")
    styles: tuple[dict[str, Any], ...] = (
        {"color": common.BLUE, "linewidth": 1.2},
        {"color": common.RED, "linewidth": 3, "linestyle": ":"},
    )
    for (name, run), style in zip(result.ours.items(), styles, strict=False):
        means = common.epoch_means(run.losses, result.batches_per_epoch)
        label = f"{name}: step {run.step_us:.0f} µs, test accuracy {run.accuracy:.1%}"
        above.plot(epochs, means, label=label, **style)
        # A logarithmic axis has no place for losses that agree in every bit: nan leaves them out.
        below.plot(epochs, [d or math.nan for d in distances(run, result)], marker="o", markersize=4, **style)
    above.set_yscale("log")
    above.set_ylabel(f"mean training loss ({dtype})")
    above.set_title("Handwritten digits: the same net, weights, batches and hyperparameters")
    above.legend()
    below.set_yscale("log")
    below.set_ylabel("relative distance from Keras")
    common.count_epochs(below, len(keras))
    common.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> Result:
    """Runs the example as the command line says, and returns what came of it."""
    parser = argparse.ArgumentParser(
        description="Repeat a recorded training of Keras with AdadeltaKeras and, beside it, torch.optim.Adadelta.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def at_most_recorded(text: str) -> int:
        value = common.at_least(1)(text)
        if value > EPOCHS:
            raise argparse.ArgumentTypeError(f"must be at most {EPOCHS}, which are recorded, got {value}")
        return value

    parser.add_argument("--epochs", type=at_most_recorded, default=EPOCHS, help="passes over the images")
    common.add_device(
        parser,
        ("float32", "float64"),
        why="Keras was recorded in float32 and in float64",
        of="the net, and of the run of Keras",
    )
    parser.add_argument("--output", type=common.picture, default="output/train_digits.png", help="the picture to write")
    options = parser.parse_args(arguments)

    with common.no_tf32():
        result = train(options.epochs, options.device, options.dtype)
    dtype = common.name_of(options.dtype)
    report(result)
    path = f"fused kernel ({kernels.cpu_capability()})" if kernels.is_loaded else "no compiled library"
    print(f"torch {torch.__version__}, {options.device}, {dtype}, one thread; AdadeltaKeras: {path}.")
    plot(result, dtype, options.output)
    largest = max(distances(result.ours["AdadeltaKeras"], result))
    if largest > TOLERANCE[dtype]:
        sys.exit(f"The losses of AdadeltaKeras are {largest:.0e} from those of Keras, above {TOLERANCE[dtype]:.0e}")
    return result


if __name__ == "__main__":
    main()
