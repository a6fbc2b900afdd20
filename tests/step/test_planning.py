"""The plan of a step: which rows it has, what it refuses, and what it leaves alone."""

import copy
import gc
import itertools
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import (
    Path,
    assert_like_oracle,
    assert_optimizer_like_oracle,
    assert_same_bits,
    assert_unchanged,
    gradients,
    oracle_of,
    snapshot,
    to_numpy,
    to_oracle,
)
from processes import Processes
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from training import advance, assert_same_training, oracle_of_all, params_of, stepped, trained
from training import give_gradients as give
from training import path as path
from training import tensors_of as everything

from torch_adadelta import AdadeltaKeras, schedules
from torch_adadelta.backends import kernels
from torch_adadelta.backends.batch import Backend
from torch_adadelta.distributed import NormGroup
from torch_adadelta.step import planning

needs_library = pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")


# ---- The rows of a step ----------------------------------------------------------------------------------------------


def test_a_step_without_any_gradient_does_not_count(path: Path) -> None:
    optimizer, params = trained(path)
    for param in params:
        param.grad = None
    before = snapshot(optimizer)
    optimizer.step()
    assert_unchanged(optimizer, before)


def test_state_in_another_order_than_the_parameters(path: Path) -> None:
    """Parameters get their state in the order of their first gradients, which need not be theirs in the group."""
    params = [Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = AdadeltaKeras(params, 1.0, **path.options)
    oracles = [oracle_of(p, learning_rate=1.0) for p in params]
    for i, with_grad in enumerate(([2], [0], [1], [0, 1, 2], [0, 1, 2])):
        for j, (param, oracle) in enumerate(zip(params, oracles, strict=True)):
            param.grad = gradients((3,), torch.float32, steps=1, seed=10 * i + j)[0] if j in with_grad else None
            oracle.step(None if param.grad is None else param.grad.numpy())
        optimizer.step()
    assert list(optimizer.state) == [params[2], params[0], params[1]]
    for param, oracle in zip(params, oracles, strict=True):
        assert_like_oracle(param, optimizer.state[param], oracle)


def test_devices_may_differ_in_a_group(path: Path) -> None:
    """The meta device stands in for an accelerator: it has no data, but a device it is."""
    cpu = [Parameter(torch.ones(3)), Parameter(torch.ones(2, dtype=torch.float64))]
    meta = Parameter(torch.ones(3, device="meta"))
    options = {} if path.options == {"fused": True} else path.options
    optimizer = AdadeltaKeras([cpu[0], meta, cpu[1]], 1.0, **options)
    oracles = [oracle_of(p, learning_rate=1.0) for p in cpu]
    for _ in range(3):
        for param in (*cpu, meta):
            param.grad = torch.full_like(param, 0.5)
        optimizer.step()
        for oracle in oracles:
            oracle.step(torch.full(oracle.p.shape, 0.5).numpy())
    for param, oracle in zip(cpu, oracles, strict=True):
        assert_like_oracle(param, optimizer.state[param], oracle)
    assert optimizer.state[meta]["square_avg"].is_meta
    assert optimizer.iterations == 3


def test_explicit_gradients_in_any_order_and_of_any_part(path: Path) -> None:
    """They leave the partition of the last step as it is, and read no `.grad`. Callbacks see them in their order."""
    seen: list[list[Any]] = []

    def aggregator(pairs: Any) -> Any:
        seen.append([param for _, param in pairs])
        return pairs

    optimizer, params = trained(path, steps=0, global_clipnorm=0.5, gradient_aggregator=aggregator)
    expected = oracle_of_all(params, global_clipnorm=0.5)
    for step, order in enumerate([None, [3, 1, 0, 2], None, [2], [1, 3], None, [0, 1, 2, 3]]):
        grads = give(params, step)
        if order is None:
            optimizer.step()
            order = [0, 1, 2, 3]
        else:
            optimizer.apply_gradients([(grads[i] * 2, params[i]) for i in order])
            grads = [2 * grad for grad in grads]
        if optimizer.gradient_aggregator is not None:
            assert [id(param) for param in seen[-1]] == [id(params[i]) for i in order]
        if step == 4:
            optimizer.gradient_aggregator = None
        clipped = expected.clip([(i, to_numpy(grads[i])) for i in order])
        for i, grad in zip(order, clipped, strict=True):
            expected.oracles[i].learning_rate = 1.0
            expected.oracles[i].step(grad)
    for param, oracle in zip(params, expected.oracles, strict=True):
        assert_like_oracle(param, optimizer.state[param], oracle)
    assert optimizer.iterations == 7


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


def test_parameters_of_every_dtype_in_each_group(path: Path) -> None:
    """In batches of their own where they must be; schedules and `decay` are computed in the opmath dtype of each."""
    optimizer = stepped(path, steps=0, decay=0.3)
    params = params_of(optimizer)
    expected = oracle_of_all(params, decay=0.3)
    for step in range(3):
        grads = give(params, step)
        clipped = expected.clip([(i, to_numpy(grad)) for i, grad in enumerate(grads)])
        for i, (oracle, grad) in enumerate(zip(expected.oracles, clipped, strict=True)):
            expected.learning_rate = 0.5 if i < 4 else 1.0
            oracle.learning_rate = expected.learning_rate_at(step, oracle.format.T)
            oracle.step(grad)
        optimizer.step()
        for i, (param, oracle) in enumerate(zip(params, expected.oracles, strict=True)):
            assert_like_oracle(param, optimizer.state[param], oracle, f"{i} at step {step}")


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"clipnorm": -1.0}, r"Expected clipnorm >= 0, received: -1\.0"),
        ({"clipnorm": 1.0, "global_clipnorm": 1.0}, "Cannot accept both `clipnorm` and `global_clipnorm`"),
        ({"norm_variables": ((0, 0, 0, 6),)}, r"has 5 rows, and norm_variables the rows \[0, 6\)"),
    ],
    ids=["range", "both norms", "norm_variables"],
)
@pytest.mark.parametrize(("steps", "calls"), [(0, None), (2, None), (2, 2)])
def test_what_is_written_to_groups_is_checked_before_the_step(
    path: Path, values: dict[str, Any], error: str, steps: int, calls: int | None
) -> None:
    optimizer, _ = trained(path, steps, gradient_accumulation_steps=calls)
    for group in optimizer.param_groups:
        group.update(values)
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError), match=error):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_groups_that_disagree_are_refused(path: Path) -> None:
    optimizer, _ = trained(path)
    optimizer.param_groups[1]["clipvalue"] = 0.5
    before = snapshot(optimizer)
    with pytest.raises(
        ValueError, match="clipvalue belongs to the whole optimizer, but group 0 has None and group 1 has"
    ):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_state_is_made_without_a_step_for_a_checkpoint_to_be_loaded_into(path: Path) -> None:
    """As distributed checkpointing does: lr 0, which nobody but it can have written under a schedule; zero gradients."""
    for schedule, lr, grad, makes_state_only in (
        (schedules.ExponentialDecay(1.0, 2, 0.5), 0.0, 0.0, True),
        (schedules.ExponentialDecay(1.0, 2, 0.5), torch.tensor(0.0), 0.0, True),
        (1.0, 0.0, 0.0, False),
    ):
        param, other = Parameter(torch.ones(3)), Parameter(torch.ones(2))
        optimizer = AdadeltaKeras([{"params": [param]}, {"params": [other]}], schedule, **path.options)
        for group in optimizer.param_groups:
            group["lr"] = lr
        param.grad = torch.full((3,), grad)
        optimizer.step()
        assert optimizer.state.keys() == {param}
        assert not any(tensor.any() for tensor in optimizer.state[param].values())
        assert optimizer.iterations == (0 if makes_state_only else 1)
    # Neither with a gradient that is not zero, nor where there is state: then it was overwritten.
    for spoil in ("gradient", "state", "lr"):
        param, other = Parameter(torch.ones(3)), Parameter(torch.ones(2))
        groups = [{"params": [param]}, {"params": [other]}]
        optimizer = AdadeltaKeras(groups, schedules.ExponentialDecay(1.0, 2, 0.5), **path.options)
        param.grad = torch.zeros(3)
        if spoil == "state":
            optimizer.step()
            other.grad = torch.zeros(2)  # so that there is no partition for it
        if spoil == "gradient":
            param.grad[1] = 1.0
        for group in optimizer.param_groups[: 1 if spoil == "lr" else 2]:
            group["lr"] = 0.0
        with pytest.raises(RuntimeError, match="which would overwrite that"):
            optimizer.step()
        assert optimizer.iterations == (spoil == "state")


