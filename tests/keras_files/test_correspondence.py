"""Transfers, and whether they cover each parameter once."""

import numpy as np
import pytest
import torch
from keras_memory import layer_of
from torch import Tensor

from torch_adadelta.keras.correspondence import Match, WeightTransfer, overlap
from torch_adadelta.keras.layouts import Layout, same


def transfer(
    role: str, shape: tuple[int, ...], name: str, tensor: Tensor, first: int | None = None, row: int | None = None
) -> WeightTransfer:
    layer = layer_of("a", "Dense", {}, {role: np.ones(shape)})
    layout = same(shape) if row is None else Layout((0,))
    return WeightTransfer(layer, layer.variables[0], name, tensor, layout, row, first)


WHOLE = torch.zeros(6, 2)


def test_what_of_a_parameter_a_weight_goes_to() -> None:
    whole = transfer("kernel", (6, 2), "w", WHOLE)
    assert (whole.label, whole.part, whole.rows) == ("a/kernel", "w", (0, 6))
    part = transfer("kernel", (2, 2), "w", WHOLE, 4)
    assert (part.part, part.rows) == ("w[4:6]", (4, 6))
    half = transfer("bias", (8,), "b", torch.zeros(4), row=1)
    assert (half.label, half.part, half.rows) == ("a/bias[1]", "b", (0, 4))
    assert transfer("scale", (), "s", torch.tensor(1.0)).rows == (0, 1)


def test_parts_come_in_the_order_of_their_rows_and_cover_the_parameter() -> None:
    parts = [transfer(f"k{first}", (2, 2), "w", WHOLE, first) for first in (4, 0, 2)]
    match = Match([parts[0], transfer("bias", (3,), "b", torch.zeros(3)), *parts[1:]])
    assert [[own.rows[0] for own in transfers] for transfers in match.by_tensor()] == [[0, 2, 4], [0]]
    match.check_parts()
    for transfers, message in (
        (parts[:2], r"mapping has parts of w, and nothing for w\[2:4\]"),
        (parts[1:], r"mapping has parts of w, and nothing for w\[4:6\]"),
        (parts[:1], r"mapping has parts of w, and nothing for w\[0:4\]"),
        ([*parts, transfer("more", (1, 2), "w", WHOLE, 3)], r"a/k2 for w\[2:4\], and a/more goes to w\[3:4\]"),
        ([*parts, transfer("more", (6, 2), "w", WHOLE)], r"mapping has a/k0 for w\[0:2\], and a/more goes to w$"),
    ):
        with pytest.raises(ValueError, match=message):
            Match(transfers).check_parts()


def test_overlapping_rows() -> None:
    assert overlap((2, 4), [(0, 2), (3, 5)])
    assert not overlap((2, 4), [(0, 2), (4, 5)])
    assert not overlap((2, 4), [])
