"""What the examples share, not one itself: handwritten digits, options of the command line, how pictures look."""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

# Distinct to the colour-blind (Okabe and Ito).
BLUE: Final = "#0072B2"
RED: Final = "#D55E00"
GREEN: Final = "#009E73"
PINK: Final = "#CC79A7"
GREY: Final = "#999999"

# What is kept for testing, which no option changes: all seeds are measured on the same data.
SPLIT_SEED: Final = 0

DTYPES: Final = ("float32", "float64", "bfloat16", "float16")

Array = NDArray[Any]


# ---- Data -----------------------------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """Images of shape (n, 64) with values in [0, 1], and their labels of shape (n,): arrays, or tensors."""

    train_images: Any
    train_labels: Any
    test_images: Any
    test_labels: Any


def load(dtype: str = "float32") -> Digits:
    """The 1797 images of 8x8 pixels that come with scikit-learn, a quarter of them for testing, always the same."""
    images, labels = load_digits(return_X_y=True)
    train_images, test_images, train_labels, test_labels = train_test_split(
        (images / 16).astype(dtype), labels, test_size=0.25, random_state=SPLIT_SEED, stratify=labels
    )
    return Digits(train_images, train_labels, test_images, test_labels)


def load_tensors(device: torch.device, dtype: torch.dtype, shape: Sequence[int] = (64,)) -> Digits:
    """The same as tensors on a device. `shape` is that of an image."""
    train_images, train_labels, test_images, test_labels = (torch.from_numpy(array).to(device) for array in load())
    return Digits(
        train_images.to(dtype).reshape(-1, *shape), train_labels, test_images.to(dtype).reshape(-1, *shape), test_labels
    )


# ---- Training -------------------------------------------------------------------------------------------------------


def convolutional_net(activation: type[nn.Module] = nn.Tanh, pooling: type[nn.Module] = nn.AvgPool2d) -> nn.Sequential:
    """A net of about 151 000 parameters for images of shape (n, 1, 8, 8).

    By default it is smooth: where a ReLU or a maximum switches over, a last bit becomes a difference that one can see.
    """
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        activation(),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        activation(),
        pooling(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        activation(),
        nn.Linear(128, 10),
    )


def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy, which takes logits of 16 bits in float32."""
    logits = model(images)
    return nn.functional.cross_entropy(logits if logits.dtype is torch.float64 else logits.float(), labels)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of the images that the model tells right."""
    return (model(images).argmax(dim=1) == labels).double().mean().item()


def synchronize(device: torch.device) -> None:
    """Waits for the device, whose work the host only queues: times are taken between two such calls."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


def no_tf32() -> AbstractContextManager[None]:
    """Convolutions on a GPU in whole float32, as Keras computed them."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


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


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text}: PyTorch knows no such device. Use cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text}: the examples run on the CPU and on CUDA devices. Use cpu or cuda")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        remedy = "a number below that, or cpu" if count else "cpu"
        raise argparse.ArgumentTypeError(f"{text}: PyTorch finds {count} CUDA devices here. Use {remedy}")
    return device


def name_of(dtype: torch.dtype) -> str:
    """As the command line has it."""
    return str(dtype).removeprefix("torch.")


def add_device(
    to: argparse.ArgumentParser, dtypes: Sequence[str] = DTYPES, *, why: str = "not a dtype of a model", of: str = "all"
) -> None:
    """The options `--device` and `--dtype`.

    Args:
        to (ArgumentParser): what gets them.
        dtypes (sequence of str, optional): what the example can do, the default first. (default: all)
        why (str, optional): what to tell who asks for another one.
        of (str, optional): what has this dtype, for the help. (default: all)
    """

    def dtype(text: str) -> torch.dtype:
        if text not in dtypes:
            raise argparse.ArgumentTypeError(f"{text}: {why}. Use {' or '.join(dtypes)}")
        return getattr(torch, text)

    to.add_argument(
        "--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu", help="where to train"
    )
    to.add_argument("--dtype", type=dtype, default=dtypes[0], help=f"of {of}: {', '.join(dtypes)}")


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
