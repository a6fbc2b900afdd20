"""Moving averages of the parameters, with `use_ema`: what a step is to write of them.

The averages of parameters that a dense batch updates move on inside that update. All others, of parameters without a
gradient too, move on in a pass of their own after it.
"""

from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from torch_adadelta.backends import dtensor, masters
from torch_adadelta.backends.batch import Batch
from torch_adadelta.backends.opmath import Value, wide_dtype
from torch_adadelta.step import precision, validation
from torch_adadelta.step.sources import Group

KEY: Final = "average"

State = dict[Tensor, dict[str, Any]]


class AveragePass(NamedTuple):
    """Averages of one device that move on after the updates; nothing does if `found_inf` is not 0."""

    params: list[Tensor]
    averages: list[Tensor]
    remainders: list[Tensor | None]  # what parameters lack of their masters, which the averages follow
    momentum: Value
    overwrites: bool
    found_inf: Tensor | None


class Momentum(NamedTuple):
    """What all averages of a step have in common.

    Args:
        value: what an average is multiplied by; 0 in the first update, which makes it a copy.
        overwrites: whether parameters become their averages.
    """

    value: Value
    overwrites: bool

    def on(self, device: torch.device) -> Value:
        """`value` for tensors of a device."""
        if not isinstance(self.value, Tensor):
            return self.value
        return self.value.to(device, non_blocking=device.type != "cpu")


def momentum_of(group: Group) -> Momentum:
    """That of this step. A count that is kept on a device is not read."""
    count, frequency, n = group["iterations"], group["ema_overwrite_frequency"], group["gradient_accumulation_steps"]
    is_known = not isinstance(count, Tensor) or count.device.type == "cpu" or frequency is not None or n is not None
    if not is_known:
        return Momentum(momentum_on_device(group), False)
    update = int(count) // (n or 1)
    overwrites = frequency is not None and (update + 1) % frequency == 0
    return Momentum(group["ema_momentum"] if update else 0.0, overwrites)


def momentum_on_device(group: Group) -> Tensor:
    """The momentum of a step whose number is a Tensor, which is not read."""
    momentum: Tensor = (group["iterations"] != 0).to(torch.float64) * group["ema_momentum"]
    return momentum


def new_average(param: Tensor, remainder: Tensor | None = None) -> Tensor:
    """The average of a parameter that has none yet."""
    return masters.master_of(param, remainder).to(wide_dtype(param), copy=True)


def attach(
    groups: list[Group], state: State, batches: list[Batch], new_state: State, names: validation.NameOf
) -> list[Tensor]:
    """Gives dense batches the averages of their parameters, which it returns.

    Averages that are missing are made, in `new_state`.
    """
    momentum = momentum_of(groups[0])
    # The average of a parameter that is updated twice, or in pieces, moves on once, after that.
    times = Counter(id(param) for batch in batches for param in batch.owners[0])
    is_repeated = len(times) < times.total()
    attached: list[Tensor] = []
    for batch in batches:
        owners = batch.owners[0]
        if batch.is_sparse or (is_repeated and any(times[id(param)] > 1 for param in owners)):
            continue
        own = averages_of(groups, owners, state, new_state, names, is_checked_later=batch.wholes is None)
        batch.averages = dtensor.local_tensors(own)
        if batch.wholes is not None:
            batch.wholes = (*batch.wholes[:4], own, batch.wholes[5])
        value = momentum.on(batch.params[0].device)
        batch.segments = [
            segment._replace(ema_momentum=value, overwrites=momentum.overwrites) for segment in batch.segments
        ]
        attached += owners
    return attached


def passes(
    groups: list[Group],
    params: Iterable[Tensor],
    state: State,
    new_state: State,
    names: validation.NameOf,
    found_inf: Tensor | None,
) -> list[AveragePass]:
    """A pass over the averages of these parameters for each device."""
    momentum = momentum_of(groups[0])
    on_device: dict[torch.device, list[Tensor]] = {}
    for param in params:
        on_device.setdefault(param.device, []).append(param)
    group_of = precision.groups_of(groups) if on_device else {}  # to hash all parameters takes long
    result = []
    for device, some in on_device.items():
        own = dtensor.local_tensors(averages_of(groups, some, state, new_state, names))
        remainders: list[Tensor | None] = []
        for param in some:
            if not precision.needs_remainder(group_of[param], param):
                remainders.append(None)
                continue
            remainder = precision.remainder_of(param, state, new_state)
            validation.check_remainder(partial(names, param), param, remainder)
            remainders.append(dtensor.local(remainder))
        skips = None if found_inf is None else found_inf.to(device, non_blocking=device.type != "cpu").reshape(())
        params_here = dtensor.local_tensors(some)
        result.append(AveragePass(params_here, own, remainders, momentum.on(device), momentum.overwrites, skips))
    return result


def averages_of(
    groups: list[Group],
    params: list[Tensor],
    state: State,
    new_state: State,
    names: validation.NameOf,
    *,
    is_checked_later: bool = False,
) -> list[Tensor]:
    """The averages of parameters, checked: all that a backend does not look at itself, if it `is_checked_later`."""
    try:
        averages = [state[param][KEY] for param in params]
    except KeyError:
        averages = [state.get(param, {}).get(KEY, new_state.get(param, {}).get(KEY)) for param in params]
    group_of: dict[Tensor, Group] = {}
    for row, (param, average) in enumerate(zip(params, averages, strict=True)):
        if average is None:
            group_of = group_of or precision.groups_of(groups)
            remainder = precision.remainder_in(group_of[param], param, state)
            averages[row] = new_state.setdefault(param, {}).setdefault(KEY, new_average(param, remainder))
        elif type(average) is not Tensor or not is_checked_later:
            validation.check_wide_state(partial(names, param), param, KEY, average)
    return averages
