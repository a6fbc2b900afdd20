"""From what the user gave (a number, a Tensor, a callable, a schedule) to the value of one step.

Keras keeps `learning_rate` and `rho` in float32 variables, so a Python number is rounded to float32 before it is cast
to the arithmetic type; `epsilon` goes there directly. Tensors and NumPy scalars carry a precision of their own and are
never rounded here.
"""

import ctypes
import math
import sys
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from torch_adadelta.schedules import LearningRateSchedule, Value

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
    "decay": _Rule(_FLOAT32_MAX, "a finite number >= 0 that fits float32", True),
    "clipvalue": _Rule(math.inf, "a number >= 0", False),
    "clipnorm": _Rule(_FLOAT32_MAX, "a finite number >= 0 that fits float32", False),
    "global_clipnorm": _Rule(_FLOAT32_MAX, "a finite number >= 0 that fits float32", False),
}

# Plain numbers, the same in all param groups.
NUMBERS: Final = ("decay", "clipvalue", "clipnorm", "global_clipnorm")


def round_to_float32(number: float) -> float:
    """The float32 nearest to `number`, ties to even; infinity beyond the largest."""
    return _float32(number).value


def _number(name: str, value: Any) -> float:
    """The number behind a Python or NumPy scalar, rounded as Keras rounds it, once it is known to be in range."""
    is_numpy_scalar = _is_numpy_scalar(value)
    number = value.item() if is_numpy_scalar else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        kinds = "a number" if name in NUMBERS else "a number or a one-element Tensor"
        raise TypeError(f"{name} must be {kinds}, got {value!r} of type {type(value).__name__}")
    _check_range(name, number, value)
    if is_numpy_scalar or not _RULES[name].rounds_to_float32:
        return float(number)
    nearest = round_to_float32(number)
    _check_range(name, nearest, value)
    return nearest


def _check_range(name: str, number: float, given: Any) -> None:
    rule = _RULES[name]
    if 0.0 <= number <= rule.maximum:
        return
    if number < 0.0 and name in NUMBERS:
        raise ValueError(f"Expected {name} >= 0, received: {given!r}")  # as Keras words it
    raise ValueError(f"Invalid {name}: {given!r}; it must be {rule.text}")


def validated_number(name: str, value: Any) -> Any:
    """What the optimizer keeps for a "decay", "clipvalue", "clipnorm" or "global_clipnorm".

    A decay is kept as it is, for its precision is of its type; the others become a float.

    Raises:
        TypeError: `value` is no number; a decay may also be a Tensor of one element on the CPU.
        ValueError: it is negative, nan or too large.
    """
    if isinstance(value, Tensor) and name == "decay" and value.numel() == 1 and value.device.type == "cpu":
        _check_range(name, float(value), value)
        return value
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, got a Tensor; use .item()")
    number = _number(name, value)
    return value if name == "decay" else number


def _is_numpy_scalar(value: Any) -> bool:
    return type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0


def as_saved(name: str, value: Any) -> Any:
    """A hyperparameter for a checkpoint: a NumPy scalar becomes a number, or a Tensor if that would be rounded."""
    if not _is_numpy_scalar(value):
        return value
    number = float(value)
    is_kept = not _RULES[name].rounds_to_float32 or round_to_float32(number) == number
    return number if is_kept else torch.tensor(number, dtype=torch.float64)


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


# What `for_step` was given last and returned, if they were floats: most steps have the same, and cannot change them.
_last_floats: tuple[Any, Any, Any, StepValues] = (object(), object(), object(), (0.0, 0.0, 0.0))


def for_step(
    learning_rate: Any, rho: Any, epsilon: Any, keep_tensor: bool = False, is_scheduled: bool = False
) -> StepValues:
    """The values that this step uses: floats to be cast to the arithmetic type, or Tensors to be read where they are.

    A CPU Tensor becomes a float unless `keep_tensor` is set, which lets gradients flow to it. Checks everything again,
    for a scheduler or the user may have written anything into a param group; only a learning rate that `at_step` gave
    is taken as it is.

    Raises what `validated` raises.
    """
    global _last_floats
    last_learning_rate, last_rho, last_epsilon, last_values = _last_floats
    if learning_rate is last_learning_rate and rho is last_rho and epsilon is last_epsilon and not is_scheduled:
        return last_values
    if type(learning_rate) is float and type(rho) is float and type(epsilon) is float and not is_scheduled:
        rounded_lr, rounded_rho = _float32(learning_rate).value, _float32(rho).value
        if (
            learning_rate >= 0.0
            and rounded_lr <= _FLOAT32_MAX
            and 0.0 <= rho <= 1.0
            and 0.0 < epsilon <= sys.float_info.max
        ):
            values = (rounded_lr, rounded_rho, epsilon)
            _last_floats = (learning_rate, rho, epsilon, values)
            return values
    return (
        learning_rate if is_scheduled else _for_step("learning_rate", learning_rate, keep_tensor),
        _for_step("rho", rho, keep_tensor),
        _for_step("epsilon", epsilon, keep_tensor),
    )


# ---- Schedules, callables and decay ---------------------------------------------------------------------------------


