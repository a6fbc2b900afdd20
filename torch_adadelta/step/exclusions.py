"""Which parameters are excluded from weight decay.

A param group holds the places of its own ones, so that a state_dict can keep them.
"""

import re
from collections.abc import Iterable
from typing import Any, Final

from torch import Tensor

from torch_adadelta.step.sources import Group

KEY: Final = "excluded_from_weight_decay"


def find(groups: list[Group], var_list: Iterable[Tensor] | None, var_names: Iterable[str] | None) -> list[Any]:
    """What each group is to hold: the places of these parameters, and of those whose name one of the patterns matches.

    Raises:
        TypeError: the arguments are of other types.
        ValueError: a parameter is in no group; or a pattern is no regular expression, or parameters have no names.
    """
    patterns = _listed("var_names", var_names, str)
    wanted = known_ids(groups, var_list)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"var_names has {pattern!r}, which is no regular expression: {error}") from error
    if patterns and not all("param_names" in group for group in groups):
        raise ValueError(
            f"var_names={patterns!r} needs names: give the optimizer model.named_parameters(), or pass var_list"
        )
    places = []
    for group in groups:
        names = group.get("param_names", [""] * len(group["params"]))
        found = [
            place
            for place, (param, name) in enumerate(zip(group["params"], names, strict=True))
            if id(param) in wanted or any(re.search(pattern, name) for pattern in patterns)
        ]
        places.append(found or None)
    return places


def known_ids(groups: list[Group], var_list: Any) -> set[int]:
    """The ids of some parameters of the groups, checked."""
    given = _listed("var_list", var_list, Tensor)
    wanted = set(map(id, given))
    unknown = wanted - {id(param) for group in groups for param in group["params"]}
    for param in given:
        if id(param) in unknown:
            raise ValueError(
                f"var_list has a tensor of shape {tuple(param.shape)} that is no parameter of this optimizer; pass it "
                "to the constructor or to add_param_group before"
            )
    return wanted


def _listed(name: str, value: Any, kind: type) -> list[Any]:
    if isinstance(value, Tensor | str | dict) or not isinstance(value, Iterable | None):
        raise TypeError(f"{name} must be a list, got {value!r} of type {type(value).__name__}")
    found = list(value or ())
    for item in found:
        if not isinstance(item, kind):
            raise TypeError(f"{name} must consist of {kind.__name__}, got {item!r} of type {type(item).__name__}")
    return found


def check(groups: list[Group]) -> None:
    """Raises ValueError unless what groups hold are places of their parameters."""
    for index, group in enumerate(groups):
        places = group.get(KEY)
        if places is None:
            continue
        count = len(group["params"])
        if not isinstance(places, list) or not all(type(place) is int and 0 <= place < count for place in places):
            raise ValueError(
                f"group {index} has {KEY}={places!r}, which must be None or a list of places of its {count} "
                "parameters; call optimizer.exclude_from_weight_decay"
            )


def excluded_ids(groups: list[Group]) -> set[int]:
    """The ids of the parameters that are excluded."""
    return {id(group["params"][place]) for group in groups for place in group[KEY] or ()}
