"""From param groups and gradients to the plan of a step. Whatever may fail, fails here, before anything is written.

What was found of the last step is kept, as a partition: which parameters one call updates, with which state. While it
matches, only gradients and numbers are new.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby, repeat
from operator import is_, itemgetter
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from torch_adadelta import distributed, options
from torch_adadelta.backends import dtensor, functional, kernels
from torch_adadelta.backends.batch import NO_OPTIONS, STATE_DTYPES, STATE_KEYS, Backend, Batch, Row, Segment, has_state
from torch_adadelta.backends.opmath import opmath_dtype, opmath_dtypes
from torch_adadelta.options import HYPERPARAMETERS, OPTIONS, Kind
from torch_adadelta.step import accumulation, averages, exclusions, norm_variables, precision, validation
from torch_adadelta.step.callbacks import Callbacks
from torch_adadelta.step.clipping import NO_CLIPPING, Clipping, recording, set_gradient_options
from torch_adadelta.step.selection import PLAIN_TYPES, by_device, is_lazy, select_backend
from torch_adadelta.step.sources import Group, GroupWrite, Sources, StepValues, is_capturing

State = dict[Tensor, dict[str, Any]]

# For each of STATE_KEYS, that of all rows of a step.
Columns = tuple[list[Tensor], ...]

# What a partition depends on, and what is checked when it changes.
_get_options: Final = itemgetter(
    *(option.key for option in OPTIONS if option.kind is not Kind.HYPERPARAMETER),
    *options.new_metadata(),
)
_get_clip_options: Final = itemgetter(*options.CLIP_OPTIONS)
_get_gradient_options: Final = itemgetter(*options.CLIP_OPTIONS, "loss_scale_factor")
_UNCHANGED: Final = (None, None, None, None)
_get_hyperparameters: Final = itemgetter(*(option.key for option in HYPERPARAMETERS))
_get_state: Final = itemgetter(*STATE_KEYS)


class ExplicitGradients(NamedTuple):
    """Gradients that were handed over instead of left in `.grad`."""

    pairs: list[tuple[Tensor, Tensor]]
    aggregates: bool


class StepRequest(NamedTuple):
    """All that a step depends on.

    Args:
        groups, state: those of the optimizer.
        sources, callbacks: schedules and callables of hyperparameters, and of gradients.
        partitions: where the partition of the last step is kept.
        explicit: gradients that replace those in `.grad`.
        grad_scale, found_inf: what GradScaler has set.
        norm_group: the processes over which the norm of all gradients is taken.
        is_part: whether other optimizers have other parameters, and this one keeps count with them, as it does where it
            has no parameters.
        has_scheduler: whether a scheduler of torch.optim writes the learning rate.
        renewed: makes the request anew, for callbacks may have loaded a checkpoint.
    """

    groups: list[Group]
    state: State
    sources: Sources
    callbacks: Callbacks
    partitions: "PartitionCache"
    explicit: ExplicitGradients | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    norm_group: "distributed.NormGroup | None" = None
    is_part: bool = False
    has_scheduler: Callable[[], bool] = lambda: False
    renewed: "Callable[[], StepRequest] | None" = None

    def name_of(self, param: Tensor) -> str:
        """What errors call a parameter."""
        return validation.name_of(self.groups, param)


class Rows(NamedTuple):
    """What is to be updated, group after group."""

    params: list[Tensor]
    grads: list[Tensor]
    sizes: list[int]  # how many are of each group
    order: list[int] | None = None  # the number of each gradient in the step; None for 0, 1, 2, …


class Inputs(NamedTuple):
    """What a step knows before its parameters are partitioned."""

    rows: Rows
    values: StepValues
    clipping: Clipping
    sums: State | None = None  # new ones of gradients
    ends_sums: bool = False  # whether all sums of gradients become 0
    averages_rest: bool = True  # whether the averages of all other parameters move on with this plan


@dataclass
class StepPlan:
    """A step that is checked and ready to be written.

    Args:
        request: the step.
        batches: the updates.
        new_state: what is added to the state of parameters.
        writes: what schedules and callables gave, to be left in the groups.
        passes: averages that are not part of an update.
        additions, finished: gradients that are added to sums; sums that become 0.
        counts: whether the step is counted.
        inputs: what it was made from, to make another plan, should the partition of the last step be wrong.
    """

    request: StepRequest
    batches: list[Batch]
    new_state: State
    writes: list[GroupWrite]
    passes: list[averages.AveragePass] = field(default_factory=list)
    additions: list[accumulation.Addition] = field(default_factory=list)
    finished: list[Tensor] = field(default_factory=list)
    counts: bool = True
    inputs: Inputs | None = None


# ---- The partition --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class SegmentSpec:
    """The part of a group, of one opmath dtype T, that is in a batch."""

    group: int
    T: torch.dtype
    is_excluded: bool  # from weight decay
    size: int
    given: tuple[Any, ...] | None = None  # what the group held when `segment` was made; None if it may not be reused
    segment: Segment | None = None

    def segment_of(self, groups: list[Group], values: StepValues) -> Segment:
        """The hyperparameters of this step."""
        group = groups[self.group]
        given = _get_hyperparameters(group)
        is_known = (self.group, self.T) in values.known  # which may be older than what the group holds
        if not is_known and self.segment is not None and self.given is not None and all(map(is_, given, self.given)):
            return self.segment
        lr, rho, epsilon, weight_decay = values.of(self.group, self.T)
        if not group["decoupled_weight_decay"]:  # the value may be new
            options.check_weight_decay({**group, "weight_decay": weight_decay})
        decay = 0.0 if self.is_excluded else weight_decay, group["decoupled_weight_decay"]
        self.segment = Segment(
            self.size,
            lr,
            rho,
            epsilon,
            group["maximize"],
            *decay,
            state_dtype=STATE_DTYPES.index(group["state_dtype"]),
            has_masters=group["master_weights"],
        )
        is_fixed = not values.sources[self.group] and not group["decay"] and all(type(x) in (float, int) for x in given)
        self.given = given if is_fixed and not is_known else None
        return self.segment


@dataclass(slots=True)
class BatchSpec:
    """What of a batch stays the same from step to step."""

    backend: Backend
    is_sparse: bool
    is_differentiable: bool
    is_local: bool  # whether there are DTensors, of which the local tensors are updated
    has_remainders: bool
    rows: list[int] | None  # which of the step's rows these are; None for all of them
    segments: list[SegmentSpec] = field(default_factory=list)
    accumulators: kernels.AccumulatorCache | None = None
    cached: list[Tensor] = field(default_factory=list)  # the tensors that `accumulators` holds

    def select(self, values: list[Any]) -> list[Any]:
        """Those of the batch among one for each row of the step."""
        return values if self.rows is None else [values[row] for row in self.rows]

    @property
    def has_checking_op(self) -> bool:
        """Whether an op looks whether the gradients are dense, before it writes anything."""
        return self.backend is Backend.FUSED and not self.is_sparse

    def fits(self, rows: Rows) -> bool:
        """Whether the gradients are of the kind that the batch is for, as far as no op looks."""
        grads = self.select(rows.grads)
        if self.is_local and not dtensor.are_alike(self.select(rows.params), grads):
            return False
        return self.has_checking_op or all(functional.is_sparse(grad) == self.is_sparse for grad in grads)

    def batch(self, rows: Rows, state: Columns, groups: list[Group], values: StepValues) -> Batch:
        """The batch of this step."""
        lists: Any = (rows.params, rows.grads, *state)
        if self.rows is not None:
            lists = tuple(map(self.select, lists))
        wholes, accumulators = None, None if self.accumulators is None else self.accumulators.number
        if self.is_local:
            none = [None] * len(lists[0])
            wholes = (lists[0], dtensor.aligned(*lists[:2]), *lists[2:], none, none)
            lists = tuple(map(dtensor.local_tensors, wholes[:4]))
            accumulators = accumulators if all(map(is_, chain(*lists[2:]), self.cached)) else None
        return Batch(  # type: ignore[call-arg]
            self.backend,
            self.is_sparse,
            self.is_differentiable,
            *lists,
            [segment.segment_of(groups, values) for segment in self.segments],
            NO_OPTIONS,
            self.rows if rows.order is None else self.select(rows.order),
            accumulators,
            wholes,
        )

    def cache_accumulators(self, batch: Batch) -> None:
        """Hands the state to the compiled library, where it keeps that, for the steps to come."""
        if self.backend is Backend.FUSED and not self.is_sparse and not self.has_remainders:
            self.cached = [*batch.square_avgs, *batch.acc_deltas]
            self.accumulators = kernels.cached_accumulators(batch.square_avgs, batch.acc_deltas)
            batch.accumulators = None if self.accumulators is None else self.accumulators.number


# A partition keeps the state itself, to compare it with that of the next step, if it has no more elements than this:
# what replaced larger state would wait in memory for the next step, for instance on a GPU that it was moved from. Of
# larger state it knows the ids. For large tensors the library's cache of accumulators makes no difference to speed.
_MOST_KEPT: Final = 2**22


class Partition:
    """Which parameters of a step one call updates, and what that depends on."""

    def __init__(self, groups: list[Group], rows: Rows, state: Columns) -> None:
        self.options = list(map(_get_options, groups))
        self.sizes = rows.sizes
        is_small = sum(map(Tensor.numel, state[0])) <= _MOST_KEPT
        self.state = state if is_small else None
        self.ids = [] if is_small else [list(map(id, column)) for column in state]
        self.specs = _specs(groups, rows)
        # A single op checks all of its lists before it writes.
        is_left_to_op = len(self.specs) == 1 and self.specs[0].has_checking_op and not self.specs[0].is_local
        self.needs_checks = not is_left_to_op
        # The opmath dtype decides in which precision schedules and `decay` are computed; the dtype, which parameters
        # multi-tensor operations take together.
        depends_on_dtype = any(group["decay"] or group["schedule"] or group["callables"] for group in groups) or any(
            spec.backend is not Backend.FUSED for spec in self.specs
        )
        self.dtypes = [param.dtype for param in rows.params] if depends_on_dtype else None

    def keep(self, batches: list[Batch]) -> None:
        """Has the compiled library keep the accumulators of these batches, of this step, for the next ones."""
        for spec, batch in zip(self.specs, batches, strict=True) if self.state is not None else ():
            spec.cache_accumulators(batch)

    def fits(self, rows: Rows) -> bool:
        """Whether the gradients of a step are of the kinds that the batches are for, as far as no op looks."""
        return all(spec.fits(rows) for spec in self.specs)

    def state_of(self, params: list[Tensor], state: State) -> Columns | None:
        """The state of the parameters, if it is what it was, by identity: then they are those that they were."""
        entries: Any = state.values()
        if len(state) != len(params) or not all(map(is_, state, params)):
            entries = list(map(state.get, params))  # to hash a thousand parameters takes much longer
        try:
            if self.state is None:
                current = tuple([entry[key] for entry in entries] for key in STATE_KEYS)
                return current if [list(map(id, column)) for column in current] == self.ids else None
            for entry, square_avg, acc_delta in zip(entries, *self.state, strict=True):
                if entry["square_avg"] is not square_avg or entry["acc_delta"] is not acc_delta:
                    return None
        except (KeyError, TypeError):  # a parameter without state, or with that of something else
            return None
        return self.state


class PartitionCache:
    """The partition of the last step, if there is one."""

    def __init__(self) -> None:
        self.partition: Partition | None = None

    def find(self, request: StepRequest, rows: Rows) -> tuple[Partition, Columns] | None:
        """The partition and the state of the parameters, if a step has the same options, parameters and state."""
        partition = self.partition
        if (
            partition is None
            or rows.order is not None
            or rows.sizes != partition.sizes
            or list(map(_get_options, request.groups)) != partition.options
            or (partition.dtypes is not None and [param.dtype for param in rows.params] != partition.dtypes)
        ):
            return None
        state = partition.state_of(rows.params, request.state)
        return None if state is None else (partition, state)


# ---- How rows are partitioned into batches --------------------------------------------------------------------------


class _Kind(NamedTuple):
    """What parameters have in common that one call updates."""

    device: torch.device
    backend: Backend
    is_sparse: bool
    is_differentiable: bool
    is_local: bool
    has_remainders: bool
    dtypes: tuple[torch.dtype, torch.dtype] | None = None  # of parameters and state, where they must be the same
    is_dtensor: bool = False  # under autograd DTensors do not mix with others


def _kinds_in_group(group: Group, params: list[Tensor], grads: list[Tensor]) -> list[_Kind]:
    """The kind of each row of a group."""
    selected = {device: select_backend(group, some) for device, some in by_device(params).items()}
    kinds = []
    for param, grad in zip(params, grads, strict=True):
        backend, is_local = selected[param.device]
        is_sparse, is_dtensor = functional.is_sparse(grad), not is_local and dtensor.is_dtensor(param)
        if is_sparse and backend is Backend.MULTI_TENSOR:  # which has no update of its own for them
            backend = Backend.SINGLE_TENSOR
        dtypes = (param.dtype, precision.state_dtype(group, param)) if backend is Backend.MULTI_TENSOR else None
        has_remainders = precision.needs_remainder(group, param)
        kinds.append(
            _Kind(
                param.device, backend, is_sparse, group["differentiable"], is_local, has_remainders, dtypes, is_dtensor
            )
        )
    return kinds


def _members(params: list[Tensor], kinds: list[_Kind]) -> list[list[int]]:
    """The rows of each batch."""
    plain = [param for param in params if type(param) in PLAIN_TYPES and not param.is_meta]
    is_twice = len(set(map(id, params))) < len(params)
    if len(set(kinds)) > 1 and (is_twice or validation.is_listed_twice(plain)):
        # A parameter that is listed twice is updated in the order of the gradients.
        return [list(run) for _, run in groupby(range(len(kinds)), kinds.__getitem__)]
    members: dict[_Kind, list[int]] = {}
    for row, kind in enumerate(kinds):
        members.setdefault(kind, []).append(row)
    # Dense ones first: their op checks all of them before it writes, which then need not be done beforehand.
    return sorted(members.values(), key=lambda rows: kinds[rows[0]].is_sparse)


def _specs(groups: list[Group], rows: Rows) -> list[BatchSpec]:
    kinds: list[_Kind] = []
    group_of: list[int] = []
    for index, size in enumerate(rows.sizes):
        part = slice(len(kinds), len(kinds) + size)
        if size:
            kinds += _kinds_in_group(groups[index], rows.params[part], rows.grads[part])
            group_of += [index] * size
    # Schedules and `decay` are computed in T, so that a segment has one.
    T_of = [opmath_dtype(param.dtype) for param in rows.params]
    excluded = exclusions.excluded_ids(groups)
    segment_of = [(group, T, id(p) in excluded) for group, T, p in zip(group_of, T_of, rows.params, strict=True)]
    specs = []
    for members in _members(rows.params, kinds):
        members.sort(key=lambda row: (group_of[row], T_of[row] is torch.float64, segment_of[row][2]))
        is_all = members == list(range(len(kinds)))
        kind = kinds[members[0]]
        spec = BatchSpec(
            kind.backend,
            kind.is_sparse,
            kind.is_differentiable,
            kind.is_local,
            kind.has_remainders,
            None if is_all else members,
        )
        for segment, run in groupby(members, segment_of.__getitem__):
            spec.segments.append(SegmentSpec(*segment, len(list(run))))
        specs.append(spec)
    return specs


# ---- The plan -------------------------------------------------------------------------------------------------------


def gather(request: StepRequest) -> Rows:
    """The parameters that have a gradient, and their gradients."""
    if request.explicit is not None:
        return _explicit_rows(request.groups, request.explicit.pairs)
    params: list[list[Tensor]] = []
    grads: list[list[Tensor]] = []
    for group in request.groups:
        with_grad = group["params"]
        group_grads = [grad for param in with_grad if (grad := param.grad) is not None]
        if len(group_grads) != len(with_grad):
            with_grad = [param for param in with_grad if param.grad is not None]
        params.append(with_grad)
        grads.append(group_grads)
    if len(params) == 1:  # to copy a list of a thousand tensors touches each of them
        return Rows(params[0], grads[0], [len(grads[0])])
    return Rows(list(chain(*params)), list(chain(*grads)), list(map(len, grads)))


def _explicit_rows(groups: list[Group], pairs: list[tuple[Tensor, Tensor]]) -> Rows:
    group_of = {id(param): index for index, group in enumerate(groups) for param in group["params"]}
    order = sorted(range(len(pairs)), key=lambda number: group_of[id(pairs[number][1])])
    sizes = [0] * len(groups)
    for _, param in pairs:
        sizes[group_of[id(param)]] += 1
    params, grads = ([pairs[number][place] for number in order] for place in (1, 0))
    return Rows(params, grads, sizes, None if order == list(range(len(order))) else order)


def plan(request: StepRequest) -> StepPlan | None:
    """The plan of a step; None if there is nothing to do.

    Raises whatever is wrong with options, gradients and state, and what schedules and callbacks raise.
    """
    rows = gather(request)
    sums: State = {}
    ends_sums = request.groups[0]["gradient_accumulation_steps"] is not None
    if ends_sums:
        check_groups(request)
        if rows.params and _makes_state_only(request, rows):
            return _plan_of_state(request, rows)
        if not accumulation.is_update(request.groups[0]):
            return _plan_of_sums(request, rows)
        rows = _means(request, rows, sums)
    kept = request.partitions.find(request, rows)
    if kept is None:
        check_groups(request)
        if _makes_state_only(request, rows):
            return _plan_of_state(request, rows)
    if any(request.sources.of_groups):
        request.sources.sync(request.groups, request.callbacks)
        request.sources.check_not_overwritten(request.groups, request.has_scheduler)
    if request.callbacks.aggregator is not None or request.callbacks.transformers:
        request.callbacks.check_clip_options(request.groups[0])  # one may have been appended to the list
        rows = _run_callbacks(request, rows)
        # They may have written to groups and state, or loaded a checkpoint.
        request = request if request.renewed is None else request.renewed()
        kept = request.partitions.find(request, rows)
        if kept is None:
            check_groups(request)
    clipping, others_have_gradients = NO_CLIPPING, False
    if request.norm_group is not None or request.found_inf is not None or request.grad_scale is not None:
        clipping, others_have_gradients = _clipping(request, rows)
    elif _get_gradient_options(request.groups[0]) != _UNCHANGED:
        clipping, _ = _clipping(request, rows)
    if rows.params:
        values = StepValues(request.groups, request.sources.of_groups)
        return assemble(request, Inputs(rows, values, clipping, sums, ends_sums), kept)
    if clipping.over_parts is not None or clipping.over_processes is not None:  # others wait for this process
        set_gradient_options([], clipping)
    if not others_have_gradients and not request.is_part and any(group["params"] for group in request.groups):
        return None
    if torch.version.cuda is not None and is_capturing():
        validation.check_capture(request.groups, [], {}, request.name_of)
    new_state: State = {}
    finished = accumulation.all_sums(request.groups, request.state) if ends_sums else []
    return StepPlan(request, [], new_state, [], average_rest(request, [], new_state), finished=finished)


def assemble(request: StepRequest, inputs: Inputs, kept: tuple[Partition, Columns] | None = None) -> StepPlan:
    """The plan of a step with gradients.

    Args:
        request: the step.
        inputs: what is known of it.
        kept: the partition of the last step and the state; they are made anew without, or should they no longer fit.
    """
    rows, values, clipping, *_ = inputs
    new_state: State = {}
    is_cached = kept is not None and (not kept[0].needs_checks or kept[0].fits(rows))
    if kept is not None and is_cached:
        partition, state = kept
    else:
        state, new_state = _completed(request, rows)
        partition = Partition(request.groups, rows, state)
    for param, entry in (inputs.sums or {}).items():
        new_state.setdefault(param, {}).update(entry)
    batches = [spec.batch(rows, state, request.groups, values) for spec in partition.specs]
    for spec, batch in zip(partition.specs, batches, strict=True):
        if spec.has_remainders:
            precision.attach_remainders(batch, request.state, new_state, request.name_of)
    if not is_cached and len(batches) > 1:  # each op or Python path looks at its own batch only
        validation.check_memory(batches, request.name_of)
    if not is_cached and rows.order is None:
        partition.keep(batches)
        request.partitions.partition = partition
    refused = None
    if clipping.clipnorm is not None and norm_variables.any_in(request.groups):
        batches, over_variables = norm_variables.split(batches, request.groups, request.name_of)
        clipping = clipping._replace(over_variables=over_variables)
    passes: list[averages.AveragePass] = []
    if request.groups[0]["use_ema"]:
        in_batches = averages.attach(request.groups, request.state, batches, new_state, request.name_of)
        passes = average_rest(request, in_batches, new_state) if inputs.averages_rest else []
    if partition.needs_checks:
        refused = validation.check_batches(batches, request.name_of)
    if refused is None and clipping is not NO_CLIPPING:
        refused = set_gradient_options(batches, clipping)
    if refused is not None:
        if is_cached:
            return assemble(request, inputs)
        validation.raise_named(*refused, request.name_of)
    if torch.version.cuda is not None and is_capturing():
        validation.check_capture(request.groups, batches, new_state, request.name_of)
    # Norms that were summed over processes cannot be summed again: the others would not take part.
    is_shared = clipping.over_parts is not None or clipping.over_processes is not None
    inputs_again = inputs if is_cached and not is_shared else None
    finished = accumulation.all_sums(request.groups, request.state) if inputs.ends_sums else []
    return StepPlan(request, batches, new_state, values.writes, passes, finished=finished, inputs=inputs_again)


def check_groups(request: StepRequest) -> None:
    """Raises what is wrong with the options, which somebody may have written to the groups."""
    groups = request.groups
    request.sources.sync(groups, request.callbacks)
    options.canonicalize_wide(dict(groups[0]))
    options.check_agreement(groups)
    for group in groups:
        options.canonicalize_choices(group)  # ZeroRedundancyOptimizer hands over what was saved
        options.check_combinations(group)
    validation.check_dtypes(groups)
    exclusions.check(groups)
    norm_variables.check(groups, request.norm_group is not None or request.is_part)


def _in_order(rows: Rows) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and gradients in the order in which they were given."""
    numbers = range(len(rows.params)) if rows.order is None else rows.order
    in_order = sorted(range(len(rows.params)), key=numbers.__getitem__)
    return [rows.params[row] for row in in_order], [rows.grads[row] for row in in_order]


