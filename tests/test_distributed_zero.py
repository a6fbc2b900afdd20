"""DistributedDataParallel and ZeroRedundancyOptimizer, and norms over processes with parameters of their own, on gloo."""

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import assert_same_bits
from exact_training import (
    OPTIONS,
    STEPS,
    Model,
    Sum,
    alone,
    assert_same,
    data,
    dtype_for,
    error_of,
    everything,
    shard_of,
    train,
    whole_batch,
)
from processes import Processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torch_adadelta import AdadeltaKeras, schedules, to_bfloat16
from torch_adadelta.distributed import NormGroup, all_reduce_sum

pytestmark = pytest.mark.xdist_group("processes")


# ---- DDP ------------------------------------------------------------------------------------------------------------


def train_ddp(all_options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    results = {}
    for name, options in all_options.items():
        model = DistributedDataParallel(Sum(dtype_for(options)))
        optimizer = AdadeltaKeras(model.parameters(), **{"learning_rate": 1.0, **options})
        train(model, optimizer, range(STEPS), shard_of)
        results[name] = everything(model, optimizer), optimizer.iterations
    return results


def test_ddp_trains_as_one_process_does(two: Processes) -> None:
    for results in two.run(train_ddp, OPTIONS):
        for name, (ours, iterations) in results.items():
            expected, count = alone(OPTIONS[name])
            assert_same(ours, expected, name)
            assert iterations == count


def accumulate(how: str) -> tuple[dict[str, Tensor], int]:
    """Updates from two batches each, in the ways that docs/frameworks.md tells of."""
    options: dict[str, Any] = {"learning_rate": 1.0, "global_clipnorm": 5.0}
    if how != "no_sync":
        options["gradient_accumulation_steps"] = 2
    if how == "aggregator":
        options["gradient_aggregator"] = all_reduce_sum
    model = Model() if how == "aggregator" else DistributedDataParallel(Sum())
    optimizer = AdadeltaKeras(model.parameters(), **options)
    if how == "no_sync":
        for step in range(0, STEPS, 2):
            optimizer.zero_grad()
            with model.no_sync():
                (model(shard_of(data(step))) / 2).backward()
            (model(shard_of(data(step + 1))) / 2).backward()
            optimizer.step()
    elif how == "both":
        with model.no_sync():
            train(model, optimizer, range(1), shard_of)
        train(model, optimizer, range(1, 2), shard_of)
    else:
        train(model, optimizer, range(STEPS), shard_of)
    return without_sums(everything(model, optimizer)), optimizer.iterations


def without_sums(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("gradient_accumulator")}


@pytest.mark.parametrize("how", ["no_sync", "optimizer", "aggregator"])
def test_ways_to_accumulate_gradients(two: Processes, how: str) -> None:
    expected, count = alone({"gradient_accumulation_steps": 2, "global_clipnorm": 5.0})
    for ours, iterations in two.run(accumulate, how):
        assert_same(ours, without_sums(expected))
        assert iterations == count


def test_no_sync_beside_the_accumulation_of_the_optimizer_is_not_one_of_them(two: Processes) -> None:
    (one, _), (other, _) = two.run(accumulate, "both")
    assert not torch.equal(one["five"], other["five"])


def convert_wrapped() -> list[str]:
    model = Sum(torch.float32)
    ddp, zero = DistributedDataParallel(model), zero_of(model, {})
    return [
        error_of(lambda: to_bfloat16(ddp, AdadeltaKeras(ddp.parameters()))),
        error_of(lambda: to_bfloat16(model, zero.optim)),
    ]


def test_what_pytorch_has_wrapped_is_not_converted(two: Processes) -> None:
    """DDP's hooks are on what autograd drops with the dtype, and ZeRO's groups overrule those of its optimizers."""
    for of_ddp, of_zero in two.run(convert_wrapped):
        assert "Convert the module in it, and wrap it again" in of_ddp
        assert "Convert the model first, and make it anew" in of_zero


def load_into_zero(state_dict: dict[str, Any]) -> set[torch.dtype]:
    model = Model()
    zero = zero_of(model, {})
    zero.load_state_dict(state_dict)
    train(model, zero, range(3), whole_batch)
    return {state["square_avg"].dtype for state in zero.optim.state.values()}


def test_zero_takes_the_state_dtype_of_a_checkpoint(two: Processes) -> None:
    """It overrules the groups of its optimizers by those that were saved, and has their state unconverted."""
    model = Model()
    optimizer = AdadeltaKeras(model.parameters(), 1.0, state_dtype=torch.bfloat16)
    train(model, optimizer, range(1), whole_batch)
    assert two.run(load_into_zero, optimizer.state_dict()) == [{torch.bfloat16}] * 2


# ---- ZeroRedundancyOptimizer ----------------------------------------------------------------------------------------


def zero_of(model: nn.Module, options: dict[str, Any]) -> Any:
    # Not at the top: what it does to TorchScript keeps cycles of parameters from being collected, in this very process.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(model.parameters(), AdadeltaKeras, **{"lr": 1.0, **options})


def train_zero(all_options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each process has all gradients, as after DDP, and state for some of the parameters."""
    results = {}
    for name, options in all_options.items():
        model = Model(dtype_for(options))
        options = {"lr": options.get("learning_rate", 1.0), **options}
        options.pop("learning_rate", None)
        if "global_clipnorm" in options:
            options = {**options, "norm_group": "world"}
        zero = zero_of(model, options)
        train(model, zero, range(STEPS), whole_batch)
        results[name] = everything(model, zero.optim), zero.optim.iterations
    return results


def test_zero_trains_as_one_process_does(processes: Processes) -> None:
    by_rank = processes.run(train_zero, OPTIONS)
    for name, options in OPTIONS.items():
        expected, count = alone(options)
        ours: dict[str, Tensor] = {}
        for results in by_rank:
            everything_here, iterations = results[name]
            assert iterations == count
            for key, tensor in everything_here.items():
                assert_same_bits(tensor, expected[key], f"{key} {name}")
            ours |= everything_here
        assert ours.keys() == expected.keys()


def refusals_of_zero() -> list[str]:
    model = Model()
    errors = [error_of(lambda: zero_of(model, {"global_clipnorm": 1.0}))]
    zero = zero_of(model, {})
    errors.append(error_of(lambda: setattr(zero.optim, "global_clipnorm", 1.0)))
    zero.optim.norm_group = dist.group.WORLD
    zero.optim.global_clipnorm = 1.0
    errors.append(error_of(lambda: setattr(zero.optim, "norm_group", None)))
    copy.deepcopy(zero.optim)
    for group in zero.param_groups:
        group["global_clipnorm"] = 2.0 if dist.get_rank() else 3.0
    model(data(0)).backward()
    errors.append(error_of(zero.step))
    return errors


def test_zero_and_global_clipnorm(two: Processes) -> None:
    for errors in two.run(refusals_of_zero):
        for error in errors[:3]:
            assert error.startswith("ValueError: global_clipnorm=1.0 needs the gradients of all parameters, and under")
        assert "disagree on global_clipnorm (process 0: 3.0, process 1: 2.0)" in errors[3]


class Small(nn.Module):
    """One parameter: of several processes one only has something to do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).sum()


def counts_of_an_unused_part() -> list[int]:
    """The last process has gradients for none of its parameters, as where a branch of a model was not used."""
    model = Model()
    zero = zero_of(model, {})
    counts = []
    for step in range(3):
        zero.zero_grad()
        model(data(step)).backward()
        if dist.get_rank() == dist.get_world_size() - 1:
            for group in zero.optim.param_groups:
                for param in group["params"]:
                    param.grad = None
        zero.step()
        counts.append(zero.optim.iterations)
    return counts


def test_a_process_of_zero_without_gradients_does_not_fall_behind(two: Processes) -> None:
    assert two.run(counts_of_an_unused_part) == [[1, 2, 3], [1, 2, 3]]


def count_without_parameters() -> list[int]:
    counts = []
    for options in ({}, {"global_clipnorm": 1.0, "norm_group": "world"}):
        model = Small()
        zero = zero_of(model, options)
        train(model, zero, range(3), whole_batch)
        counts += [zero.optim.iterations, zero.param_groups[0]["iterations"]]
    return counts


def test_a_process_without_parameters_keeps_count(two: Processes) -> None:
    assert two.run(count_without_parameters) == [[3] * 4] * 2


def count_without_gradients() -> tuple[int, bool]:
    """With a group, a process whose parameters got no gradient counts when others have one."""
    params = [nn.Parameter(torch.ones(2))]
    optimizer = AdadeltaKeras(params, 1.0, norm_group="world")
    optimizer.step()  # no process has one
    if dist.get_rank() == 0:
        params[0].grad = torch.ones(2)
    optimizer.step()
    return optimizer.iterations, bool(optimizer.state)


def test_a_process_without_gradients_does_not_fall_behind(two: Processes) -> None:
    assert two.run(count_without_gradients) == [(1, True), (1, False)]


def resume_zero(made_with: str) -> tuple[dict[str, Tensor], list[Any]]:
    """Two steps, a checkpoint consolidated in the last process, and two steps of an optimizer that loads it."""
    schedule = schedules.ExponentialDecay(1.0, 2, 0.5)
    model = Model()
    # Under the name `lr`: its wrapper keeps what it is given by other names, and would save the schedule itself.
    zero = zero_of(model, {"lr": schedule})
    train(model, zero, range(2), whole_batch)
    last = dist.get_world_size() - 1
    zero.consolidate_state_dict(to=last)
    file = io.BytesIO()
    if dist.get_rank() == last:
        torch.save(zero.state_dict(), file)
    sent = [file.getvalue()]
    dist.broadcast_object_list(sent, src=last)
    state_dict = torch.load(io.BytesIO(sent[0]), weights_only=True)

    again = Model()
    again.load_state_dict(model.state_dict())
    given = {"schedule": schedules.ExponentialDecay(1.0, 2, 0.5), "number": 0.25}[made_with]
    resumed = zero_of(again, {"lr": given})
    resumed.load_state_dict(state_dict)
    resumed.optim.state_dict()
    train(again, resumed, range(2, 4), whole_batch)
    rate = resumed.optim.learning_rate
    return everything(again, resumed.optim), [resumed.optim.iterations, rate.get_config()]


@pytest.mark.parametrize("made_with", ["schedule", "number"])
def test_zero_resumes_a_schedule(processes: Processes, made_with: str) -> None:
    expected, count = alone({"learning_rate": schedules.ExponentialDecay(1.0, 2, 0.5)})
    for ours, (iterations, config) in processes.run(resume_zero, made_with):
        assert iterations == count
        assert config["decay_rate"] == 0.5
        for name, tensor in ours.items():
            assert_same_bits(tensor, expected[name], name)


# ---- Norm groups ----------------------------------------------------------------------------------------------------


def agree_on_norms() -> list[Any]:
    """What processes of a norm group are told, of whom one has a gradient and another one in float64."""
    rank, group = dist.get_rank(), NormGroup("world")
    number = torch.tensor([1.5 + rank])
    results: list[Any] = [
        group.agree(3, rank == 0, rank == 1, 0.5),
        group.agree(3, False, False, None),
        group.agree(3, False, True, 0.0),
        group.agree(3, True, False, 0.5),
        [group.sum(number).tolist(), number.tolist()],
    ]
    for iterations, clipnorm in ((3 + rank, 0.5), (3, 0.5 + rank), (3, None if rank else 0.5)):
        results.append(error_of(lambda i=iterations, c=clipnorm: group.agree(i, True, False, c)))
    alone = NormGroup([dist.new_group([i]) for i in range(2)][rank])
    results.append(alone.agree(3 + rank, rank == 0, False, None))
    return results


def test_the_processes_of_a_norm_group_agree(two: Processes) -> None:
    for rank, results in enumerate(two.run(agree_on_norms)):
        assert results[:5] == [(True, True), (False, False), (False, True), (True, False), [[4.0], [1.5 + rank]]]
        for error, name, values in zip(
            results[5:8],
            ("iterations", "global_clipnorm", "global_clipnorm"),
            ((3, 4), (0.5, 1.5), (0.5, None)),
            strict=True,
        ):
            text = f"disagree on {name} (process 0: {values[0]}, process 1: {values[1]})"
            assert error.startswith(f"RuntimeError: the processes of norm_group {text}")
        assert results[8] == (rank == 0, False)


def test_what_is_no_norm_group() -> None:
    for given in (None, 1, "World", [0, 1]):
        with pytest.raises(TypeError, match=r'norm_group must be a process group, "world" or None, got'):
            NormGroup(given)
    group = NormGroup("world")
    assert copy.deepcopy(group) is group
    with pytest.raises(RuntimeError, match=r"norm_group: torch.distributed is not initialized.* leave norm_group out"):
        group.agree(1, True, False, None)


def what_is_not_for_zero() -> list[str]:
    model = Model()
    zero = zero_of(model, {"use_ema": True})
    train(model, zero, range(1), whole_batch)
    fresh = zero_of(Model(), {"weight_decay": 0.1}).optim
    return [
        error_of(lambda: zero.optim.swap_averages().__enter__()),
        error_of(zero.optim.finalize_variable_values),
        error_of(lambda: fresh.exclude_from_weight_decay(var_list=fresh.param_groups[0]["params"])),
    ]


def test_what_would_be_done_to_the_parameters_of_one_process_only(two: Processes) -> None:
    for swap, finalize, exclude in two.run(what_is_not_for_zero):
        assert swap.startswith("RuntimeError: swap_averages would change the parameters of this process only")
        assert finalize.startswith("RuntimeError: finalize_variable_values would change the parameters of this process")
        assert exclude.startswith("ValueError: exclude_from_weight_decay is not for ZeroRedundancyOptimizer")
