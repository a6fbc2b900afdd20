"""The torch.optim contract: groups, state, closures, flags, saving and loading, and what a failed step leaves behind."""

import copy
import gc
import io
import itertools
import math
import pickle
import subprocess
import sys
import textwrap
import warnings
import weakref
from typing import Any

import direct
import expecttest
import pytest
import torch
from cases import (
    DTYPES,
    REAL_DTYPES,
    Path,
    assert_like_oracle,
    assert_same_bits,
    assert_unchanged,
    dtype_name,
    gradients,
    optimizer_with,
    oracle_of,
    randn,
    snapshot,
    to_numpy,
)
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras
from torch_adadelta.backends import functional, kernels
from torch_adadelta.backends.batch import Backend
from torch_adadelta.step import planning, selection, sources, validation

needs_library = pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")


def stepped(path: Path, steps: int = 3, **options: Any) -> AdadeltaKeras:
    """An optimizer of two groups and several dtypes, after a few steps."""
    generator = torch.Generator().manual_seed(7)
    groups = [{"params": [Parameter(randn((5, 3), dtype, generator)) for dtype in REAL_DTYPES]} for _ in range(2)]
    optimizer = AdadeltaKeras([{**groups[0], "lr": 0.5}, groups[1]], 1.0, **options, **path.options)
    advance(optimizer, steps)
    return optimizer


