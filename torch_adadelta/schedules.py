"""The learning-rate schedules of tf.keras with the same numbers, for a step number or a step Tensor on any device.

Keras computes a schedule in the dtype of its initial learning rate, and so does this module. This dtype, called T, is
float64 for a float64 Tensor or NumPy scalar, and float32 otherwise. Every operation is rounded separately, in the order
of Keras. Python numbers are rounded to float32 before they are cast to T.

A step Tensor gives a Tensor. The computation runs on its device, without synchronization and without branches on
values, so a CUDA graph can capture it and torch.compile can trace it. A step number is computed in the same way on the
CPU, and gives a float with the same bits.

Constants are 0-dim Tensors on the device, not Python numbers: on CUDA, PyTorch replaces the division by a number with a
multiplication by its reciprocal, which rounds twice.
"""

import ctypes
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar, overload

import torch
from torch import Tensor

from torch_adadelta.backends.opmath import is_numpy_scalar

__all__ = [
    "LearningRateSchedule",
    "ExponentialDecay",
    "PiecewiseConstantDecay",
    "PolynomialDecay",
    "InverseTimeDecay",
    "CosineDecay",
    "CosineDecayRestarts",
    "LinearCosineDecay",
    "NoisyLinearCosineDecay",
    "serialize",
    "deserialize",
]

# What a hyperparameter is in one step.
Value = float | Tensor
Schedule = TypeVar("Schedule", bound="LearningRateSchedule")

_FLOAT32_MAX: Final = torch.finfo(torch.float32).max
_PI: Final = 3.141592653589793
_SQRT_2: Final = 1.4142135623730951
_UINT32_MAX: Final = 0xFFFFFFFF


# ---- Arguments ------------------------------------------------------------------------------------------------------


def _check(name: str, value: Any, holds: Callable[[float], bool], text: str) -> Any:
    """`value` itself, if it is a number, or a Tensor of one, for which `holds`. Tensors on a device are not read.

    A NumPy scalar, which torch.compile cannot trace, becomes a number, or a float64 Tensor if it is a float64.
    """
    given = number = value
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{name} must be a number or a one-element Tensor, got a Tensor of shape {tuple(value.shape)}"
            )
        if value.is_complex() or value.dtype is torch.bool:
            raise TypeError(f"{name} must be a real number, got a Tensor of {value.dtype}")
        if value.is_meta:
            raise ValueError(f"{name} is a Tensor on the meta device, which has no value")
        if value.device.type != "cpu":
            return value
        number = value.detach().item()
    elif is_numpy_scalar(value):
        number = value.item()
        value = torch.tensor(number, dtype=torch.float64, device="cpu") if value.dtype == "float64" else number
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(
            f"{name} must be a number or a one-element Tensor, got {given!r} of type {type(given).__name__}"
        )
    if not abs(number) <= _FLOAT32_MAX or not holds(number):  # nan compares false
        raise ValueError(f"Invalid {name}: {given!r}; it must be {text}")
    return value


def _finite(name: str, value: Any) -> Any:
    return _check(name, value, lambda number: True, "a finite number that fits float32")


def _positive(name: str, value: Any) -> Any:
    # Rounded to float32 first: a smaller number would become 0, and be divided by.
    text = "a finite number > 0 that fits float32"
    return _check(name, value, lambda number: ctypes.c_float(number).value > 0.0, text)


def _not_negative(name: str, value: Any) -> Any:
    return _check(name, value, lambda number: number >= 0.0, "a finite number >= 0 that fits float32")


def _boolean(name: str, value: Any) -> bool:
    plain = value.item() if is_numpy_scalar(value) else value
    if not isinstance(plain, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}")
    return plain


def _name(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"name must be a string or None, got {value!r} of type {type(value).__name__}")
    return value


def _list(name: str, values: Any) -> list[Any]:
    if not isinstance(values, list | tuple):
        raise TypeError(f"{name} must be a list of numbers, got {values!r} of type {type(values).__name__}")
    return [_finite(f"{name}[{i}]", value) for i, value in enumerate(values)]


# ---- Arithmetic -----------------------------------------------------------------------------------------------------


def _dtype_of(learning_rate: Any) -> torch.dtype:
    """T: float64 for a float64 Tensor, which a NumPy scalar has become, else float32."""
    is_float64 = isinstance(learning_rate, Tensor) and learning_rate.dtype is torch.float64
    return torch.float64 if is_float64 else torch.float32