@pytest.mark.parametrize("calls", [None, 2])
def test_gradients_are_divided_by_the_factor_of_the_loss_once(path: Path, calls: int | None) -> None:
    """Before they are summed, before callbacks, or in the update: where they come to first."""
    options: dict[str, Any] = {"gradient_accumulation_steps": calls, "loss_scale_factor": 3.0, "clipvalue": 0.2}
    aggregated, plain = (trained(path, 4, gradient_aggregator=given, **options)[0] for given in (list, None))
    assert_same_training(aggregated, plain)


@pytest.mark.parametrize("key", ["clipvalue", "clipnorm", "global_clipnorm", "decay"])
def test_a_bool_is_no_number_where_one_stood(path: Path, key: str) -> None:
    """To the partition of the last step True is 1.0, and False 0.0."""
    for number, groups in itertools.product((1.0,) if key == "decay" else (1.0, 0.0), ((0, 1), (1,))):
        optimizer, _ = trained(path, **{key: number})
        for group in groups:
            optimizer.param_groups[group][key] = bool(number)
        before = snapshot(optimizer)
        with pytest.raises(
            (TypeError, ValueError), match=f"{key} must be a number|{key} belongs to the whole optimizer"
        ):
            optimizer.step()
        assert_unchanged(optimizer, before)


