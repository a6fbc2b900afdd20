"""What goes wrong with a file of Keras, and arrays in one."""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# What is stored may be compressed, but not to less than this share: a hundred-fold file of zeros is no checkpoint.
MAX_EXPANSION: Final = 100

MAX_NDIM: Final = 8


class KerasFileError(ValueError):
    """A file cannot be used: it is damaged, hostile, or lacks what is needed. The message says which."""


class NoStateError(KerasFileError):
    """A file holds no state of an Adadelta, so that the weights are all there is to load."""


class LazyArray(NamedTuple):
    """An array in a file, which is read when `read` is called, after its shape was found to fit."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], Array]
    flipped: tuple[int, ...] = ()  # the axes that the file has the other way round

    def flip(self, axes: tuple[int, ...]) -> "LazyArray":
        """The array that the file has the other way round along some axes."""
        return self._replace(read=lambda: np.flip(self.read(), axes), flipped=axes)

    def as_stored(self, array: Array) -> Array:
        """What to write into the file for the array to be this one."""
        return np.flip(array, self.flipped)


def checked_shape(name: str, shape: tuple[int, ...], itemsize: int, stored: int, file_size: int) -> int:
    """The bytes of an array of this shape, once it is known that the file can hold them.

    Raises:
        KerasFileError: the file says that the array is larger than what it has stored for it.
    """
    if len(shape) > MAX_NDIM or any(not 0 <= size < 2**48 for size in shape):
        raise KerasFileError(f"{name} has shape {shape}, which no weight has; the file is damaged")
    nbytes = itemsize
    for size in shape:
        nbytes *= size
    if not 0 <= stored <= file_size or nbytes > MAX_EXPANSION * stored:
        raise KerasFileError(
            f"{name} has shape {shape}, {nbytes} bytes, for which the file of {file_size} bytes holds {stored}; it is "
            "damaged, or made to exhaust the memory"
        )
    return nbytes
