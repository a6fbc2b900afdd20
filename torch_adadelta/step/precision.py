"""What a param group says of the dtypes of its parameters' state, and the remainders of those that have masters."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_adadelta.backends import dtensor, masters
from torch_adadelta.backends.batch import STATE_KEYS, Batch, new_state_of
from torch_adadelta.step import validation
from torch_adadelta.step.sources import Group

State = dict[Tensor, dict[str, Any]]


def state_dtype(group: Group, param: Tensor) -> torch.dtype:
    """The dtype of square_avg and acc_delta of a parameter."""
    return group["state_dtype"] or param.dtype


def new_state(group: Group, param: Tensor) -> dict[str, Tensor]:
    """The state that the first step with a gradient makes."""
    return new_state_of(param, group["state_dtype"])


def needs_remainder(group: Group, param: Tensor) -> bool:
    """Whether the master of a parameter needs more than the parameter itself."""
    return group["master_weights"] and masters.has_remainder(param.dtype)


def groups_of(groups: list[Group]) -> dict[Tensor, Group]:
    """The group of each parameter."""
    return {param: group for group in groups for param in group["params"]}


def group_of(groups: list[Group], param: Tensor) -> Group:
    """The group of one parameter, which is not hashed.

    Raises:
        KeyError: it is in none of the groups.
    """
    for group in groups:
        if any(candidate is param for candidate in group["params"]):
            return group
    raise KeyError(param)


def remainder_in(group: Group, param: Tensor, state: State) -> Tensor | None:
    """The remainder that a parameter has in its state; None if there is none, as before a step."""
    return state.get(param, {}).get(masters.KEY) if needs_remainder(group, param) else None


def convert_state(groups: list[Group], state: State, dtypes: Mapping[Tensor, torch.dtype] | None = None) -> None:
    """Gives state the dtypes that groups ask for, and drops remainders for which they have no masters.

    `dtypes` are those that parameters will have, where these are others.
    """
    converted: State = {}
    without_remainder = []
    for group in groups:
        for param in group["params"]:
            dtype = (dtypes or {}).get(param, param.dtype)
            own = state.get(param, {})
            converted[param] = {key: own[key].to(group["state_dtype"] or dtype) for key in STATE_KEYS if key in own}
            if not (group["master_weights"] and masters.has_remainder(dtype)):
                without_remainder.append(param)
    for param, new in converted.items():
        state.get(param, {}).update(new)
    for param in without_remainder:
        own = state.get(param, {})
        if own.pop(masters.KEY, None) is not None and not own:
            del state[param]


def remainder_of(param: Tensor, state: State, new_state: State) -> Any:
    """That of a parameter with a master, made in `new_state` if it is missing; not checked yet."""
    found = state.get(param, {}).get(masters.KEY)
    if found is None:
        found = new_state.setdefault(param, {}).setdefault(masters.KEY, masters.new_remainder(param))
    return found


def attach_remainders(batch: Batch, state: State, new_state: State, names: validation.NameOf) -> None:
    """Gives a batch of parameters with masters their remainders. Those that are missing are made, in `new_state`."""
    owners = batch.owners[0]
    remainders = []
    for param in owners:
        remainder = remainder_of(param, state, new_state)
        if type(remainder) is not Tensor or batch.wholes is not None:  # no backend looks at it
            validation.check_remainder(partial(names, param), param, remainder)
        remainders.append(remainder)
    batch.remainders = dtensor.local_tensors(remainders)
    if batch.wholes is not None:
        batch.wholes = (*batch.wholes[:-1], remainders)
