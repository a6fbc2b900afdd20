"""What Keras 3 adds to Adadelta in a file: weight decay, moving averages and sums of gradients, in and out."""

from collections.abc import Collection, Mapping
from typing import Any, Final, NamedTuple

from torch import Tensor

from torch_adadelta.keras.config import DROPPABLE, OPTIONS_OF, SLOT_OF
from torch_adadelta.keras.contents import KERAS3, NEW, Checkpoint
from torch_adadelta.keras.errors import KerasFileError
from torch_adadelta.optimizer import AdadeltaKeras
from torch_adadelta.options import OPTIONS
from torch_adadelta.step import accumulation, averages, exclusions

# In the configuration of the new class and of Keras 3.
DEFAULTS: Final = {
    option.name: option.default for option in OPTIONS if option.is_keras3 and option.name != "decoupled_weight_decay"
} | {"weight_decay": None}

DROPPABLE_ON_SAVE: Final = (*DROPPABLE, "exclusions")


class LeftOut(NamedTuple):
    """What a copy of a template is written without, of `SLOT_OF`."""

    ours: list[str]  # what the optimizer has, and the template has no place for
    theirs: list[str]  # what the template has, and the optimizer does not


def steps(optimizer: AdadeltaKeras, settings: Mapping[str, Any]) -> int:
    """How many calls make an update."""
    return settings.get("gradient_accumulation_steps", optimizer.gradient_accumulation_steps) or 1


def given(optimizer: AdadeltaKeras) -> list[str]:
    """The options that the optimizer has from its own arguments, and that do something."""
    names = [name for name in DEFAULTS if getattr(optimizer, name)]
    return names if optimizer.use_ema else [name for name in names if "ema" not in name]


def uses(optimizer: AdadeltaKeras) -> list[str]:
    """The names in `drop` of the state that the optimizer has besides the accumulators."""
    return [name for name in SLOT_OF if getattr(optimizer, OPTIONS_OF[name][0])]


def has(checkpoint: Checkpoint, slot: str) -> bool:
    return any(slot in variable.slots for _, variable in checkpoint.variables())


def _steps_of(checkpoint: Checkpoint, default: int) -> int:
    """How many calls made an update in Keras, as far as the file says."""
    value = checkpoint.hyperparameters.get("gradient_accumulation_steps")
    return value if isinstance(value, int) and value > 0 else default


def check_state(checkpoint: Checkpoint, optimizer: AdadeltaKeras, settings: Mapping[str, Any], count: int) -> None:
    """Raises unless the optimizer is going to use what state there is, and has what it needs."""
    for name, slot in SLOT_OF.items():
        option = OPTIONS_OF[name][0]
        value = settings.get(option, getattr(optimizer, option))
        if has(checkpoint, slot) and not value:
            raise KerasFileError(
                f"{checkpoint.path}: its optimizer had {DROPPABLE[name]}, and {option} of the AdadeltaKeras is "
                f"{value!r}. Give it the option as Keras had it, or pass drop={{{name!r}}} to leave them out"
            )
    n = steps(optimizer, settings)
    theirs = _steps_of(checkpoint, n)
    if count % theirs != count % n:
        raise KerasFileError(
            f"{checkpoint.path}: after {count} calls with gradient_accumulation_steps={theirs}, the gradients of "
            f"{count % theirs} are summed, which is another number with gradient_accumulation_steps={n}. Give "
            "AdadeltaKeras what Keras had"
        )
    if count % n and not has(checkpoint, accumulation.KEY):
        raise KerasFileError(
            f"{checkpoint.path}: after {count} calls, gradient_accumulation_steps={n} makes some gradients wait for "
            f"their update, and no sums of them were read. Save after a multiple of {n} calls, or give AdadeltaKeras "
            "what Keras had"
        )


def check_sums(checkpoint: Checkpoint, states: Mapping[Tensor, dict[str, Tensor]], count: int, n: int) -> None:
    """Raises if there are sums of gradients when there should be none, for Keras clears them."""
    sums = [state[accumulation.KEY] for state in states.values() if accumulation.KEY in state]
    if count % n == 0 and any(bool((total != 0).any()) for total in sums):
        raise KerasFileError(
            f"{checkpoint.path}: after {count} calls with gradient_accumulation_steps={n} no gradients are summed, and "
            "there are sums that are not zero: Keras had another number, or these are averages. Give AdadeltaKeras the "
            "options that Keras had, or pass drop={'gradient_accumulation'} to leave the sums out"
        )