def _tensor(value: Any, T: torch.dtype, device: torch.device, number_dtype: torch.dtype = torch.float32) -> Tensor:
    """An argument as a 0-dim Tensor on `device`, without a copy that the host would have to wait for.

    A float is rounded to `number_dtype` first: TensorFlow makes a float32 of it, and casts that to T.
    """
    if isinstance(value, float):
        return torch.full((), value, dtype=number_dtype, device=device).to(T)
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=T, device=device)
    value = value.reshape(()).to(T)
    if value.device.type == "cpu" and device.type != "cpu":
        # A 0-dim CPU operand is read when the kernel is launched, as a number is.
        return value + torch.zeros((), dtype=T, device=device)
    return value.to(device)


def _in_T(step: Tensor, learning_rate: Any, *values: Any) -> tuple[Tensor, ...]:
    """The step, the learning rate and the other values in T, which is the learning rate's, on the step's device."""
    T = _dtype_of(learning_rate)
    return step.to(T), *(_tensor(value, T, step.device) for value in (learning_rate, *values))


def _rounded_once(function: Callable[..., Tensor], *operands: Tensor) -> Tensor:
    """`function` in float64, rounded to T once.

    PyTorch's float32 functions differ from each other between devices and vector widths, and those of the CPU from
    TensorFlow's: measured on x86, 5 % of all cosines, 2 % of logarithms and 17 % of roots by one ulp. Rounded once,
    logarithms and roots are TensorFlow's, and 1.4 % of cosines and 0.05 % of powers are an ulp away.
    """
    return function(*(x.double() for x in operands)).to(operands[0].dtype)


def _half_cosine(fraction: Tensor, scale: Tensor | float = 0.5) -> Tensor:
    """The product of `scale` and 1 + cos(pi * fraction)."""
    pi = torch.full((), _PI, dtype=fraction.dtype, device=fraction.device)
    return scale * (1.0 + _rounded_once(torch.cos, pi * fraction))


def _step_tensor(step: Any) -> Tensor:
    """A step number as TensorFlow converts it: a float is rounded to float32, an int and a NumPy scalar are kept."""
    if is_numpy_scalar(step):
        number, dtype = step.item(), torch.as_tensor(step).dtype
    else:
        number, dtype = step, torch.float32 if isinstance(step, float) else torch.int64
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(f"step must be a number or a one-element Tensor, got {step!r} of type {type(step).__name__}")
    if not number >= 0 or (isinstance(number, int) and number >= 2**63):
        raise ValueError(f"Invalid step: {step!r}; it must be a number >= 0 below 2**63, the count of finished steps")
    return torch.full((), number, dtype=dtype, device="cpu")


def _scalar_step(step: Tensor) -> Tensor:
    if step.numel() != 1:
        raise ValueError(f"step must be a number or a one-element Tensor, got a Tensor of shape {tuple(step.shape)}")
    if step.is_complex() or step.dtype is torch.bool:
        raise TypeError(f"step must be a real number, got a Tensor of {step.dtype}")
    return step.reshape(())


# ---- The base -------------------------------------------------------------------------------------------------------


class LearningRateSchedule:
    """Base class of all schedules. A schedule gives the learning rate of a step.

    A subclass overrides `__call__` and, to be saved with an optimizer, `get_config`:

        class Inverse(LearningRateSchedule):
            def __init__(self, learning_rate):
                self.learning_rate = learning_rate

            def __call__(self, step):
                return self.learning_rate / (step + 1)

            def get_config(self):
                return {"learning_rate": self.learning_rate}

    Source: `tf.keras.optimizers.schedules.LearningRateSchedule`.
    """

    def __call__(self, step: Any) -> Any:
        """The learning rate of a step. The step is a number or a one-element Tensor and counts from 0."""
        raise NotImplementedError(f"{type(self).__name__} must override `__call__(self, step)`")

    def get_config(self) -> dict[str, Any]:
        """The keyword arguments of the constructor, as plain Python values."""
        raise NotImplementedError(f"{type(self).__name__} must override `get_config(self)` to be saved")

    @classmethod
    def from_config(cls: type[Schedule], config: Mapping[str, Any]) -> Schedule:
        """Makes a schedule from the output of `get_config`, of this package or of Keras."""
        return cls(**{key: _from_keras(value) for key, value in config.items()})

    def __repr__(self) -> str:
        try:
            config = self.get_config()
        except NotImplementedError:
            return object.__repr__(self)
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in config.items())})"


