"""Param groups: what they may hold, in which form it is kept, and what a checkpoint brings."""

from itertools import chain
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from torch_adadelta import hyperparameters, schedules
from torch_adadelta import update as updates
from torch_adadelta.gradients import Callback
from torch_adadelta.hyperparameters import Source
from torch_adadelta.schedules import LearningRateSchedule

STATE_KEYS: Final = ("square_avg", "acc_delta")

# The hyperparameters by their key in a param group.
HYPERPARAMETERS: Final = {"lr": "learning_rate", "rho": "rho", "epsilon": "epsilon"}

# What a group shows for a callable until the first step has called it.
_UNTIL_CALLED: Final = {"lr": 0.001, "rho": 0.95, "epsilon": hyperparameters.DEFAULT_EPSILON}


class Followed(NamedTuple):
    """A group, and what the optimizer last wrote there of its schedule and callables.

    Where other objects are found there, somebody has written to the group past the optimizer, as
    ``ZeroRedundancyOptimizer`` does when it loads a checkpoint.
    """

    group: dict[str, Any]
    schedule: Any
    callables: Any

    def is_current(self, group: dict[str, Any]) -> bool:
        return (
            self.group is group and group.get("schedule") is self.schedule and group.get("callables") is self.callables
        )


def name_of(group_index: int, group: dict[str, Any], index: int) -> str:
    names = group.get("param_names")
    return f"parameter {index} of group {group_index}" + (f" ({names[index]!r})" if names else "")


def check_keys(group: dict[str, Any]) -> None:
    if "eps" in group:
        raise ValueError(f"a param group has eps={group['eps']!r}; here the key is `epsilon`")
    if group.get("weight_decay"):
        raise ValueError(
            f"a param group has weight_decay={group['weight_decay']!r}; Keras' Adadelta has none. Add the "
            "penalty to the loss, or leave the key out"
        )


def normalise(options: dict[str, Any], previous: dict[str, Source], iterations: Any) -> dict[str, Source]:
    """Checks the options of a group, or the defaults, and brings them to the form in which they are kept.

    Returns the schedules and callables among them. `previous` holds those that the optimizer has already.
    """
    check_options(options)
    sources: dict[str, Source] = {}
    for key in HYPERPARAMETERS:
        source = take(options, key, previous.get(key), iterations)
        if source is not None:
            sources[key] = source
    for key in ("maximize", "capturable", "differentiable"):
        if not isinstance(options[key], bool):
            raise TypeError(f"{key} must be True or False, got {options[key]!r}")
    for key in ("foreach", "fused"):
        if options[key] is not None and not isinstance(options[key], bool):
            raise TypeError(f"{key} must be True, False or None, got {options[key]!r}")
    updates.check_choice(options["foreach"], options["fused"], options["differentiable"])
    return sources


def take(options: dict[str, Any], key: str, previous: Source | None, iterations: Any) -> Source | None:
    """Brings the hyperparameter `key` of a group to the form in which it is kept; returns its source, if it has one."""
    name, value = HYPERPARAMETERS[key], options[key]
    if hyperparameters.is_source(value):
        hyperparameters.check_source(name, value)
        if isinstance(value, LearningRateSchedule):
            options["schedule"] = config_of(value)
            options[key] = hyperparameters.at_step(value, int(iterations), torch.float32)
        else:
            options[key] = _UNTIL_CALLED[key]
        return Source(name, value, options[key])
    if key == "lr" and options["schedule"] is not None:
        return Source(name, _schedule(options["schedule"], previous), value)
    if name in options["callables"]:
        if previous is None:
            raise ValueError(
                f"what is to be loaded was saved with a callable for {name}, and functions are not saved: set "
                f"optimizer.{name} first"
            )
        return Source(name, previous.given, value)
    options[key] = hyperparameters.validated(name, value)
    return None


def config_of(schedule: Any) -> dict[str, Any] | None:
    """The configuration of a schedule as Keras writes it, or None if its class has none."""
    try:
        return schedules.serialize(schedule)
    except NotImplementedError:
        return None


def _schedule(config: dict[str, Any], previous: Source | None) -> LearningRateSchedule:
    """The schedule that a configuration describes: the one that is there, if it is the same."""
    known = previous.given if previous is not None and isinstance(previous.given, LearningRateSchedule) else None
    if known is not None and config_of(known) == config:
        return known
    try:
        return schedules.deserialize(config, {} if known is None else {type(known).__name__: type(known)})
    except ValueError as error:
        raise ValueError(f"the schedule to load cannot be made: {error}; set optimizer.learning_rate first") from error


def check_options(options: dict[str, Any]) -> None:
    for key in hyperparameters.NUMBERS:
        if options[key] is not None or key == "decay":
            options[key] = hyperparameters.validated_number(key, options[key])
    if options["clipnorm"] is not None and options["global_clipnorm"] is not None:
        raise ValueError(
            "Cannot accept both `clipnorm` and `global_clipnorm`. "
            f"Received: `clipnorm`={options['clipnorm']!r}, `global_clipnorm`={options['global_clipnorm']!r}."
        )


