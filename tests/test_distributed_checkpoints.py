"""Distributed checkpointing, of sharded parameters and by one process, on gloo."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from exact_training import (
    HEADS_PLAN,
    STEPS,
    Heads,
    Model,
    alone,
    assert_same,
    dtype_for,
    everything,
    parallel,
    shard_of,
    sharded_model,
    train,
    whole_batch,
)
from processes import Processes
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from torch_adadelta import AdadeltaKeras, schedules

pytestmark = pytest.mark.xdist_group("processes")


SAVED: dict[str, Any] = {"learning_rate": schedules.ExponentialDecay(1.0, 2, 0.5), "clipnorm": 2.0}

MASTERS: dict[str, Any] = {"learning_rate": 1.0, "master_weights": True, "state_dtype": torch.float32, "use_ema": True}


def state_dicts(model: nn.Module, optimizer: AdadeltaKeras, flattened: bool) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=flattened)
    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer, options=options)}


def save_checkpoint(folder: str, options: dict[str, Any], steps: int, flattened: bool) -> int:
    model = sharded_model(dtype_for(options))
    optimizer = AdadeltaKeras(model.parameters(), **options)
    train(model, optimizer, range(steps), shard_of)
    dcp.save(state_dicts(model, optimizer, flattened), checkpoint_id=folder)
    return optimizer.iterations


def continue_checkpoint(folder: str, options: dict[str, Any], steps: range, flattened: bool) -> Any:
    """Loads into an optimizer that has not stepped, sharded or not, and trains on."""
    is_alone = not dist.is_initialized()
    dtype = dtype_for(options)
    model = Model(dtype) if is_alone else sharded_model(dtype)
    optimizer = AdadeltaKeras(model.parameters(), **options)
    loaded = state_dicts(model, optimizer, flattened)
    assert optimizer.iterations == 0
    dcp.load(loaded, checkpoint_id=folder)
    model.load_state_dict(loaded["model"])
    set_optimizer_state_dict(
        model,
        optimizer,
        loaded["optimizer"],
        options=StateDictOptions(flatten_optimizer_state_dict=flattened),
    )
    train(model, optimizer, steps, whole_batch if is_alone else shard_of)
    return everything(model, optimizer), optimizer.iterations


@pytest.mark.parametrize("flattened", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("options", [SAVED, {"learning_rate": 1.0}, MASTERS], ids=["schedule", "number", "masters"])
def test_checkpoints_load_onto_another_number_of_processes(
    two: Processes, three: Processes, tmp_path: Path, options: dict[str, Any], flattened: bool
) -> None:
    expected, count = alone(options)
    assert two.run(save_checkpoint, str(tmp_path), options, 2, flattened) == [2, 2]
    results = three.run(continue_checkpoint, str(tmp_path), options, range(2, 4), flattened)
    results.append(continue_checkpoint(str(tmp_path), options, range(2, 4), flattened))
    for ours, iterations in results:
        assert iterations == count
        assert_same(ours, expected)


def train_heads(folder: str, options: dict[str, Any], load: bool, steps: range) -> tuple[dict[str, Any], int]:
    """Some steps, after a checkpoint or before one."""
    model = Heads(dtype_for(options))
    loss, of = parallel(model, HEADS_PLAN)
    optimizer = AdadeltaKeras(model.parameters(), **options)
    if load:
        loaded = state_dicts(model, optimizer, False)
        dcp.load(loaded, checkpoint_id=folder)
        model.load_state_dict(loaded["model"])
        set_optimizer_state_dict(model, optimizer, loaded["optimizer"])
    train(loss, optimizer, steps, of)
    if not load:
        dcp.save(state_dicts(model, optimizer, False), checkpoint_id=folder)
    return everything(model, optimizer), optimizer.iterations


@pytest.mark.parametrize("options", [SAVED, MASTERS], ids=["schedule", "masters"])
def test_checkpoints_of_tensor_parallelism_load_with_and_without_it(
    two: Processes, four: Processes, tmp_path: Path, options: dict[str, Any]
) -> None:
    expected, count = train_heads(str(tmp_path / "alone"), options, False, range(4))
    folder = str(tmp_path / "four")
    four.run(train_heads, folder, options, False, range(2))
    results = [*four.run(train_heads, folder, options, True, range(2, 4))]
    results += two.run(train_heads, folder, options, True, range(2, 4))
    results.append(train_heads(folder, options, True, range(2, 4)))
    for ours, iterations in results:
        assert iterations == count
        assert_same(ours, expected)


def test_a_state_dict_that_is_offloaded() -> None:
    """PyTorch refuses whatever is no Tensor, number or text in what it gathers, offloads or saves asynchronously."""
    model = Model(torch.bfloat16)
    optimizer, other = (AdadeltaKeras(model.parameters(), **MASTERS) for _ in range(2))
    train(model, optimizer, range(2), whole_batch)
    options = StateDictOptions(cpu_offload=True)
    set_optimizer_state_dict(model, other, get_optimizer_state_dict(model, optimizer, options=options), options=options)
    assert_same(everything(model, other), everything(model, optimizer))
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_a_checkpoint_before_the_first_step(two: Processes, tmp_path: Path) -> None:
    """PyTorch makes state by a step with zero gradients. It moves and counts nothing, and makes no nan of a norm 0."""
    options = {"learning_rate": 1.0, "clipnorm": 2.0}
    assert two.run(save_checkpoint, str(tmp_path), options, 0, False) == [0, 0]
    expected, _ = alone(options)
    ours, iterations = continue_checkpoint(str(tmp_path), options, range(STEPS), False)
    assert iterations == STEPS
    assert_same(ours, expected)


@pytest.mark.parametrize("options", [{}, {"clipnorm": 0.0}, {"lr": torch.tensor(0.5)}], ids=str)
def test_state_made_for_a_checkpoint_is_zeros(options: dict[str, Any]) -> None:
    model = Model()
    optimizer = AdadeltaKeras(model.parameters(), **options)
    before = everything(model, optimizer)
    state_dict = get_optimizer_state_dict(model, optimizer)
    assert optimizer.iterations == 0
    for name, state in state_dict["state"].items():
        assert all(not tensor.any() for tensor in state.values()), name
    assert_same({name: t for name, t in everything(model, optimizer).items() if name in before}, before)
    # A step of the user's own with the same numbers counts.
    meant = AdadeltaKeras(model.parameters(), lr=0.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    meant.step()
    assert meant.iterations == 1


def full_state_dict(from_rank0: bool) -> tuple[Any, Any]:
    """A full state_dict of a sharded optimizer, loaded into one that is sharded anew."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=from_rank0, broadcast_from_rank0=from_rank0)
    model = sharded_model()
    optimizer = AdadeltaKeras(model.parameters(), **SAVED)
    train(model, optimizer, range(2), shard_of)
    # On the CPU, it is in the first process only.
    whole = StateDictOptions(full_state_dict=True, cpu_offload=from_rank0)
    state_dict = get_optimizer_state_dict(model, optimizer, options=whole)
    again = sharded_model()
    again.load_state_dict(model.state_dict())
    resumed = AdadeltaKeras(again.parameters(), **SAVED)
    set_optimizer_state_dict(again, resumed, state_dict, options=options)
    train(again, resumed, range(2, 4), shard_of)
    return everything(again, resumed), resumed.iterations


@pytest.mark.parametrize("from_rank0", [False, True])
def test_full_state_dicts(two: Processes, from_rank0: bool) -> None:
    expected, count = alone(SAVED)
    for ours, iterations in two.run(full_state_dict, from_rank0):
        assert iterations == count
        assert_same(ours, expected)