class _KerasSchedule(LearningRateSchedule):
    """What the schedules of Keras share: both kinds of step, and the config."""

    name: str | None

    @overload
    def __call__(self, step: float) -> float: ...
    @overload
    def __call__(self, step: Tensor) -> Tensor: ...
    def __call__(self, step: float | Tensor) -> float | Tensor:
        """The learning rate of a step.

        Args:
            step (float or Tensor): a number >= 0, or a one-element Tensor of an integer or floating dtype, whose value
                is not checked. It is rounded to T: in float32, steps beyond 2**24 may coincide.

        Returns:
            For a number, a float that holds the value in T. For a Tensor, a 0-dim Tensor in T on the device of the
            step. The host waits for a device only if an argument of the schedule is a Tensor on another device.

        Raises:
            TypeError: `step` is not a number or Tensor, or it is a complex or boolean Tensor.
            ValueError: `step` is negative or nan, or a Tensor without exactly one element.
        """
        if isinstance(step, Tensor):
            return self._value(_scalar_step(step))
        return self._value(_step_tensor(step)).item()

    def _value(self, step: Tensor) -> Tensor:
        raise NotImplementedError

    def _config(self, *names: str) -> dict[str, Any]:
        config = {name: _plain(getattr(self, name)) for name in names}
        if "initial_learning_rate" in config:
            # With an int Keras would compute in integers.
            config["initial_learning_rate"] = float(config["initial_learning_rate"])
        if self.name is not None:  # its absence means None to r2.4, but Keras 3 cannot call a schedule without a name
            config["name"] = self.name
        return config


def _plain(value: Any) -> Any:
    """A Python number, for what can be saved as JSON and loaded by `torch.load(weights_only=True)`."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, Tensor) or is_numpy_scalar(value) else value


def _from_keras(value: Any) -> Any:
    """A value of a config, where Keras writes a Tensor as {"class_name": "__tensor__", "config": {...}}."""
    if isinstance(value, list):
        return [_from_keras(item) for item in value]
    if isinstance(value, Mapping) and value.get("class_name") in ("__tensor__", "__numpy__"):
        return torch.tensor(value["config"]["value"], dtype=getattr(torch, value["config"]["dtype"]), device="cpu")
    return value


# ---- The schedules --------------------------------------------------------------------------------------------------


class _RateDecay(_KerasSchedule):
    """What the schedules with a `decay_rate` share; each has its own constructor, which an error names."""

    def _take(self, initial_learning_rate: Value, decay_steps: Value, decay_rate: Value, staircase: bool) -> None:
        self.initial_learning_rate = _finite("initial_learning_rate", initial_learning_rate)
        self.decay_steps = _positive("decay_steps", decay_steps)
        self.decay_rate = _finite("decay_rate", decay_rate)
        self.staircase = _boolean("staircase", staircase)

    def _terms(self, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """In T: the initial learning rate, the decay rate, and how often `decay_steps` have passed."""
        t, lr, decay_steps, decay_rate = _in_T(step, self.initial_learning_rate, self.decay_steps, self.decay_rate)
        periods = t / decay_steps
        return lr, decay_rate, torch.floor(periods) if self.staircase else periods

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as plain Python values."""
        return self._config("initial_learning_rate", "decay_steps", "decay_rate", "staircase")


class ExponentialDecay(_RateDecay):
    """Multiplies the learning rate by `decay_rate` every `decay_steps` steps.

    The learning rate of a step is::

        initial_learning_rate * decay_rate ** (step / decay_steps)

    Args:
        initial_learning_rate (float or Tensor): the learning rate of step 0: a number, a NumPy scalar or a one-element
            Tensor.
        decay_steps (float or Tensor): the number of steps for one multiplication, > 0.
        decay_rate (float or Tensor): the factor.
        staircase (bool, optional): round the exponent down, so that the rate is constant for `decay_steps` steps.
            (default: False)
        name (str, optional): for Keras; it has no effect. (default: None)

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a number is nan, infinite or out of range.

    Source: `tf.keras.optimizers.schedules.ExponentialDecay`.
    """

    def __init__(
        self,
        initial_learning_rate: Value,
        decay_steps: Value,
        decay_rate: Value,
        staircase: bool = False,
        name: str | None = None,
    ) -> None:
        self._take(initial_learning_rate, decay_steps, decay_rate, staircase)
        self.name = _name(name)

    def _value(self, step: Tensor) -> Tensor:
        lr, decay_rate, exponent = self._terms(step)
        return lr * _rounded_once(torch.pow, decay_rate, exponent)