class Source:
    """A schedule or callable that the user gave for a hyperparameter.

    The param group holds the value that was last taken from it, so that whoever reads a group finds a number there. A
    value that somebody else wrote there would be lost without a word; `is_foreign` tells.
    """

    def __init__(self, name: str, given: Callable[..., Any], current: Any) -> None:
        self.name = name
        self.given = given
        self.is_schedule = isinstance(given, LearningRateSchedule)
        self.wrote(current)

    def wrote(self, value: Any) -> None:
        """Remembers what is in the param group now."""
        self._written, self._version = value, _version(value)

    def is_foreign(self, value: Any) -> bool:
        """Whether `value`, found in the param group, is not what was written there last."""
        if isinstance(value, Tensor):
            # A callable may return a Tensor that the user fills. That of a schedule is nobody else's to fill.
            return value is not self._written or (self.is_schedule and _version(value) != self._version)
        return isinstance(self._written, Tensor) or value != self._written

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_version"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._version = _version(self._written)  # a copy counts its versions anew


def _version(value: Any) -> int | None:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


def is_source(value: Any) -> bool:
    """Whether `value` is a schedule or a callable instead of a value."""
    return callable(value) and not isinstance(value, Tensor)


def check_source(name: str, value: Any) -> None:
    """Raises TypeError if `value` is a schedule that cannot be one for this hyperparameter."""
    if isinstance(value, LearningRateSchedule) and name != "learning_rate":
        raise TypeError(f"{name} must be a number, a one-element Tensor or a callable, got the schedule {value!r}")
    if isinstance(value, type):
        raise TypeError(f"{name} must be a number, a one-element Tensor or a callable, got the class {value.__name__}")
    library = type(value).__module__.partition(".")[0]
    if library in ("keras", "tf_keras", "tensorflow") and hasattr(value, "get_config"):
        raise TypeError(
            f"{name} is a {type(value).__name__} of {library}, which computes with the tensors of {library}. Use the "
            "class of that name in torch_adadelta.schedules, or torch_adadelta.schedules.deserialize("
            f"{library}.optimizers.schedules.serialize(schedule))"
        )


def at_step(schedule: Callable[..., Any], iterations: int | Tensor, T: torch.dtype) -> Value:
    """The learning rate of a schedule at a step, which it is told as a Tensor in T, on the device of `iterations`.

    A float if `iterations` is an int; else what the schedule returned. Keras lets a schedule be negative, and so it may
    be here.

    Raises:
        TypeError: the schedule returned no number and no real Tensor.
        ValueError: it returned nan, an infinity, or a Tensor of several elements.
    """
    step = iterations.to(T) if isinstance(iterations, Tensor) else torch.tensor(float(iterations), dtype=T)
    value: Any = schedule(step)
    what = f"the schedule {type(schedule).__name__}"
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.dtype is torch.bool:
            raise ValueError(
                f"{what} returned a Tensor of shape {tuple(value.shape)} and dtype {value.dtype}, not a number"
            )
        if isinstance(iterations, Tensor):
            return value.reshape(())
        value = value.item()
    elif _is_numpy_scalar(value):
        value = value.item()
    elif isinstance(value, float):
        value = round_to_float32(value) if math.isfinite(value) else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{what} returned {value!r} of type {type(value).__name__}, not a number")
    if not abs(value) <= _FLOAT32_MAX:
        raise ValueError(f"{what} returned {value!r} at step {float(step):.0f}; a learning rate must be finite")
    return float(value)


def decayed(lr: Value, decay: float | Tensor, iterations: int | Tensor, T: torch.dtype) -> Value:
    """Lr / (1 + decay * iterations), every operation rounded to T."""
    decay = float(decay) if isinstance(decay, Tensor) else _number("decay", decay)
    if not isinstance(lr, Tensor) and not isinstance(iterations, Tensor):
        divisor = rounded(1.0 + rounded(rounded(decay, T) * rounded(float(iterations), T), T), T)
        return rounded(rounded(lr, T) / divisor, T)
    device = iterations.device if isinstance(iterations, Tensor) else lr.device  # type: ignore[union-attr]
    t = iterations.to(T) if isinstance(iterations, Tensor) else float(iterations)
    numerator = lr.to(device, T).reshape(()) if isinstance(lr, Tensor) else torch.full((), lr, dtype=T, device=device)
    return numerator / (1 + torch.full((), decay, dtype=T, device=device) * t)


def rounded(number: float, T: torch.dtype) -> float:
    """`number` in T.

    Correctly rounded too where it is a sum, product, quotient or root of float32 numbers that was computed in double:
    double has digits enough that the two roundings end where one would.
    """
    return round_to_float32(number) if T is torch.float32 else number


def cast(value: Value, dtype: torch.dtype, device: torch.device) -> Value:
    """`value` in the arithmetic type: a float that `dtype` holds exactly, or a 0-dim Tensor on `device`."""
    if isinstance(value, Tensor):
        return value.to(dtype=dtype, device=device).reshape(())
    return rounded(value, dtype)


def one_minus(rho: Value, dtype: torch.dtype) -> Value:
    """1 - rho, subtracted in the arithmetic type: 0.050000012, not 0.05, for the float32 neighbour of 0.95."""
    if isinstance(rho, Tensor):
        return 1 - rho
    # The difference of two float32 numbers rounded to double and then to float32 is the correctly rounded one.
    return cast(1.0 - rho, dtype, torch.device("cpu"))
