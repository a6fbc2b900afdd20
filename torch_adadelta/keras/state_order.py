"""Which weight the n-th state of a ``.keras`` or ``.weights.h5`` file belongs to.

The optimizer has its state in the order of the weights that it was built for: those that the model trained then, layer
by layer, and in a layer its own before those of the layers in it. What the file and the configuration leave open is the
order of layers in a custom layer, for they are named by attributes; which layers were frozen at first, and which only
later, when there was state for them; and whether there are averages or accumulated gradients beside the accumulators,
where the configuration of the optimizer is not in the file. All that fits the counts and shapes is tried. A state is
taken if it belongs to the same weight in every case.
"""

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from torch_adadelta.keras.config import DROPPABLE, OPTIONS_OF, SLOT_OF, WEIGHTS_ALONE, ModelConfig, optional_state
from torch_adadelta.keras.errors import KerasFileError, LazyArray
from torch_adadelta.keras.layers import ACCUMULATORS, Layer, Variable

Shape = tuple[int, ...]

_MAX_TRIES: Final = 500_000
_MAX_FREE: Final = 1000  # weights in layers whose order is not known
_MAX_SHAPES: Final = 60  # in a message

_STATISTICS: Final = {"moving_mean", "moving_variance"}


class State(NamedTuple):
    """The variables of an optimizer, told apart; by default none."""

    iterations: LazyArray | None = None
    learning_rate: LazyArray | None = None
    slots: Mapping[int, dict[str, LazyArray]] = {}  # by the `id` of the weight
    order: Sequence[Variable] = ()  # the weights, as far as they have state
    optional: Mapping[str, list[str]] = {}  # where an optional slot of all weights is, by its key


@dataclass
class _Block:
    """A layer: its own weights, and the layers in it."""

    name: str
    variables: list[Variable] = field(default_factory=list)
    children: "dict[str, _Block]" = field(default_factory=dict)
    is_known: bool = False  # whether its class is, and so which weights it trains, and in which order
    is_optional: bool = False  # whether it may have been frozen when the optimizer was built

    def choices(self) -> Iterator[list[Variable]]:
        """The weights of its own that may have state, longest first. A custom layer has those it trains first."""
        if not self.is_known:
            for count in range(len(self.variables), -1, -1):
                yield self.variables[:count]
            return
        yield self.variables
        if self.is_optional:
            yield []

    def tasks(self) -> "_Tasks":
        """Its weights and those of the layers in it, as far as their order is known."""
        lanes: dict[str, list[_Tasks]] = {}
        for name in sorted(self.children, key=natural):
            # The layers of a model are numbered by class (dense, dense_1, conv2d).
            lane = re.sub(r"_\d+$", "", name) if self.name == "layers" else name
            lanes.setdefault(lane, []).append(self.children[name].tasks())
        own = [_Tasks(block=self)] if self.variables else []
        return _Tasks(steps=[*own, _Tasks(lanes=[_Tasks(steps=steps) for steps in lanes.values()])])


class _Tasks(NamedTuple):
    """Layers whose weights come one after the other: one layer; or steps in their order; or lanes that interleave.

    The layers in a layer need not come in one piece: a layer that several others use lies in the file where it was
    found first by the alphabet, and its weights come where it was first by creation.
    """

    block: _Block | None = None
    steps: "list[_Tasks]" = []  # noqa: RUF012
    lanes: "list[_Tasks]" = []  # noqa: RUF012

    @property
    def is_done(self) -> bool:
        return self.block is None and all(tasks.is_done for tasks in (*self.steps, *self.lanes))

    def next(self) -> "Iterator[tuple[_Block, _Tasks]]":
        """The layers that may come next, each with what is left then."""
        if self.block is not None:
            yield self.block, _Tasks()
        steps = [step for step in self.steps if not step.is_done]
        if steps:
            for block, left in steps[0].next():
                yield block, _Tasks(steps=[left, *steps[1:]])
        lanes = [lane for lane in self.lanes if not lane.is_done]
        for number, lane in enumerate(lanes):
            for block, left in lane.next():
                yield block, _Tasks(lanes=[*lanes[:number], left, *lanes[number + 1 :]])