def remarks(checkpoint: Checkpoint, optimizer: AdadeltaKeras, settings: Mapping[str, Any], count: int) -> list[str]:
    """What a report says of averages and sums."""
    notes = []
    if has(checkpoint, averages.KEY):
        notes.append(_ON_WEIGHTS)
        if checkpoint.generation == NEW:
            notes.append(_ON_NEW_CLASS)
    elif settings.get("use_ema", optimizer.use_ema):
        notes.append("no moving averages were read: they begin as the parameters")
    n = steps(optimizer, settings)
    if n > 1:
        notes.append(f"{count} calls with gradient_accumulation_steps={n}: the gradients of {count % n} are summed")
    return notes


_ON_WEIGHTS: Final = (
    "the weights in a file that was saved after fit are the moving averages, for fit ends so; in one that a callback "
    "saved, or that was saved after train_on_batch, they are what the optimizer goes on with"
)
_ON_NEW_CLASS: Final = (
    "moving averages of this Keras begin as the weights before training, with ema_momentum from the first step on, and "
    "stay where a weight has no gradient; here and in Keras 3 they begin as the weights after the first step, and all "
    "move on"
)


def exclusions_note(optimizer: AdadeltaKeras, settings: Mapping[str, Any]) -> list[str]:
    """A note on weights that Keras may have excluded from weight decay."""
    if not settings.get("weight_decay") or any(group[exclusions.KEY] for group in optimizer.param_groups):
        return []
    return [
        f"all parameters get weight_decay={settings['weight_decay']!r}: which ones Keras excluded is in no file; call "
        "optimizer.exclude_from_weight_decay before load_keras if it did"
    ]


# ---- To Keras ------------------------------------------------------------------------------------------------------


def check_places(
    checkpoint: Checkpoint, optimizer: AdadeltaKeras, drop: Collection[str], hyperparameters: bool
) -> LeftOut:
    """What is to be left out, because only the optimizer has it, or only the file.

    Raises:
        ValueError: that is not to be dropped.
    """
    left_out = LeftOut([], [])
    for name, slot in SLOT_OF.items():
        option = OPTIONS_OF[name][0]
        value = getattr(optimizer, option)
        if value and not has(checkpoint, slot):
            if name not in drop:
                raise ValueError(
                    f"the optimizer has {option}={value!r}, and {checkpoint.path} no place for {DROPPABLE[name]}. Save "
                    f"a template, after a step, with a Keras optimizer that has {option}"
                    f"{'' if checkpoint.generation == KERAS3 else ', such as that of Keras 3'}; or pass "
                    f"drop={{{name!r}}} to leave them out"
                )
            left_out.ours.append(name)
        elif not value and has(checkpoint, slot):
            raise ValueError(
                f"{checkpoint.path} has {DROPPABLE[name]}, and the optimizer has {option}={value!r}. Set "
                f"optimizer.{option}; or pass drop={{{name!r}}} to take them out of the copy, for a Keras optimizer "
                "without them"
            )
        elif not value and slot in checkpoint.optional:
            left_out.theirs.append(name)
    count, n = int(optimizer.param_groups[0]["iterations"]), steps(optimizer, {})
    theirs = _steps_of(checkpoint, n)
    if not hyperparameters and has(checkpoint, accumulation.KEY) and count % theirs != count % n:
        raise ValueError(
            f"after {count} calls the gradients of {count % n} are summed, which is another number with the "
            f"gradient_accumulation_steps={theirs} of {checkpoint.path}; pass hyperparameters=True"
        )
    return left_out


def written_weight_decay(
    checkpoint: Checkpoint, optimizer: AdadeltaKeras, drop: Collection[str], notes: list[str]
) -> dict[str, float]:
    """The weight decay of all parameters, if there is some and Keras can have it.

    Raises:
        ValueError: Keras cannot express it, and it is not to be dropped.
    """
    decays = [float(group["weight_decay"]) for group in optimizer.param_groups]
    found = sorted(set(decays) - {0.0})
    if not found:
        return {}
    problem = None
    if not checkpoint.generation.has_additions:
        problem = f"weight_decay={found[-1]!r}, which this Keras does not have"
    elif len(found) > 1:
        problem = f"weight_decay={found[0]!r} and {found[-1]!r} in its groups, where Keras has one number"
    elif not all(group["decoupled_weight_decay"] for group in optimizer.param_groups):
        problem = "decoupled_weight_decay=False, which Keras does not have"
    if problem is not None:
        if "weight_decay" not in drop:
            raise ValueError(f"the optimizer has {problem}. Pass drop={{'weight_decay'}}: Keras goes on without")
        notes.append(f"left out: {DROPPABLE['weight_decay']}")
        return {}
    if 0.0 in decays or any(group[exclusions.KEY] for group in optimizer.param_groups):
        if "exclusions" not in drop:
            raise ValueError(
                "some parameters are excluded from weight decay, which no file of Keras holds. Pass "
                "drop={'exclusions'}, and call exclude_from_weight_decay of the optimizer in Keras"
            )
        notes.append("left out: exclusions from weight decay; call exclude_from_weight_decay in Keras")
    return {"weight_decay": found[0]}
