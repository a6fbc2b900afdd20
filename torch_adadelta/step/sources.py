"""From what the user gave for a hyperparameter (a number, a Tensor, a callable, a schedule) to its value in one step.

A group holds the value that a schedule or callable gave last, so that whoever reads a group finds a number there. What
somebody else writes there would be lost without a word, and is noticed instead.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from torch_adadelta import options, schedules
from torch_adadelta.backends.opmath import Value, is_numpy_scalar, round_to_float32, rounded
from torch_adadelta.options import BY_KEY, HYPERPARAMETERS, Option
from torch_adadelta.schedules import LearningRateSchedule
from torch_adadelta.step.callbacks import Callbacks
from torch_adadelta.step.selection import check_choice

Group = dict[str, Any]

_FLOAT32_MAX: Final = torch.finfo(torch.float32).max


class Source:
    """A schedule or callable that the user gave for a hyperparameter, and what it gave to the group last."""

    # What is being written to the group. An interrupt before `record` must not make it look like somebody else's.
    pending: Any = None

    def __init__(self, name: str, given: Callable[..., Any], current: Any) -> None:
        self.name = name
        self.given = given
        self.is_schedule = isinstance(given, LearningRateSchedule)
        self.record(current)

    def record(self, value: Any) -> None:
        """Remembers what is in the param group now."""
        self._written, self._version, self.pending = value, _version(value), None

    def is_overwritten(self, value: Any) -> bool:
        """Whether `value`, found in the param group, is not what was written there last."""
        if isinstance(value, Tensor):
            # A callable may return a Tensor that the user fills. That of a schedule is nobody else's to fill.
            is_filled = self.is_schedule and _version(value) != self._version
            return value is not self.pending and (value is not self._written or is_filled)
        return not any(value == own for own in (self._written, self.pending) if not isinstance(own, Tensor))

    def __str__(self) -> str:
        return f"the {'schedule' if self.is_schedule else 'callable'} {self.given!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_version"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._version = _version(self._written)  # a copy counts its versions anew


def _version(value: Any) -> int | None:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


# ---- What a group is given ------------------------------------------------------------------------------------------


def _check_source(option: Option, value: Any) -> None:
    kinds = "a number, a one-element Tensor or a callable"
    if isinstance(value, LearningRateSchedule) and not option.takes_schedule:
        raise TypeError(f"{option.name} must be {kinds}, got the schedule {value!r}")
    if isinstance(value, type):
        raise TypeError(f"{option.name} must be {kinds}, got the class {value.__name__}")
    library = type(value).__module__.partition(".")[0]
    if library in ("keras", "tf_keras", "tensorflow") and hasattr(value, "get_config"):
        raise TypeError(
            f"{option.name} is a {type(value).__name__} of {library}, which computes with the tensors of {library}. "
            "Use the class of that name in torch_adadelta.schedules, or torch_adadelta.schedules.deserialize("
            f"{library}.optimizers.schedules.serialize(schedule))"
        )


def _config_of(schedule: Any) -> dict[str, Any] | None:
    """The configuration of a schedule as Keras writes it, or None if its class has none."""
    try:
        return schedules.serialize(schedule)
    except NotImplementedError:
        return None


def _schedule_of(config: dict[str, Any], previous: Source | None) -> LearningRateSchedule:
    """The schedule that a configuration describes: the one that is there, if it is the same."""
    known = previous.given if previous is not None and isinstance(previous.given, LearningRateSchedule) else None
    if known is not None and _config_of(known) == config:
        return known
    try:
        return schedules.deserialize(config, {} if known is None else {type(known).__name__: type(known)})
    except ValueError as error:
        raise ValueError(f"the schedule to load cannot be made: {error}; set optimizer.learning_rate first") from error


def bind_hyperparameter(group: Group, option: Option, previous: Source | None, iterations: Any) -> Source | None:
    """Brings a hyperparameter of a group to the form in which it is kept; returns its source, if it has one.

    `previous` is the source that the group had.
    """
    key, name, value = option.key, option.name, group[option.key]
    if callable(value) and not isinstance(value, Tensor):
        _check_source(option, value)
        if isinstance(value, LearningRateSchedule):
            group["schedule"] = _config_of(value)
            group[key] = at_step(value, int(iterations), torch.float32)
        else:
            group[key] = option.default  # until the first step has called it
        return Source(name, value, group[key])
    if option.takes_schedule and group["schedule"] is not None:
        return Source(name, _schedule_of(group["schedule"], previous), value)
    if name in group["callables"]:
        if previous is None:
            raise ValueError(
                f"what is to be loaded was saved with a callable for {name}, and functions are not saved: set "
                f"optimizer.{name} first"
            )
        return Source(name, previous.given, value)
    group[key] = options.canonicalize(option, value)
    return None


def bind_group(group: Group, previous: dict[str, Source], iterations: Any) -> dict[str, Source]:
    """Brings all options of a group, or the defaults, to the form in which they are kept; returns the sources."""
    options.canonicalize_wide(group)
    sources: dict[str, Source] = {}
    for option in HYPERPARAMETERS:
        source = bind_hyperparameter(group, option, previous.get(option.key), iterations)
        if source is not None:
            sources[option.key] = source
    options.canonicalize_choices(group)
    options.check_combinations({**group, **dict.fromkeys(sources)})  # what a callable gives is not known yet
    check_choice(group)
    return sources


class GroupSnapshot(NamedTuple):
    """A group, and what the optimizer last wrote there of its schedule and callables.

    Where other objects are found there, somebody has written to the group past the optimizer, as
    ``ZeroRedundancyOptimizer`` does when it loads a checkpoint.
    """

    group: Group
    schedule: Any
    callables: Any

    def is_current(self, group: Group) -> bool:
        return (
            self.group is group and group.get("schedule") is self.schedule and group.get("callables") is self.callables
        )


class Sources:
    """The sources of each param group, by the group's key, and those that a new group would get."""

    def __init__(self, defaults: dict[str, Source]) -> None:
        self.defaults = defaults
        self.of_groups: list[dict[str, Source]] = []
        self.snapshots: list[GroupSnapshot] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "of_groups": self.of_groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, snapshots=[])

    def copy(self) -> "Sources":
        """The same sources, in containers of their own."""
        result = Sources(dict(self.defaults))
        result.of_groups = [dict(own) for own in self.of_groups]
        return result

    def has_any(self, key: str) -> bool:
        """Whether some group has a source for this hyperparameter."""
        return any(key in sources for sources in self.of_groups)

    def previous(self, index: int) -> dict[str, Source]:
        """What group `index` has, or would get."""
        return self.of_groups[index] if index < len(self.of_groups) else self.defaults

    def update_metadata(self, groups: list[Group], callbacks: Callbacks, first: int = 0) -> None:
        """Leaves in each group, from `first` on, the names of what was given and a state_dict cannot hold."""
        del self.snapshots[first:]
        for group, sources in zip(groups[first:], self.of_groups[first:], strict=True):
            scheduled = sources.get("lr")
            if scheduled is not None and scheduled.is_schedule:  # whose configuration may have changed
                config = _config_of(scheduled.given)
                group["schedule"] = group["schedule"] if group["schedule"] == config else config
            own = [source.name for key, source in sources.items() if key != "lr" or group["schedule"] is None]
            named = callbacks.names + own
            group["callables"] = group["callables"] if group["callables"] == named else named
            self.snapshots.append(GroupSnapshot(group, group["schedule"], group["callables"]))

    def sync(self, groups: list[Group], callbacks: Callbacks) -> None:
        """Comes in line with groups that were removed, or written to past the methods of the optimizer."""
        if self._are_current(groups):
            return
        known = {id(was.group): (was, sources) for was, sources in zip(self.snapshots, self.of_groups, strict=True)}
        synced: list[dict[str, Source]] = []
        for group in groups:
            if id(group) not in known:
                raise RuntimeError("param_groups was changed from outside; use add_param_group")
            was, sources = known[id(group)]
            if not was.is_current(group):
                callbacks.check_known([group])
                sources = bind_group(group, sources, group["iterations"])
                group["iterations"] = options.iterations_for(group, group["iterations"])
            synced.append(sources)
        self.of_groups = synced
        self.update_metadata(groups, callbacks)

    def _are_current(self, groups: list[Group]) -> bool:
        return len(self.snapshots) == len(groups) and all(
            snapshot.is_current(group) for snapshot, group in zip(self.snapshots, groups, strict=True)
        )

    def check_not_overwritten(self, groups: list[Group], has_scheduler: Callable[[], bool]) -> None:
        """Raises RuntimeError if somebody else wrote, or would write, what a schedule or callable is there to give."""
        for index, (group, sources) in enumerate(zip(groups, self.of_groups, strict=True)):
            for key, source in sources.items():
                if key == "lr" and has_scheduler():
                    raise RuntimeError(
                        f"the learning rate is given by {source}, and a scheduler of torch.optim is attached too: use "
                        "one of them. A number for optimizer.learning_rate removes the former"
                    )
                if source.is_overwritten(group[key]):
                    raise RuntimeError(
                        f"group {index} has {key}={group[key]!r}, but its {source.name} is given by {source}, which "
                        f"would overwrite that. Set optimizer.{source.name} to use the value instead"
                    )


