"""Gradient accumulation, with `gradient_accumulation_steps`: sums of gradients, and their means for an update."""

import warnings
from functools import partial
from typing import Final, NamedTuple

import torch
from torch import Tensor

from torch_adadelta.backends import dtensor, functional
from torch_adadelta.backends.opmath import wide_dtype
from torch_adadelta.step import validation
from torch_adadelta.step.averages import State
from torch_adadelta.step.sources import Group

KEY: Final = "gradient_accumulator"


def steps_of(group: Group) -> int:
    """How many calls make an update."""
    return group["gradient_accumulation_steps"] or 1


def is_update(group: Group) -> bool:
    """Whether the next call updates parameters."""
    return (int(group["iterations"]) + 1) % steps_of(group) == 0


def has_pending(group: Group) -> bool:
    """Whether some calls were summed that no update has used yet."""
    return int(group["iterations"]) % steps_of(group) != 0


def check_pending(groups: list[Group], state: State) -> None:
    """Raises ValueError if the count says that there are sums, and there are none."""
    if not groups or not has_pending(groups[0]):
        return
    if not any(isinstance(entry, dict) and KEY in entry for entry in state.values()):
        n, count = steps_of(groups[0]), int(groups[0]["iterations"])
        raise ValueError(
            f"after {count} calls, with gradient_accumulation_steps={n}, the gradients of {count % n} are summed, and "
            f"no parameter has a {KEY}. Load state that has them, or set iterations to a multiple of {n}"
        )


class Addition(NamedTuple):
    """A gradient that is to be added to a sum."""

    total: Tensor
    grad: Tensor


def additions(
    groups: list[Group],
    state: State,
    params: list[Tensor],
    grads: list[Tensor],
    new_state: State,
    names: validation.NameOf,
) -> list[Addition]:
    """What a call adds to sums. Those that are missing are made, in `new_state`. Writes nothing."""
    validation.check_sums(params, grads, names)
    totals = [sum_of(param, state, new_state, names) for param in params]
    factor = groups[0]["loss_scale_factor"]
    rows = zip(totals, dtensor.aligned(params, grads), strict=True)
    return [Addition(total, functional.unscaled_in(total, grad, factor)) for total, grad in rows]


def means(
    groups: list[Group], state: State, params: list[Tensor], rows: list[Addition], names: validation.NameOf
) -> dict[Tensor, Tensor]:
    """For each parameter with a gradient in the call that updates, the mean of all since the last update.

    `rows` are the additions of this call, one for each of `params`. Warns of parameters without one, whose sums are
    lost.
    """
    sums: dict[Tensor, Tensor] = {}
    for param, (total, grad) in zip(params, rows, strict=True):  # one may be listed twice
        sums[param] = functional.added(sums.get(param, total), grad)
    lost = [param for group in groups for param in group["params"] if param not in sums and KEY in state.get(param, {})]
    if lost and params:
        some = ", ".join(map(names, lost[:5])) + (", ..." if len(lost) > 5 else "")
        warnings.warn(
            f"no gradient in the call that updates: {some}; what was summed before is dropped, as in Keras",
            stacklevel=2,
        )
    return {param: functional.divided(total, steps_of(groups[0])) for param, total in sums.items()}


def new_sum(param: Tensor) -> Tensor:
    """The sum of a parameter's gradients before there is one."""
    return torch.zeros_like(param, dtype=wide_dtype(param))


def all_sums(groups: list[Group], state: State) -> list[Tensor]:
    """All sums that there are."""
    entries = [state.get(param, {}) for group in groups for param in group["params"]]
    return [entry[KEY] for entry in entries if KEY in entry]


def sum_of(param: Tensor, state: State, new_state: State, names: validation.NameOf) -> Tensor:
    """The sum of a parameter's gradients, checked; zeros, in `new_state`, if there is none."""
    total = state.get(param, {}).get(KEY)
    if total is None:
        return new_state.setdefault(param, {}).setdefault(KEY, new_sum(param))
    validation.check_wide_state(partial(names, param), param, KEY, total)
    return total
