"""What checkpoints bring: state to be checked, and param groups of `torch.optim.Adadelta` to be turned into ours."""

import warnings
from collections.abc import Iterable
from functools import partial
from itertools import chain
from typing import Any, Final

from torch import Tensor
from torch.utils._pytree import tree_map_only

from torch_adadelta import options
from torch_adadelta.backends import masters
from torch_adadelta.backends.batch import STATE_KEYS, has_state
from torch_adadelta.backends.opmath import stored, wide_dtype
from torch_adadelta.options import OPTIONS, Kind
from torch_adadelta.step import accumulation, averages, precision, validation
from torch_adadelta.step.sources import Group, Source, Sources, bind_group

# State in the opmath dtype, whatever the parameter's is.
_WIDE_KEYS: Final = (averages.KEY, accumulation.KEY)

_NO_GROUP: Final = {"state_dtype": None, "master_weights": False}

_OPTIONAL_KEYS: Final = (*_WIDE_KEYS, masters.KEY)


def save_groups(groups: Iterable[Group]) -> None:
    """Brings the options in the groups of a state_dict to the form in which they are saved."""
    for group in groups:
        for option in OPTIONS:
            if option.kind in (Kind.HYPERPARAMETER, Kind.NUMBER):
                group[option.key] = options.as_saved(option, group[option.key])
            elif option.kind is Kind.DTYPE and group[option.key] is not None:  # torch.distributed knows no dtypes
                group[option.key] = str(group[option.key])


def restore_groups(
    groups: list[Group], defaults: Group, sources: Sources, previous: list[Group]
) -> list[dict[str, Source]]:
    """Gives saved groups the options that are newer than they are, checked; returns their schedules and callables.

    `previous` are the groups that load, if there are any.
    """
    restored = []
    for group, was in zip(groups, previous, strict=False):
        for key in ("norm_variables", "excluded_from_weight_decay"):
            group.setdefault(key, was.get(key))
        for key in ("master_weights", "state_dtype"):  # which say how to keep what is loaded
            group[key] = was[key]
    for index, group in enumerate(groups):
        for key, value in {**defaults, **options.new_metadata(), "iterations": 0}.items():
            group.setdefault(key, value)
        restored.append(bind_group(group, sources.previous(index), group["iterations"]))
        group["iterations"] = options.iterations_for(group, group["iterations"])
        options.warn_of_rho(group)
    counts = {int(group["iterations"]) for group in groups}
    if len(counts) > 1:
        raise ValueError(f"the param groups disagree on iterations: {sorted(counts)}; they count the same steps")
    options.check_agreement(groups)
    validation.check_dtypes(groups)
    return restored


def check_state(name: str, param: Tensor, state: Any) -> None:
    """Raises ValueError, naming the parameter, unless its state can be loaded. The keys of others are not looked at."""
    if not state:
        return
    if not isinstance(state, dict) or (has_state(state) and not state.keys() >= set(STATE_KEYS)):
        raise ValueError(f"{name}: its state must hold square_avg and acc_delta, got {sorted(state)}")
    for key in (*(STATE_KEYS if has_state(state) else ()), *(key for key in _OPTIONAL_KEYS if key in state)):
        tensor = state[key]
        if not isinstance(tensor, Tensor) or tensor.shape != param.shape:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else repr(tensor)
            raise ValueError(f"{name} has shape {tuple(param.shape)}, but the state {key} to load is {got}")


def take_over(state: dict[Any, Any], groups: list[Group], loading: Any) -> None:
    """Makes loaded state the optimizer's own, in the dtypes that this keeps, in place.

    Optimizer.load_state_dict hands over tensors that fit as they are: to keep them would be to write to the checkpoint,
    or to another optimizer's state. It casts all real ones to the parameter's dtype, so they are taken from `loading`,
    the state_dict, if that is known. What others keep in the state has any dtype, and keeps it.

    Warns of remainders that are dropped, for the optimizer has no masters.
    """
    saved: dict[Tensor, Any] = {}
    if loading is not None:
        for saved_group, group in zip(loading["param_groups"], groups, strict=True):
            for number, param in zip(saved_group["params"], group["params"], strict=True):
                saved[param] = loading["state"].get(number)
    group_of = precision.groups_of(groups)
    dropped = 0
    for param, entry in state.items():
        if not isinstance(param, Tensor) or not entry:  # others may keep something that belongs to no parameter
            continue
        given = saved.get(param) or entry
        group = group_of.get(param, _NO_GROUP)  # one that was removed
        dtypes = dict.fromkeys(STATE_KEYS, precision.state_dtype(group, param))
        dtypes |= dict.fromkeys(_WIDE_KEYS, wide_dtype(param))
        if precision.needs_remainder(group, param):
            dtypes[masters.KEY] = masters.DTYPE
            _check_remainder(groups, param, given)
        own = {key: stored(given[key].to(param.device), dtype) for key, dtype in dtypes.items() if key in given}
        foreign = {key: given[key] for key in entry if key not in own and key != masters.KEY}
        dropped += masters.KEY in given and masters.KEY not in own
        move = partial(Tensor.to, device=param.device, copy=True)
        state[param] = {**tree_map_only(Tensor, move, foreign), **own}
    if dropped:
        warnings.warn(
            f"the state to load has the remainders of {dropped} masters, which are dropped: their parameters go on in "
            "their own dtypes. Make the optimizer with master_weights=True to keep them",
            stacklevel=7,
        )


def _check_remainder(groups: list[Group], param: Tensor, state: dict[str, Any]) -> None:
    """Raises ValueError, naming the parameter, if state brings a remainder of another dtype."""
    remainder = state.get(masters.KEY)
    if remainder is not None and remainder.dtype != masters.DTYPE:
        raise ValueError(
            f"{validation.name_of(groups, param)}: the state {masters.KEY} to load has dtype {remainder.dtype}, not "
            f"{masters.DTYPE}"
        )


def convert_torch_adadelta(groups: list[Group], state: dict[Any, dict[str, Any]], previous: list[Group]) -> None:
    """Turns the groups and state of a `torch.optim.Adadelta` checkpoint into ours, in place.

    `foreach` and `fused` say how to compute, not what: they stay as they are in `previous`, the groups that load.
    """
    for index, group in enumerate(groups):
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
        group["decoupled_weight_decay"] = was.get("decoupled_weight_decay", True) and not group.get("weight_decay")
        group["epsilon"] = group.pop("eps")
        group["iterations"] = iterations * (was.get("gradient_accumulation_steps") or 1)
        group["foreach"], group["fused"] = was.get("foreach"), was.get("fused")