# ---- The values of one step -----------------------------------------------------------------------------------------


class GroupWrite(NamedTuple):
    """What a source gave, to be left in the group once the step is taken."""

    group: Group
    key: str
    value: Any
    source: Source


@dataclass(slots=True)
class StepValues:
    """The hyperparameters of one step.

    Each callable is called once, a schedule once for each T and device of `iterations`.
    """

    groups: list[Group]
    sources: list[dict[str, Source]]
    writes: list[GroupWrite] = field(default_factory=list)  # what is to be left in the groups
    known: dict[tuple[int, torch.dtype], tuple[Value, ...]] = field(default_factory=dict)
    _called: dict[Any, Any] = field(default_factory=dict)

    def of(self, index: int, T: torch.dtype) -> tuple[Value, ...]:
        """The hyperparameters of group `index` for parameters of opmath dtype T, in the order of `HYPERPARAMETERS`.

        Raises what `options.in_step` and `at_step` raise, and what a callable raises.
        """
        if (index, T) in self.known:
            return self.known[index, T]
        group, sources = self.groups[index], self.sources[index]
        values: list[Value] = []
        for option in HYPERPARAMETERS:
            source = sources.get(option.key)
            value = group[option.key] if source is None else self._taken(index, option, source, T)
            is_scheduled = source is not None and source.is_schedule
            is_ready = is_scheduled or (value is option.default and not option.rounds_to_float32)
            values.append(value if is_ready else options.in_step(option, value, group["differentiable"]))
        if group["decay"]:
            values[0] = decayed(values[0], group["decay"], group["iterations"], T)
        self.known[index, T] = tuple(values)
        return self.known[index, T]

    def _taken(self, index: int, option: Option, source: Source, T: torch.dtype) -> Any:
        """What a source gives now."""
        group = self.groups[index]
        iterations = group["iterations"]
        # Groups that differ in `capturable` or device each get what their own `iterations` give.
        device = iterations.device if isinstance(iterations, Tensor) else None
        key = (id(source.given), T, device) if source.is_schedule else id(source.given)
        if key not in self._called:
            self._called[key] = at_step(source.given, iterations, T) if source.is_schedule else source.given()
        value = self._called[key]
        if not source.is_schedule:
            value = options.canonicalize(option, value)
        if group["capturable"] and not isinstance(value, Tensor) and is_capturing():
            raise RuntimeError(
                f"{source} gives {source.name} as a Python number, which a CUDA graph would repeat for ever. Give a "
                f"Tensor on the device for {source.name}, and fill it between replays"
            )
        if (index, torch.float64) not in self.known:  # of two T the group keeps the wider, whichever comes first
            self.writes.append(GroupWrite(group, option.key, value, source))
        return value


def is_capturing() -> bool:
    """Whether work on the current stream is recorded in a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


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
    elif is_numpy_scalar(value):
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
    number = options.number_of(BY_KEY["decay"], decay)
    if not isinstance(lr, Tensor) and not isinstance(iterations, Tensor):
        divisor = rounded(1.0 + rounded(rounded(number, T) * rounded(float(iterations), T), T), T)
        return rounded(rounded(lr, T) / divisor, T)
    device = iterations.device if isinstance(iterations, Tensor) else lr.device  # type: ignore[union-attr]
    t = iterations.to(T) if isinstance(iterations, Tensor) else float(iterations)
    numerator = lr.to(device, T).reshape(()) if isinstance(lr, Tensor) else torch.full((), lr, dtype=T, device=device)
    return numerator / (1 + torch.full((), number, dtype=T, device=device) * t)


def write(writes: Iterable[GroupWrite]) -> None:
    """Leaves in the groups what schedules and callables gave."""
    for group, key, value, source in writes:
        source.pending = value
        group[key] = value
        source.record(value)
