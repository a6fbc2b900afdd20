"""The partition that is kept from step to step: what it must notice, and that it is kept."""

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import Path, assert_like_oracle, assert_same_bits, assert_unchanged, oracle_of, snapshot
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn import Parameter
from training import advance, assert_same_training, params_of, trained
from training import give_gradients as give
from training import path as path

from torch_adadelta import AdadeltaKeras, schedules
from torch_adadelta.backends import functional, kernels
from torch_adadelta.step import planning

needs_library = pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")


# ---- What changes between two steps takes effect at once ------------------------------------------------------------

# What is done before round number `round` to an optimizer with four parameters in two groups.
Change = Callable[[Any, list[Any], int], Any]


def option(name: str, *values: Any) -> Change:
    """An option that is set, and taken back."""
    return lambda optimizer, params, round: setattr(optimizer, name, values[round % len(values)])


def in_group(number: int, key: str, *values: Any) -> Change:
    return lambda optimizer, params, round: optimizer.param_groups[number].update({key: values[round % len(values)]})


def filled(name: str, kind: Callable[[float], Any]) -> Change:
    """A number of the user's that changes in place."""
    numbers: dict[int, Any] = {}

    def change(optimizer: Any, params: list[Any], round: int) -> None:
        if round == 0:
            numbers[0] = kind(0.5)
            setattr(optimizer, name, numbers[0])
        numbers[0][...] = (0.5, 0.25, 0.125)[round]

    return change


def of_state(number: int, key: str, new: Callable[[Tensor], Any], in_place: bool = False) -> Change:
    """Another state tensor, or another memory of it."""

    def change(optimizer: Any, params: list[Any], round: int) -> None:
        state = optimizer.state[params[number]]
        if in_place:
            state[key].data = new(state[key].data)
        else:
            state[key] = new(state[key])

    return change


def exchanged_state(optimizer: Any, params: list[Any], round: int) -> None:
    first, last = optimizer.state[params[0]], optimizer.state[params[3]]
    key = ("square_avg", "acc_delta")[round % 2]
    first[key], last[key] = last[key], first[key]


def exchanged_params(optimizer: Any, params: list[Any], round: int) -> None:
    first, second = (group["params"] for group in optimizer.param_groups)
    first[0], second[1] = second[1], first[0]


def reversed_params(optimizer: Any, params: list[Any], round: int) -> None:
    optimizer.param_groups[round % 2]["params"].reverse()


def other_param(optimizer: Any, params: list[Any], round: int) -> None:
    """As where points are added to and taken from a scene: the state moves with the group's entry."""
    group = optimizer.param_groups[1]
    new = Parameter(torch.zeros(5, dtype=torch.float64 if round == 0 else torch.float32))
    optimizer.state[new] = {key: value.to(new.dtype) for key, value in optimizer.state.pop(group["params"][1]).items()}
    group["params"][1] = new


def other_dtype(optimizer: Any, params: list[Any], round: int) -> None:
    """A schedule and `decay` are computed in the opmath dtype; multi-tensor operations take parameters of one dtype."""
    params[1].grad = None
    for tensor in (params[1], *optimizer.state[params[1]].values()):
        tensor.data = tensor.data.to((torch.float64, torch.bfloat16, torch.float32)[round])


def without(optimizer: Any, params: list[Any], round: int) -> Any:
    """Parameters that are frozen and thawed."""
    return {"absent": ([0], [1, 2], [0, 1])[round]}


def sparse(optimizer: Any, params: list[Any], round: int) -> Any:
    return {"sparse": ([0], [0, 1, 2, 3], [3])[round]}


def one_cleared(optimizer: Any, params: list[Any], round: int) -> None:
    optimizer.state.pop(params[round])


def removed_group(optimizer: Any, params: list[Any], round: int) -> None:
    if round == 1:
        for param in optimizer.param_groups.pop()["params"]:
            del optimizer.state[param]


def transformed(pairs: Any) -> Any:
    return [(2 * grad, param) for grad, param in pairs]


