"""Trains a small net on handwritten digits in float32, in bfloat16, and in bfloat16 with float32 masters.

All start from the same weights and see the same batches. At this learning rate a step changes most weights by less than
half the distance between two bfloat16 numbers. Rounded to bfloat16, such a change is lost, and the training stalls.
With `master_weights=True` the optimizer keeps what the weights lack of their float32 masters, and the training goes on
as in float32. It prints the loss over all training images, which are those of scikit-learn: nothing is downloaded. Run
it, where torch_adadelta is installed with its extra "examples", with

    python examples/train_bfloat16.py [--device cuda]
"""

import sys
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import common
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from torch_adadelta import AdadeltaKeras, to_bfloat16


class Way(NamedTuple):
    """A dtype of the model, and the optimizer's options that go with it."""

    dtype: torch.dtype
    options: dict[str, Any]


WAYS: Final = {
    "float32": Way(torch.float32, {}),
    "bfloat16": Way(torch.bfloat16, {}),
    "bfloat16, masters": Way(torch.bfloat16, {"master_weights": True, "state_dtype": torch.bfloat16}),
    "bfloat16, masters, float32 state": Way(torch.bfloat16, {"master_weights": True, "state_dtype": torch.float32}),
}

_CPU: Final = torch.device("cpu")


class Result(NamedTuple):
    """What came of one training."""

    losses: list[float]  # over all training images: before the first epoch, and after each
    accuracy: float  # on the test images, in [0, 1]


def build_model() -> nn.Sequential:
    """A net with one hidden layer, of 4810 parameters."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def train(
    way: Way,
    epochs: int = 40,
    batch_size: int = 32,
    learning_rate: float = 0.1,
    seed: int = 0,
    device: torch.device = _CPU,
) -> Result:
    """Trains one net, on one thread. The seed determines its first weights and the batches, whatever the way."""
    images, labels, test_images, test_labels = common.load_tensors(device, way.dtype)
    with common.one_thread():
        torch.manual_seed(seed)
        model = build_model().to(device)
        has_masters = "master_weights" in way.options
        if not has_masters:
            model.to(way.dtype)
        optimizer = AdadeltaKeras(model.parameters(), learning_rate=learning_rate, **way.options)
        if has_masters:
            to_bfloat16(model, optimizer)  # whose masters are the float32 weights, bit by bit

        @torch.no_grad()
        def loss_of_all() -> float:
            return nn.functional.cross_entropy(model(images).float(), labels).item()

        losses = [loss_of_all()]
        for _ in range(epochs):
            for indices in torch.randperm(len(labels)).to(device).split(batch_size):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[indices]).float(), labels[indices]).backward()
                optimizer.step()
            losses.append(loss_of_all())
        return Result(losses, common.accuracy(model, test_images, test_labels))


def report(results: dict[str, Result]) -> None:
    """Prints the losses side by side."""
    epochs = len(results["bfloat16"].losses) - 1
    shown = sorted({0, epochs // 4, epochs // 2, epochs})
    table = Table()
    table.add_column("training in", no_wrap=True)
    for epoch in shown:
        table.add_column(f"loss after\n{epoch} epochs", justify="right")
    table.add_column("test accuracy", justify="right")
    for name, result in results.items():
        table.add_row(name, *(f"{result.losses[epoch]:.4f}" for epoch in shown), f"{result.accuracy:.1%}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main(arguments: Sequence[str] | None = None) -> dict[str, Result]:
    """Runs the example as the command line says, and returns what came of it, by the names of the ways."""
    parser = common.parser(
        "Train a small net on handwritten digits in float32, and in bfloat16 with and without float32 masters.",
        epochs=40,
        batch_size=32,
    )
    common.add_device(
        parser,
        ("float32", "float64"),
        why="the example trains in bfloat16 anyway, and float16 has no masters",
        of="the training that bfloat16 is compared with",
    )
    parser.add_argument("--learning-rate", type=float, default=0.1)
    options = parser.parse_args(arguments)
    ways = {common.name_of(options.dtype): Way(options.dtype, {})} | {
        key: way for key, way in WAYS.items() if key != "float32"
    }
    results = {
        name: train(way, options.epochs, options.batch_size, options.learning_rate, options.seed, options.device)
        for name, way in ways.items()
    }
    report(results)
    return results


if __name__ == "__main__":
    main()