class PiecewiseConstantDecay(_KerasSchedule):
    """Uses a constant learning rate in each interval between boundaries.

        values[0]     step <= boundaries[0]
        values[i]     boundaries[i - 1] < step <= boundaries[i]
        values[-1]    step > boundaries[-1]

    As in Keras, boundaries are cast to the dtype of the step before the comparison, and floats to float32 first. So
    with an integer step, boundaries lose their fraction. With a float32 step, a boundary beyond 2**24 is rounded to a
    neighbour. Integer steps are compared as int64, whatever their width.

    Args:
        boundaries (list): numbers, NumPy scalars or one-element Tensors, strictly increasing.
        values (list): the learning rates, one more than there are boundaries. The dtype of the first one determines T.
        name (str, optional): for Keras; it has no effect. (default: None)

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: the lengths do not match, the boundaries do not increase, or a number is nan or infinite.

    Source: `tf.keras.optimizers.schedules.PiecewiseConstantDecay`.
    """

    def __init__(self, boundaries: Sequence[Value], values: Sequence[Value], name: str | None = None) -> None:
        self.boundaries = _list("boundaries", boundaries)
        self.values = _list("values", values)
        self.name = _name(name)
        if len(self.values) != len(self.boundaries) + 1:
            raise ValueError(
                f"values must be one more than boundaries, got {len(self.values)} values for {len(self.boundaries)} "
                "boundaries; the first value is for the steps up to the first boundary"
            )
        known = [x for x in self.boundaries if not isinstance(x, Tensor) or x.device.type == "cpu"]
        if any(low >= high for low, high in itertools.pairwise(known)):
            raise ValueError(f"boundaries must increase strictly, got {_plain(known)}")

    def _value(self, step: Tensor) -> Tensor:
        T = _dtype_of(self.values[0])
        if not step.is_floating_point():
            step = step.to(torch.int64)
        elif step.dtype.itemsize == 1:
            step = step.float()  # PyTorch compares no float8
        value = _tensor(self.values[0], T, step.device)
        for boundary, after in zip(self.boundaries, self.values[1:], strict=True):
            value = torch.where(
                step > _tensor(boundary, step.dtype, step.device), _tensor(after, T, step.device), value
            )
        return value

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as plain Python values."""
        config = self._config("boundaries", "values")
        config["values"] = [float(value) for value in config["values"]]  # Keras refuses a mixture of int and float
        return config


class PolynomialDecay(_KerasSchedule):
    """Decays from one learning rate to another, along a line or another power.

    The learning rate of a step is::

        t = min(step, decay_steps)
        (initial_learning_rate - end_learning_rate) * (1 - t / decay_steps) ** power + end_learning_rate

    With `cycle`, t is the step, and `decay_steps` is multiplied by ceil(step / decay_steps), or by 1 at step 0. The
    learning rate reaches `end_learning_rate` at each multiple of `decay_steps`. The next step restarts, and later
    cycles restart higher. (Beyond 2**24 steps, rounding may bring t above the multiple. A fractional power is then nan,
    as in Keras.)

    Args:
        initial_learning_rate (float or Tensor): the learning rate of step 0: a number, a NumPy scalar or a one-element
            Tensor.
        decay_steps (float or Tensor): the number of steps to the end, > 0.
        end_learning_rate (float or Tensor, optional): the learning rate at the end. (default: 0.0001)
        power (float or Tensor, optional): the power; 1.0 is a line. (default: 1.0)
        cycle (bool, optional): restart after `decay_steps` instead of staying at the end. (default: False)
        name (str, optional): for Keras; it has no effect. (default: None)

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a number is nan, infinite or out of range.

    Source: `tf.keras.optimizers.schedules.PolynomialDecay`.
    """

    def __init__(
        self,
        initial_learning_rate: Value,
        decay_steps: Value,
        end_learning_rate: Value = 0.0001,
        power: Value = 1.0,
        cycle: bool = False,
        name: str | None = None,
    ) -> None:
        self.initial_learning_rate = _finite("initial_learning_rate", initial_learning_rate)
        self.decay_steps = _positive("decay_steps", decay_steps)
        self.end_learning_rate = _finite("end_learning_rate", end_learning_rate)
        self.power = _finite("power", power)
        self.cycle = _boolean("cycle", cycle)
        self.name = _name(name)

    def _value(self, step: Tensor) -> Tensor:
        t, lr, decay_steps, end_lr, power = _in_T(
            step, self.initial_learning_rate, self.decay_steps, self.end_learning_rate, self.power
        )
        if self.cycle:
            decay_steps = decay_steps * torch.where(t == 0, torch.ones_like(t), torch.ceil(t / decay_steps))
        else:
            t = torch.minimum(t, decay_steps)
        return (lr - end_lr) * _rounded_once(torch.pow, 1 - t / decay_steps, power) + end_lr

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as plain Python values."""
        return self._config("initial_learning_rate", "decay_steps", "end_learning_rate", "power", "cycle")


