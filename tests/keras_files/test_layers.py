"""Layers and weights as a file holds them."""

import numpy as np

from torch_adadelta.keras.errors import LazyArray
from torch_adadelta.keras.layers import Layer, Variable


def stored(*shape: int) -> LazyArray:
    return LazyArray("x", shape, np.dtype("f4"), lambda: np.zeros(shape, "f4"))


def test_a_layer_knows_its_weights() -> None:
    kernel, bias = Variable("kernel", stored(3, 2)), Variable("bias", stored(2))
    layer = Layer("encoder/dense", "Dense", {}, [kernel, bias])
    assert str(layer) == "encoder/dense (Dense): kernel (3, 2), bias (2,)"
    assert str(Layer("dense", None, {}, [bias])) == "dense (class unknown): bias (2,)"
    assert not kernel.has_state
    kernel.square_avg = kernel.acc_delta = stored(3, 2)
    assert kernel.has_state
    assert not bias.has_state
    assert not layer.is_frozen
    bias.is_frozen = True
    assert layer.is_frozen
    assert not Layer("a", None).variables
    assert Layer("a", None).variables is not Layer("b", None).variables


def test_the_state_of_a_weight_is_in_one_order() -> None:
    one = stored(1)
    assert Variable("kernel", one).slots == []
    every = ["square_avg", "acc_delta", "average", "gradient_accumulator"]
    assert Variable("kernel", one, **dict.fromkeys(reversed(every), one)).slots == every
    assert Variable("kernel", one, average=one).slots == ["average"]
    assert not Variable("kernel", one, average=one).has_state
