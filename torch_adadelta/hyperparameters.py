"""From what the user gave (a number, a NumPy scalar, a Tensor) to the value of one step.

Keras keeps `learning_rate` and `rho` in float32 variables, so a Python number is rounded to float32 before it is cast
to the arithmetic type; `epsilon` goes there directly. Tensors and NumPy scalars carry a precision of their own and are
never rounded here.
"""

import ctypes
import math
import sys
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

Value = float | Tensor
StepValues = tuple[Value, Value, Value]

DEFAULT_EPSILON: Final = 1e-7

_float32: Final = ctypes.c_float

_FLOAT32_MAX: Final = torch.finfo(torch.float32).max


class _Rule(NamedTuple):
    maximum: float
    text: str
    rounds_to_float32: bool


_RULES: Final = {
    "learning_rate": _Rule(_FLOAT32_MAX, "a finite number >= 0 that fits float32", True),
    "rho": _Rule(1.0, "a number in [0, 1]", True),
    "epsilon": _Rule(sys.float_info.max, "a finite number >= 0", False),
}


def round_to_float32(number: float) -> float:
    """The float32 nearest to `number`, ties to even; infinity beyond the largest."""
    return _float32(number).value


def _number(name: str, value: Any) -> float:
    """The number behind a Python or NumPy scalar, rounded as Keras rounds it, once it is known to be in range."""
    is_numpy_scalar = type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0
    number = value.item() if is_numpy_scalar else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(
            f"{name} must be a number or a one-element Tensor, got {value!r} of type {type(value).__name__}"
        )
    _check_range(name, number, value)
    if is_numpy_scalar or not _RULES[name].rounds_to_float32:
        return float(number)
    rounded = round_to_float32(number)
    _check_range(name, rounded, value)
    return rounded


def _check_range(name: str, number: float, given: Any) -> None:
    rule = _RULES[name]
    if not 0.0 <= number <= rule.maximum:  # nan compares false
        raise ValueError(f"Invalid {name}: {given!r}; it must be {rule.text}")


def validated(name: str, value: Any) -> Any:
    """What the optimizer keeps for `value`: the value itself, except that an epsilon of None or 0 means 1e-7.

    Args:
        name: "learning_rate", "rho" or "epsilon".
        value: a number, a NumPy scalar or a one-element Tensor. Tensors on a device are not read.

    Raises:
        TypeError: `value` is no number and no Tensor, or a complex or boolean Tensor.
        ValueError: it is nan, infinite or out of range, or a Tensor without exactly one element.
    """
    if name == "epsilon" and value is None:
        return DEFAULT_EPSILON
    if not isinstance(value, Tensor):
        number = _number(name, value)
        return DEFAULT_EPSILON if name == "epsilon" and number == 0.0 else value
    if value.numel() != 1:
        raise ValueError(f"{name} must be a number or a one-element Tensor, got a Tensor of shape {tuple(value.shape)}")
    if value.is_complex() or value.dtype is torch.bool:
        raise TypeError(f"{name} must be a real number, got a Tensor of {value.dtype}")
    if value.is_meta:
        raise ValueError(f"{name} is a Tensor on the meta device, which has no value")
    if value.device.type == "cpu":
        _check_range(name, float(value.detach()), value)
    return value


def _for_step(name: str, value: Any, keep_tensor: bool) -> Value:
    value = validated(name, value)
    if not isinstance(value, Tensor):
        return _number(name, value)
    if keep_tensor or value.device.type != "cpu":
        return value
    number = float(value.detach())
    return number or DEFAULT_EPSILON if name == "epsilon" else number


def for_step(learning_rate: Any, rho: Any, epsilon: Any, keep_tensor: bool = False) -> StepValues:
    """The values that this step uses: floats to be cast to the arithmetic type, or Tensors to be read where they are.

    A CPU Tensor becomes a float unless `keep_tensor` is set, which lets gradients flow to it. Checks everything again,
    for a scheduler or the user may have written anything into a param group.

    Raises what `validated` raises.
    """
    if type(learning_rate) is float and type(rho) is float and type(epsilon) is float:
        rounded_lr, rounded_rho = _float32(learning_rate).value, _float32(rho).value
        if (
            learning_rate >= 0.0
            and rounded_lr <= _FLOAT32_MAX
            and 0.0 <= rho <= 1.0
            and 0.0 < epsilon <= sys.float_info.max
        ):
            return rounded_lr, rounded_rho, epsilon
    return (
        _for_step("learning_rate", learning_rate, keep_tensor),
        _for_step("rho", rho, keep_tensor),
        _for_step("epsilon", epsilon, keep_tensor),
    )


def cast(value: Value, dtype: torch.dtype, device: torch.device) -> Value:
    """`value` in the arithmetic type: a float that `dtype` holds exactly, or a 0-dim Tensor on `device`."""
    if isinstance(value, Tensor):
        return value.to(dtype=dtype, device=device).reshape(())
    return round_to_float32(value) if dtype is torch.float32 and math.isfinite(value) else value


def one_minus(rho: Value, dtype: torch.dtype) -> Value:
    """1 - rho, subtracted in the arithmetic type: 0.050000012, not 0.05, for the float32 neighbour of 0.95."""
    if isinstance(rho, Tensor):
        return 1 - rho
    # The difference of two float32 numbers rounded to double and then to float32 is the correctly rounded one.
    return cast(1.0 - rho, dtype, torch.device("cpu"))