def check_agreement(groups: list[dict[str, Any]]) -> None:
    for index, group in enumerate(groups):
        for key in hyperparameters.NUMBERS:
            if group[key] != groups[0][key]:
                raise ValueError(
                    f"{key} belongs to the whole optimizer, but group 0 has {groups[0][key]!r} and group {index} has "
                    f"{group[key]!r}. Set optimizer.{key}"
                )


def check_not_complex(groups: list[dict[str, Any]], first: int = 0) -> None:
    for group_index, group in enumerate(groups[first:], first):
        if group["clipvalue"] is None or not any(map(Tensor.is_complex, group["params"])):
            continue
        for index, param in enumerate(group["params"]):
            if param.is_complex():
                raise ValueError(
                    f"{name_of(group_index, group, index)} has dtype {param.dtype}, and "
                    f"clipvalue={group['clipvalue']!r} is for real numbers; use clipnorm or global_clipnorm"
                )


def checked_callback(kind: str, callback: Any) -> Any:
    if callback is not None and not callable(callback):
        raise TypeError(f"{kind} must be callable, got {callback!r}")
    return callback


def checked_transformers(transformers: Any) -> list[Callback]:
    if callable(transformers) or isinstance(transformers, str):
        raise TypeError(f"gradient_transformers must be a list of callables, got {transformers!r}")
    transformers = list(transformers or ())
    for transformer in transformers:
        if not callable(transformer):
            raise TypeError(f"gradient_transformers must be callables, got {transformer!r}")
    return transformers


def check_transformers(transformers: Any, options: dict[str, Any]) -> None:
    if not transformers:
        return
    for key in ("clipvalue", "clipnorm", "global_clipnorm"):
        if options[key] is not None:
            raise ValueError(
                f"`{key}` cannot be set when `gradient_transformers` is set. Instead, use the `gradient_transformers` "
                f"to specify clipping and other transformations. Received: {key}={options[key]!r}"
            )


def check_callbacks(groups: list[dict[str, Any]], callbacks: dict[str, Any]) -> None:
    """Raises ValueError if groups to be taken over were saved with callbacks that are not there."""
    for kind, given in callbacks.items():
        if not given and any(kind in group.get("callables", ()) for group in groups):
            raise ValueError(
                f"what is to be loaded was saved with {kind}, and functions are not saved: set optimizer.{kind} first"
            )


def describe(source: Source) -> str:
    return f"the schedule {source.given!r}" if source.is_schedule else f"the callable {source.given!r}"


def _checked_iterations(value: Any) -> int:
    if not isinstance(value, bool | int) and hasattr(value, "__index__"):
        value = value.__index__()  # of NumPy
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"iterations must be an int, got {value!r} of type {type(value).__name__}")
    if not 0 <= value < 2**63:
        raise ValueError(f"iterations must be >= 0 and fit 64 bits, got {value}")
    return value


def iterations_for(group: dict[str, Any], iterations: Any) -> int | Tensor:
    """`iterations` as the group keeps it: an int, or an int64 Tensor of its own on the device if it is capturable."""
    count = _checked_iterations(int(iterations) if isinstance(iterations, Tensor) else iterations)
    if not group["capturable"]:
        return count
    device = group["params"][0].device if group["params"] else None
    return torch.tensor(count, dtype=torch.int64, device=device)


def check_state(name: str, param: Tensor, state: Any) -> None:
    if not state:
        return
    if not isinstance(state, dict) or set(state) != set(STATE_KEYS):
        raise ValueError(f"{name}: its state must hold square_avg and acc_delta, got {sorted(state)}")
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.shape != param.shape:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else repr(tensor)
            raise ValueError(f"{name} has shape {tuple(param.shape)}, but the state {key} to load is {got}")


def convert_torch_adadelta(
    groups: list[dict[str, Any]], state: dict[Any, dict[str, Any]], previous: list[dict[str, Any]]
) -> None:
    """Turns the groups and state of a `torch.optim.Adadelta` checkpoint into ours, in place.

    `foreach` and `fused` say how to compute, not what: they stay as they are in the optimizer that loads.
    """
    for index, group in enumerate(groups):
        if group.get("weight_decay"):
            raise ValueError(
                f"group {index} of the torch.optim.Adadelta checkpoint has weight_decay={group['weight_decay']!r}; "
                "Keras' Adadelta has none, so training would go on differently. Set it to 0 in the checkpoint to "
                "accept that"
            )
        if group["eps"] == 0:
            raise ValueError(
                f"group {index} of the torch.optim.Adadelta checkpoint has eps=0, which would mean 1e-7 here. Set "
                "it to the value you want in the checkpoint"
            )
    iterations = max((int(s["step"]) for s in state.values() if "step" in s), default=0)
    for s in state.values():
        s.pop("step", None)
    live = chain(previous, [{}] * len(groups))
    for group, was in zip(groups, live, strict=False):
        group.pop("weight_decay", None)
        group["epsilon"] = group.pop("eps")
        group["iterations"] = iterations
        group["foreach"], group["fused"] = was.get("foreach"), was.get("fused")
