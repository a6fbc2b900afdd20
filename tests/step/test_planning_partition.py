"""The partition that is kept from step to step: what it must notice, and that it is kept."""

import copy
import itertools
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import (
    Path,
    assert_like_oracle,
    assert_same_bits,
    assert_unchanged,
    gradients,
    oracle_of,
    snapshot,
    to_numpy,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn import Parameter
from training import advance, assert_same_training, groups_of_two, params_of, trained
from training import give_gradients as give
from training import path as path

from torch_adadelta import AdadeltaKeras, schedules
from torch_adadelta.backends import functional, kernels
from torch_adadelta.step import planning

needs_library = pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")


# ---- What changes between two steps takes effect at once ------------------------------------------------------------


@pytest.mark.parametrize("changed", [0, 1], ids=["first group", "last group"])
def test_maximize_is_noticed(path: Path, changed: int) -> None:
    optimizer, params = trained(path)
    oracles = []
    for index in range(len(params)):
        oracles.append(oracle_of(torch.zeros(5), learning_rate=1.0))
        for step in range(2):
            (grad,) = gradients((5,), torch.float32, 1, seed=100 * step + index)
            oracles[-1].step(to_numpy(grad))
    optimizer.param_groups[changed]["maximize"] = True
    optimizer.step()
    for index, (param, oracle) in enumerate(zip(params, oracles, strict=True)):
        assert param.grad is not None
        oracle.step(to_numpy(-param.grad if index // 2 == changed else param.grad))
        assert_like_oracle(param, optimizer.state[param], oracle, str(index))


@needs_library
def test_a_choice_of_backend_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what runs in each group: it has the same bits everywhere."""
    params = [Parameter(torch.zeros(5)) for _ in range(2)]
    optimizer = AdadeltaKeras([{"params": [param]} for param in params], 1.0)
    ran: list[tuple[str, int]] = []
    for room, name in ((functional, "single_tensor"), (functional, "multi_tensor"), (kernels, "update")):
        real: Callable[..., Any] = getattr(room, name)

        def spied(batch: Any, name: str = name, real: Callable[..., Any] = real, **options: Any) -> Any:
            ran.append((name, len(batch.params)))
            return real(batch, **options)

        monkeypatch.setattr(room, name, spied)
    for choice, expected in (
        ({}, [("update", 2)]),
        ({}, [("update", 2)]),
        ({"foreach": True}, [("update", 1), ("multi_tensor", 1)]),
        ({"foreach": False}, [("update", 1), ("single_tensor", 1)]),
        ({"foreach": None, "fused": False}, [("update", 1), ("single_tensor", 1)]),
        ({"foreach": None, "fused": True}, [("update", 2)]),
    ):
        optimizer.param_groups[1].update(choice)
        give(params, 0)
        ran.clear()
        optimizer.step()
        assert sorted(ran) == sorted(expected), choice


def test_differentiable_is_noticed(path: Path) -> None:
    optimizer, _ = trained(path)
    group = optimizer.param_groups[-1]
    group.update(differentiable=True, foreach=None, fused=None)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="parameter 0 of group 1 is a leaf that requires grad"):
        optimizer.step()
    assert_unchanged(optimizer, before)


OPTIONS: dict[str, dict[str, Any]] = {
    "clipvalue": {"clipvalue": 1e-3},
    "clipnorm": {"clipnorm": 1e-3},
    "global_clipnorm": {"global_clipnorm": 1e-3},
    "decay": {"decay": 0.5},
    "learning_rate": {"learning_rate": 0.25},
    "schedule": {"learning_rate": schedules.ExponentialDecay(1.0, 1, 0.5)},
    "callable": {"rho": lambda: 0.5},
    "epsilon": {"epsilon": 1e-3},
    "transformers": {"gradient_transformers": [lambda pairs: [(2 * g, p) for g, p in pairs]]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_that_is_set_or_taken_back_is_noticed(path: Path, name: str) -> None:
    """As a loaded checkpoint, which begins without a partition, has it."""
    optimizer, params = trained(path)
    ((key, value),) = OPTIONS[name].items()
    before = getattr(optimizer, key)
    for step, now in enumerate((value, value, before, value)):
        copies = [Parameter(param.detach().clone()) for param in params]
        fresh = AdadeltaKeras(groups_of_two(copies), **path.options)
        setattr(optimizer, key, now)
        for callback in ("rho", "gradient_transformers"):
            setattr(fresh, callback, getattr(optimizer, callback))
        fresh.load_state_dict(optimizer.state_dict())
        for each in (params, copies):
            give(each, step)
        optimizer.step()
        fresh.step()
        assert_same_training(optimizer, fresh, f"{name} {step}")
        assert optimizer.iterations == fresh.iterations


def test_parameters_that_are_frozen_and_thawed_are_noticed(path: Path) -> None:
    optimizer, params = trained(path, steps=0)
    oracles = [oracle_of(torch.zeros(5), learning_rate=1.0) for _ in params]
    for step, has_grad in enumerate(itertools.product((True, False), repeat=4)):
        for index, (param, is_there) in enumerate(zip(params, has_grad, strict=True)):
            (grad,) = gradients((5,), torch.float32, 1, seed=10 * step + index)
            param.grad = grad if is_there else None
            if is_there:
                oracles[index].step(to_numpy(grad))
        optimizer.step()
        # A step counts in every group, also in one without gradients, if there is any at all.
        assert [group["iterations"] for group in optimizer.param_groups] == [step + any(has_grad)] * 2
    for index, (param, oracle) in enumerate(zip(params, oracles, strict=True)):
        assert_like_oracle(param, optimizer.state[param], oracle, str(index))


@needs_library
@pytest.mark.parametrize("key", ["square_avg", "acc_delta"])
def test_state_that_trades_places_is_noticed(path: Path, key: str) -> None:
    optimizer, params = trained(path)
    expected, others = trained(path)
    for each, own in ((optimizer, params), (expected, others)):
        first, last = each.state[own[0]], each.state[own[-1]]
        first[key], last[key] = last[key], first[key]
    fresh = AdadeltaKeras([{"params": others[:2]}, {"params": others[2:]}], 1.0, **path.options)
    for param in others:
        fresh.state[param] = expected.state[param]
    fresh.iterations = 2
    optimizer.step()
    fresh.step()
    assert_same_training(optimizer, fresh)


def test_parameters_that_trade_places_are_noticed(path: Path) -> None:
    optimizer, params = trained(path)
    expected, others = trained(path)
    for each, own in ((optimizer, params), (expected, others)):
        first, second = (group["params"] for group in each.param_groups)
        first[0], second[1] = own[3], own[0]
        each.param_groups[1]["lr"] = 0.25
    expected.load_state_dict(expected.state_dict())
    optimizer.step()
    expected.step()
    assert_same_training(optimizer, expected)


def test_a_parameter_in_place_of_another_is_noticed(path: Path) -> None:
    """As where points are added to and taken from a scene: the state moves with the group's entry."""
    optimizer, params = trained(path)
    group = optimizer.param_groups[1]
    new = Parameter(torch.zeros(5, dtype=torch.float64))
    state = {key: value.double() for key, value in optimizer.state.pop(params[3]).items()}
    group["params"][1], optimizer.state[new] = new, state
    oracle = oracle_of(torch.zeros(5, dtype=torch.float64), learning_rate=1.0)
    oracle.square_avg, oracle.acc_delta = to_numpy(state["square_avg"]).copy(), to_numpy(state["acc_delta"]).copy()
    new.grad = torch.ones(5, dtype=torch.float64)
    optimizer.step()
    oracle.step(np.ones(5))
    assert_like_oracle(new, optimizer.state[new], oracle)


@pytest.mark.parametrize("clip", [{}, {"clipnorm": 0.5}], ids=["unclipped", "clipnorm"])
def test_a_gradient_that_becomes_sparse_or_dense_is_noticed(path: Path, clip: dict[str, Any]) -> None:
    """As an optimizer without a partition has it."""
    optimizer, params = trained(path, **clip)
    for step, sparse in enumerate([[0], [3], [0, 1, 2, 3], [0, 1, 2, 3], [], [1, 2], [0, 3]]):
        other = copy.deepcopy(optimizer)
        for each in (params, params_of(other)):
            give(each, step)
            for i in sparse:
                each[i].grad = each[i].grad.to_sparse()
        optimizer.step()
        other.step()
        assert_same_training(optimizer, other, step)


@pytest.mark.parametrize(
    "options", [{"decay": 0.3}, {"learning_rate": schedules.ExponentialDecay(1.0, 1, 0.3)}], ids=["decay", "schedule"]
)
def test_a_dtype_that_changes_in_place_is_noticed(path: Path, options: dict[str, Any]) -> None:
    """A schedule and `decay` are computed in the opmath dtype; multi-tensor operations take parameters of one dtype."""
    optimizer, params = trained(path, **options)
    for tensor in (params[1], *optimizer.state[params[1]].values()):
        tensor.data = tensor.data.double()
    other = copy.deepcopy(optimizer)
    for each in (optimizer, other):
        for param in params_of(each):
            param.grad = None
        advance(each, 2, seed=5)
    assert_same_training(optimizer, other)


def test_the_values_of_the_last_step_are_not_those_of_another() -> None:
    """A step remembers numbers by identity."""
    param = Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = AdadeltaKeras([param], 0.5)
    group = optimizer.param_groups[0]
    for lr in (0.1, 0.1, float("0.1"), np.float64(0.1), 0.1, torch.tensor(0.1, dtype=torch.float64), 0.1):
        oracle = oracle_of(param, learning_rate=lr if not isinstance(lr, torch.Tensor) else np.float64(0.1))
        optimizer.state.clear()
        group["lr"] = lr
        param.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()
        oracle.step(np.ones(1))
        assert_like_oracle(param, optimizer.state[param], oracle, repr(lr))
    for key, value in (("lr", math.nan), ("rho", None), ("epsilon", math.inf)):
        before, group[key] = group[key], value
        with pytest.raises((TypeError, ValueError)):
            optimizer.step()
        group[key] = before


@pytest.mark.parametrize("numel", [16, 2**22 + 1], ids=["small", "large"])
def test_what_replaces_state_is_used(path: Path, numel: int) -> None:
    """Small state is compared by reference, large by id, of which the next object may have the same."""
    param = Parameter(torch.zeros(numel))
    optimizer = AdadeltaKeras([param], 1.0, **path.options)
    for step in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()
        square_avg = optimizer.state[param]["square_avg"]
        old = weakref.ref(square_avg)
        optimizer.state[param]["square_avg"] = torch.full_like(param, 4.0 + step)
        del square_avg
        assert numel == 16 or old() is None
    param.grad = torch.zeros_like(param)
    optimizer.step()
    expected = np.float32(6.0) * np.float32(0.95)
    assert (optimizer.state[param]["square_avg"] == float(expected)).all()


def test_large_state_that_is_distributed_otherwise_is_noticed() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        numel = 2**22 + 1
        param = Parameter(distribute_tensor(torch.zeros(numel), mesh, [Shard(0)]))
        optimizer = AdadeltaKeras([param], 1.0)
        for _ in range(2):
            param.grad = distribute_tensor(torch.ones(numel), mesh, [Shard(0)])
            optimizer.step()
        optimizer.state[param]["acc_delta"] = distribute_tensor(torch.zeros(numel), mesh, [Replicate()])
        with pytest.raises(RuntimeError, match="its state acc_delta are distributed in different ways"):
            optimizer.step()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("crowd", "options"),
    [((0, 0), {}), ((0, 0), {"global_clipnorm": 1e30}), ((80, 512), {"clipvalue": 1e30})],
    ids=["few", "global_clipnorm", "many"],  # so many and large that several threads read what belongs to them
)
def test_state_may_change_in_every_way_between_two_steps(
    path: Path, crowd: tuple[int, int], options: dict[str, Any]
) -> None:
    """Each tensor of each parameter is replaced, or its memory, in turn; no step may use what was there before."""
    params = [Parameter(torch.ones(2, 2)) for _ in range(4)]
    count, numel = crowd
    others = [Parameter(torch.ones(numel)) for _ in range(count)]
    for other in others:
        other.grad = torch.ones(numel)
    optimizer = AdadeltaKeras([*params[:2], *others, *params[2:]], 1.0, **path.options, **options)
    oracles = [oracle_of(p, learning_rate=1.0) for p in params]
    number = 0

    def step() -> None:
        nonlocal number
        number += 1
        for i, (param, oracle) in enumerate(zip(params, oracles, strict=True)):
            param.grad = gradients((2, 2), torch.float32, steps=1, seed=10 * number + i)[0]
            oracle.step(param.grad.numpy())
        optimizer.step()
        for param, oracle in zip(params, oracles, strict=True):
            assert_like_oracle(param, optimizer.state[param], oracle)

    step()
    for i, key in itertools.product(range(4), ("square_avg", "acc_delta")):
        state = optimizer.state[params[i]]
        new = torch.rand(2, 2)
        setattr(oracles[i], key, new.numpy().copy())
        state[key] = new.clone()
        step()
        setattr(oracles[i], key, new.numpy().copy())
        state[key].data = new.clone()
        step()
        state[key].copy_(new)
        setattr(oracles[i], key, new.numpy().copy())
        step()
        # The same memory, seen the other way round.
        setattr(oracles[i], key, to_numpy(state[key]).T.copy())
        state[key].data = state[key].data.t()
        step()
    for param, oracle in zip(params, oracles, strict=True):
        oracle.p = to_numpy(param).T.copy()
        param.data = param.data.t()
        step()
    # One of two states with equal values, which == would not tell apart.
    optimizer.state[params[0]]["square_avg"] = optimizer.state[params[0]]["square_avg"].clone()
    step()


@pytest.mark.parametrize("key", ["learning_rate", "epsilon", "rho"])
@pytest.mark.parametrize("kind", [np.array, torch.tensor], ids=["NumPy", "Tensor"])
def test_a_number_that_is_filled_is_noticed(path: Path, key: str, kind: Any) -> None:
    number = kind(0.5)
    optimizer, params = trained(path, **({} if key == "learning_rate" else {key: number}))
    if key == "learning_rate":
        optimizer.learning_rate = number
    optimizer.step()
    number[...] = 0.25
    copies = [Parameter(param.detach().clone()) for param in params]
    fresh = AdadeltaKeras(groups_of_two(copies), **path.options)
    fresh.load_state_dict(optimizer.state_dict())
    for each in (params, copies):
        give(each, 5)
    optimizer.step()
    fresh.step()
    assert_same_training(optimizer, fresh)


@pytest.mark.parametrize("value", [float("nan"), -3.0, -1.0])
def test_a_decay_that_is_filled_with_nonsense_is_refused(path: Path, value: float) -> None:
    decay = torch.tensor(0.5)
    optimizer, _ = trained(path, decay=decay)
    decay.fill_(value)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="decay"):
        optimizer.step()
    for now, was in zip(snapshot(optimizer)[1], before[1], strict=True):
        assert_same_bits(now, was)
    assert optimizer.iterations == 2


# ---- The partition ---------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fused": True},
        {"fused": True, "foreach": False},
        {"clipvalue": 1.0},
        {"clipnorm": 1.0},
        {"global_clipnorm": 1.0},
        {"decay": 0.1},
        {"lr": torch.tensor(0.5)},
    ],
    ids=str,
)
def test_accumulators_are_cached_once(options: dict[str, Any]) -> None:
    optimizer = AdadeltaKeras([Parameter(torch.ones(3)) for _ in range(2)], **options)
    advance(optimizer)
    held = [spec.accumulators for spec in optimizer._partitions.partition.specs]
    advance(optimizer, 2)
    assert None not in held
    assert [spec.accumulators for spec in optimizer._partitions.partition.specs] == held


@needs_library
@pytest.mark.parametrize(
    "options",
    [*OPTIONS.values(), {}, {"maximize": True}, {"capturable": True}, {"learning_rate": torch.tensor(0.5)}],
    ids=[*OPTIONS, "plain", "maximize", "capturable", "tensor lr"],
)
def test_every_case_runs_on_the_partition_of_the_step_before(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Several groups, a sparse gradient beside dense ones, and two dtypes."""
    params = [Parameter(torch.zeros(4, 2, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16) * 3]
    groups = [{"params": params[:2]}, {"params": params[2:4], "rho": 0.5}, {"params": params[4:]}]
    optimizer = AdadeltaKeras(groups, **{"learning_rate": 1.0, **options})

    def take_step(step: int) -> None:
        give(params, step)
        params[0].grad = torch.sparse_coo_tensor(torch.tensor([[1, 3, 1]]), torch.ones(3, 2), (4, 2))
        optimizer.step()

    take_step(0)
    made = []
    real = planning.Partition.__init__
    monkeypatch.setattr(planning.Partition, "__init__", lambda self, *args: made.append(self) or real(self, *args))
    for step in range(1, 4):
        take_step(step)
    assert made == []
    assert optimizer.iterations == 4