def test_planning_writes_to_no_group(path: Path) -> None:
    """Not even another form of what the user left there."""
    optimizer, params = trained(path, clipnorm=0.5)
    group = optimizer.param_groups[0]
    group.update(norm_variables=[[0, 1, 0, 5], [0, 0, 0, 3]], epsilon=0, rho=np.float64(0.5))
    values = {key: group[key] for key in ("norm_variables", "epsilon", "rho", "clipnorm", "lr")}
    for step in range(2):
        give(params, step)
        optimizer.step()
    assert all(group[key] is value for key, value in values.items())
    expected, others = trained(path, clipnorm=0.5)
    expected.norm_variables = [[(others[0], 0, 3), others[1]]]
    expected.param_groups[0].update(epsilon=1e-7, rho=np.float64(0.5))
    advance(expected, 2)
    assert_same_training(optimizer, expected)


def test_nothing_but_the_optimizer_holds_its_tensors(path: Path) -> None:
    """Replaced state is freed by the next step, parameters can be swapped, a cycle through the optimizer is collected."""
    optimizer, params = trained(path, groups=10)
    old = weakref.ref(optimizer.state[params[0]]["square_avg"])
    optimizer.state[params[0]]["square_avg"] = torch.ones(5)
    advance(optimizer)
    assert old() is None
    optimizer.zero_grad()
    torch.utils.swap_tensors(params[1], Parameter(torch.full((5,), 2.0)))
    advance(optimizer)
    gone = [weakref.ref(tensor) for state in optimizer.state.values() for tensor in state.values()]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    gc.collect()
    assert {ref() for ref in gone} == {None}
    advance(optimizer)
    params[0].optimizer = optimizer  # type: ignore[attr-defined]
    gone = [weakref.ref(x) for x in (optimizer, params[0], optimizer.state[params[1]]["acc_delta"])]
    del optimizer, params
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


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


