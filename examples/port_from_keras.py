"""Trains one small net twice, with tf_keras and with PyTorch, and shows that the numbers stay the same.

Both start from the weights that Keras drew, see the same batches of scikit-learn's handwritten digits, and use Adadelta
with a learning-rate schedule and `clipnorm`: `tf_keras.optimizers.legacy.Adadelta`, which is the class of TensorFlow
2.4, and an `AdadeltaKeras` made from its configuration. What differs is rounding alone: the frameworks sum a matrix
product in different orders, and TensorFlow approximates a reciprocal square root in float32. To tell rounding from a
difference in the formula, everything runs in float64 too. There the distance must shrink to the rounding noise of
float64; a difference in the formula would stay.

It prints both loss curves, the distances of losses, parameters and accumulators, and the accuracies. `--device` is that
of PyTorch; Keras trains on the CPU. Where torch_adadelta is installed with its extras "parity" and "examples", run it
with

    python examples/port_from_keras.py --plot output/port_from_keras.png
"""

import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import common
import numpy as np
import torch
from common import Array, Digits
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from torch_adadelta import AdadeltaKeras

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # must be set before TensorFlow is imported
import tensorflow as tf
import tf_keras

# The largest relative distance of two losses that passes for rounding noise: about thirty times what the defaults give
# in float32, and two thousand times in float64. An epsilon of 1e-6 instead of 1e-7 moves them by 7e-1, a rho that is
# not rounded to float32 by 2e-7, in both.
TOLERANCE: Final = {"float32": 1e-5, "float64": 1e-12}

_COLOURS: Final = {
    "tf_keras": common.BLUE,
    "PyTorch": common.RED,
    "float32": common.GREEN,
    "float64": common.PINK,
}


class Run(NamedTuple):
    """What came of one framework. Arrays are in the layout of Keras: kernel, bias, kernel, bias."""

    losses: list[float]  # of every batch
    weights: list[Array]
    accum_grad: list[Array]
    accum_var: list[Array]
    accuracy: float  # on the test images, in [0, 1]


class Comparison(NamedTuple):
    """Both frameworks in one dtype, and how far apart they are: relative distances."""

    keras: Run
    torch: Run
    losses: list[float]  # of every batch
    weights: float
    accum_grad: float
    accum_var: float


class Result(NamedTuple):
    """What came of both dtypes."""

    by_dtype: dict[str, Comparison]
    batches_per_epoch: int


class Setting(NamedTuple):
    """What both frameworks are given."""

    digits: Digits
    initial_weights: list[Array]
    batches: list[Array]  # indices of images, in the order of training
    learning_rate: float
    clipnorm: float


# ---- The two frameworks ---------------------------------------------------------------------------------------------


def build_keras_model(dtype: str) -> Any:
    """A net of 4810 parameters, with the initial weights of Keras: glorot_uniform and zeros."""
    return tf_keras.Sequential(
        [
            tf_keras.layers.Dense(64, activation="relu", input_shape=(64,), dtype=dtype),
            tf_keras.layers.Dense(10, dtype=dtype),
        ]
    )


def build_torch_model(dtype: str) -> nn.Module:
    """The same net in PyTorch."""
    torch_dtype = getattr(torch, dtype)
    return nn.Sequential(nn.Linear(64, 64, dtype=torch_dtype), nn.ReLU(), nn.Linear(64, 10, dtype=torch_dtype))


def transposed(arrays: Iterable[Array]) -> list[Array]:
    """Kernels from (in, out) to (out, in) or back; biases as they are."""
    return [array.T for array in arrays]


def build_keras_optimizer(setting: Setting) -> Any:
    """Adadelta as of TensorFlow 2.4. The learning rate falls to a tenth in a straight line."""
    schedule = tf_keras.optimizers.schedules.PolynomialDecay(
        setting.learning_rate, decay_steps=len(setting.batches), end_learning_rate=setting.learning_rate / 10
    )
    return tf_keras.optimizers.legacy.Adadelta(learning_rate=schedule, clipnorm=setting.clipnorm)


