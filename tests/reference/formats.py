"""The formats of numbers that the oracle knows: how each is rounded to, and masters of bfloat16 in two halves.

What NumPy has no type for is a float32 or complex64 array whose values are rounded already.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def round_to_T(x: Array) -> Array:
    """`x` itself, which is in T: storing a float32 or float64 rounds nothing."""
    return x


def round_to_float16(x: Array) -> Array:
    """The float16 values nearest to a float32 array, ties to even, as float32."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def round_to_bfloat16(x: Array) -> Array:
    """The bfloat16 values nearest to a float32 array, ties to even, as float32.

    A bfloat16 is the upper half of a float32: adding just under half of its last place, and one more if that place is
    odd, carries exactly when rounding up is due, into the exponent and up to infinity too. nan must not be carried.
    """
    bits = np.asarray(x).view(np.uint32)
    with np.errstate(over="ignore"):
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = (bits + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), np.float32(np.nan), rounded.view(np.float32))


def split_master(master: Array) -> tuple[Array, Array]:
    """A float32 array as bfloat16 values, as float32, and what they lack of it, as int16.

    The values are the nearest, ties away from zero: then what they lack always fits. nan becomes the quiet nan of its
    sign, which lacks nothing.
    """
    bits = np.asarray(master, np.float32).view(np.uint32)
    with np.errstate(over="ignore"):
        upper = (bits + np.uint32(0x8000)) & np.uint32(0xFFFF0000)
        remainder = (bits - upper).astype(np.uint16).view(np.int16)
    is_nan = np.isnan(master)
    upper = np.where(is_nan, (bits & np.uint32(0x80000000)) | np.uint32(0x7FC00000), upper)
    return upper.view(np.float32), np.where(is_nan, np.int16(0), remainder)


def join_master(param: Array, remainder: Array) -> Array:
    """The float32 array that `split_master` took apart.

    A pair that it never makes is of a parameter that somebody else wrote. Zeros and infinities then are their own
    masters; whatever else is within half a unit in the last place of the parameter, and a nan is a nan.
    """
    bits = np.asarray(param, np.float32).view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    is_stale = ((magnitude == 0) & (remainder < 0)) | ((magnitude == 0x7F800000) & (remainder > 0))
    with np.errstate(over="ignore"):
        joined = bits + remainder.astype(np.int32).view(np.uint32)
    return np.asarray(np.where(is_stale, bits, joined).view(np.float32))


class Format(NamedTuple):
    T: Any  # the opmath dtype
    store: Callable[[Array], Array]
    is_complex: bool = False


FORMATS: Final = {
    "float64": Format(np.float64, round_to_T),
    "float32": Format(np.float32, round_to_T),
    "float16": Format(np.float32, round_to_float16),
    "bfloat16": Format(np.float32, round_to_bfloat16),
    "complex128": Format(np.float64, round_to_T, is_complex=True),
    "complex64": Format(np.float32, round_to_T, is_complex=True),
    "complex32": Format(np.float32, round_to_float16, is_complex=True),
}

DTYPES: Final = tuple(FORMATS)