class InverseTimeDecay(_RateDecay):
    """Divides the learning rate by a number that grows with the step.

    The learning rate of a step is::

        initial_learning_rate / (1 + decay_rate * step / decay_steps)

    Args:
        initial_learning_rate (float or Tensor): the learning rate of step 0: a number, a NumPy scalar or a one-element
            Tensor.
        decay_steps (float or Tensor): the number of steps in which the divisor grows by `decay_rate`, > 0.
        decay_rate (float or Tensor): the growth of the divisor.
        staircase (bool, optional): round step / decay_steps down, so that the rate is constant for `decay_steps` steps.
            (default: False)
        name (str, optional): for Keras; it has no effect. (default: None)

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a number is nan, infinite or out of range.

    Source: `tf.keras.optimizers.schedules.InverseTimeDecay`.
    """

    def __init__(
        self,
        initial_learning_rate: Value,
        decay_steps: Value,
        decay_rate: Value,
        staircase: bool = False,
        name: str | None = None,
    ) -> None:
        self._take(initial_learning_rate, decay_steps, decay_rate, staircase)
        self.name = _name(name)

    def _value(self, step: Tensor) -> Tensor:
        lr, decay_rate, fraction = self._terms(step)
        return lr / (1 + decay_rate * fraction)


class CosineDecay(_KerasSchedule):
    """Decays along half a cosine to `alpha` times the learning rate, after an optional linear warm-up.

    The learning rate of a step is::

        t = min(step, decay_steps)
        initial_learning_rate * ((1 - alpha) * 0.5 * (1 + cos(pi * t / decay_steps)) + alpha)

    With a `warmup_target`, the first `warmup_steps` steps are

        (warmup_target - initial_learning_rate) * step / warmup_steps + initial_learning_rate

    and the decay above follows, from `warmup_target` and with step - warmup_steps.

    Args:
        initial_learning_rate (float or Tensor): the learning rate of step 0: a number, a NumPy scalar or a one-element
            Tensor.
        decay_steps (float or Tensor): the number of steps of the decay, > 0.
        alpha (float or Tensor, optional): the learning rate at the end, as a fraction of the highest. (default: 0.0)
        name (str, optional): for Keras; it has no effect. (default: None)
        warmup_target (float or Tensor, optional): the learning rate at the end of the warm-up; None for no warm-up.
            (default: None)
        warmup_steps (float or Tensor, optional): the number of steps of the warm-up, >= 0. With 0, the decay from
            `warmup_target` begins at once. Without a `warmup_target` it has no effect. (default: 0)

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a number is nan, infinite or out of range.

    Sources: `tf.keras.experimental.CosineDecay`, and for the warm-up `keras.optimizers.schedules.CosineDecay` of Keras
    3; Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, https://arxiv.org/abs/1608.03983.
    """

    def __init__(
        self,
        initial_learning_rate: Value,
        decay_steps: Value,
        alpha: Value = 0.0,
        name: str | None = None,
        warmup_target: Value | None = None,
        warmup_steps: Value = 0,
    ) -> None:
        self.initial_learning_rate = _finite("initial_learning_rate", initial_learning_rate)
        self.decay_steps = _positive("decay_steps", decay_steps)
        self.alpha = _finite("alpha", alpha)
        self.name = _name(name)
        self.warmup_target = None if warmup_target is None else _finite("warmup_target", warmup_target)
        self.warmup_steps = _not_negative("warmup_steps", warmup_steps)

    def _value(self, step: Tensor) -> Tensor:
        t, lr, decay_steps = _in_T(step, self.initial_learning_rate, self.decay_steps)
        # In this schedule alone Keras subtracts alpha from 1 before it is rounded, and rounds it to T at once.
        one_minus_alpha, alpha = (
            _tensor(x, t.dtype, t.device, number_dtype=t.dtype) for x in (1 - self.alpha, self.alpha)
        )
        if self.warmup_target is None:
            return lr * (one_minus_alpha * _half_cosine(torch.minimum(t, decay_steps) / decay_steps) + alpha)
        target, warmup_steps = (_tensor(value, t.dtype, t.device) for value in (self.warmup_target, self.warmup_steps))
        t = torch.minimum(t, decay_steps + warmup_steps)
        warming_up = (target - lr) * (t / warmup_steps) + lr
        decaying = target * (one_minus_alpha * _half_cosine((t - warmup_steps) / decay_steps) + alpha)
        return torch.where(t < warmup_steps, warming_up, decaying)

    def get_config(self) -> dict[str, Any]:
        """The arguments, as plain Python values. Those of the warm-up, which r2.4 does not have, only if set."""
        config = self._config("initial_learning_rate", "decay_steps", "alpha", "warmup_target", "warmup_steps")
        if config["warmup_target"] is None and config["warmup_steps"] == 0:
            del config["warmup_target"], config["warmup_steps"]
        return config