def train_keras(setting: Setting, dtype: str) -> Run:
    """A custom training loop of tf.keras."""
    images, labels = setting.digits.train_images, setting.digits.train_labels
    model = build_keras_model(dtype)
    model.set_weights(setting.initial_weights)
    optimizer = build_keras_optimizer(setting)
    loss_function = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def loss_and_gradients(images: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_function(labels, model(images, training=True))
        return loss, tape.gradient(loss, model.trainable_variables)

    losses = []
    for indices in track(setting.batches, f"tf_keras, {dtype}", transient=True):
        loss, gradients = loss_and_gradients(tf.constant(images[indices]), tf.constant(labels[indices]))
        # Outside tf.function: its graph optimiser turns the division in the schedule into a product, which rounds some
        # learning rates to the neighbouring float32 number. In float64 that would be the largest difference of all.
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        losses.append(float(loss))

    def slots(name: str) -> list[Array]:
        return [optimizer.get_slot(variable, name).numpy() for variable in model.trainable_variables]

    predicted = model(setting.digits.test_images).numpy().argmax(axis=1)
    accuracy = float((predicted == setting.digits.test_labels).mean())
    return Run(losses, model.get_weights(), slots("accum_grad"), slots("accum_var"), accuracy)


def train_torch(setting: Setting, dtype: str, device: torch.device) -> Run:
    """Its port."""
    images, labels, test_images, test_labels = (torch.from_numpy(array).to(device) for array in setting.digits)
    model = build_torch_model(dtype).to(device)
    params = list(model.parameters())
    with torch.no_grad():
        for param, array in zip(params, transposed(setting.initial_weights), strict=True):
            param.copy_(torch.from_numpy(array))
    # Without Keras at hand: AdadeltaKeras(params, torch_adadelta.schedules.PolynomialDecay(...), clipnorm=...)
    optimizer = AdadeltaKeras.from_config(build_keras_optimizer(setting).get_config(), params)

    losses = []
    for indices in track(setting.batches, f"PyTorch, {dtype}", transient=True):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[indices]), labels[indices])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    def slots(name: str) -> list[Array]:
        return transposed(optimizer.get_slot(param, name).cpu().numpy() for param in params)

    accuracy = common.accuracy(model, test_images, test_labels)
    weights = transposed(param.detach().cpu().numpy() for param in params)
    return Run(losses, weights, slots("accum_grad"), slots("accum_var"), accuracy)


# ---- Their distance -------------------------------------------------------------------------------------------------


def distance(ours: Sequence[Array], theirs: Sequence[Array]) -> float:
    """The norm of the difference of all arrays together, relative to the norm of theirs."""
    flat_ours, flat_theirs = (
        np.concatenate([a.ravel() for a in arrays]).astype("float64") for arrays in (ours, theirs)
    )
    return float(np.linalg.norm(flat_ours - flat_theirs) / np.linalg.norm(flat_theirs))


def compare(keras: Run, ours: Run) -> Comparison:
    """How far apart two runs are."""
    return Comparison(
        keras,
        ours,
        [abs(a - b) / b for a, b in zip(ours.losses, keras.losses, strict=True)],
        distance(ours.weights, keras.weights),
        distance(ours.accum_grad, keras.accum_grad),
        distance(ours.accum_var, keras.accum_var),
    )


def train(
    epochs: int,
    batch_size: int,
    learning_rate: float,
    clipnorm: float,
    seed: int,
    device: torch.device,
    dtypes: Sequence[str],
) -> Result:
    """Trains with both frameworks, in each dtype, from the same weights and with the same batches.

    The batches of an epoch have the same size, give or take one image. Keras trains on the CPU.
    """
    with common.one_thread():
        return _train(epochs, batch_size, learning_rate, clipnorm, seed, device, dtypes)


