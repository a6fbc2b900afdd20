"""Which layers fit which modules."""

import numpy as np
from keras_memory import layer_of
from torch import nn

from torch_adadelta.keras.fits import Fits
from torch_adadelta.keras.modules import torch_layers_of


def test_what_is_alike_is_of_one_sort() -> None:
    layers = [layer_of(name, "Dense", {}, {"kernel": np.ones(shape)}) for name, shape in
              (("a", (4, 3)), ("b", (4, 2)), ("c", (4, 3)))]  # fmt: skip
    modules, _ = torch_layers_of(nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3, bias=False), nn.Linear(4, 3)]))
    fits = Fits(layers, modules)
    assert [[layer.path for layer in sort] for sort in fits.sorts(layers)] == [["a", "c"], ["b"]]
    assert [[module.path for module in sort] for sort in fits.sorts(modules)] == [["0", "2"], ["1"]]
    assert [len(fits.options(layer, modules[1])) for layer in layers] == [1, 0, 1]
    assert fits.reason(layers[1], modules[0]) == "kernel would be (2, 4), and weight is (3, 4)"
    assert fits.options(layers[0], modules[0])[0].kind == "dense"


def test_layers_of_the_same_shapes_may_differ_by_their_configuration() -> None:
    weights = {"kernel": np.ones((3, 9)), "recurrent_kernel": np.ones((3, 9))}
    layers = [layer_of(str(is_after), "GRU", {"reset_after": is_after}, weights) for is_after in (True, False)]
    modules, _ = torch_layers_of(nn.GRU(3, 3, bias=False))
    fits = Fits(layers, modules)
    assert [len(fits.options(layer, modules[0])) for layer in layers] == [1, 0]


def test_modules_of_the_same_shapes_may_differ_by_their_heads() -> None:
    shapes = {f"{part}/kernel": (4, 2, 2) for part in ("query", "key", "value")} | {"output/kernel": (2, 2, 4)}
    weights = {role: np.ones(shape) for role, shape in shapes.items()}
    layer = layer_of("a", "MultiHeadAttention", {}, weights)
    modules, _ = torch_layers_of(nn.ModuleList([nn.MultiheadAttention(4, heads, bias=False) for heads in (1, 2)]))
    fits = Fits([layer], modules)
    assert [len(fits.options(layer, module)) for module in modules] == [0, 1]
