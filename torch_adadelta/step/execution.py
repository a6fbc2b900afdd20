"""The only code that writes: runs the plan of a step and counts it; or undoes it, or says that it is partial."""

import torch
from torch import Tensor

from torch_adadelta.backends import dtensor, functional, kernels
from torch_adadelta.backends.batch import Backend, Batch, Refusal
from torch_adadelta.step import planning, sources, validation
from torch_adadelta.step.clipping import recording
from torch_adadelta.step.planning import State, StepPlan
from torch_adadelta.step.sources import Group

_PARTIAL = "(the step is partial: some parameters and state were updated, others not)"


def run_plan(plan: StepPlan) -> None:
    """Runs a plan; if the partition of the last step was taken, and turns out to be wrong now, one with another."""
    refusal = apply(plan)
    if refusal is not None and plan.inputs is not None:
        plan = planning.assemble(plan.request, plan.inputs)
        refusal = apply(plan)
    if refusal is not None:
        validation.raise_named(plan.batches[0], refusal, plan.request.name_of)


def apply(plan: StepPlan) -> Refusal | None:
    """Writes what a plan says; or returns why the op of its first batch refused that, when nothing is written."""
    request, has_written = plan.request, False
    try:
        if plan.new_state:
            add_state(request.state, plan.new_state)
        for total, grad in plan.additions:
            has_written = True
            functional.add_to_sum(dtensor.local(total), dtensor.local(grad))
        for batch in plan.batches:
            refusal = run(batch)
            if refusal is not None and not (has_written or batch.has_begun):
                remove_state(request.state, plan.new_state)
                return refusal
            if refusal is not None:  # it was checked, and somebody has changed it since
                validation.raise_named(batch, refusal, request.name_of)
            has_written = True
        for some in plan.passes:
            has_written = True
            functional.average(*some)
        for total in plan.finished:
            has_written = True
            total.zero_()
        if plan.counts:
            has_written = True
            if request.found_inf is not None:
                count_unless(request.found_inf, request.groups)
            else:
                for group in request.groups:
                    group["iterations"] += 1  # in place where it is a Tensor
        if plan.writes:
            sources.write(plan.writes)
    except BaseException as error:
        if has_written or any(batch.has_begun for batch in plan.batches):
            level_counts(request.groups)
            mark_partial(error)
        else:
            remove_state(request.state, plan.new_state)
        raise
    return None


def run(batch: Batch) -> Refusal | None:
    """Updates a batch; or returns why its op refused that, when nothing of it is written."""
    if batch.backend is Backend.FUSED:
        decays_first = batch.is_sparse and functional.decays_tables(batch)
        refusal = _run_with_decay(batch) if decays_first else kernels.update(batch)
        if refusal is not None:
            return refusal
    elif batch.is_sparse:
        functional.sparse_single_tensor(batch)
    elif batch.backend is Backend.MULTI_TENSOR and not validation.is_listed_twice(batch.params):
        functional.multi_tensor(batch)
    else:
        with recording(batch.is_differentiable):
            functional.single_tensor(batch)
    if batch.wholes is not None:
        # The wrapper has a version of its own, by which autograd notices that what it saved has changed.
        owners = zip(batch.wholes[0], batch.params, strict=True)
        torch.autograd.graph.increment_version([owner for owner, local in owners if owner is not local])
    return None


def _run_with_decay(batch: Batch) -> Refusal | None:
    """Updates a batch of sparse gradients with weight decay, one after the other: one may be listed twice."""
    for index, row in enumerate(batch.rows):
        batch.has_begun = True
        functional.decay_table(row)
        row.segments = [segment._replace(weight_decay=0.0) for segment in row.segments]
        refusal = kernels.update(row)
        if refusal is not None:
            return refusal._replace(param=index)
    return None


def add_state(state: State, new_state: State) -> None:
    """Gives parameters their first state, beside what others may keep there."""
    for param, new in new_state.items():
        if param in state:
            state[param].update(new)
        else:
            state[param] = new


def remove_state(state: State, new_state: State) -> None:
    """Undoes `add_state`, even if it has not come to its end."""
    for param, new in new_state.items():
        entry = state.get(param)
        if entry is new:
            del state[param]
        elif entry is not None:
            for key in new:
                entry.pop(key, None)


def count_unless(found_inf: Tensor, groups: list[Group]) -> None:
    """Counts a step on the device, where it is known whether it was skipped."""
    for group in groups:
        if not isinstance(group["iterations"], Tensor):
            # Not torch.tensor, which would copy from the host, and wait.
            group["iterations"] = torch.full((), group["iterations"], dtype=torch.int64, device=found_inf.device)
        counts = found_inf.reshape(()) == 0
        group["iterations"] += counts.to(group["iterations"].device, non_blocking=group["iterations"].is_cuda)


def level_counts(groups: list[Group]) -> None:
    """Lets groups agree on the number of steps, should they have been interrupted amid their counting.

    Groups that disagree could be saved, but not loaded. A device is not looked at, for that may be what failed.
    """
    counts = [group["iterations"] for group in groups]
    if any(isinstance(count, Tensor) and count.device.type != "cpu" for count in counts):
        return
    least = min(map(int, counts), default=0)
    for group, count in zip(groups, counts, strict=True):
        if isinstance(count, Tensor):
            count.fill_(least)
        elif count != least:
            group["iterations"] = least


def mark_partial(error: BaseException) -> None:
    """Adds to an exception's message that the step is partial."""
    error.args = (f"{str(error) or type(error).__name__} {_PARTIAL}",)
    if _PARTIAL not in str(error) and hasattr(error, "add_note"):  # its class makes a text of its own
        error.add_note(_PARTIAL)