def _plan_of_sums(request: StepRequest, rows: Rows) -> StepPlan | None:
    """The plan of a call that only adds gradients to their sums; None if there is nothing to do."""
    sums: State = {}
    additions = accumulation.additions(request.groups, request.state, *_in_order(rows), sums, request.name_of)
    others_have_gradients = False
    if request.norm_group is not None:  # the others are asked, too
        _, others_have_gradients = _clipping(request, rows)
    has_params = any(group["params"] for group in request.groups)
    if not rows.params and not others_have_gradients and not request.is_part and has_params:
        return None
    return StepPlan(request, [], sums, [], average_rest(request, [], sums), additions)


def _means(request: StepRequest, rows: Rows, sums: State) -> Rows:
    """The means of all gradients since the last update. Sums that are missing are made, in `sums`."""
    params, grads = _in_order(rows)
    added = accumulation.additions(request.groups, request.state, params, grads, sums, request.name_of)
    means = accumulation.means(request.groups, request.state, params, added, request.name_of)
    return _explicit_rows(request.groups, [(mean, param) for param, mean in means.items()])


def _plan_of_state(request: StepRequest, rows: Rows) -> StepPlan:
    """The plan that makes state to load into, and counts nothing."""
    _, new_state = _completed(request, rows)
    names, has_sums = request.name_of, request.groups[0]["gradient_accumulation_steps"] is not None
    group_of = precision.groups_of(request.groups)
    for param in rows.params:
        if precision.needs_remainder(group_of[param], param):
            precision.remainder_of(param, request.state, new_state)
        if has_sums:
            accumulation.sum_of(param, request.state, new_state, names)
    if request.groups[0]["use_ema"]:
        averages.averages_of(request.groups, rows.params, request.state, new_state, names)
    return StepPlan(request, [], new_state, [], counts=False)