def _train(
    epochs: int,
    batch_size: int,
    learning_rate: float,
    clipnorm: float,
    seed: int,
    device: torch.device,
    dtypes: Sequence[str],
) -> Result:
    tf_keras.utils.set_random_seed(seed)
    initial_weights = build_keras_model("float32").get_weights()
    rng = np.random.default_rng(seed)
    count = len(common.load().train_labels)
    batches_per_epoch = -(-count // batch_size)
    batches = [indices for _ in range(epochs) for indices in np.array_split(rng.permutation(count), batches_per_epoch)]
    by_dtype = {}
    for dtype in dtypes:
        weights = [array.astype(dtype) for array in initial_weights]
        setting = Setting(common.load(dtype), weights, batches, learning_rate, clipnorm)
        by_dtype[dtype] = compare(train_keras(setting, dtype), train_torch(setting, dtype, device))
    return Result(by_dtype, batches_per_epoch)


# ---- Showing it -----------------------------------------------------------------------------------------------------


def report(result: Result) -> None:
    """Prints the loss curves of the first dtype, all distances, and the accuracies."""
    console, n = Console(), result.batches_per_epoch
    (name, first), comparisons = next(iter(result.by_dtype.items())), result.by_dtype.values()

    curves = Table(title=f"Mean training loss ({name}), and the largest relative distance of a batch")
    for heading in ("epoch", "tf_keras", "PyTorch", *(f"distance, {dtype}" for dtype in result.by_dtype)):
        curves.add_column(heading, justify="right")
    all_means = [common.epoch_means(run.losses, n) for run in (first.keras, first.torch)]
    for epoch, means in enumerate(zip(*all_means, strict=True)):
        largest = (max(comparison.losses[epoch * n : (epoch + 1) * n]) for comparison in comparisons)
        curves.add_row(str(epoch + 1), *(f"{mean:.9f}" for mean in means), *(f"{d:.1e}" for d in largest))
    console.print(curves)

    distances = Table(title="Relative distances after the last step")
    distances.add_column("PyTorch from tf_keras")
    for heading in result.by_dtype:
        distances.add_column(heading, justify="right")
    for label, field in (
        ("parameters", "weights"),
        ("square_avg = accum_grad", "accum_grad"),
        ("acc_delta = accum_var", "accum_var"),
    ):
        distances.add_row(label, *(f"{getattr(comparison, field):.1e}" for comparison in comparisons))
    console.print(distances)
    print(
        "Expected is rounding noise: a few times 6e-08 in float32, a few times 1e-16 in float64. A difference in the\n"
        "formula would be about as large in float64 as in float32."
    )
    for dtype, comparison in result.by_dtype.items():
        print(
            f"Test accuracy, {dtype}: tf_keras {comparison.keras.accuracy:.2%}, PyTorch {comparison.torch.accuracy:.2%}"
        )


def plot(result: Result, path: Path) -> None:
    """Draws the loss of every batch in both frameworks, and below it their relative distance."""
    n = result.batches_per_epoch
    figure = common.new_figure(9, 7)
    above, below = figure.subplots(2, sharex=True)
    name, first = next(iter(result.by_dtype.items()))
    epochs = [(i + 0.5) / n for i in range(len(first.losses))]
    above.plot(epochs, first.keras.losses, color=_COLOURS["tf_keras"], linewidth=3, alpha=0.5, label="tf_keras")
    above.plot(epochs, first.torch.losses, color=_COLOURS["PyTorch"], linewidth=0.8, label="PyTorch, AdadeltaKeras")
    above.set_ylabel(f"training loss of a batch ({name})")
    above.set_title("The same training in tf_keras and PyTorch: same weights, batches, schedule and clipnorm")
    for dtype, comparison in result.by_dtype.items():
        # A logarithmic axis has no place for losses that agree in every bit: nan leaves them out.
        distances = [d if d > 0 else math.nan for d in comparison.losses]
        below.plot(epochs, distances, ".", markersize=4, color=_COLOURS[dtype], label=dtype)
        unit = np.finfo(dtype).eps / 2
        below.axhline(unit, color=_COLOURS[dtype], linestyle=":", label=f"rounding unit of {dtype}, {unit:.0e}")
    below.set_yscale("log")
    below.set_ylabel("relative distance of the losses")
    common.count_epochs(below, len(first.losses) / n)
    for axes in (above, below):
        axes.legend(loc="best")
    common.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> Result:
    """Runs the example as the command line says, and returns what came of it."""
    parser = common.parser(
        "Train a small net on handwritten digits with tf_keras and with PyTorch, and measure how far the numbers are "
        "apart.",
        epochs=5,
        batch_size=32,
    )
    common.add_device(
        parser,
        ("float32", "float64"),
        why="in 16 bits Keras rounds after every operation, and the port after every step",
        of="the curves; distances are those of float64 too",
    )
    parser.add_argument(
        "--learning-rate", type=float, default=1.0, help="of the first step; the last has a tenth of it"
    )
    parser.add_argument("--clipnorm", type=float, default=0.5, help="the largest norm of each gradient")
    parser.add_argument("--plot", type=common.picture, metavar="PNG", help="draw the loss curves and their distance")
    options = parser.parse_args(arguments)

    dtypes = ("float32", "float64") if options.dtype is torch.float32 else ("float64",)
    settings = (options.epochs, options.batch_size, options.learning_rate, options.clipnorm, options.seed)
    result = train(*settings, options.device, dtypes)
    report(result)
    if options.plot is not None:
        plot(result, options.plot)
    return result


if __name__ == "__main__":
    for dtype, comparison in main().by_dtype.items():
        if max(comparison.losses) > TOLERANCE[dtype]:
            sys.exit(
                f"In {dtype} the losses are up to {max(comparison.losses):.1e} apart, above {TOLERANCE[dtype]:.0e}. "
                "With other options than the defaults, rounding noise may grow that far; else something differs."
            )