def advance(optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for step in range(steps):
        for group in optimizer.param_groups:
            for i, param in enumerate(group["params"]):
                param.grad = gradients(param.shape, param.dtype, steps=1, seed=100 * step + i)[0]
        optimizer.step()


def assert_same_training(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    """Parameters, state and groups agree, bit by bit."""
    for ours, theirs in zip(one.param_groups, other.param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}
        for p, q in zip(ours["params"], theirs["params"], strict=True):
            assert_same_bits(p, q)
            assert one.state[p].keys() == other.state[q].keys()
            for key in one.state[p]:
                assert_same_bits(one.state[p][key], other.state[q][key])


# ---- State and groups -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_state_is_lazy_and_like_the_parameter(path: Path, dtype: torch.dtype) -> None:
    param = Parameter(torch.ones(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last))
    idle = Parameter(torch.ones(2, dtype=dtype))
    optimizer = AdadeltaKeras([param, idle], **path.options)
    assert not optimizer.state
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert set(optimizer.state) == {param}
    assert set(optimizer.state[param]) == {"square_avg", "acc_delta"}
    for tensor in optimizer.state[param].values():
        assert (tensor.shape, tensor.dtype, tensor.stride()) == (param.shape, param.dtype, param.stride())
        assert type(tensor) is torch.Tensor
        assert not tensor.requires_grad


def test_parameters_without_gradient_wait(path: Path) -> None:
    params = [Parameter(torch.ones(4)) for _ in range(3)]
    optimizer = AdadeltaKeras(params, 1.0, **path.options)
    oracles = [oracle_of(p, learning_rate=1.0) for p in params]
    for step in range(6):
        for i, (param, oracle) in enumerate(zip(params, oracles, strict=True)):
            param.grad = None if (step + i) % 3 == 0 else gradients((4,), torch.float32, steps=1, seed=step)[0]
            oracle.step(None if param.grad is None else param.grad.numpy())
        optimizer.step()
    for param, oracle in zip(params, oracles, strict=True):
        assert_like_oracle(param, optimizer.state[param], oracle)
    assert optimizer.iterations == 6


def test_a_step_without_any_gradient_does_not_count(path: Path) -> None:
    optimizer = optimizer_with([torch.ones(3)], path)
    before = snapshot(optimizer)
    optimizer.step()
    assert_unchanged(optimizer, before)
    assert optimizer.iterations == 0


def test_replaced_state_and_swapped_data_are_honoured(path: Path) -> None:
    param = Parameter(torch.ones(40))
    optimizer = AdadeltaKeras([param], 1.0, **path.options)
    oracle = oracle_of(param, learning_rate=1.0)
    grads = gradients((40,), torch.float32, steps=8)

    def step() -> None:
        grad = grads.pop()
        param.grad = grad
        oracle.step(grad.numpy())
        optimizer.step()
        assert_like_oracle(param, optimizer.state[param], oracle)

    step()
    optimizer.state[param]["square_avg"] = torch.full((40,), 2.0)
    oracle.square_avg = torch.full((40,), 2.0).numpy()
    step()
    optimizer.state[param] = {key: value.clone() for key, value in optimizer.state[param].items()}
    step()
    param.data = torch.full((40,), 5.0)
    oracle.p = to_numpy(param).copy()
    step()
    optimizer.state[param] = {}
    oracle.square_avg = oracle.acc_delta = torch.zeros(40).numpy()
    step()
    optimizer.state.clear()
    oracle.square_avg = oracle.acc_delta = torch.zeros(40).numpy()
    step()
    param.data = param.data.double()
    optimizer.state[param] = {key: value.double() for key, value in optimizer.state[param].items()}
    oracle = oracle_of(param, learning_rate=1.0)
    oracle.square_avg, oracle.acc_delta = (to_numpy(value).copy() for value in optimizer.state[param].values())
    grads = [grad.double() for grad in grads]
    step()


def test_nothing_but_the_optimizer_holds_its_tensors(path: Path) -> None:
    """Replaced state is freed by the next step, parameters can be swapped, a cycle through the optimizer is collected."""
    params = [Parameter(torch.ones(3)) for _ in range(20)]
    optimizer = AdadeltaKeras(params, **path.options)
    advance(optimizer, 2)
    old = weakref.ref(optimizer.state[params[0]]["square_avg"])
    optimizer.state[params[0]]["square_avg"] = torch.ones(3)
    advance(optimizer)
    assert old() is None
    optimizer.zero_grad()
    torch.utils.swap_tensors(params[1], Parameter(torch.full((3,), 2.0)))
    advance(optimizer)
    params[0].optimizer = optimizer  # type: ignore[attr-defined]
    gone = weakref.ref(optimizer), weakref.ref(optimizer.state[params[0]]["acc_delta"])
    del optimizer, params
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


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
def test_state_is_taken_hold_of_once(options: dict[str, Any]) -> None:
    optimizer = AdadeltaKeras([Parameter(torch.ones(3)) for _ in range(2)], **options)
    advance(optimizer)
    held = [spec.accumulators for spec in optimizer._partitions.partition.specs]
    advance(optimizer, 2)
    assert None not in held
    assert [spec.accumulators for spec in optimizer._partitions.partition.specs] == held


def test_large_state_is_freed_when_it_is_replaced(path: Path) -> None:
    param = Parameter(torch.ones(2**22 + 1))
    optimizer = AdadeltaKeras([param], **path.options)
    param.grad = torch.ones_like(param)
    optimizer.step()
    old = weakref.ref(optimizer.state[param]["square_avg"])
    optimizer.state[param]["square_avg"] = torch.ones_like(param)
    assert old() is None


def test_loading_lets_go_of_the_state_before(path: Path) -> None:
    optimizer = stepped(path)
    single = AdadeltaKeras([Parameter(torch.ones(3)) for _ in range(5)], **path.options)
    advance(single, 2)
    for each in (optimizer, single):
        old = [weakref.ref(tensor) for state in each.state.values() for tensor in state.values()]
        each.load_state_dict(copy.deepcopy(each.state_dict()))
        gc.collect()
        assert {ref() for ref in old} == {None}


# Parameters that are so many, and so large, that several threads read what belongs to them.
MANY = (80, 512)


@pytest.mark.parametrize("crowd", [(0, 0), MANY], ids=["few", "many"])
@pytest.mark.parametrize("options", [{}, {"clipvalue": 1e30}, {"global_clipnorm": 1e30}], ids=str)
def test_state_may_change_in_every_way_between_two_steps(
    path: Path, options: dict[str, float], crowd: tuple[int, int]
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


@needs_library
@pytest.mark.parametrize("options", [{}, {"clipvalue": 1e30}], ids=str)
@pytest.mark.parametrize("key", ["square_avg", "acc_delta"])
@pytest.mark.parametrize(("count", "numel"), [(3, 4), MANY])
def test_state_that_no_longer_fits_is_noticed_where_it_is_held(
    count: int, numel: int, key: str, options: dict[str, float]
) -> None:
    """A step like the one before it, but for the shape, dtype or layout of a state tensor."""
    for spoil, message in (
        (lambda x: x.double(), "dtype"),
        (lambda x: x[:2], "shape"),
        (lambda x: x[:1].expand(numel), "dense tensor of its own memory"),
    ):
        optimizer = AdadeltaKeras([Parameter(torch.ones(numel)) for _ in range(count)], fused=True, **options)
        advance(optimizer, 2)
        last = optimizer.param_groups[0]["params"][-1]
        before = snapshot(optimizer)
        good = optimizer.state[last][key].data
        optimizer.state[last][key].data = spoil(good)
        with pytest.raises(RuntimeError, match=message):
            advance(optimizer)
        optimizer.state[last][key].data = good
        assert_unchanged(optimizer, before)


@pytest.mark.parametrize(("count", "numel"), [(3, 4), MANY])
def test_gradients_that_do_not_fit_are_noticed_where_state_is_held(count: int, numel: int) -> None:
    optimizer = AdadeltaKeras([Parameter(torch.ones(numel)) for _ in range(count)])
    advance(optimizer, 2)
    before = snapshot(optimizer)
    last = optimizer.param_groups[0]["params"][-1]
    last.grad.data = torch.ones(numel + 1)
    with pytest.raises(RuntimeError, match=f"parameter {count - 1} of group 0 has shape"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("of_params", [True, False])
@pytest.mark.parametrize("of_state", [True, False])
@pytest.mark.parametrize(("count", "numel"), [(3, 4), MANY])
def test_lazy_clones_keep_their_values(path: Path, count: int, numel: int, of_state: bool, of_params: bool) -> None:
    """A clone that copies on write shares its memory with what the next step writes to, until then."""
    optimizer = AdadeltaKeras([Parameter(torch.ones(numel)) for _ in range(count)], **path.options)
    twin = copy.deepcopy(optimizer)
    advance(optimizer, 2)
    advance(twin, 2)
    tensors = [x for state in optimizer.state.values() for x in state.values()] if of_state else []
    tensors += [param.detach() for param in optimizer.param_groups[0]["params"]] if of_params else []
    clones, values = ([function(x) for x in tensors] for function in (torch._lazy_clone, torch.clone))
    advance(optimizer, 2)
    advance(twin, 2)
    assert_same_training(optimizer, twin)
    for clone, value in zip(clones, values, strict=True):
        assert_same_bits(clone, value)


@needs_library
def test_lists_may_be_emptied_while_an_update_runs() -> None:
    """By another thread: what the update works on stays alive."""
    code = """
        from concurrent.futures import ThreadPoolExecutor
        import torch
        from torch_adadelta.backends import kernels

        numel = 2**25
        square_avgs, acc_deltas = [torch.zeros(numel)], [torch.zeros(numel)]
        state = kernels.AccumulatorCache(square_avgs, acc_deltas)
        update_op = torch.ops.torch_adadelta.adadelta_.cached
        with ThreadPoolExecutor(1) as executor:
            for _ in range(5):
                before = square_avgs[0][0].clone()
                params, grads = [torch.ones(numel)], [torch.ones(numel)]
                segment = [1], [1.0, 0.95, 1e-7, 0.0], []
                update = executor.submit(update_op, params, grads, state.number, *segment)
                while not update.done() and square_avgs[0][0] == before:
                    pass  # until it has begun to write
                params.clear()
                grads.clear()
                update.result()
        assert square_avgs[0].min() == square_avgs[0].max() > 0
        """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


@pytest.mark.parametrize("key", ["square_avg", "acc_delta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_state_that_is_a_lazy_view_is_refused(path: Path, dtype: torch.dtype, key: str) -> None:
    """What is written to a resolved copy of it would be lost."""
    optimizer = AdadeltaKeras([Parameter(torch.ones(4, dtype=dtype)) for _ in range(2)], **path.options)
    advance(optimizer)
    state = optimizer.state[optimizer.param_groups[0]["params"][1]]
    state[key] = state[key].conj() if dtype.is_complex else torch._neg_view(-state[key])
    before = snapshot(optimizer)
    with pytest.raises(
        RuntimeError, match=f"parameter 1 of group 0: its state {key} is a lazily conjugated or negated"
    ):
        advance(optimizer)
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


def test_the_users_gradient_is_never_written_to(path: Path) -> None:
    for maximize in (False, True):
        optimizer = optimizer_with([torch.ones(50)], path, maximize=maximize)
        (param,) = optimizer.param_groups[0]["params"]
        grad = gradients((50,), torch.float32, steps=1)[0]
        param.grad, before = grad, (grad.clone(), grad._version)
        optimizer.step()
        assert param.grad is grad
        assert_same_bits(grad, before[0])
        assert grad._version == before[1]


def test_autograd_notices_that_a_saved_parameter_changed(path: Path) -> None:
    param = Parameter(torch.ones(3))
    optimizer = AdadeltaKeras([param], 1.0, **path.options)
    loss = (param * param).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_closure(path: Path) -> None:
    param = Parameter(torch.tensor([3.0]))
    optimizer = AdadeltaKeras([param], 1.0, **path.options)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (param**2).sum()
        assert torch.is_grad_enabled()
        loss.backward()
        return loss.item()

    with torch.no_grad():
        assert optimizer.step(closure) == 9.0
        assert not torch.is_grad_enabled()
    assert param.item() < 3.0
    assert optimizer.iterations == 1
    assert optimizer.step() is None


def test_hooks_see_every_step(path: Path) -> None:
    optimizer = optimizer_with([torch.ones(3)], path)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda o, *_: seen.append(o.iterations))
    advance(optimizer, 2)
    assert seen == ["before", 1, "before", 2]


def test_named_parameters_appear_in_errors_and_checkpoints(path: Path) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = AdadeltaKeras(model.named_parameters(), **path.options)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    advance(optimizer)
    optimizer.state[model.bias]["acc_delta"] = torch.zeros(3)
    with pytest.raises(
        RuntimeError, match=r"parameter 1 of group 0 \('bias'\) has shape \(1,\), but its state acc_delta"
    ):
        optimizer.step()


def test_add_param_group_copies_iterations_and_defaults(path: Path) -> None:
    optimizer = stepped(path)
    new = Parameter(torch.ones(2))
    optimizer.add_param_group({"params": new, "custom": "kept"})
    group = optimizer.param_groups[2]
    assert group["iterations"] == 3
    assert group["lr"] == 1.0
    assert group["custom"] == "kept"
    assert group["optimizer_name"] == "Adadelta"
    advance(optimizer)
    assert [g["iterations"] for g in optimizer.param_groups] == [4, 4, 4]
    assert new in optimizer.state


def test_a_group_may_have_a_name(path: Path) -> None:
    optimizer = AdadeltaKeras([{"params": [Parameter(torch.ones(1))], "name": "head"}], name="mine", **path.options)
    assert optimizer.param_groups[0]["name"] == "head"
    assert optimizer.name == "mine"


@pytest.mark.parametrize("capturable", [False, True])
def test_iterations_can_be_read_and_set(path: Path, capturable: bool) -> None:
    optimizer = stepped(path, steps=2, capturable=capturable)
    assert optimizer.iterations == 2
    optimizer.iterations = 10
    advance(optimizer)
    assert optimizer.iterations == 11
    for group in optimizer.param_groups:
        count = group["iterations"]
        assert int(count) == 11
        assert isinstance(count, torch.Tensor) == capturable
        if capturable:
            assert (count.dtype, count.shape) == (torch.int64, ())
    with pytest.raises(TypeError, match=r"iterations must be an int, got 1\.5"):
        optimizer.iterations = 1.5  # type: ignore[assignment]
    for count in (-1, 2**63):
        with pytest.raises(ValueError, match=f"iterations must be >= 0 and fit 64 bits, got {count}"):
            optimizer.iterations = count
    assert optimizer.iterations == 11


# ---- The choice of the path -----------------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    """A tensor that may mean anything by its operators."""


def chosen(params: list[torch.Tensor], **options: Any) -> Backend:
    optimizer = AdadeltaKeras(params, **options)
    backend, is_local = selection.select_backend(optimizer.param_groups[0], params)
    assert not is_local
    return backend


@needs_library
def test_none_picks_the_best_that_applies() -> None:
    plain = [Parameter(torch.ones(1))]
    special = [Parameter(torch.ones(1)), torch.ones(1).as_subclass(Subclass)]
    meta = [torch.ones(1, device="meta")]
    assert chosen(plain) is Backend.FUSED
    assert chosen(plain, fused=True) is Backend.FUSED
    assert chosen(plain, foreach=True) is Backend.MULTI_TENSOR
    assert chosen(plain, foreach=False) is Backend.SINGLE_TENSOR  # as in torch.optim
    assert chosen(plain, fused=False) is Backend.SINGLE_TENSOR  # on the CPU foreach has nothing to offer
    assert chosen(plain, foreach=False, fused=True) is Backend.FUSED
    assert chosen(plain, differentiable=True) is Backend.SINGLE_TENSOR
    assert chosen(special) is Backend.SINGLE_TENSOR
    assert chosen(meta) is Backend.SINGLE_TENSOR


def test_a_subclass_takes_the_for_loop() -> None:
    param = torch.ones(5).as_subclass(Subclass)
    optimizer = AdadeltaKeras([param], 1.0)
    oracle = oracle_of(torch.ones(5), learning_rate=1.0)
    param.grad = torch.full((5,), 0.5).as_subclass(Subclass)
    optimizer.step()
    oracle.step(torch.full((5,), 0.5).numpy())
    state = {key: value.as_subclass(torch.Tensor) for key, value in optimizer.state[param].items()}
    assert_like_oracle(param.as_subclass(torch.Tensor), state, oracle)


class TestChoices(expecttest.TestCase):
    """Explicit choices that cannot run, in words."""

    def message(self, params: Any = None, **options: Any) -> str:
        with pytest.raises(RuntimeError) as caught:
            AdadeltaKeras(params or [Parameter(torch.ones(1))], **options)
        return str(caught.value)

    def test_two_choices(self) -> None:
        self.assertExpectedInline(
            self.message(foreach=True, fused=True),
            """`fused` and `foreach` cannot both be True: choose one, or leave both None for the fastest""",
        )

    def test_differentiable(self) -> None:
        self.assertExpectedInline(
            self.message(fused=True, differentiable=True),
            """`fused` and `differentiable` cannot both be True: autograd records single-tensor operations only; leave `fused` None""",
        )
        self.assertExpectedInline(
            self.message(foreach=True, differentiable=True),
            """`foreach` and `differentiable` cannot both be True: autograd records single-tensor operations only; leave `foreach` None""",
        )

    @needs_library
    def test_subclass_and_device(self) -> None:
        self.assertExpectedInline(
            self.message([torch.ones(1).as_subclass(Subclass)], fused=True),
            """`fused=True` needs plain tensors, got a Subclass; leave `fused` None""",
        )
        self.assertExpectedInline(
            self.message([torch.ones(1).as_subclass(Subclass)], foreach=True),
            """`foreach=True` needs plain tensors, got a Subclass; leave `foreach` None""",
        )
        self.assertExpectedInline(
            self.message([torch.ones(1, device="meta")], fused=True),
            """`fused=True` cannot run on meta parameters: there are kernels for cpu and cuda parameters, not for meta; leave `fused` None""",
        )


def test_options_of_the_wrong_type() -> None:
    for name, value in itertools.product(("maximize", "capturable", "differentiable"), (None, 1, "yes")):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got"):
            AdadeltaKeras([Parameter(torch.ones(1))], **{name: value})
    for name, value in itertools.product(("foreach", "fused"), (1, "yes")):
        with pytest.raises(TypeError, match=f"{name} must be True, False or None, got"):
            AdadeltaKeras([Parameter(torch.ones(1))], **{name: value})
    with pytest.raises(TypeError, match="name must be a str"):
        AdadeltaKeras([Parameter(torch.ones(1))], 0.1, 0.9, 1e-7, 5)  # type: ignore[arg-type]


# ---- Differentiable -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=dtype_name)
def test_differentiable_step(dtype: torch.dtype) -> None:
    """The derivative of two steps by gradient, state and every hyperparameter, against finite differences."""
    generator = torch.Generator().manual_seed(8)
    start = randn((3,), dtype, generator)

    def two_steps(
        grad: torch.Tensor, square_avg: torch.Tensor, acc_delta: torch.Tensor, *values: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        param = start.clone()
        optimizer = AdadeltaKeras([param], *values, differentiable=True)
        if dtype.is_complex:
            square_avg, acc_delta = (torch.complex(x, x) for x in (square_avg, acc_delta))
        optimizer.state[param] = {"square_avg": square_avg.clone(), "acc_delta": acc_delta.clone()}
        for factor in (1.0, 2.0):
            param.grad = grad * factor
            optimizer.step()
        return (param, *optimizer.state[param].values())

    state = [torch.rand(3, dtype=torch.float64, generator=generator) + 0.1 for _ in range(2)]
    values = [torch.tensor(value, dtype=torch.float64) for value in (0.7, 0.9, 1e-2)]
    inputs = [x.requires_grad_() for x in (randn((3,), dtype, generator), *state, *values)]
    assert torch.autograd.gradcheck(two_steps, inputs)
    assert torch.autograd.gradgradcheck(two_steps, inputs)


def test_differentiable_gives_the_same_bits() -> None:
    results = []
    for differentiable in (False, True):
        param = torch.ones(50)
        optimizer = AdadeltaKeras([param], 1.0, foreach=False, differentiable=differentiable)
        for grad in gradients((50,), torch.float32, steps=5):
            param.grad = grad.requires_grad_(differentiable)
            optimizer.step()
        results.append([param, *optimizer.state[param].values()])
    for one, other in zip(*results, strict=True):
        assert_same_bits(other, one)


@pytest.mark.parametrize("default", [False, True])
def test_differentiable_is_an_option_of_each_group(default: bool) -> None:
    """A leaf that requires grad can be updated in a group that is not differentiable, whatever the default."""
    leaf, free = Parameter(torch.ones(3)), torch.ones(3)
    groups = [{"params": [leaf], "differentiable": False}, {"params": [free], "differentiable": True}]
    optimizer = AdadeltaKeras(groups, 1.0, differentiable=default)
    leaf.grad, free.grad = torch.ones(3), torch.ones(3, requires_grad=True)
    optimizer.step()
    assert free.requires_grad
    assert_same_bits(leaf, free)
    assert not any(tensor.requires_grad for tensor in optimizer.state[leaf].values())
    assert torch.is_grad_enabled()


# ---- Saving and loading ---------------------------------------------------------------------------------------------


def through_state_dict(optimizer: AdadeltaKeras) -> AdadeltaKeras:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    groups = [{"params": [Parameter(p.detach().clone()) for p in g["params"]]} for g in optimizer.param_groups]
    other = AdadeltaKeras(groups, 123.0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(
    "copied",
    [through_state_dict, copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))],
    ids=["state_dict", "deepcopy", "pickle"],
)
def test_copies_train_on_alike(path: Path, copied: Any, capturable: bool) -> None:
    optimizer = stepped(path, rho=0.9, name="mine", maximize=True, capturable=capturable)
    other = copied(optimizer)
    assert_same_training(optimizer, other)
    advance(optimizer, 2)
    assert other.iterations == 3
    advance(other, 2)
    assert_same_training(optimizer, other)
    assert (other.iterations, other.name) == (5, "mine")


def test_loading_casts_the_state_to_the_parameter(path: Path) -> None:
    optimizer = stepped(path)
    groups = [{"params": [Parameter(p.detach().double()) for p in g["params"]]} for g in optimizer.param_groups]
    other = AdadeltaKeras(groups, **path.options)
    other.load_state_dict(optimizer.state_dict())
    for state in other.state.values():
        assert {tensor.dtype for tensor in state.values()} == {torch.float64}
    advance(other)


def test_loading_casts_complex_state_too(path: Path) -> None:
    optimizer = optimizer_with([torch.ones(3, dtype=torch.complex64)], path)
    advance(optimizer)
    other = optimizer_with([torch.ones(3, dtype=torch.complex128)], path)
    other.load_state_dict(optimizer.state_dict())
    advance(other)
    (state,) = other.state.values()
    assert {tensor.dtype for tensor in state.values()} == {torch.complex128}


def test_an_older_checkpoint_gets_what_it_lacks(path: Path) -> None:
    optimizer = stepped(path)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        for key in ("iterations", "maximize", "foreach", "fused", "capturable", "differentiable", "optimizer_name"):
            del group[key]
    optimizer.load_state_dict(saved)
    assert optimizer.iterations == 0
    assert optimizer.name == "Adadelta"
    advance(optimizer)


@pytest.mark.parametrize("capturable", [False, True])
def test_torch_adadelta_checkpoint(path: Path, capturable: bool) -> None:
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(2)), Parameter(torch.ones(4))]
    theirs = torch.optim.Adadelta([{"params": params[:2], "lr": 0.5}, {"params": params[2:]}], rho=0.8, eps=1e-5)
    for step in range(3):
        params[0].grad = torch.full((3,), step + 1.0)
        params[2].grad = torch.full((4,), step + 2.0) if step > 0 else None
        theirs.step()
    saved = theirs.state_dict()
    before = copy.deepcopy(saved)
    ours = AdadeltaKeras([{"params": params[:2]}, {"params": params[2:]}], capturable=capturable, **path.options)
    ours.load_state_dict(saved)
    assert saved["param_groups"] == before["param_groups"]
    assert ours.iterations == 3
    assert [(g["lr"], g["rho"], g["epsilon"]) for g in ours.param_groups] == [(0.5, 0.8, 1e-5), (1.0, 0.8, 1e-5)]
    assert ours.param_groups[0].keys() == AdadeltaKeras([Parameter(torch.ones(1))]).param_groups[0].keys()
    assert all(path.options[key] == g[key] for g in ours.param_groups for key in path.options)
    assert set(ours.state) == {params[0], params[2]}
    for param in ours.state:
        assert set(ours.state[param]) == {"square_avg", "acc_delta"}
        assert_same_bits(ours.state[param]["square_avg"], theirs.state[param]["square_avg"])
        assert_same_bits(ours.state[param]["acc_delta"], theirs.state[param]["acc_delta"])
    advance(ours)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (
            lambda saved: saved["param_groups"][1].update(eps=1e-6, weight_decay=0.1),
            "group 1 .* weight_decay=0.1; Keras",
        ),
        (lambda saved: saved["param_groups"][1].update(eps=0), "group 1 .* eps=0, which would mean 1e-7 here"),
        (lambda saved: saved["param_groups"][1].update(lr=-1.0), "Invalid learning_rate: -1.0"),
        (lambda saved: saved["param_groups"][1].update(iterations=4), r"disagree on iterations: \[3, 4\]"),
        (
            lambda saved: saved["param_groups"][1].update(iterations=-4),
            "iterations must be >= 0 and fit 64 bits, got -4",
        ),
        (
            lambda saved: saved["state"][7].update(square_avg=torch.zeros(4)),
            r"parameter 3 of group 1 has shape \(5, 3\)",
        ),
        (
            lambda saved: saved["state"][7].pop("acc_delta"),
            "parameter 3 of group 1: its state must hold square_avg and",
        ),
        (lambda saved: saved["param_groups"].pop(), "different number of parameter groups"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(path: Path, change: Any, error: str) -> None:
    optimizer = stepped(path)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 99.0
    change(saved)
    if any("eps" in group for group in saved["param_groups"]):
        for group in saved["param_groups"]:
            group.setdefault("eps", 1e-6)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=error):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


# ---- Bad input ------------------------------------------------------------------------------------------------------


class TestConstruction(expecttest.TestCase):
    """What the constructor and add_param_group refuse, in words."""

    def message(self, params: Any, **options: Any) -> str:
        with pytest.raises((TypeError, ValueError)) as caught:
            AdadeltaKeras(params, **options)
        return f"{caught.type.__name__}: {caught.value}"

    def test_parameters(self) -> None:
        self.assertExpectedInline(self.message([]), """ValueError: optimizer got an empty parameter list""")
        self.assertExpectedInline(
            self.message([torch.ones(2, dtype=torch.int64)]),
            """TypeError: parameter 0 of group 0 has dtype torch.int64; Adadelta trains floating-point and complex parameters. Leave it out, as in (p for p in model.parameters() if p.requires_grad)""",
        )
        self.assertExpectedInline(
            self.message([("weight", torch.ones(2).to(torch.float8_e4m3fn))]),
            """TypeError: parameter 0 of group 0 ('weight') has dtype torch.float8_e4m3fn; Adadelta trains floating-point and complex parameters. Leave it out, as in (p for p in model.parameters() if p.requires_grad)""",
        )
        self.assertExpectedInline(
            self.message([torch.ones(2), torch.ones(1).expand(3)]),
            """ValueError: parameter 1 of group 0 overlaps itself in memory (shape (3,), strides (0,)), as an expanded tensor does. Use .contiguous()""",
        )
        self.assertExpectedInline(
            self.message([torch.eye(2).to_sparse()]),
            """ValueError: parameter 0 of group 0 has layout torch.sparse_coo; only dense parameters can be trained. Use .to_dense()""",
        )
        self.assertExpectedInline(
            self.message([torch.ones(2, dtype=torch.complex64).conj()]),
            """ValueError: parameter 0 of group 0 is a lazily conjugated or negated view. Use .resolve_conj().resolve_neg()""",
        )
        self.assertExpectedInline(
            self.message(torch.ones(2)),
            """TypeError: params argument given to the optimizer should be an iterable of Tensors or dicts, but got torch.FloatTensor""",
        )
        self.assertExpectedInline(
            self.message([1.0]), """TypeError: optimizer can only optimize Tensors, but one of the params is float"""
        )
        self.assertExpectedInline(
            self.message([torch.ones(1, requires_grad=True) * 2]), """ValueError: can't optimize a non-leaf Tensor"""
        )

    def test_groups(self) -> None:
        param = torch.ones(2)
        self.assertExpectedInline(
            self.message([{"params": [param]}, {"params": [param]}]),
            """ValueError: some parameters appear in more than one parameter group""",
        )
        self.assertExpectedInline(
            self.message([{"params": [param], "eps": 1e-6}]),
            """ValueError: a param group has eps=1e-06; here the key is `epsilon`""",
        )
        self.assertExpectedInline(
            self.message([{"params": [param], "weight_decay": 0.1}]),
            """ValueError: a param group has weight_decay=0.1; Keras' Adadelta has none. Add the penalty to the loss, or leave the key out""",
        )
        self.assertExpectedInline(
            self.message([{"params": {param}}]),
            """TypeError: optimizer parameters need to be organized in ordered collections, but the ordering of tensors in sets will change between runs. Please use a list instead.""",
        )


@pytest.mark.parametrize(
    "group",
    [
        {"params": [torch.ones(2), torch.ones(2, dtype=torch.int32)]},
        {"params": [torch.ones(2)], "rho": 7},
        {"params": [torch.ones(2)], "fused": True, "foreach": True},
        {"params": [torch.ones(2).as_subclass(Subclass)], "foreach": True},
        {"params": [torch.ones(2)], "eps": 1e-7},
        {"params": 3},
    ],
)
def test_a_refused_group_leaves_the_optimizer_as_it_was(path: Path, group: dict[str, Any]) -> None:
    optimizer = stepped(path)
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        optimizer.add_param_group(group)
    assert_unchanged(optimizer, before)
    advance(optimizer)


def _spoil_index(optimizer: AdadeltaKeras, p: Parameter) -> None:
    p.grad = torch.sparse_coo_tensor([[0, 5]], torch.ones(2, 3, dtype=p.dtype), (5, 3), check_invariants=False)


def _spoil_shape(optimizer: AdadeltaKeras, p: Parameter) -> None:
    p.data = torch.ones(2, 2, dtype=p.dtype)


def _spoil_dtype(optimizer: AdadeltaKeras, p: Parameter) -> None:
    optimizer.state[p] = {key: torch.zeros(5, 3, dtype=torch.float32) for key in ("square_avg", "acc_delta")}


def _spoil_overlap(optimizer: AdadeltaKeras, p: Parameter) -> None:
    p.data = torch.ones(5, 1, dtype=p.dtype).expand(5, 3)


def _spoil_device(optimizer: AdadeltaKeras, p: Parameter) -> None:
    optimizer.state[p] = {key: torch.zeros_like(p, device="meta") for key in ("square_avg", "acc_delta")}


def _spoil_state_shape(optimizer: AdadeltaKeras, p: Parameter) -> None:
    optimizer.state[p] = {"square_avg": torch.zeros_like(p), "acc_delta": torch.zeros(3, dtype=p.dtype)}


def _spoil_state_keys(optimizer: AdadeltaKeras, p: Parameter) -> None:
    optimizer.state[p] = {"square_avg": torch.zeros_like(p), "step": 3}


def _spoil_state_type(optimizer: AdadeltaKeras, p: Parameter) -> None:
    optimizer.state[p] = {"square_avg": torch.zeros_like(p), "acc_delta": None}


def _spoil_state_overlap(optimizer: AdadeltaKeras, p: Parameter) -> None:
    optimizer.state[p] = {"square_avg": torch.zeros_like(p), "acc_delta": torch.zeros(1, dtype=p.dtype).expand(5, 3)}


def _spoil_state_aliases_param(optimizer: AdadeltaKeras, p: Parameter) -> None:
    optimizer.state[p] = {"square_avg": p.detach(), "acc_delta": torch.zeros_like(p)}


def _spoil_grad_aliases_param(optimizer: AdadeltaKeras, p: Parameter) -> None:
    base = torch.ones(16, dtype=p.dtype)
    p.data, p.grad = base[:15].view(5, 3), base[1:].view(5, 3)


def _spoil_hyperparameter(optimizer: AdadeltaKeras, p: Parameter) -> None:
    optimizer.param_groups[-1]["rho"] = 2.0


def _spoil_choice(optimizer: AdadeltaKeras, p: Parameter) -> None:
    optimizer.param_groups[-1].update(fused=True, foreach=True)


def _spoil_agreement(optimizer: AdadeltaKeras, p: Parameter) -> None:
    optimizer.param_groups[-1]["decay"] = 0.5


def _spoil_number(optimizer: AdadeltaKeras, p: Parameter) -> None:
    for group in optimizer.param_groups:
        group["clipnorm"] = -1.0


def _spoil_source(optimizer: AdadeltaKeras, p: Parameter) -> None:
    group = optimizer.param_groups.pop()
    optimizer.add_param_group({**group, "rho": lambda: math.nan})


def _spoil_overwritten_source(optimizer: AdadeltaKeras, p: Parameter) -> None:
    optimizer.epsilon = lambda: 1e-7
    optimizer.param_groups[-1]["epsilon"] = 1e-3


@pytest.mark.parametrize("sparse", [None, 0, -1], ids=["dense", "first sparse", "last sparse"])
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (_spoil_agreement, r"decay belongs to the whole optimizer, but group 0 has 0\.0 and group 1 has 0\.5"),
        (_spoil_number, r"Expected clipnorm >= 0, received: -1\.0"),
        (_spoil_source, "Invalid rho: nan"),
        (_spoil_overwritten_source, r"group 1 has epsilon=0\.001, but its epsilon is given by the callable"),
        (
            _spoil_index,
            "parameter 3 of group 1 has 5 rows, but its sparse gradient has the index 5 at position 1",
        ),
        (_spoil_shape, r"parameter 3 of group 1 has shape \(2, 2\), but its gradient has shape \(5, 3\)"),
        (
            _spoil_dtype,
            "parameter 3 of group 1 has dtype torch.bfloat16, but its state square_avg has dtype torch.float32",
        ),
        (_spoil_overlap, "parameter 3 of group 1 overlaps itself in memory"),
        (_spoil_device, "parameter 3 of group 1 is on cpu, but its state square_avg is on meta"),
        (_spoil_state_shape, r"parameter 3 of group 1 has shape \(5, 3\), but its state acc_delta has shape \(3,\)"),
        (
            _spoil_state_keys,
            r"parameter 3 of group 1: its state holds \['square_avg', 'step'\], not square_avg and acc_delta",
        ),
        (_spoil_state_type, "parameter 3 of group 1: its state acc_delta is None, not a Tensor"),
        (_spoil_state_overlap, "parameter 3 of group 1: its state acc_delta is not a dense tensor of its own memory"),
        (_spoil_state_aliases_param, "parameter 3 of group 1: it and its state square_avg share memory. Use .clone()"),
        (_spoil_grad_aliases_param, "parameter 3 of group 1: it and its gradient share memory. Use .clone()"),
        (_spoil_hyperparameter, "Invalid rho: 2.0"),
        (_spoil_choice, "`fused` and `foreach` cannot both be True"),
    ],
)
def test_a_failed_check_in_the_last_parameter_changes_nothing(
    path: Path, spoil: Any, error: str, steps_before: int, sparse: int | None
) -> None:
    """In the last parameter of the last group, so that whatever is written too early would be seen.

    Where a gradient is sparse, one call cannot update all.
    """
    optimizer = stepped(path, steps=steps_before)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param in params:
        param.grad = torch.ones_like(param)
    if sparse is not None:
        params[sparse].grad = torch.ones_like(params[sparse]).to_sparse(1)
    spoil(optimizer, optimizer.param_groups[-1]["params"][-1])
    if path.options == {"foreach": True}:
        optimizer.param_groups[0]["fused"] = None
    before = snapshot(optimizer)
    with pytest.raises((RuntimeError, ValueError, IndexError), match=error):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_a_single_batch_that_is_refused_changes_nothing(path: Path) -> None:
    """The common case: the fused op checks for itself."""
    params = [Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = AdadeltaKeras(params, **path.options)
    advance(optimizer)
    optimizer.state[params[-1]]["acc_delta"] = optimizer.state[params[-1]]["acc_delta"].double()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 2 of group 0 has dtype torch\.float32, but its state acc_delta"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_a_leaf_that_requires_grad_cannot_be_differentiated_through() -> None:
    params = [torch.ones(2), Parameter(torch.ones(2))]
    optimizer = AdadeltaKeras(params, differentiable=True)
    for param in params:
        param.grad = torch.ones(2)
    before = snapshot(optimizer)
    with pytest.raises(
        RuntimeError, match="parameter 1 of group 0 is a leaf that requires grad: with differentiable=True"
    ):
        optimizer.step()
    assert_unchanged(optimizer, before)


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


@needs_library
def test_fused_refuses_a_device_without_a_kernel_at_the_step() -> None:
    optimizer = AdadeltaKeras([Parameter(torch.ones(3)), Parameter(torch.ones(3))], fused=True)
    optimizer.param_groups[0]["params"][1] = Parameter(torch.ones(3, device="meta"))
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with pytest.raises(
        RuntimeError,
        match="`fused=True` cannot run on meta parameters: there are kernels for cpu and cuda parameters, not",
    ):
        optimizer.step()
    assert optimizer.iterations == 0
    assert not optimizer.state


def test_an_interrupt_amid_the_writes_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = AdadeltaKeras([{"params": [Parameter(torch.ones(1))]} for _ in range(2)], foreach=False)
    real, calls = functional.clip, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(functional, "clip", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"KeyboardInterrupt \(the step is partial"):
        advance(optimizer)


@pytest.mark.parametrize(
    ("capturable", "steps_before", "message"),
    [
        (False, 1, "group 0 has capturable=False, so iterations would stand still when it is replayed"),
        (True, 0, "parameter 0 of group 0 has no state yet, which every replay would reset to zeros"),
        (True, 1, "parameter 0 of group 0 is on the CPU, where no replay would update it"),
    ],
)
def test_what_a_graph_would_not_repeat_is_refused(
    monkeypatch: pytest.MonkeyPatch, path: Path, capturable: bool, steps_before: int, message: str
) -> None:
    """Told that it is being captured, for want of a CUDA device; tests/cuda captures in earnest."""
    optimizer = AdadeltaKeras([Parameter(torch.ones(3))], 1.0, capturable=capturable, **path.options)
    advance(optimizer, steps_before)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for room in (planning, sources, validation):
        monkeypatch.setattr(room, "is_capturing", lambda: True)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_repr() -> None:
    class TestRepr(expecttest.TestCase):
        def runTest(self) -> None:
            self.assertExpectedInline(
                repr(AdadeltaKeras([torch.ones(1)], maximize=True)),
                """\
AdadeltaKeras (
Parameter Group 0
    callables: []
    capturable: False
    clipnorm: None
    clipvalue: None
    decay: 0.0
    differentiable: False
    epsilon: 1e-07
    foreach: None
    fused: None
    global_clipnorm: None
    iterations: 0
    lr: 0.001
    maximize: True
    norm_variables: None
    optimizer_name: Adadelta
    rho: 0.95
    schedule: None
)""",
            )

    TestRepr().runTest()


def test_no_warning_in_ordinary_use(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped(path)


def test_inference_mode(path: Path) -> None:
    with torch.inference_mode():
        param = torch.ones(3)
        optimizer = AdadeltaKeras([param], 1.0, **path.options)
        oracle = oracle_of(param, learning_rate=1.0)
        param.grad = torch.ones(3)
        optimizer.step()
    oracle.step(torch.ones(3).numpy())
    assert_like_oracle(param, optimizer.state[param], oracle)


def test_what_was_made_in_inference_mode_is_refused_outside(path: Path) -> None:
    with torch.inference_mode():
        param = torch.ones(3)
        param.grad = torch.ones(3)
    optimizer = AdadeltaKeras([param], **path.options)
    before = snapshot(optimizer)
    if path.update is direct.fused:  # which writes below autograd, and can
        optimizer.step()
    else:
        with pytest.raises(RuntimeError, match="parameter 0 of group 0 or its state was made in inference mode"):
            optimizer.step()
        assert_unchanged(optimizer, before)