class CosineDecayRestarts(_KerasSchedule):
    """Decays along half a cosine in each period. Each period has its own length and initial learning rate.

    Period i lasts ``first_decay_steps * t_mul ** i`` steps. In it, with x from 0 to 1, the learning rate is::

        initial_learning_rate * ((1 - alpha) * 0.5 * m_mul ** i * (1 + cos(pi * x)) + alpha)

    If `t_mul` is not 1, i is the quotient of two logarithms, rounded down, as in Keras. In float32 it may fall on the
    wrong side of an integer. With `t_mul=2`, the 13th and the 15th restart come one step late. Restarts after some
    hundred times `first_decay_steps` may come a few steps early.

    Args:
        initial_learning_rate (float or Tensor): the learning rate of step 0: a number, a NumPy scalar or a one-element
            Tensor.
        first_decay_steps (float or Tensor): the number of steps of the first period, > 0.
        t_mul (float or Tensor, optional): the ratio of the lengths of successive periods, > 0. Below 1, the periods end
            after first_decay_steps / (1 - t_mul) steps, and the value is nan from there on, as in Keras. (default: 2.0)
        m_mul (float or Tensor, optional): the ratio of the heights of successive periods. (default: 1.0)
        alpha (float or Tensor, optional): the learning rate at the end of each period, as a fraction of the initial
            one. (default: 0.0)
        name (str, optional): for Keras; it has no effect. (default: None)

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a number is nan, infinite or out of range.

    Sources: `tf.keras.experimental.CosineDecayRestarts`; Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with
    Warm Restarts, https://arxiv.org/abs/1608.03983.
    """

    def __init__(
        self,
        initial_learning_rate: Value,
        first_decay_steps: Value,
        t_mul: Value = 2.0,
        m_mul: Value = 1.0,
        alpha: Value = 0.0,
        name: str | None = None,
    ) -> None:
        self.initial_learning_rate = _finite("initial_learning_rate", initial_learning_rate)
        self.first_decay_steps = _positive("first_decay_steps", first_decay_steps)
        self.t_mul = _positive("t_mul", t_mul)
        self.m_mul = _finite("m_mul", m_mul)
        self.alpha = _finite("alpha", alpha)
        self.name = _name(name)

    def _value(self, step: Tensor) -> Tensor:
        t, lr, first_decay_steps, t_mul, m_mul, alpha = _in_T(
            step, self.initial_learning_rate, self.first_decay_steps, self.t_mul, self.m_mul, self.alpha
        )
        elapsed = t / first_decay_steps  # in first periods

        # All periods equally long.
        period = torch.floor(elapsed)
        fraction = elapsed - period

        # Each t_mul times as long: a geometric series.
        logarithm = _rounded_once(torch.log, 1.0 - elapsed * (1.0 - t_mul))
        geometric_period = torch.floor(logarithm / _rounded_once(torch.log, t_mul))
        length = _rounded_once(torch.pow, t_mul, geometric_period)
        geometric_fraction = (elapsed - (1.0 - length) / (1.0 - t_mul)) / length

        are_equal = t_mul == 1.0
        period = torch.where(are_equal, period, geometric_period)
        fraction = torch.where(are_equal, fraction, geometric_fraction)
        height = _rounded_once(torch.pow, m_mul, period)
        return lr * ((1 - alpha) * _half_cosine(fraction, 0.5 * height) + alpha)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as plain Python values."""
        return self._config("initial_learning_rate", "first_decay_steps", "t_mul", "m_mul", "alpha")


class LinearCosineDecay(_KerasSchedule):
    """Decays along a line multiplied by a cosine.

    The learning rate of a step is::

        t = min(step, decay_steps)
        linear = (decay_steps - t) / decay_steps
        cosine = 0.5 * (1 + cos(pi * 2 * num_periods * t / decay_steps))
        initial_learning_rate * ((alpha + linear) * cosine + beta)

    Args:
        initial_learning_rate (float or Tensor): the learning rate that is scaled: a number, a NumPy scalar or a
            one-element Tensor.
        decay_steps (float or Tensor): the number of steps of the decay, > 0.
        num_periods (float or Tensor, optional): the number of full periods of the cosine in the decay. (default: 0.5)
        alpha (float or Tensor, optional): added to the line. (default: 0.0)
        beta (float or Tensor, optional): added to the product. (default: 0.001)
        name (str, optional): for Keras; it has no effect. (default: None)

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a number is nan, infinite or out of range.

    Sources: `tf.keras.experimental.LinearCosineDecay` of TensorFlow r2.4; Bello et al., Neural Optimizer Search with
    Reinforcement Learning, https://arxiv.org/abs/1709.07417.
    """

    def __init__(
        self,
        initial_learning_rate: Value,
        decay_steps: Value,
        num_periods: Value = 0.5,
        alpha: Value = 0.0,
        beta: Value = 0.001,
        name: str | None = None,
    ) -> None:
        self.initial_learning_rate = _finite("initial_learning_rate", initial_learning_rate)
        self.decay_steps = _positive("decay_steps", decay_steps)
        self.num_periods = _finite("num_periods", num_periods)
        self.alpha = _finite("alpha", alpha)
        self.beta = _finite("beta", beta)
        self.name = _name(name)

    def _value(self, step: Tensor) -> Tensor:
        t, lr, decay_steps, num_periods, alpha, beta = _in_T(
            step, self.initial_learning_rate, self.decay_steps, self.num_periods, self.alpha, self.beta
        )
        t = torch.minimum(t, decay_steps)
        linear = self._line((decay_steps - t) / decay_steps, t, step)
        cosine = _half_cosine(2.0 * num_periods * (t / decay_steps))
        return lr * ((alpha + linear) * cosine + beta)

    def _line(self, linear: Tensor, t: Tensor, step: Tensor) -> Tensor:
        return linear

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as plain Python values."""
        return self._config("initial_learning_rate", "decay_steps", "num_periods", "alpha", "beta")


