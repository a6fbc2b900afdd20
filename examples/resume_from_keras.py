"""Trains a small net in Keras, stops, and goes on in PyTorch where Keras left off: one loss curve with a hand-over.

A convolutional net learns scikit-learn's handwritten digits in Keras 3, with Adadelta and a falling learning rate.
After half of the epochs the job is saved to one .h5 file, as ``model.save`` writes it. PyTorch takes over what is in it
(the weights, both accumulators of the optimizer, the number of steps and the schedule) and finishes the job. To see
what a perfect hand-over looks like, Keras finishes it too; and to see what the state is worth, PyTorch also finishes it
with the weights alone, as one would without torch_adadelta.keras.

It prints where each weight went, and the losses of all three, and draws them. `--device` is that of PyTorch. Where
torch_adadelta is installed with its extras "keras", "parity" and "examples", run it with

    python examples/resume_from_keras.py --plot output/resume_from_keras.png
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import common
import numpy as np
import torch
from common import Array, Digits, epoch_means
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from torch_adadelta import AdadeltaKeras
from torch_adadelta.keras import Report, load_keras

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # must be set before TensorFlow is imported
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
import keras
import tensorflow as tf

# The largest relative distance of two epochs' mean losses that passes for the same training: the defaults give 1.4e-7,
# and without the state 2.6e-2.
TOLERANCE: Final = 1e-5

_COLOURS: Final = {"Keras": common.BLUE, "PyTorch": common.RED, "PyTorch, weights only": common.GREY}


class Result(NamedTuple):
    """The losses of every batch, the accuracies on the test images, and what was handed over."""

    before: list[float]  # in Keras, up to the hand-over
    after: dict[str, list[float]]  # by who went on
    accuracies: dict[str, float]
    report: Report
    batches_per_epoch: int


def load() -> Digits:
    """The digits, as images of shape (n, 8, 8, 1) as Keras has them."""
    digits = common.load(keras.config.floatx())
    return digits._replace(
        train_images=digits.train_images.reshape(-1, 8, 8, 1), test_images=digits.test_images.reshape(-1, 8, 8, 1)
    )


def build_keras_model(learning_rate: float, steps: int) -> Any:
    """A convolutional net, compiled with Adadelta. The learning rate falls to a tenth in a straight line."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    schedule = keras.optimizers.schedules.PolynomialDecay(learning_rate, steps, learning_rate / 10)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adadelta(schedule), loss=loss)
    return model


def build_torch_model() -> nn.Module:
    """The same net. Its flatten has the channels first, so the Dense kernel behind it must be permuted too."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def train_keras(model: Any, digits: Digits, batches: list[Array]) -> list[float]:
    """A custom training loop of Keras; returns the loss of every batch."""

    @tf.function
    def step(images: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = model.loss(labels, model(images, training=True))
        variables = model.trainable_variables
        model.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    images, labels = digits.train_images, digits.train_labels
    return [
        float(step(tf.constant(images[indices]), tf.constant(labels[indices])))
        for indices in track(batches, "Keras", transient=True)
    ]


def as_tensors(digits: Digits, model: nn.Module) -> Digits:
    """The digits where the model is, as images of shape (n, 1, 8, 8) as PyTorch has them."""
    device = next(model.parameters()).device
    train_images, train_labels, test_images, test_labels = (torch.from_numpy(array).to(device) for array in digits)
    return Digits(train_images.permute(0, 3, 1, 2), train_labels, test_images.permute(0, 3, 1, 2), test_labels)


def train_torch(model: nn.Module, optimizer: AdadeltaKeras, digits: Digits, batches: list[Array]) -> list[float]:
    """The same loop in PyTorch."""
    images, labels, _, _ = as_tensors(digits, model)
    losses = []
    for indices in track(batches, "PyTorch", transient=True):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[indices]), labels[indices])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def resume(path: Path, with_state: bool, device: torch.device) -> tuple[nn.Module, AdadeltaKeras, Report]:
    """The job in a file of Keras, in PyTorch: a model and an optimizer to go on with."""
    model = build_torch_model().to(device, getattr(torch, keras.config.floatx()))
    optimizer = AdadeltaKeras(model.named_parameters())
    report = load_keras(path, optimizer, model, weights=True)
    if not with_state:
        optimizer.state.clear()
    return model, optimizer, report


def accuracy(model: nn.Module, digits: Digits) -> float:
    """The share of the test images that the model tells right."""
    _, _, images, labels = as_tensors(digits, model)
    return common.accuracy(model, images, labels)


def train(epochs: int, batch_size: int, learning_rate: float, seed: int, device: torch.device) -> Result:
    """Trains half of the epochs in Keras, and the rest three times."""
    keras.utils.set_random_seed(seed)
    digits = load()
    rng = np.random.default_rng(seed)
    count = len(digits.train_labels)
    per_epoch = -(-count // batch_size)
    batches = [indices for _ in range(epochs) for indices in np.array_split(rng.permutation(count), per_epoch)]
    first, second = batches[: epochs // 2 * per_epoch], batches[epochs // 2 * per_epoch :]

    model = build_keras_model(learning_rate, len(batches))
    before = train_keras(model, digits, first)
    after: dict[str, list[float]] = {}
    accuracies: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "job.h5"
        model.save(str(path))
        for name, with_state in (("PyTorch", True), ("PyTorch, weights only", False)):
            torch_model, optimizer, report = resume(path, with_state, device)
            after[name] = train_torch(torch_model, optimizer, digits, second)
            accuracies[name] = accuracy(torch_model, digits)
    after = {"Keras": train_keras(model, digits, second), **after}
    predicted = model(digits.test_images).numpy().argmax(axis=1)
    accuracies = {"Keras": float((predicted == digits.test_labels).mean()), **accuracies}
    return Result(before, after, accuracies, report, per_epoch)


def distance(result: Result, name: str) -> float:
    """The largest relative distance from Keras of an epoch's mean loss."""
    ours, theirs = (epoch_means(result.after[who], result.batches_per_epoch) for who in (name, "Keras"))
    return max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))