def average_rest(request: StepRequest, others: list[Tensor], new_state: State) -> list[averages.AveragePass]:
    """The passes over the averages of all parameters but these."""
    if not request.groups[0]["use_ema"]:
        return []
    known = set(map(id, others))
    rest = [
        param
        for param in dict.fromkeys(param for group in request.groups for param in group["params"])
        if id(param) not in known and not is_lazy(param)
        if param.requires_grad or averages.KEY in request.state.get(param, ())
    ]
    return averages.passes(request.groups, rest, request.state, new_state, request.name_of, request.found_inf)


def _makes_state_only(request: StepRequest, rows: Rows) -> bool:
    """Whether distributed checkpointing makes state to load into: it sets lr to 0 and steps with zero gradients."""
    if any(map(has_state, request.state.values())) or not all(_is_zero(group["lr"]) for group in request.groups):
        return False
    # A zero under a schedule was written by somebody else. Without one it may be meant, and then the step counts.
    if not request.sources.has_any("lr") and not distributed.is_called_to_make_state():
        return False
    return not dtensor.any_nonzero(rows.params, rows.grads)


def _is_zero(value: Any) -> bool:
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return False  # to look would be to wait for the device
    return bool(value == 0)


def _run_callbacks(request: StepRequest, rows: Rows) -> Rows:
    """The same rows with the gradients that aggregator and transformers return for those in their order."""
    params, grads = _in_order(rows)
    for param, grad in zip(params, grads, strict=True):
        validation.check_gradient(partial(request.name_of, param), param, grad)
    aggregates = request.explicit is None or request.explicit.aggregates
    with recording(any(group["differentiable"] for group in request.groups)):
        is_unscaled = request.groups[0]["gradient_accumulation_steps"] is not None
        factor = None if is_unscaled else request.groups[0]["loss_scale_factor"]
        grads = request.callbacks.run(params, grads, aggregates, request.grad_scale, factor, request.name_of)
    numbers = range(len(rows.params)) if rows.order is None else rows.order
    return rows._replace(grads=[grads[number] for number in numbers])


