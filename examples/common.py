"""What the examples share, not one itself: handwritten digits, options of the command line, how pictures look."""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

# Distinct to the colour-blind (Okabe and Ito).
BLUE: Final = "#0072B2"
RED: Final = "#D55E00"
GREEN: Final = "#009E73"
PINK: Final = "#CC79A7"
GREY: Final = "#999999"

# What is kept for testing, which no option changes: all seeds are measured on the same data.
SPLIT_SEED: Final = 0

Array = NDArray[Any]


# ---- Data -----------------------------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """Images of shape (n, 64) with values in [0, 1], and their labels of shape (n,)."""

    train_images: Array
    train_labels: Array
    test_images: Array
    test_labels: Array


def load(dtype: str = "float32") -> Digits:
    """The 1797 images of 8x8 pixels that come with scikit-learn, a quarter of them for testing, always the same."""
    images, labels = load_digits(return_X_y=True)
    train_images, test_images, train_labels, test_labels = train_test_split(
        (images / 16).astype(dtype), labels, test_size=0.25, random_state=SPLIT_SEED, stratify=labels
    )
    return Digits(train_images, train_labels, test_images, test_labels)


# ---- Training -------------------------------------------------------------------------------------------------------


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread.

    More gain little on small nets, lose much on a busy machine, and would let the losses depend on the number of cores.
    """
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def epoch_means(losses: Sequence[float], batches_per_epoch: int) -> list[float]:
    """The mean loss of each epoch."""
    return [
        statistics.fmean(losses[start : start + batches_per_epoch])
        for start in range(0, len(losses), batches_per_epoch)
    ]


# ---- The command line -----------------------------------------------------------------------------------------------


def at_least(least: int) -> Callable[[str], int]:
    """What reads an option that is a whole number, and refuses smaller ones."""

    def read(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return read


def picture(text: str) -> Path:
    """What reads an option that names a picture, and makes its folder: better now than after the training."""
    path = Path(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def parser(
    description: str, *, epochs: int, batch_size: int, data: str = "images", least_epochs: int = 1
) -> argparse.ArgumentParser:
    """The options of every training, with their defaults."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    result.add_argument("--epochs", type=at_least(least_epochs), default=epochs, help=f"passes over the {data}")
    result.add_argument("--batch-size", type=at_least(1), default=batch_size, help=f"{data} per step, at most")
    result.add_argument("--seed", type=int, default=0, help=f"of the initial values and the order of the {data}")
    return result


# ---- Pictures -------------------------------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Figure:
    """An empty picture, in inches. Without pyplot there is no window and no global state; savefig renders with Agg."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def count_epochs(axes: Axes, epochs: float) -> None:
    """Makes the horizontal axis one of epochs."""
    axes.set_xlim(0, epochs)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("epochs")


def save(figure: Figure, path: Path) -> None:
    """Writes a picture."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.savefig(path)
    print(f"Drawn to {path}")
