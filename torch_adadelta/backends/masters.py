"""Float32 masters of bfloat16 parameters, which hold their upper halves; int16 remainders hold the rest.

With M the bits of a master, the parameter has the bits (M + 0x8000) >> 16, which is the nearest bfloat16, ties away
from zero, and the remainder is M - (parameter << 16). Every master but nan returns bit for bit; a nan is a quiet one.

Whoever writes a parameter leaves its remainder as it is. A pair that no master makes then is harmless: zeros and
infinities are their own masters, and a master is never further from its parameter than half a unit in the last place.
"""

from typing import Final

import torch
from torch import Tensor

from torch_adadelta.backends import dtensor

KEY: Final = "remainder"
DTYPE: Final = torch.int16

_SIGN: Final = -(2**31)


def has_remainder(dtype: torch.dtype) -> bool:
    """Whether the masters of parameters of this dtype are kept in two halves."""
    return dtype is torch.bfloat16


def new_remainder(param: Tensor) -> Tensor:
    """That of a parameter which is its own master so far."""
    return torch.zeros_like(param, dtype=DTYPE)


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """The float32 masters of bfloat16 elements."""
    bits = param.view(torch.int16).to(torch.int32) << 16
    joined = (bits + remainder).view(torch.float32)
    return torch.where(joined.isnan(), bits.view(torch.float32), joined)


def split_(param: Tensor, remainder: Tensor, master: Tensor) -> None:
    """Stores float32 masters in bfloat16 elements and their remainders."""
    bits = master.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    rest = bits - (upper << 16)
    is_nan = master.isnan()
    param.view(torch.int16).copy_(torch.where(is_nan, ((bits & _SIGN) >> 16) | 0x7FC0, upper))
    remainder.copy_(torch.where(is_nan, 0, rest))


def wide(param: Tensor, remainder: Tensor | None, T: torch.dtype) -> Tensor:
    """Real elements as an update sees them: their masters, or they themselves in T."""
    return param.to(T) if remainder is None else join(param, remainder)


def store(param: Tensor, remainder: Tensor | None, value: Tensor) -> None:
    """Stores what an update makes of elements."""
    if remainder is None:
        param.copy_(value)
    else:
        split_(param, remainder, value)


def master_of(param: Tensor, remainder: Tensor | None) -> Tensor:
    """The master of a parameter, a DTensor if that is one; the parameter itself, detached, where it is its own."""
    if remainder is None:
        return param.detach()
    return dtensor.from_local(param, join(dtensor.local(param.detach()), dtensor.local(remainder)))


@torch.no_grad()
def set_master(param: Tensor, remainder: Tensor | None, value: Tensor) -> None:
    """Gives a parameter another master, of its shape and in any dtype."""
    if remainder is None:
        param.copy_(value)
    else:
        split_(dtensor.local(param), dtensor.local(remainder), dtensor.local(value).to(torch.float32))