CHANGES: dict[str, Change] = {
    "clipvalue": option("clipvalue", 1e-3, None),
    "clipnorm": option("clipnorm", 1e-3, None),
    "global_clipnorm": option("global_clipnorm", 1e-3, None),
    "decay": option("decay", 0.5, 0.0),
    "learning_rate": option("learning_rate", 0.25, 1.0),
    "schedule": option("learning_rate", schedules.ExponentialDecay(1.0, 1, 0.5), 1.0),
    "callable": option("rho", lambda: 0.5, 0.95),
    "epsilon": option("epsilon", 1e-3, 1e-7),
    "transformers": option("gradient_transformers", [transformed], None),
    "iterations": option("iterations", 7, 2**40),
    "norm_variables": lambda optimizer, params, round: setattr(
        optimizer, "norm_variables", [[params[0], (params[3], 1, 3)]] if round % 2 == 0 else None
    ),
    **{f"maximize of group {i}": in_group(i, "maximize", True, False) for i in range(2)},
    **{f"lr of group {i}": in_group(i, "lr", 0.25, 1.0) for i in range(2)},
    "rho of group 1": in_group(1, "rho", 0.5, np.float64(0.95)),
    **{f"{name}, filled {kind.__name__}": filled(name, kind)
       for name in ("learning_rate", "rho", "epsilon") for kind in (np.array, torch.tensor)},
    **{f"{how} {key} {number}": of_state(number, key, new, in_place)
       for number, key in ((0, "square_avg"), (3, "acc_delta"))
       for how, new, in_place in (("other", lambda x: x * 2, False), ("clone of", torch.clone, False),
                                  ("filled", lambda x: x.mul_(2), False), ("other memory of", lambda x: x * 2, True),
                                  ("strided", lambda x: torch.stack([x, x], -1)[..., 0], True))},
    "state is exchanged": exchanged_state,
    "state in another order": lambda optimizer, params, round: optimizer.state.update(
        [(param, optimizer.state.pop(param)) for param in reversed(params)]
    ),
    "state is cleared": lambda optimizer, params, round: optimizer.state.clear(),
    "one state is cleared": one_cleared,
    "parameters are exchanged": exchanged_params,
    "parameters are reversed": reversed_params,
    "parameter's memory": lambda optimizer, params, round: setattr(params[2], "data", params[2].data * 2),
    "another parameter": other_param,
    "another dtype": other_dtype,
    "without gradients": without,
    "sparse gradients": sparse,
    "a group is removed": removed_group,
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"decay": 0.5, "clipnorm": 0.5}], ids=["plain", "decay, clipnorm"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(path: Path, name: str, options: dict[str, Any]) -> None:
    """As a copy, which begins without a partition, has it."""
    if options and name in ("clipvalue", "clipnorm", "global_clipnorm", "decay", "transformers", "sparse gradients"):
        pytest.skip("excluded by the options, or by themselves")
    optimizer, _ = trained(path, **options)
    for round in range(3):
        gradients: Any = CHANGES[name](optimizer, params_of(optimizer), round)
        other = copy.deepcopy(optimizer)
        for step in range(2):
            for each in (optimizer, other):
                params = params_of(each)
                give(params, 10 * round + step)
                for kind, numbers in gradients.items() if isinstance(gradients, dict) else ():
                    for param in (params[i] for i in numbers):
                        param.grad = None if kind == "absent" else param.grad.to_sparse()
                each.step()
            assert_same_training(optimizer, other, (round, step))


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


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """One process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_local_tensors_that_are_replaced_are_noticed(mesh: DeviceMesh) -> None:
    plain, ours = Parameter(torch.zeros(4)), Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
    optimizers = [AdadeltaKeras([param], 1.0) for param in (plain, ours)]
    for step in range(4):
        plain.grad, ours.grad = torch.ones(4), distribute_tensor(torch.ones(4), mesh, [Shard(0)])
        for key in ("square_avg", "acc_delta") if step == 2 else ():
            optimizers[0].state[plain][key].fill_(0.25)
            optimizers[1].state[ours][key]._local_tensor = torch.full((4,), 0.25)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours.to_local(), plain)  # type: ignore[attr-defined]
    for key, state in optimizers[0].state[plain].items():
        assert torch.equal(optimizers[1].state[ours][key].to_local(), state), key


def test_large_state_that_is_distributed_otherwise_is_noticed(mesh: DeviceMesh) -> None:
    numel = 2**22 + 1
    param = Parameter(distribute_tensor(torch.zeros(numel), mesh, [Shard(0)]))
    optimizer = AdadeltaKeras([param], 1.0)
    for _ in range(2):
        param.grad = distribute_tensor(torch.ones(numel), mesh, [Shard(0)])
        optimizer.step()
    optimizer.state[param]["acc_delta"] = distribute_tensor(torch.zeros(numel), mesh, [Replicate()])
    with pytest.raises(RuntimeError, match="its state acc_delta are distributed in different ways"):
        optimizer.step()


def test_the_values_of_the_last_step_are_not_those_of_another() -> None:
    """A step remembers numbers by identity."""
    param = Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = AdadeltaKeras([param], 0.5)
    group = optimizer.param_groups[0]
    oracle = oracle_of(param, learning_rate=0.5)
    for lr in (0.1, 0.1, float("0.1"), np.float64(0.1), 0.1, torch.tensor(0.1, dtype=torch.float64), 0.1):
        oracle.learning_rate = lr if not isinstance(lr, torch.Tensor) else np.float64(0.1)
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
    [
        {},
        {"maximize": True},
        {"capturable": True},
        {"learning_rate": torch.tensor(0.5)},
        {"learning_rate": schedules.ExponentialDecay(1.0, 1, 0.5)},
        {"decay": 0.5, "clipvalue": 1e-3},
        {"clipnorm": 1e-3},
        {"global_clipnorm": 1e-3},
        {"rho": lambda: 0.5, "gradient_transformers": [transformed]},
    ],
    ids=[
        "plain",
        "maximize",
        "capturable",
        "tensor lr",
        "schedule",
        "clipvalue",
        "clipnorm",
        "global_clipnorm",
        "callable",
    ],
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