class NoisyLinearCosineDecay(LinearCosineDecay):
    """Decays along a line with noise, multiplied by a cosine.

    The learning rate of a step is::

        t = min(step, decay_steps)
        linear = (decay_steps - t) / decay_steps
        noise ~ N(0, initial_variance / (1 + t) ** variance_decay)
        cosine = 0.5 * (1 + cos(pi * 2 * num_periods * t / decay_steps))
        initial_learning_rate * ((alpha + linear + noise) * cosine + beta)

    The value may be negative, as in Keras. In Keras, the noise comes from a generator with a state. Here it is a
    function of only the seed and the step (rounded down, modulo 2**32). So a resumed run has the same noise as an
    uninterrupted one, and repeated calls with one step return the same value.

    If several processes train one model, pass a seed. Otherwise each process draws its own.

    `get_config` includes the seed. tf_keras reads this config, and draws other noise from the seed. Keras 3 has no such
    schedule. r2.4 has no seed: call `config.pop("seed")` before its `from_config`.

    Args:
        initial_learning_rate (float or Tensor): the learning rate that is scaled: a number, a NumPy scalar or a
            one-element Tensor.
        decay_steps (float or Tensor): the number of steps of the decay, > 0.
        initial_variance (float or Tensor, optional): the variance of the noise at step 0, >= 0. (default: 1.0)
        variance_decay (float or Tensor, optional): the power with which the variance falls. (default: 0.55)
        num_periods (float or Tensor, optional): the number of full periods of the cosine in the decay. (default: 0.5)
        alpha (float or Tensor, optional): added to the line. (default: 0.0)
        beta (float or Tensor, optional): added to the product. (default: 0.001)
        name (str, optional): for Keras; it has no effect. (default: None)
        seed (int, optional): the seed of the noise. None draws one from PyTorch's default generator, once, in the
            constructor. (default: None)

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a number is nan, infinite or out of range.

    Sources: `tf.keras.experimental.NoisyLinearCosineDecay` of TensorFlow r2.4; Bello et al., Neural Optimizer Search
    with Reinforcement Learning, https://arxiv.org/abs/1709.07417; for the hash of the noise, lowbias32 of
    https://github.com/skeeto/hash-prospector.
    """

    def __init__(
        self,
        initial_learning_rate: Value,
        decay_steps: Value,
        initial_variance: Value = 1.0,
        variance_decay: Value = 0.55,
        num_periods: Value = 0.5,
        alpha: Value = 0.0,
        beta: Value = 0.001,
        name: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(initial_learning_rate, decay_steps, num_periods, alpha, beta, name)
        self.initial_variance = _not_negative("initial_variance", initial_variance)
        self.variance_decay = _finite("variance_decay", variance_decay)
        given, seed = seed, _plain(seed)
        if seed is None:
            seed = int(torch.randint(2**31, (), device="cpu"))
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an int or None, got {given!r} of type {type(given).__name__}")
        self._seed = seed
        # Seeds that people choose are close to each other; what is made of them must not be.
        digest = hashlib.blake2b(str(seed).encode(), digest_size=8).digest()
        self._keys = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")

    @property
    def seed(self) -> int:
        """The seed of the noise."""
        return self._seed

    def _line(self, linear: Tensor, t: Tensor, step: Tensor) -> Tensor:
        initial_variance, variance_decay = (
            _tensor(value, t.dtype, t.device) for value in (self.initial_variance, self.variance_decay)
        )
        variance = initial_variance / _rounded_once(torch.pow, 1.0 + t, variance_decay)
        return linear + _standard_normal(step, self._keys).to(t.dtype) * _rounded_once(torch.sqrt, variance)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as plain Python values, with the seed that was given or drawn."""
        names = ("initial_learning_rate", "decay_steps", "initial_variance", "variance_decay", "num_periods")
        return self._config(*names, "alpha", "beta", "seed")


def _hashed(x: Tensor) -> Tensor:
    """lowbias32: a bijection of [0, 2**32) in which each bit of `x` changes each bit of the result half the time.

    In int64, where no product overflows: the second factor, taken modulo 2**32, is the one nearer to 0.
    """
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _UINT32_MAX
    x = x ^ (x >> 15)
    x = (x * (0x846CA68B - 2**32)) & _UINT32_MAX
    return x ^ (x >> 16)


def _standard_normal(step: Tensor, keys: tuple[int, int]) -> Tensor:
    """A draw from N(0, 1) in float64: the hash of the keys and the step, through the inverse of the distribution."""
    counter = step.to(torch.int64) & _UINT32_MAX
    hashed = _hashed(_hashed(counter ^ keys[0]) ^ keys[1])
    return _SQRT_2 * torch.erfinv((hashed.double() + 0.5) * 2.0**-31 - 1.0)


# ---- Saving ---------------------------------------------------------------------------------------------------------

_CLASSES: Final[dict[str, type[LearningRateSchedule]]] = {
    schedule.__name__: schedule
    for schedule in (
        ExponentialDecay,
        PiecewiseConstantDecay,
        PolynomialDecay,
        InverseTimeDecay,
        CosineDecay,
        CosineDecayRestarts,
        LinearCosineDecay,
        NoisyLinearCosineDecay,
    )
}

_KERAS_PACKAGES: Final = frozenset(("keras", "tf_keras", "tensorflow"))


def serialize(schedule: LearningRateSchedule) -> dict[str, Any]:
    """Converts a schedule to a dictionary that `deserialize`, here and in every Keras, converts back.

    Args:
        schedule (LearningRateSchedule): a schedule of this package, or your own with `get_config`.

    Returns:
        A dictionary with the name of its class under ``"class_name"``, and its arguments under ``"config"``, as plain
        Python values.

    Raises:
        TypeError: `schedule` is not a LearningRateSchedule.
    """
    if not isinstance(schedule, LearningRateSchedule):
        raise TypeError(f"Only a LearningRateSchedule can be serialized, got {schedule!r}")
    return {"class_name": type(schedule).__name__, "config": schedule.get_config()}


def deserialize(config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Any:
    """Makes a schedule from the output of `serialize`, of this package, of r2.4, tf_keras or Keras 3.

    Args:
        config (dict): has the keys "class_name" and "config". Newer versions of Keras add "module" and
            "registered_name", which may show that a class is not from Keras although its name is.
        custom_objects (dict, optional): your own classes, by name. They take precedence. (default: None)

    Raises:
        TypeError: `config` is not a mapping.
        ValueError: a key is missing, or the class is unknown.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"A schedule's config must be a dict, got {config!r} of type {type(config).__name__}")
    if not {"class_name", "config"} <= config.keys():
        raise ValueError(
            f"A schedule's config must have the keys 'class_name' and 'config', got {sorted(config)}; "
            "`serialize(schedule)` makes one"
        )
    class_name: str = config["class_name"]
    registered_name: str | None = config.get("registered_name")
    for name in (registered_name, class_name):
        if custom_objects and name is not None and name in custom_objects:
            return custom_objects[name].from_config(config["config"])
    package = (config.get("module") or "keras").partition(".")[0]
    if class_name not in _CLASSES or registered_name not in (None, class_name) or package not in _KERAS_PACKAGES:
        raise ValueError(
            f"Unknown schedule {registered_name or class_name!r}: Keras has {', '.join(_CLASSES)}. Pass the class of "
            f"another in custom_objects, as in custom_objects={{{class_name!r}: {class_name}}}"
        )
    return _CLASSES[class_name].from_config(config["config"])