def natural(name: str) -> list[Any]:
    """A key to sort by in which dense_10 comes after dense_9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def label(layer: Layer, variable: Variable) -> str:
    """The name of a weight, for people and for `state_order`."""
    return f"{layer.path}/{variable.role}"


def assigned(
    states: Sequence[LazyArray],
    layers: Sequence[Layer],
    model: ModelConfig | None,
    options: dict[str, Any],
    drop: Collection[str],
    state_order: Sequence[str] | None,
    uses: Collection[str] = (),
    is_by_slot: bool = False,
) -> State:
    """The state of each weight.

    Args:
        states: the variables of the optimizer, in their order.
        layers: the layers, in the order of the model if that is known.
        model: its configuration, if there is one.
        options: the configuration of the optimizer; empty if there is none.
        drop: what may be left out.
        state_order: the names of the weights in the order of the optimizer, if the user gave it.
        uses: what the optimizer used of "ema" and "gradient_accumulation", as far as that is known elsewhere. It names
            what the counts say is there, where nothing else does.
        is_by_slot: whether the variables are those of Keras 2: perhaps without iterations, and first all accumulators,
            then all delta accumulators.

    Raises:
        KerasFileError: the variables are not those of an Adadelta, or it cannot be told which is which.
    """
    has_iterations = states[0].shape == () and states[0].dtype.kind in "iu"
    if not (has_iterations or is_by_slot):
        raise KerasFileError("the first variable of its optimizer is not the iterations")
    iterations, rest = (states[0], states[1:]) if has_iterations else (None, states)
    weights = _weights(layers)
    given = None if state_order is None else _given(state_order, weights)
    units = _units(layers, model, is_by_slot)
    found: list[tuple[_Reading, _Order]] = []
    problems: list[str] = []
    for reading in _by_slot(rest) if is_by_slot else _readings(rest, options, drop):
        shapes = [pair[0].shape for pair in reading.pairs]
        if given is not None:
            order = _Order([*given], is_unique=True) if [v.value.shape for v in given] == shapes else None
        else:
            order = _order(units, shapes, problems)
        if order is not None:
            found.append((reading, order))
    if len(found) == 1 and found[0][1].is_unique:
        reading, order = found[0]
        columns = dict(zip(ACCUMULATORS, zip(*reading.pairs, strict=True), strict=True))
        optional = {}
        for name, column in zip(_names(reading, options, drop, uses, len(states)), reading.beside, strict=True):
            optional[SLOT_OF[name]] = [stored.name for stored in column]
            if name not in drop:
                columns[SLOT_OF[name]] = tuple(column)
        places = [(variable, place) for place, variable in enumerate(order.variables) if variable is not None]
        slots = {id(v): {slot: column[place] for slot, column in columns.items()} for v, place in places}
        return State(iterations, reading.learning_rate, slots, [v for v, _ in places], optional)
    listing = _listing(weights, states)
    if given is not None:
        raise KerasFileError(
            f"state_order has {len(given)} weights, which do not fit the {len(states)} variables of its optimizer"
            + listing
        )
    if not found:
        problem = problems[0] if problems else "no order of them fits"
        kept = optional_state(options)
        if kept:
            advice = ", ".join(map(repr, kept))
            problem += (
                f", with {' and '.join(DROPPABLE[name] for name in kept)} (drop={{{advice}}} would leave that out)"
            )
    elif not all(order.is_unique for _, order in found):
        problem = "several orders of them fit"
    else:
        problem = (
            "it may have moving averages or accumulated gradients, or else state for weights that were frozen later, "
            "for both fit"
        )
    config = "" if model is not None else "config=model.to_json(), or "
    another = "" if options else f"; or, if it is not that of an Adadelta, {WEIGHTS_ALONE}"
    raise KerasFileError(
        "the state of its optimizer has no names, and which weight each belongs to cannot be told from the "
        f"configuration, the counts and the shapes: {problem}. Pass {config}state_order=[names of the weights in the "
        f"optimizer's order], from those below{another}{listing}"
    )


def _weights(layers: Iterable[Layer]) -> dict[str, Variable]:
    """By their labels, those that an optimizer may train."""
    return {
        label(layer, variable): variable
        for layer in layers
        for variable in layer.variables
        if variable.role not in _STATISTICS and layer.class_name != "Normalization" and variable.value.dtype.kind == "f"
    }


def _given(names: Sequence[str], weights: dict[str, Variable]) -> list[Variable]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise KerasFileError(f"state_order must be a list of names of weights, got {names!r}")
    unknown = [name for name in names if name not in weights]
    if unknown:
        raise KerasFileError(f"state_order has {unknown[0]!r}, which is no weight; there are {', '.join(weights)}")
    twice = [name for name in names if list(names).count(name) > 1]
    if twice:
        raise KerasFileError(f"state_order has {twice[0]!r} twice")
    return [weights[name] for name in names]


def _listing(weights: dict[str, Variable], states: Sequence[LazyArray]) -> str:
    lines = "\n".join(f"  {name} {variable.value.shape}" for name, variable in weights.items())
    shapes = ", ".join(str(stored.shape) for stored in states[:_MAX_SHAPES]) + ", …" * (len(states) > _MAX_SHAPES)
    return f"\nweights:\n{lines}\nshapes of the variables of the optimizer:\n  {shapes}"


# ---- What the variables of an optimizer are -------------------------------------------------------------------------


class _Reading(NamedTuple):
    """What the variables may be: the learning rate, what all weights have besides the accumulators, and these."""

    learning_rate: LazyArray | None
    beside: list[list[LazyArray]]
    pairs: list[tuple[LazyArray, LazyArray]]


def _readings(states: Sequence[LazyArray], options: dict[str, Any], drop: Collection[str]) -> Iterator[_Reading]:
    """All that the counts admit, of what is behind the iterations.

    There may be the learning rate; the averages of all weights; their accumulated gradients; and then the two
    accumulators of one weight after the other.
    """
    kept = optional_state(options)
    counts = {len(kept), len([name for name in kept if name not in drop])} if options else {0, 1, 2}
    for has_rate, extras in itertools.product((True, False), sorted(counts)):
        rest = list(states)
        learning_rate = None
        if has_rate:
            if rest[0].shape != () or rest[0].dtype.kind != "f":
                continue
            learning_rate = rest.pop(0)
        count, left = divmod(len(rest), 2 + extras)
        if left:
            continue
        beside = [rest[start : start + count] for start in range(0, extras * count, count)]
        rest = rest[extras * count :]
        pairs = list(zip(rest[::2], rest[1::2], strict=True))
        shapes = [one.shape for one, _ in pairs]
        if all([stored.shape for stored in column] == shapes for column in ([two for _, two in pairs], *beside)):
            yield _Reading(learning_rate, beside, pairs)


def _by_slot(states: Sequence[LazyArray]) -> Iterator[_Reading]:
    """All accumulators, and then all delta accumulators."""
    half = len(states) // 2
    pairs = list(zip(states[:half], states[half:], strict=False))
    if len(states) == 2 * half and all(one.shape == two.shape for one, two in pairs):
        yield _Reading(None, [], pairs)


def _names(
    reading: _Reading, options: dict[str, Any], drop: Collection[str], uses: Collection[str], count: int
) -> list[str]:
    """What the variables beside the accumulators are, of `SLOT_OF`."""
    extras = len(reading.beside)
    if options:
        kept = optional_state(options)
        return kept if len(kept) == extras else [name for name in kept if name not in drop]
    if extras in (0, len(SLOT_OF)):
        return list(SLOT_OF)[:extras]
    names = [name for name in SLOT_OF if name in uses or name in drop]
    if len(names) == 1 or set(SLOT_OF) <= set(drop):  # all is left out, whatever it is
        return names[:1]
    them = " or ".join(DROPPABLE[name] for name in SLOT_OF)
    ways = " or ".join(OPTIONS_OF[name][0] for name in SLOT_OF)
    raise KerasFileError(
        f"its optimizer has {count} variables for {len(reading.pairs)} weights: it had {them}, and the file does not "
        f"say which. Give AdadeltaKeras what it had of {ways}; or pass "
        f"{' or '.join(f'drop={{{name!r}}}' for name in SLOT_OF)} to leave them out"
    )


# ---- Orders of the weights ------------------------------------------------------------------------------------------


class _Order(NamedTuple):
    variables: list[Variable | None]  # for each pair; None if it is of a weight that is frozen, and which is open
    is_unique: bool


def _units(layers: Sequence[Layer], model: ModelConfig | None, is_ordered: bool) -> list[_Block]:
    """What comes one after the other: layers whose order is known, by the model or else; or one block with all."""
    is_known = model is not None and model.is_complete
    if not (is_known or is_ordered):
        return [_tree(layers, is_optional=True)]
    units = [_tree([layer], is_optional=layer.is_frozen or not is_known) for layer in layers]
    return [unit for unit in units if unit.variables or unit.children]


def _tree(layers: Sequence[Layer], is_optional: bool) -> _Block:
    """The layers as they lie in the file, with known ones as one block each."""
    root = _Block("")
    for layer in layers:
        for variable in layer.variables:
            if variable.role in _STATISTICS or layer.class_name == "Normalization" or variable.value.dtype.kind != "f":
                continue
            parts = layer.group.split("/") if layer.is_known else variable.value.name.rpartition("/vars/")[0].split("/")
            block = root
            for part in parts if len(layers) > 1 or not layer.is_known else ():
                block = block.children.setdefault(part, _Block(part))
            block.is_known, block.is_optional = layer.is_known, is_optional
            block.variables.append(variable)
    return root


def _order(units: list[_Block], shapes: list[Shape], problems: list[str]) -> _Order | None:
    """The weight of each pair; None, perhaps with a reason, if no order fits, or too many would have to be tried."""
    try:
        fitting = _fitting(units, shapes)
    except (RecursionError, OverflowError):
        problems.append("there are too many orders to try")
        return None
    if fitting is None:
        return None
    variables: list[Variable | None] = [None] * len(shapes)
    is_unique = True
    for unit, orders in zip(units, fitting, strict=True):
        places = [{id(variable): at + n for n, variable in enumerate(order)} for at, order in orders]
        for variable in _all_variables(unit):
            found = {place.get(id(variable)) for place in places}
            place = found.pop()
            if found:
                is_unique = is_unique and variable.is_frozen
            elif place is not None:
                variables[place] = variable
    return _Order(variables, is_unique)


def _fitting(units: list[_Block], shapes: list[Shape]) -> list[list[tuple[int, list[Variable]]]] | None:
    """Where each unit may begin, and its weights with state, in all orders that fit as a whole; None if none does."""
    budget = [_MAX_TRIES]
    most_orders = 2 if len(units) == 1 else _MAX_TRIES  # two are enough to know that it is open
    local: list[list[tuple[int, list[Variable]]]] = []
    starts = {0}
    # How many weights with state the units from one on have at least, and at most.
    least, most = [0], [0]
    for unit in reversed(units):
        most.append(most[-1] + len(_all_variables(unit)))
        least.append(least[-1] + (len(unit.variables) if unit.is_known and not unit.is_optional else 0))
    for number, unit in enumerate(units):
        if not unit.is_known and len(_all_variables(unit)) > _MAX_FREE:
            raise OverflowError
        left = len(units) - number
        starts = {at for at in starts if least[left] <= len(shapes) - at <= most[left]}
        tasks, slack = unit.tasks(), most[-1] - len(shapes)
        local.append(
            [
                (at, order)
                for at in sorted(starts)
                for order in _distinct(_orders(tasks, shapes, at, slack, budget), most_orders)
            ]
        )
        starts = {at + len(order) for at, order in local[-1]}
    ends = {len(shapes)}
    if not starts & ends:
        return None
    found = []
    for orders in reversed(local):
        found.append([(at, order) for at, order in orders if at + len(order) in ends])
        ends = {at for at, _ in found[-1]}
    return found[::-1]


def _distinct(orders: Iterable[list[Variable]], most: int) -> list[list[Variable]]:
    found: dict[tuple[int, ...], list[Variable]] = {}
    for order in orders:
        found[tuple(map(id, order))] = order
        if len(found) == most:
            break
    return list(found.values())


def _orders(tasks: _Tasks, shapes: list[Shape], at: int, slack: int, budget: list[int]) -> Iterator[list[Variable]]:
    """The weights that may have the state from a place on, all but so many, in each order that fits."""
    if tasks.is_done:
        yield []
        return
    for block, left in tasks.next():
        for own in block.choices():
            budget[0] -= 1
            if budget[0] < 0:
                raise OverflowError
            skipped = len(block.variables) - len(own)
            if skipped <= slack and shapes[at : at + len(own)] == [variable.value.shape for variable in own]:
                for tail in _orders(left, shapes, at + len(own), slack - skipped, budget):
                    yield own + tail


def _all_variables(block: _Block) -> list[Variable]:
    return block.variables + [v for child in block.children.values() for v in _all_variables(child)]
