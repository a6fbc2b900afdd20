"""Trains a Keras model on handwritten digits with `torch_adadelta.keras3.Adadelta`, beside Keras' own Adadelta.

Both models start from the same weights and see the same batches, so that their losses agree but for rounding; what
differs is the time that `fit` spends in the optimizer. Then the model is saved, loaded, and trained on: the loaded one
goes on with the same bits.

It prints losses, accuracies and times. Where torch_adadelta is installed with its extras "keras3" and "examples", run
it with

    python examples/train_keras3.py
"""

import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

os.environ["KERAS_BACKEND"] = "torch"  # must be set before Keras is imported

import common
import keras
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from torch_adadelta import keras3

# The largest relative distance of the losses of two epochs that passes for rounding noise, many times what it is.
TOLERANCE: Final = 1e-3


class Run(NamedTuple):
    """What came of one optimizer."""

    name: str
    losses: list[float]  # of every epoch
    accuracy: float  # on the test images, in [0, 1]
    apply_us: float  # the median time in the optimizer of a train step, in microseconds


class Result(NamedTuple):
    """What came of both optimizers, and of the model that was saved."""

    ours: Run
    keras: Run
    resumed: list[float]  # the losses of the epochs after loading
    expected: list[float]  # those of the model that was saved


class _Timer(keras.callbacks.Callback):
    """Times the calls of the optimizer."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.ns: list[int] = []

    def on_train_begin(self, logs: Any = None) -> None:
        apply = self.model.optimizer.apply

        def timed(*arguments: Any) -> None:
            common.synchronize(self.device)
            start = time.perf_counter_ns()
            apply(*arguments)
            common.synchronize(self.device)
            self.ns.append(time.perf_counter_ns() - start)

        self.model.optimizer.apply = timed

    def on_train_end(self, logs: Any = None) -> None:
        del self.model.optimizer.apply  # the method is there again


def build_model(optimizer: Any, seed: int) -> Any:
    """A net of dense layers for 64 pixels, compiled with an optimizer."""
    keras.utils.set_random_seed(seed)
    hidden = [keras.layers.Dense(64, activation="relu") for _ in range(3)]
    model = keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"], jit_compile=False)
    return model


def fit(model: Any, epochs: int, batch_size: int, seed: int, timer: _Timer | None = None) -> list[float]:
    """Trains for some epochs, in an order that the seed gives; returns the loss of each."""
    digits = common.load(keras.config.floatx())
    rng = np.random.default_rng(seed)
    losses = []
    for _ in range(epochs):
        order = rng.permutation(len(digits.train_labels))
        history = model.fit(
            digits.train_images[order],
            digits.train_labels[order],
            batch_size=batch_size,
            shuffle=False,
            verbose=0,
            callbacks=[timer] if timer is not None else None,
        )
        losses += history.history["loss"]
    return losses


def train(epochs: int, batch_size: int, learning_rate: float, seed: int, device: torch.device) -> Result:
    """Trains with both optimizers, then saves, loads and trains on."""
    with common.one_thread(), keras.device(str(device)):
        digits = common.load(keras.config.floatx())
        runs, models = [], []
        for name, cls in (
            ("torch_adadelta.keras3.Adadelta", keras3.Adadelta),
            ("keras.optimizers.Adadelta", keras.optimizers.Adadelta),
        ):
            model, timer = build_model(cls(learning_rate), seed), _Timer(device)
            losses = fit(model, epochs, batch_size, seed, timer)
            accuracy = model.evaluate(digits.test_images, digits.test_labels, verbose=0)[1]
            runs.append(Run(name, losses, accuracy, statistics.median(timer.ns) / 1000))
            models.append(model)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.keras"
            models[0].save(path)
            loaded = keras.saving.load_model(path)  # the class is registered: importing it is enough
        resumed, expected = (fit(model, 2, batch_size, seed + 1) for model in (loaded, models[0]))
        ours, theirs = runs
        return Result(ours, theirs, resumed, expected)


def distance(result: Result) -> float:
    """The largest relative distance of two losses: ours from Keras'."""
    pairs = zip(result.ours.losses, result.keras.losses, strict=True)
    return max(math.inf if math.isnan(a) else abs(a - b) / b for a, b in pairs)


def report(result: Result) -> None:
    """Prints what came of it."""
    table = Table()
    table.add_column("optimizer", no_wrap=True)
    for heading in ("first loss", "last loss", "accuracy", "optimizer"):
        table.add_column(heading, justify="right")
    for run in (result.ours, result.keras):
        figures = (f"{run.losses[0]:.7f}", f"{run.losses[-1]:.7f}", f"{run.accuracy:.2%}", f"{run.apply_us:.0f} µs")
        table.add_row(run.name, *figures)
    Console().print(table)
    print(f"Largest relative distance of the losses of an epoch: {distance(result):.1e}")
    bits = "the same bits as" if result.resumed == result.expected else "other numbers than"
    print(f"Saved, loaded and trained on: {bits} without ({result.resumed[-1]:.7f})")


def main(arguments: Sequence[str] | None = None) -> Result:
    """Runs the example as the command line says, and returns what came of it."""
    parser = common.parser(
        "Train a Keras model on handwritten digits with the fused Adadelta, beside Keras' own.",
        epochs=10,
        batch_size=32,
    )
    common.add_device(
        parser,
        ("float32", "float64"),
        why="in 16 bits Keras rounds after every operation, and the fused update after every step",
        of="both models",
    )
    parser.add_argument("--learning-rate", type=float, default=1.0, help="of both optimizers")
    options = parser.parse_args(arguments)
    keras.config.set_floatx(common.name_of(options.dtype))
    result = train(options.epochs, options.batch_size, options.learning_rate, options.seed, options.device)
    report(result)
    return result


if __name__ == "__main__":
    found = main()
    if distance(found) > TOLERANCE or found.resumed != found.expected:
        sys.exit("The numbers are not those of Keras. With many more epochs, rounding noise may grow that far.")