@pytest.mark.parametrize(
    "options",
    [
        {"use_ema": True, "ema_overwrite_frequency": 3, "master_weights": True, "clipnorm": 0.7},
        {"gradient_accumulation_steps": 2, "use_ema": True, "loss_scale_factor": 3.0, "global_clipnorm": 0.9},
        {"gradient_accumulation_steps": 3, "master_weights": True, "weight_decay": 0.25},
    ],
    ids=str,
)
def test_a_plan_is_more_than_updates(path: Path, options: dict[str, Any]) -> None:
    """Averages, sums and remainders, some of which begin later than others."""
    params = [Parameter(torch.zeros(5, 2, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32, torch.float64)]
    optimizer = AdadeltaKeras([{"params": params[:1]}, {"params": params[1:]}], 1.0, **options, **path.options)
    expected = oracle_of_all(params, **options)
    optimizer.step()  # which is none, without gradients
    for step in range(8):
        grads: list[Any] = give(params, step)
        if step % 3 == 1:
            params[0].grad = grads[0] = grads[0].to_sparse(1)
        if step < 2:
            params[2].grad = grads[2] = None
        optimizer.step()
        expected.step(to_oracle(grads))
        assert_optimizer_like_oracle(optimizer, expected, f"at step {step}")


@pytest.mark.filterwarnings("ignore:no gradient in the call that updates")
def test_all_state_is_made_for_a_checkpoint_to_be_loaded_into(path: Path) -> None:
    options: dict[str, Any] = {"master_weights": True, "use_ema": True, "gradient_accumulation_steps": 2}
    params = [Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = AdadeltaKeras(params, schedules.ExponentialDecay(1.0, 2, 0.5), **options, **path.options)
    optimizer.param_groups[0]["lr"] = 0.0
    params[0].grad = torch.zeros(3, dtype=torch.bfloat16)
    optimizer.step()
    assert optimizer.iterations == 0
    assert optimizer.state.keys() == {params[0]}
    assert optimizer.state[params[0]].keys() == {
        "square_avg", "acc_delta", "remainder", "average", "gradient_accumulator",
    }  # fmt: skip
    assert not planning._is_zero(torch.zeros((), device="meta")), "which would wait for the device"


def test_parameters_of_a_kind_are_updated_by_one_call(path: Path) -> None:
    """Sparse ones last. In state, both keys of this optimizer are needed."""
    optimizer, params = trained(path, steps=0)
    params[1].grad = torch.ones(5).to_sparse()
    plan = planning.plan(optimizer.step_request())
    assert plan is not None
    assert [(batch.is_sparse, len(batch.params)) for batch in plan.batches] == [(False, 3), (True, 1)]
    assert plan.batches[1].backend is (Backend.FUSED if path.name == "fused" else Backend.SINGLE_TENSOR)
    optimizer.step()
    del optimizer.state[params[3]]["acc_delta"]
    with pytest.raises(RuntimeError, match="parameter 1 of group 1: its state holds"):
        planning.plan(optimizer.step_request())


def test_a_parameter_that_is_given_twice_is_updated_in_the_order_of_its_gradients(path: Path) -> None:
    """Dense or sparse, in calls of their own."""
    params = [Parameter(torch.zeros(5, 2)) for _ in range(2)]
    optimizer = AdadeltaKeras(params, 1.0, **path.options)
    expected = oracle_of_all(params)
    for step in range(3):
        grads = [gradients((5, 2), torch.float32, 1, seed=10 * step + i)[0] for i in range(4)]
        grads[1] = grads[1].to_sparse(1)
        order = (0, 0, 1, 0)
        optimizer.apply_gradients([(grad, params[i]) for grad, i in zip(grads, order, strict=True)])
        for one in expected.oracles:
            one.learning_rate = 1.0
        for grad, i in zip(to_oracle(grads), order, strict=True):
            expected.oracles[i].step(grad)
    for param, oracle in zip(params, expected.oracles, strict=True):
        assert_like_oracle(param, optimizer.state[param], oracle)


def test_weight_decay_that_is_written_to_a_group_is_checked(path: Path) -> None:
    """Beside a clip option, on the partition of the last step too."""
    optimizer, _ = trained(path, clipnorm=0.5, decoupled_weight_decay=False)
    optimizer.param_groups[1]["weight_decay"] = 0.1
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="cannot be combined with decoupled_weight_decay=False"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("option", ["clipnorm", "global_clipnorm"])
def test_what_has_no_norm_is_refused_by_name(path: Path, option: str, steps: int) -> None:
    optimizer, params = trained(path, steps, **{option: 0.5})
    params[3].data = torch.zeros(4)
    before = snapshot(optimizer)
    with pytest.raises(
        RuntimeError, match=r"parameter 1 of group 1 has shape \(4,\), but its gradient has shape \(5,\)"
    ):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_distributed_gradients_stay_distributed(path: Path, mesh: DeviceMesh) -> None:
    (theirs, plain), spread = trained(path, 0, global_clipnorm=0.5), []
    spread = [Parameter(distribute_tensor(torch.zeros(5), mesh, [Shard(0)])) for _ in plain]
    ours = AdadeltaKeras([{"params": spread[:2]}, {"params": spread[2:]}], 1.0, global_clipnorm=0.5, **path.options)
    for step in range(2):
        grads = give(plain, step)
        theirs.step()
        ours.apply_gradients([(distribute_tensor(g, mesh, [Shard(0)]), p) for g, p in zip(grads, spread, strict=True)])
        for one, other in zip(plain, spread, strict=True):
            assert_same_bits(other.to_local(), one.detach())  # type: ignore[attr-defined]
    for param, grad in zip(spread, grads, strict=True):
        param.grad = distribute_tensor(grad, mesh, [Shard(0)])
    plan = planning.plan(ours.step_request())
    assert plan is not None
    assert (plan.batches[0].accumulators is not None) == (path.name == "fused"), "of the local tensors"
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 is a DTensor, but its gradient is a Tensor"):
        ours.apply_gradients(list(zip(grads, spread, strict=True)))
    assert ours.iterations == 2
    ours.global_clipnorm = None
    for option in ("clipvalue", "clipnorm", "global_clipnorm"):  # of which norms are those of all parts
        setattr(ours, option, 0.5)
        clipping, _ = planning._clipping(request := ours.step_request(), planning.gather(request))
        assert (clipping.over_parts is None) == (option == "clipvalue")
        setattr(ours, option, None)


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


# ---- Processes -------------------------------------------------------------------------------------------------------


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


class Others(NormGroup):
    """Processes with gradients, which add to the sum of squares, and float64 parameters."""

    def agree(self, *asked: Any) -> tuple[bool, bool]:
        self.asked = asked
        return True, True

    def sum(self, number: Tensor) -> Tensor:
        self.summed = number.item()
        return 4 * number + 25


def test_a_plan_with_others(path: Path) -> None:
    """Who wait for this process, and count the step, where it has no gradients too."""
    optimizer, params = trained(path, 1, global_clipnorm=1.0, use_ema=True)
    others = Others("world")
    request = optimizer.step_request()._replace(norm_group=others)
    for param in params:
        param.grad = None
    assert planning.plan(optimizer.step_request()) is None
    part, _ = trained(path, 1, use_ema=True)
    part.zero_grad()
    for plan in (planning.plan(request), planning.plan(part.step_request()._replace(is_part=True))):
        assert plan is not None
        assert (plan.batches, plan.counts, [len(some.params) for some in plan.passes]) == ([], True, [4])
    assert others.asked == (1, False, False, 1.0)
    assert others.summed == 0.0
    params[0].grad = torch.tensor([3.0, 0, 0, 0, 4.0])
    plan = planning.plan(request)
    assert plan is not None
    assert others.asked == (1, True, False, 1.0)
    assert others.summed == 25.0
    assert plan.batches[0].gradient_options.factor == 125**-0.5
    assert plan.inputs is None, "the others would not take part in another sum"


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
