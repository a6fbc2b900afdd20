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
    assert_same_bits,
    assert_unchanged,
    gradients,
    oracle_of,
    snapshot,
    to_numpy,
)
from processes import Processes
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from training import advance, assert_same_training, oracle_of_all, params_of, stepped, trained
from training import give_gradients as give
from training import path as path
from training import tensors_of as everything

from torch_adadelta import AdadeltaKeras, schedules
from torch_adadelta.backends import kernels

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
@pytest.mark.parametrize("steps", [0, 2])
def test_what_is_written_to_groups_is_checked_before_the_step(
    path: Path, values: dict[str, Any], error: str, steps: int
) -> None:
    optimizer, _ = trained(path, steps)
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
