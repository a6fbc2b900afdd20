"""Models of Keras and of PyTorch, built alike of all chains of layers that make, move or join the axes of maps.

No axis has the size of another, so that nothing that is out of order looks right.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import keras_numpy
import numpy as np
import torch
from keras_memory import checkpoint_of, layer_of, moved
from torch import Tensor, nn

from torch_adadelta.keras.errors import KerasFileError
from torch_adadelta.keras.layers import Layer

SHAPE: Final = (7, 5, 3)
FORMATS: Final = ("channels_first", "channels_last")


def permuted(x: Any, axes: Sequence[int]) -> Any:
    """The axes behind the batch in another order, of an array or a Tensor."""
    order = (0, *(int(axis) + 1 for axis in axes))
    return x.permute(order) if isinstance(x, Tensor) else x.transpose(order)


class Given(nn.Module):
    """A function as a module of which nobody knows what it does."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Chain:
    """A model of Keras and the same in PyTorch, built layer by layer from one name each.

    In PyTorch, maps have their channels first in front of each module that takes maps. `how` says what the model does
    before it flattens: "shown" as the last module gives them, in an nn.Sequential; "channels_first" the same, but with
    functions; "channels_last" and "keras" permute, the first to what the last module took for the channels.
    """

    def __init__(self, names: tuple[str, ...], how: str) -> None:
        self.names, self.how = names, how
        rng = np.random.default_rng(0)
        self.rng = rng
        self.x = self.keras = rng.standard_normal((2, *SHAPE))
        self.layers: list[Layer] = []
        self.entries: list[dict[str, Any]] = [{"class_name": "InputLayer", "config": {"batch_shape": [None, *SHAPE]}}]
        self.modules: list[nn.Module] = []
        # The tensor in PyTorch: that of Keras as it was, permuted; and what Keras did to its axes since.
        formats = [name.split()[1] for name in names if name.split()[1] in FORMATS]
        self.torch_axes: tuple[int, ...] = (0, 1, 2) if formats[:1] == ["channels_first"] else (2, 0, 1)
        self.torch_axes_of_input = self.torch_axes
        self.inputs = self.x.transpose(0, *(axis + 1 for axis in self.torch_axes)).copy()
        self.pending: list[Callable[[Any], Any]] = []
        self.has_maps = self.is_vague = False
        for number, name in enumerate([*names, "flatten channels_last", "dense"]):
            self.add(f"{name.partition(' ')[0]}_{number}", *name.split())

    def layer(self, class_name: str, name: str, config: dict[str, Any], **weights: np.ndarray) -> None:
        self.entries.append({"class_name": class_name, "config": {"name": name, **config}})
        if weights:
            self.layers.append(layer_of(name, class_name, config, weights))

    def as_maps(self, at: int) -> None:
        """Brings the tensor of PyTorch to the channels first, as a layer takes them."""
        rank = self.keras.ndim - 1
        wanted = (at, *(axis for axis in range(rank) if axis != at))
        if self.pending or wanted != self.torch_axes:
            self.modules.append(Given(self.relayout(wanted)))
        self.torch_axes, self.pending, self.has_maps = wanted, [], True

    def relayout(self, wanted: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        inverse, pending = np.argsort(self.torch_axes), list(self.pending)

        def function(x: Tensor) -> Tensor:
            x = permuted(x, inverse)
            for step in pending:
                x = step(x)
            return permuted(x, wanted).contiguous()

        return function

    def move(self, step: Callable[[Any], Any]) -> None:
        self.keras = step(self.keras)
        self.pending.append(step)

    def add(self, name: str, kind: str, option: str = "") -> None:
        rank, rng = self.keras.ndim - 1, self.rng
        config: dict[str, Any] = {"data_format": option} if option in FORMATS else {}
        at = 0 if option == "channels_first" else rank - 1
        if kind in ("conv", "pool", "gap") and rank != 3:
            raise IndexError
        if kind == "conv":
            self.as_maps(at)
            channels = self.keras.shape[at + 1]
            kernel, bias = rng.standard_normal((2, 1, channels, 4)), rng.standard_normal(4)
            self.layer("Conv2D", name, {**config, "filters": 4, "kernel_size": [2, 1]}, kernel=kernel, bias=bias)
            self.modules.append(nn.Conv2d(channels, 4, (2, 1)))
            self.keras = keras_numpy.conv(self.keras, kernel, bias, option)
        elif kind == "pool":
            self.as_maps(at)
            self.layer("MaxPooling2D", name, {**config, "pool_size": [2, 1], "strides": [1, 1]})
            self.modules.append(nn.MaxPool2d((2, 1), 1))
            self.keras = keras_numpy.pool(self.keras, (2, 1), option)
        elif kind == "bn":
            axis = int(option)
            if rank > 1:
                self.is_vague = self.is_vague or rank == 2  # a BatchNorm1d does not show whether it takes maps
                self.as_maps(0 if axis == 1 else rank - 1)
            size = self.keras.shape[axis]
            weights = {key: rng.uniform(0.5, 2, size) for key in ("gamma", "beta", "moving_mean", "moving_variance")}
            self.layer("BatchNormalization", name, {"axis": axis}, **weights)
            self.modules.append({1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d}[rank](size, eps=1e-3))
            self.keras = keras_numpy.batch_norm(self.keras, weights, axis)
        elif kind == "gap":
            self.as_maps(at)
            self.layer("GlobalAveragePooling2D", name, config)
            self.modules.append(Given(lambda x: x.mean((2, 3))))
            self.keras = self.keras.mean((2, 3) if option == "channels_first" else (1, 2))
            self.torch_axes = (0,)
        elif kind == "permute":
            dims = {2: (2, 1), 3: (3, 1, 2) if option == "a" else (2, 1, 3)}[rank]
            self.layer("Permute", name, {"dims": list(dims)})
            self.move(lambda x: permuted(x, [dim - 1 for dim in dims]))
        elif kind == "reshape":
            a, b, c = self.keras.shape[1:]
            target = {"rows": (a, b * c), "columns": (a * b, c), "places": (a * b, 1, c), "joint": (a, 1, b * c)}
            shape = target[option]
            self.layer("Reshape", name, {"target_shape": list(shape)})
            self.move(lambda x: x.reshape(len(x), *shape))
        elif kind == "flatten":
            self.layer("Flatten", name, config)
            if rank == 1:
                return
            self.keras = keras_numpy.flatten(self.keras, option)
            if self.how == "keras":
                moved = (*range(1, rank), 0) if option == "channels_first" else tuple(range(rank))
                self.modules += [Given(self.relayout(moved)), Given(lambda x: x.reshape(len(x), -1))]
            elif self.how == "channels_last":
                self.modules.append(Given(lambda x: x.movedim(1, -1).reshape(len(x), -1)))
            else:
                self.modules.append(nn.Flatten())
            self.torch_axes, self.pending = (0,), []
        elif kind == "dense":
            kernel, bias = rng.standard_normal((self.keras.shape[-1], 2)), rng.standard_normal(2)
            self.layer("Dense", name, {"units": 2}, kernel=kernel, bias=bias)
            self.modules.append(nn.Linear(len(kernel), 2))
            self.keras = self.keras @ kernel + bias

    def model(self) -> nn.Module:
        if self.how == "shown":
            return nn.Sequential(*self.modules).double().eval()

        class Hidden(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x)

        return Hidden(*self.modules).double().eval()

    def difference(self, **options: Any) -> float | None:
        """How far the outputs of both are apart after the weights moved; None if that is refused."""
        checkpoint = checkpoint_of({"class_name": "Sequential", "config": {"layers": self.entries}}, self.layers)
        model = self.model()
        units = [name for name, module in model.named_children() if any(True for _ in module.parameters())]
        mapping = dict(zip([layer.path for layer in self.layers], units, strict=True))
        try:
            moved(checkpoint, model, mapping=mapping, **options)
        except KerasFileError:
            return None
        with torch.no_grad():
            actual = model(torch.from_numpy(self.inputs)).numpy()
        return float(np.abs(actual - self.keras).max() / np.abs(self.keras).max())


NAMES: Final = (
    *(f"{kind} {data_format}" for kind in ("conv", "pool", "flatten", "gap") for data_format in FORMATS),
    *("bn 1", "bn -1", "permute a", "permute b"),
    *(f"reshape {option}" for option in ("rows", "columns", "places", "joint")),
)


def chains(how: str, most: int = 3, step: int = 1) -> Iterator[Chain]:
    """All of at most so many layers that can be computed; of the longest, one of so many."""
    for length in range(1, most + 1):
        for names in itertools.islice(itertools.product(NAMES, repeat=length), 0, None, step if length == most else 1):
            try:
                yield Chain(names, how)
            except (IndexError, KeyError, ValueError):
                continue  # a layer that cannot take what it gets
