"""The plan of a step: what the partition of the last step must notice, what is called how often, and what is refused."""

import copy
import gc
import itertools
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
from processes import Processes
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from torch_adadelta import AdadeltaKeras, schedules
from torch_adadelta.backends import functional, kernels
from torch_adadelta.step import planning

needs_library = pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")


def give(params: list[Parameter], seed: int) -> None:
    for index, param in enumerate(params):
        (param.grad,) = gradients(param.shape, param.dtype, 1, seed=100 * seed + index)


def trained(path: Path, steps: int = 2, groups: int = 2, **options: Any) -> tuple[AdadeltaKeras, list[Parameter]]:
    """An optimizer of several groups after some steps, with new gradients, and its parameters."""
    params = [Parameter(torch.zeros(5)) for _ in range(2 * groups)]
    pairs = zip(params[::2], params[1::2], strict=True)
    optimizer = AdadeltaKeras([{"params": list(pair)} for pair in pairs], 1.0, **{**path.options, **options})
    for step in range(steps):
        give(params, step)
        optimizer.step()
    give(params, steps)
    return optimizer, params


def everything(optimizer: AdadeltaKeras) -> list[Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [x for param in params for x in (param, *optimizer.state[param].values())]


def assert_same_training(one: AdadeltaKeras, other: AdadeltaKeras, what: str = "") -> None:
    for actual, expected in zip(everything(one), everything(other), strict=True):
        assert_same_bits(actual, expected.detach(), what)


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
        pairs = zip(copies[::2], copies[1::2], strict=True)
        fresh = AdadeltaKeras([{"params": list(pair)} for pair in pairs], **path.options)
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


@pytest.mark.parametrize("numel", [16, 2**22 + 1], ids=["small", "large"])
def test_what_replaces_state_is_used(path: Path, numel: int) -> None:
    """Small state is compared by reference, large by id, of which the next object may have the same."""
    if path.capability not in (None, "default"):
        pytest.skip("the partition is the same")
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


def test_a_clip_option_beside_transformers_is_noticed(path: Path) -> None:
    """Written to the groups themselves."""
    optimizer, _ = trained(path, gradient_transformers=[lambda pairs: pairs])
    for group in optimizer.param_groups:
        group["clipnorm"] = 1.0
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="`clipnorm` cannot be set when `gradient_transformers` is set"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_transformers_that_are_appended_are_noticed(path: Path) -> None:
    optimizer, _ = trained(path)
    optimizer.gradient_transformers.append(lambda pairs: [(-g, p) for g, p in pairs])
    expected, _ = trained(path)
    for group in expected.param_groups:
        group["maximize"] = True
    for each in (optimizer, expected):
        each.step()
    assert_same_training(optimizer, expected)
    clipped, _ = trained(path, clipnorm=1.0)
    clipped.gradient_transformers.append(lambda pairs: pairs)
    before = snapshot(clipped)
    with pytest.raises(ValueError, match="`clipnorm` cannot be set when `gradient_transformers` is set"):
        clipped.step()
    assert_unchanged(clipped, before)


def test_an_optimizer_and_its_partition_are_freed() -> None:
    params = [Parameter(torch.zeros(3)) for _ in range(2)]
    optimizer = AdadeltaKeras(params)
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    gone = [weakref.ref(x) for x in (optimizer, params[0], optimizer.state[params[1]]["acc_delta"])]
    del optimizer, params, param
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


# ---- Callbacks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 2])
def test_callbacks_run_once_a_step_also_where_the_first_sparse_gradient_comes(path: Path, steps: int) -> None:
    calls: list[tuple[str, int]] = []

    def called(name: str) -> Callable[[Any], Any]:
        def callback(pairs: Any) -> Any:
            calls.append((name, len(pairs)))
            return pairs

        return callback

    def rate() -> float:
        calls.append(("rho", 0))
        return 0.5

    callbacks = {"gradient_aggregator": called("aggregator"), "gradient_transformers": [called("transformer")]}
    optimizer, params = trained(path, steps, rho=rate, **callbacks)
    params[1].grad = torch.ones(5).to_sparse()
    calls.clear()
    optimizer.step()
    assert sorted(calls) == [("aggregator", 4), ("rho", 0), ("transformer", 4)]


def test_transformers_are_not_called_without_gradients(path: Path) -> None:
    calls: list[str] = []

    def aggregator(pairs: Any) -> Any:
        calls.append("aggregator")
        return pairs

    def transformer(pairs: Any) -> Any:
        calls.append("transformer")
        return pairs

    optimizer, params = trained(path, gradient_aggregator=aggregator, gradient_transformers=[transformer])
    for param in params:
        param.grad = None
    calls.clear()
    optimizer.step()
    assert calls == ["aggregator"]  # other processes may have gradients, and wait for this one
    assert optimizer.iterations == 2


def test_callbacks_cannot_change_the_gradients_of_the_user(path: Path) -> None:
    """Neither the values nor the indices."""

    def spoiling(pairs: Any) -> Any:
        for grad, _ in pairs:
            if grad.is_sparse:
                grad._indices().zero_()
                grad._values().zero_()
            else:
                grad.zero_()
        return pairs

    param, table = Parameter(torch.zeros(3)), Parameter(torch.zeros(4, 2))
    optimizer = AdadeltaKeras([param, table], 1.0, gradient_transformers=[spoiling], **path.options)
    param.grad = torch.ones(3)
    table.grad = torch.sparse_coo_tensor(torch.tensor([[1, 3]]), torch.ones(2, 2), (4, 2))
    optimizer.step()
    assert param.grad.tolist() == [1, 1, 1]
    assert table.grad._indices().tolist() == [[1, 3]]
    assert (table.grad._values() == 1).all()


@pytest.mark.parametrize("how", ["load_state_dict", "replaced", "cleared", "maximize"])
def test_what_a_callback_does_to_the_optimizer_counts(path: Path, how: str) -> None:
    """It may load a checkpoint, replace state, or write to groups: the update goes by what is there then."""
    calls = 0

    def callback(pairs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            disturb(optimizer, params)
        return pairs

    def disturb(each: AdadeltaKeras, own: list[Parameter]) -> None:
        if how == "load_state_dict":
            each.load_state_dict(saved)
        elif how == "replaced":
            each.state[own[0]]["acc_delta"] = torch.full((5,), 0.25)
        elif how == "cleared":
            each.state.clear()
        else:
            each.param_groups[1]["maximize"] = True

    optimizer, params = trained(path, gradient_transformers=[callback])
    expected, others = trained(path, gradient_transformers=[lambda pairs: pairs])
    saved = copy.deepcopy(expected.state_dict())
    if how == "load_state_dict":
        for group in saved["param_groups"]:
            group["iterations"] = 7
    disturb(expected, others)
    optimizer.step()
    expected.step()
    assert calls == 3
    assert_same_training(optimizer, expected)
    assert optimizer.iterations == expected.iterations == (8 if how == "load_state_dict" else 3)


# ---- Numbers that change in place -----------------------------------------------------------------------------------


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
    fresh = AdadeltaKeras([{"params": copies[:2]}, {"params": copies[2:]}], **path.options)
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


def test_a_group_that_is_restored_under_a_schedule(path: Path) -> None:
    optimizer, params = trained(path)
    optimizer.learning_rate = schedules.ExponentialDecay(1.0, 2, 0.5)
    optimizer.step()
    saved = [{k: copy.deepcopy(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    give(params, 3)
    optimizer.step()
    for group, was in zip(optimizer.param_groups, saved, strict=True):
        group.update(was)
    optimizer.step()
    assert optimizer.iterations == 4
    optimizer.param_groups[0] = dict(optimizer.param_groups[0])
    with pytest.raises(RuntimeError, match="param_groups was changed from outside"):
        optimizer.step()


# ---- Schedules on a device ------------------------------------------------------------------------------------------


def test_a_tensor_of_a_schedule_that_somebody_fills_is_refused(path: Path) -> None:
    param = Parameter(torch.zeros(3))
    schedule = schedules.ExponentialDecay(1.0, 2, 0.5)
    optimizer = AdadeltaKeras([param], schedule, capturable=True, **path.options)
    param.grad = torch.ones(3)
    count = optimizer.param_groups[0]["iterations"]
    for _ in range(2):
        optimizer.step()
    assert optimizer.param_groups[0]["iterations"] is count  # a graph that was captured counts in place
    assert count.item() == 2
    lr = optimizer.param_groups[0]["lr"]
    assert isinstance(lr, Tensor)
    lr.fill_(7.0)
    before = snapshot(optimizer)
    with pytest.raises(
        RuntimeError, match=r"group 0 has lr=tensor\(7\.\), but its learning_rate is given by the schedule"
    ):
        optimizer.step()
    assert_unchanged(optimizer, before)


# ---- What others see ------------------------------------------------------------------------------------------------


@needs_library
def test_a_dispatch_mode_sees_what_is_written_in_every_step() -> None:
    """Also once the library keeps the accumulators: the schema of that op does not tell that it writes to them."""

    class Mode(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.written: list[set[int]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "torch_adadelta":
                written = [x for x, arg in zip(args, func._schema.arguments, strict=False) if arg.is_write]
                self.written.append({x.data_ptr() for tensors in written for x in tensors})
            return func(*args, **(kwargs or {}))

    optimizer, params = trained(Path("fused", lambda: None, {"fused": True}), steps=3)
    partition = optimizer.step_request().partitions.partition
    assert partition is not None
    assert partition.specs[0].accumulators is not None
    for _ in range(2):
        give(params, 7)
        with Mode() as mode:
            optimizer.step()
        assert mode.written == [{x.data_ptr() for x in everything(optimizer)}]


# ---- Memory ---------------------------------------------------------------------------------------------------------


def test_a_gradient_that_is_its_parameter_transposed_is_refused(path: Path) -> None:
    param = Parameter(torch.ones(3, 3))
    optimizer = AdadeltaKeras([param], 1.0, **path.options)
    for steps in range(2):
        param.grad = param.detach().T
        before = snapshot(optimizer)
        with pytest.raises(RuntimeError, match="parameter 0 of group 0: it and its gradient share memory"):
            optimizer.step()
        assert_unchanged(optimizer, before)
        assert optimizer.iterations == steps
        param.grad = torch.ones(3, 3)
        optimizer.step()


@pytest.mark.parametrize("key", ["square_avg", "acc_delta"])
def test_a_single_shared_element_is_seen(path: Path, key: str) -> None:
    """The last of one and the first of the other."""
    optimizer, params = trained(path)
    memory = torch.zeros(9)
    with torch.no_grad():
        params[2].data = memory[:5]
    optimizer.state[params[3]][key] = memory[4:]
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=f"parameter 0 of group 1: it and the state {key} of parameter 1 of group 1"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    optimizer.state[params[3]][key] = torch.zeros(10)[5:]
    params[2].data = torch.zeros(10)[:5]
    optimizer.step()


def test_a_single_element_that_a_strided_parameter_shares_is_seen(path: Path) -> None:
    optimizer, params = trained(path)
    memory = torch.zeros(13)
    with torch.no_grad():
        params[2].data = memory[:9:2]
    optimizer.state[params[3]]["square_avg"] = memory[8:]
    with pytest.raises(RuntimeError, match="parameter 0 of group 1: it and the state square_avg of parameter 1 of"):
        optimizer.step()
    optimizer.state[params[3]]["square_avg"] = memory[9:].clone().resize_(5).zero_()
    optimizer.step()


def test_the_stride_of_a_dimension_of_size_one_means_nothing(path: Path) -> None:
    param = Parameter(torch.zeros(3, 1, 2).as_strided((3, 1, 2), (2, 1, 1)))
    optimizer = AdadeltaKeras([param], 1.0, **path.options)
    oracle = oracle_of(torch.zeros(3, 1, 2), learning_rate=1.0)
    for step in range(3):
        (grad,) = gradients((3, 1, 2), torch.float32, 1, seed=step)
        param.grad = grad.as_strided((3, 1, 2), (2, 5, 1))
        optimizer.step()
        oracle.step(to_numpy(grad))
    assert_like_oracle(param, optimizer.state[param], oracle)


# ---- DTensors and processes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"clipvalue": 0.5}, {"clipnorm": 0.5}, {"global_clipnorm": 0.5}], ids=str)
def test_a_differentiable_step_of_a_dtensor_beside_another(options: dict[str, Any]) -> None:
    """It works, with the bits of plain tensors."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        values = [torch.linspace(-1, 1, 4), torch.linspace(1, 2, 3)]
        grads = [torch.linspace(2, -1, 4), torch.linspace(-3, 3, 3)]
        plain = [value.clone() for value in values]
        mixed = [distribute_tensor(values[0].clone(), mesh, [Shard(0)]), values[1].clone()]
        optimizers = []
        for params in (plain, mixed):
            optimizers.append(AdadeltaKeras(params, 1.0, differentiable=True, **options))
            for step in range(2):
                for param, grad in zip(params, grads, strict=True):
                    own = grad * (step + 1)
                    param.grad = distribute_tensor(own, mesh, [Shard(0)]) if hasattr(param, "to_local") else own
                optimizers[-1].step()
        for one, other in zip(plain, mixed, strict=True):
            whole = other.full_tensor() if hasattr(other, "full_tensor") else other
            assert_same_bits(whole, one)
            for key in ("square_avg", "acc_delta"):
                accumulator = optimizers[1].state[other][key]
                whole = accumulator.full_tensor() if hasattr(accumulator, "full_tensor") else accumulator
                assert_same_bits(whole, optimizers[0].state[one][key], key)
        assert [optimizer.iterations for optimizer in optimizers] == [2, 2]
    finally:
        dist.destroy_process_group()


# Whose square is a little more than half a unit of 2^16 in float32, and is lost in float64 only where it is rounded.
_LARGE, _SMALL = 2.0**8, 2.0**-4 * (1 + 2.0**-9)


def _norm_of_two_types() -> list[tuple[float, float]]:
    """One process has float32 parameters, the other float64: what came of them."""
    rank = dist.get_rank()
    dtype = torch.float32 if rank == 0 else torch.float64
    param = Parameter(torch.zeros(2, dtype=dtype))
    optimizer = AdadeltaKeras([param], 1.0, global_clipnorm=0.5, norm_group="world")
    param.grad = torch.tensor([_LARGE, _SMALL], dtype=dtype)
    optimizer.step()
    state = optimizer.state[param]
    return [(state["square_avg"][0].item(), state["square_avg"][1].item())]


def test_the_norm_over_processes_of_two_dtypes_is_taken_in_one(two: Processes) -> None:
    """In float64, where one process has such parameters: as one process with both has it."""
    params = [Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    optimizer = AdadeltaKeras(params, 1.0, global_clipnorm=0.5)
    for param in params:
        param.grad = torch.tensor([_LARGE, _SMALL], dtype=param.dtype)
    optimizer.step()
    expected = [tuple(optimizer.state[param]["square_avg"].tolist()) for param in params]
    assert [results[0] for results in two.run(_norm_of_two_types)] == expected


def test_a_norm_that_zero_cannot_take_is_refused_when_it_is_written_later() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        param = Parameter(torch.zeros(3))
        zero = ZeroRedundancyOptimizer([param], optimizer_class=AdadeltaKeras, learning_rate=1.0)
        param.grad = torch.ones(3)
        zero.step()
        before = param.detach().clone()
        zero.param_groups[0]["global_clipnorm"] = 1.0
        with pytest.raises(ValueError, match=r"global_clipnorm=1\.0 needs the gradients of all parameters"):
            zero.step()
        assert_same_bits(param, before)
    finally:
        dist.destroy_process_group()


def _one_process_refuses() -> list[str]:
    param = Parameter(torch.zeros(3))
    optimizer = AdadeltaKeras([param], 1.0, global_clipnorm=1.0, norm_group="world")
    errors = []
    for step in range(4):
        param.grad = torch.ones(3)
        if step == 2 and dist.get_rank() == 0:
            optimizer.state[param]["acc_delta"].data = torch.zeros(4)
        try:
            optimizer.step()
            errors.append("")
        except RuntimeError as error:
            errors.append(str(error).split(" (", maxsplit=1)[0])
            optimizer.state[param]["acc_delta"].data = torch.zeros(3)
    return errors


def test_a_process_that_refuses_its_state_leaves_the_others_no_call_to_wait_for(two: Processes) -> None:
    """It says so before the norm is summed, and once; then all see that they disagree."""
    first, second = two.run(_one_process_refuses)
    assert first[:2] == second[:2] == ["", ""]
    assert first[2].startswith("parameter 0 of group 0 has shape")
    assert second[2] == ""
    assert first[3] == second[3] == "the processes of norm_group disagree on iterations"


# ---- The partition --------------------------------------------------------------------------------------------------


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
