"""The checks that name a parameter: what is refused, in which words, and that nothing was written before."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import direct
import pytest
import torch
from cases import Path, assert_unchanged, snapshot
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn import Parameter
from training import advance, stepped
from training import path as path

from torch_adadelta import AdadeltaKeras
from torch_adadelta.backends.batch import Backend, Row
from torch_adadelta.step import planning, sources, validation

Spoil = Callable[[AdadeltaKeras, Any], Any]


def _with_state(**tensors: Callable[[Any], Any]) -> Spoil:
    """Replaces the state of a parameter, by zeros where nothing is said."""

    def spoil(optimizer: AdadeltaKeras, p: Any) -> None:
        zeros = {"square_avg": torch.zeros_like, "acc_delta": torch.zeros_like}
        optimizer.state[p] = {key: make(p) for key, make in {**zeros, **tensors}.items() if make is not None}

    return spoil


def _with_gradient(make: Callable[[Any], Any]) -> Spoil:
    def spoil(optimizer: AdadeltaKeras, p: Any) -> None:
        p.grad = make(p)

    return spoil


def _with_group(**values: Any) -> Spoil:
    return lambda optimizer, p: optimizer.param_groups[-1].update(values)


def _with_data(make: Callable[[Any], Any]) -> Spoil:
    def spoil(optimizer: AdadeltaKeras, p: Any) -> None:
        p.data = make(p)

    return spoil


def _in_one_memory(optimizer: AdadeltaKeras, p: Any) -> None:
    base = torch.ones(16, dtype=p.dtype)
    p.data, p.grad = base[:15].view(5, 3), base[1:].view(5, 3)


def _with_negative_clipnorm(optimizer: AdadeltaKeras, p: Any) -> None:
    for group in optimizer.param_groups:
        group["clipnorm"] = -1.0


def _with_nan_source(optimizer: AdadeltaKeras, p: Any) -> None:
    optimizer.add_param_group({**optimizer.param_groups.pop(), "rho": lambda: math.nan})


def _sparse(*indices: int) -> Callable[[Any], Any]:
    def make(p: Any) -> Any:
        values = torch.ones(len(indices), 3, dtype=p.dtype)
        return torch.sparse_coo_tensor([list(indices)], values, (5, 3), check_invariants=False)

    return make


# Of the last parameter, a bfloat16 one of shape (5, 3).
SPOILED: dict[str, tuple[Spoil, str]] = {
    "agreement": (
        _with_group(decay=0.5),
        r"decay belongs to the whole optimizer, but group 0 has 0\.0 and group 1 has",
    ),
    "number": (_with_negative_clipnorm, r"Expected clipnorm >= 0, received: -1\.0"),
    "hyperparameter": (_with_group(rho=2.0), r"Invalid rho: 2\.0"),
    "source": (_with_nan_source, "Invalid rho: nan"),
    "index": (_with_gradient(_sparse(0, 5)), "{} has 5 rows, but its sparse gradient has the index 5 at position 1"),
    "negative index": (_with_gradient(_sparse(-1)), "{} has 5 rows, but its sparse gradient has the index -1 at posit"),
    "parameter's shape": (
        _with_data(lambda p: torch.ones(2, 2, dtype=p.dtype)),
        r"{} has shape \(2, 2\), but its gradient has shape \(5, 3\)",
    ),
    "expanded parameter": (
        _with_data(lambda p: torch.ones(5, 1, dtype=p.dtype).expand(5, 3)),
        "{} overlaps itself in memory",
    ),
    "gradient's memory": (_in_one_memory, r"{}: it and its gradient share memory\. Use \.clone\(\)"),
    "state's dtype": (
        _with_state(square_avg=lambda p: torch.zeros(5, 3)),
        r"{} has dtype torch\.bfloat16, but its state square_avg has dtype torch\.float32",
    ),
    "state's kind": (
        _with_state(acc_delta=lambda p: torch.zeros(5, 3, dtype=torch.complex64)),
        r"{} has dtype torch\.bfloat16, but its state acc_delta has dtype torch\.complex64",
    ),
    "state's device": (
        _with_state(square_avg=lambda p: torch.zeros_like(p, device="meta")),
        "{} is on cpu, but its state square_avg is on meta",
    ),
    "state's shape": (
        _with_state(acc_delta=lambda p: torch.zeros(3, dtype=p.dtype)),
        r"{} has shape \(5, 3\), but its state acc_delta has shape \(3,\)",
    ),
    "state's keys": (
        _with_state(acc_delta=None, step=lambda p: 3),
        r"{}: its state holds \['square_avg', 'step'\], not square_avg and acc_delta",
    ),
    "state's type": (_with_state(acc_delta=lambda p: None), "{}: its state acc_delta is None, not a Tensor"),
    "expanded state": (
        _with_state(acc_delta=lambda p: torch.zeros(1, dtype=p.dtype).expand(5, 3)),
        "{}: its state acc_delta is not a dense tensor of its own memory",
    ),
    "sparse state": (
        _with_state(square_avg=lambda p: torch.zeros_like(p).to_sparse()),
        "{}: its state square_avg is not a dense tensor of its own memory",
    ),
    "negated state": (
        _with_state(acc_delta=lambda p: torch._neg_view(torch.zeros_like(p))),
        "{}: its state acc_delta is a lazily conjugated or negated view",
    ),
    "state's memory": (
        _with_state(square_avg=lambda p: p.detach()),
        r"{}: it and its state square_avg share memory\. Use \.clone\(\)",
    ),
}


@pytest.mark.parametrize("sparse", [None, 0, -1], ids=["dense", "first sparse", "last sparse"])
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize(("spoil", "error"), SPOILED.values(), ids=SPOILED)
def test_a_failed_check_in_the_last_parameter_changes_nothing(
    path: Path, spoil: Spoil, error: str, steps_before: int, sparse: int | None
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
    spoil(optimizer, params[-1])
    before = snapshot(optimizer)
    with pytest.raises((RuntimeError, ValueError, IndexError), match=error.format("parameter 3 of group 1")):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_what_is_distributed_otherwise_is_refused(mesh: DeviceMesh) -> None:
    plain = torch.ones(4)
    spread, whole = (distribute_tensor(plain, mesh, [placement]) for placement in (Shard(0), Replicate()))
    validation.check_row(lambda: "p", Row(spread, spread, spread, spread, spread), torch.float32)
    alike = "is a DTensor, but its {} is a Tensor. Distribute both alike"
    for row, message in (
        ((spread, plain, spread, spread), alike.format("gradient")),
        ((spread, spread, plain, spread), alike.format("state square_avg")),
        ((spread, spread, spread, spread, plain), alike.format("state average")),
        (
            (spread, spread, spread, whole),
            "and its state acc_delta are distributed in different ways. Use .redistribute",
        ),
        ((plain, plain, spread, plain), "is a Tensor, but its state square_avg is a DTensor"),
    ):
        with pytest.raises(RuntimeError, match=f"^p {re.escape(message)}"):
            validation.check_row(lambda: "p", Row(*row), torch.float32)
    with pytest.raises(RuntimeError, match="but its state square_avg is a DTensor"):
        validation.check_state(lambda: "p", Row(plain, plain, spread, plain), torch.float32)


@pytest.mark.parametrize(
    ("param", "grad", "error", "message"),
    [
        (torch.ones(5, 3), torch.ones(5), RuntimeError, r"p has shape \(5, 3\), but its gradient has shape \(5,\)"),
        (torch.ones(1).expand(5), torch.ones(5), ValueError, "p overlaps itself in memory"),
        (torch.ones(5, 3), _sparse(1, 5)(torch.ones(5, 3)), IndexError, "p has 5 rows, but .* index 5 at position 1"),
    ],
)
def test_gradients_that_cannot_be_summed(param: Any, grad: Any, error: type[Exception], message: str) -> None:
    good = torch.ones(5, 3)
    validation.check_sums([good] * 2, [good, _sparse(4, 4)(good)], lambda _: "good")
    with pytest.raises(error, match=f"^{message}"):
        validation.check_sums([good, param], [_sparse(0)(good), grad], lambda p: "p" if p is param else "good")


def test_sparse_gradients_that_cannot_be_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    for decay, is_decoupled in ((0.0, False), (0.5, True), (torch.tensor(0.0), False), (0.5, False)):
        lists = [[torch.ones(5, 3)] for _ in range(4)]
        lists[1] = [_sparse(0, 4)(lists[0][0])]
        options: Any = {"weight_decay": decay, "is_decoupled": is_decoupled, "is_sparse": True}
        batch = direct.batch_of(Backend.SINGLE_TENSOR, *lists, **options)
        if not is_decoupled and (isinstance(decay, torch.Tensor) or decay):  # a Tensor may be filled later
            with pytest.raises(RuntimeError, match=r"^p has a sparse gradient, to which decoupled_weight_decay=False"):
                validation.check_batches([batch], lambda _: "p")
        else:
            assert validation.check_batches([batch], lambda _: "p") is None
    batch.segments = [batch.segments[0]._replace(weight_decay=0.0)]
    other = replace(batch, grads=[_sparse(4, 5)(torch.ones(5, 3))])
    with pytest.raises(IndexError, match="p has 5 rows, but its sparse gradient has the index 5 at position 1"):
        validation.check_batches([batch, other], lambda _: "p")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(validation, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="but p has a sparse gradient, whose indices the host must check"):
        validation.check_batches([batch], lambda _: "p")


@pytest.mark.parametrize(("count", "numel"), [(3, 4), (80, 512)], ids=["few", "many"])
@pytest.mark.parametrize(
    ("which", "spoil", "error"),
    [
        ("square_avg", lambda x: x.double(), "dtype"),
        ("acc_delta", lambda x: x.double(), "dtype"),
        ("square_avg", lambda x: x[:2], "shape"),
        ("acc_delta", lambda x: x[:2], "shape"),
        ("square_avg", lambda x: x[:1].expand(x.numel()), "dense tensor of its own memory"),
        ("acc_delta", lambda x: x[:1].expand(x.numel()), "dense tensor of its own memory"),
        ("gradient", lambda x: x[:2], "shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_changes_in_place_is_noticed_where_accumulators_are_cached(
    path: Path, which: str, spoil: Callable[[Any], Any], error: str, count: int, numel: int
) -> None:
    """A step like the one before it, of a single batch, but for the shape, dtype or layout of a tensor."""
    optimizer = AdadeltaKeras([Parameter(torch.ones(numel)) for _ in range(count)], 1.0, **path.options)
    advance(optimizer, 2)
    last = optimizer.param_groups[0]["params"][-1]
    tensor = last.grad if which == "gradient" else optimizer.state[last][which]
    before, good = snapshot(optimizer), tensor.data
    tensor.data = spoil(good)
    with pytest.raises(RuntimeError, match=f"parameter {count - 1} of group 0.*{error}"):
        optimizer.step()
    tensor.data = good
    assert_unchanged(optimizer, before)
    optimizer.step()


def test_complex_state_that_is_a_lazy_view_is_refused(path: Path) -> None:
    """What is written to a resolved copy of it would be lost."""
    optimizer = AdadeltaKeras([Parameter(torch.ones(4, dtype=torch.complex64)) for _ in range(2)], **path.options)
    advance(optimizer)
    state = optimizer.state[optimizer.param_groups[0]["params"][1]]
    state["acc_delta"] = state["acc_delta"].conj()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="parameter 1 of group 0: its state acc_delta is a lazily conjugated or neg"):
        advance(optimizer)
    assert_unchanged(optimizer, before)


def test_a_gradient_of_another_layout_is_refused(path: Path) -> None:
    optimizer = AdadeltaKeras([matrix := Parameter(torch.zeros(5, 5))], **path.options)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 has a gradient of layout torch\.sparse_csr; only"):
        optimizer.apply_gradients([(torch.eye(5).to_sparse_csr(), matrix)])
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


def test_a_sparse_gradient_cannot_be_differentiated_through() -> None:
    param = torch.ones(3)
    param.grad = torch.ones(3).to_sparse()
    optimizer = AdadeltaKeras([param], differentiable=True)
    with pytest.raises(
        RuntimeError, match="parameter 0 of group 0 has a sparse gradient, which autograd cannot follow"
    ):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize(
    ("options", "steps_before", "message"),
    [
        (
            {"capturable": True, "rho": torch.tensor(0.5)},
            1,
            "rho of group 0 is a Tensor on the CPU, of which a graph keeps",
        ),
        ({}, 1, "group 0 has capturable=False, so iterations would stand still when it is replayed"),
        ({"capturable": True}, 0, "parameter 0 of group 0 has no state yet, which every replay would reset to zeros"),
        ({"capturable": True}, 1, "parameter 0 of group 0 is on the CPU, where no replay would update it"),
    ],
)
def test_what_a_graph_would_not_repeat_is_refused(
    monkeypatch: pytest.MonkeyPatch, path: Path, options: dict[str, Any], steps_before: int, message: str
) -> None:
    """Told that it is being captured, for want of a CUDA device; tests/cuda captures in earnest."""
    optimizer = AdadeltaKeras([Parameter(torch.ones(3))], 1.0, **options, **path.options)
    advance(optimizer, steps_before)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for room in (planning, sources, validation):
        monkeypatch.setattr(room, "is_capturing", lambda: True)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert_unchanged(optimizer, before)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_lines_that_convert_the_state_work(path: Path, dtype: torch.dtype) -> None:
    model = nn.Linear(3, 2)
    optimizer = AdadeltaKeras(model.parameters(), 1.0, **path.options)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    model.to(dtype)
    model.zero_grad()
    model(torch.ones(1, 3, dtype=dtype)).sum().backward()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 has dtype .*Convert the state too:") as raised:
        optimizer.step()
    assert_unchanged(optimizer, before)
    lines = [line.removeprefix("    ") for line in str(raised.value).split("\n")[1:]]
    exec("\n".join(lines), {"optimizer": optimizer})
    optimizer.step()
    assert optimizer.iterations == 2
    assert {tensor.dtype for state in optimizer.state.values() for tensor in state.values()} == {dtype}