def _clipping(request: StepRequest, rows: Rows) -> tuple[Clipping, bool]:
    """What is to be done to the gradients, and whether other processes of `norm_group` have some."""
    clipvalue, clipnorm, global_clipnorm = _get_clip_options(request.groups[0])
    if any(isinstance(value, bool) for group in request.groups for value in _get_clip_options(group)):
        check_groups(request)  # which refuses it; to the partition of the last step True is 1.0
    has_callbacks = request.callbacks.aggregator is not None or bool(request.callbacks.transformers)
    grad_scale = None if has_callbacks else request.grad_scale
    is_unscaled = has_callbacks or request.groups[0]["gradient_accumulation_steps"] is not None
    loss_scale_factor = None if is_unscaled else request.groups[0]["loss_scale_factor"]
    if request.is_part:
        distributed.check_norm_group(request.norm_group, request.groups[0], request.is_part)
    clipping = Clipping(clipvalue, clipnorm, global_clipnorm, grad_scale, request.found_inf, loss_scale_factor)
    others_have_gradients = False
    if request.norm_group is not None:
        T_here = opmath_dtypes(rows.params)
        iterations = int(request.groups[0]["iterations"])
        others_have_gradients, in_double = request.norm_group.agree(
            iterations, bool(T_here), torch.float64 in T_here, global_clipnorm
        )
        clipping = clipping._replace(in_double=in_double)
        if global_clipnorm is not None and others_have_gradients:
            clipping = clipping._replace(over_processes=request.norm_group.sum)
    if clipnorm is not None or global_clipnorm is not None:
        params = [param for group in request.groups for param in group["params"]]
        if dtensor.has_dtensor(params):
            iterations = request.groups[0]["iterations"]
            over_parts = partial(dtensor.sum_over_parts, all_params=params, iterations=iterations)
            clipping = clipping._replace(over_parts=over_parts)
    return clipping, others_have_gradients


# ---- State ----------------------------------------------------------------------------------------------------------


def _completed(request: StepRequest, rows: Rows) -> tuple[Columns, State]:
    """The state of the rows, checked as far as no backend does it, and which of it is new."""
    new_state: State = {}
    state: list[tuple[Tensor, ...]] = []
    group_of_rows = chain.from_iterable(map(repeat, request.groups, rows.sizes))
    for group, param, grad in zip(group_of_rows, rows.params, rows.grads, strict=True):
        entry = request.state.get(param)
        name = partial(request.name_of, param)
        if entry and (has_state(entry) or not isinstance(entry, dict)):
            validation.check_keys(name, entry)
            validation.check_state(name, Row(param, grad, *_get_state(entry)), precision.state_dtype(group, param))
        elif param in new_state:
            entry = new_state[param]
        else:
            validation.check_param(name, param)
            entry = new_state[param] = precision.new_state(group, param)
        state.append(_get_state(entry))
    return tuple(map(list, zip(*state, strict=True))), new_state
