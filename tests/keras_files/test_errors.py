"""What is checked of the shape of an array before it is read."""

import math

import pytest

from torch_adadelta.keras.errors import MAX_EXPANSION, MAX_NDIM, KerasFileError, checked_shape

HUGE = 2**48


def test_a_file_that_cannot_be_taken_is_a_value_error() -> None:
    assert issubclass(KerasFileError, ValueError)


@pytest.mark.parametrize(
    ("shape", "itemsize", "stored"),
    [((), 4, 4), ((3, 2), 4, 24), ((0, HUGE - 1), 8, 0), ((1,) * MAX_NDIM, 2, 2), ((MAX_EXPANSION,), 1, 1)],
)
def test_an_array_that_fits_has_so_many_bytes(shape: tuple[int, ...], itemsize: int, stored: int) -> None:
    assert checked_shape("x", shape, itemsize, stored, 24) == itemsize * math.prod(shape)


@pytest.mark.parametrize(
    ("shape", "stored", "message"),
    [
        ((1,) * (MAX_NDIM + 1), 24, "which no weight has"),
        ((-1,), 24, "which no weight has"),
        ((0, HUGE), 0, "which no weight has"),
        ((MAX_EXPANSION + 1,), 1, r"shape \(101,\), 101 bytes, for which the file of 24 bytes holds 1"),
        ((3, 2), 25, "file of 24 bytes holds 25"),
        ((0,), -1, "holds -1"),
        ((1,), 0, "made to exhaust the memory"),
    ],
)
def test_one_that_does_not_is_refused(shape: tuple[int, ...], stored: int, message: str) -> None:
    with pytest.raises(KerasFileError, match=f"^x has .*{message}"):
        checked_shape("x", shape, 1, stored, 24)