# ---- Showing it -----------------------------------------------------------------------------------------------------


def show(result: Result) -> None:
    """Prints what was handed over, and the losses after it."""
    console = Console()
    print(result.report)
    table = Table(title="Mean training loss after the hand-over")
    table.add_column("epoch", justify="right")
    for name in result.after:
        table.add_column(name, justify="right")
    first = len(result.before) // result.batches_per_epoch
    columns = [epoch_means(losses, result.batches_per_epoch) for losses in result.after.values()]
    for number, row in enumerate(zip(*columns, strict=True), first + 1):
        table.add_row(str(number), *(f"{loss:.7f}" for loss in row))
    table.add_row("test accuracy", *(f"{value:.2%}" for value in result.accuracies.values()))
    console.print(table)
    for name in ("PyTorch", "PyTorch, weights only"):
        print(f"Largest relative distance from Keras: {distance(result, name):.1e} ({name})")


def plot(result: Result, path: Path) -> None:
    """Draws the mean loss of each epoch, with the hand-over marked."""
    per_epoch = result.batches_per_epoch
    figure = common.new_figure(8, 5)
    axes = figure.subplots()
    before = epoch_means(result.before, per_epoch)
    start = len(before)
    axes.plot(range(1, start + 1), before, "o-", color=_COLOURS["Keras"], linewidth=3, alpha=0.6)
    for name, losses in result.after.items():
        means = [before[-1], *epoch_means(losses, per_epoch)]
        styles: dict[str, dict[str, Any]] = {"Keras": {"linewidth": 3, "alpha": 0.6}, "PyTorch": {"linewidth": 1}}
        style: dict[str, Any] = {"marker": "o", "markersize": 4} | styles.get(name, {"linestyle": "--"})
        axes.plot(range(start, start + len(means)), means, color=_COLOURS[name], label=name, **style)
    axes.axvline(start, color="black", linestyle=":")
    axes.annotate("hand-over", (start, before[0]), textcoords="offset points", xytext=(6, -4))
    axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel("mean training loss")
    axes.set_title("A training job that moves from Keras to PyTorch")
    axes.legend(loc="best")
    common.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> Result:
    """Runs the example as the command line says, and returns what came of it."""
    parser = common.parser(
        "Start a training job in Keras, for half of the epochs, and finish it in PyTorch.",
        epochs=10,
        batch_size=32,
        least_epochs=2,
    )
    common.add_device(
        parser,
        ("float32", "float64"),
        why="in 16 bits Keras rounds after every operation, and PyTorch after every step",
        of="both models",
    )
    parser.add_argument(
        "--learning-rate", type=float, default=1.0, help="of the first step; the last has a tenth of it"
    )
    parser.add_argument("--plot", type=common.picture, metavar="PNG", help="draw the losses there")
    options = parser.parse_args(arguments)
    keras.config.set_floatx(common.name_of(options.dtype))
    with common.no_tf32():
        result = train(options.epochs, options.batch_size, options.learning_rate, options.seed, options.device)
    show(result)
    if options.plot is not None:
        plot(result, options.plot)
    if distance(result, "PyTorch") > TOLERANCE:
        sys.exit(f"PyTorch did not go on as Keras did: {distance(result, 'PyTorch'):.1e} > {TOLERANCE:.0e}")
    return result


if __name__ == "__main__":
    main()
