"""Sparse gradients that are refused, by name, before anything is written."""

from typing import Any

import pytest
import torch
from cases import Path, assert_unchanged, coo, coo_gradient, snapshot
from torch import Tensor
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")


@pytest.mark.parametrize("bad", [5, -1, 2**40, -(2**63)])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_an_index_out_of_range_changes_nothing(path: Path, bad: int, steps_before: int) -> None:
    """In the last of several parameters, at the last COO entry of several: all is checked before the first write."""
    params = [("dense", Parameter(torch.ones(3))), *((f"table{i}", Parameter(torch.ones(5, 3))) for i in range(3))]
    optimizer = AdadeltaKeras([{"params": params[:2]}, {"params": params[2:]}], 1.0, **path.options)
    for step in range(steps_before + 1):
        params[0][1].grad = torch.ones(3)
        for _, param in params[1:]:
            param.grad = coo_gradient((5, 3), torch.float32, 6, seed=step)
        if step < steps_before:
            optimizer.step()
    params[-1][1].grad = coo([0, 4, 2, bad, 3, bad], torch.ones(6, 3), (5, 3))
    before = snapshot(optimizer)
    with pytest.raises(IndexError) as caught:
        optimizer.step()
    assert str(caught.value) == (
        f"parameter 1 of group 1 ('table2') has 5 rows, but its sparse gradient has the index {bad} at position 3"
    )
    assert_unchanged(optimizer, before)
    assert optimizer.iterations == steps_before


def test_an_index_of_several_dimensions_out_of_range(path: Path) -> None:
    param = Parameter(torch.ones(4, 3, 2))
    optimizer = AdadeltaKeras([param], **path.options)
    param.grad = coo([[3, 0, 3], [2, 3, -1]], torch.ones(3, 2), (4, 3, 2))
    before = snapshot(optimizer)
    with pytest.raises(IndexError) as caught:
        optimizer.step()
    assert str(caught.value) == (
        "parameter 0 of group 0 has shape (4, 3, 2), but its sparse gradient has the index (0, 3) at position 1"
    )
    assert_unchanged(optimizer, before)


def test_an_index_into_an_empty_table(path: Path) -> None:
    param = Parameter(torch.ones(0, 3))
    optimizer = AdadeltaKeras([param], **path.options)
    param.grad = coo([0], torch.ones(1, 3), (0, 3))
    with pytest.raises(IndexError, match="has 0 rows, but its sparse gradient has the index 0 at position 0"):
        optimizer.step()
    param.grad = coo([], torch.ones(0, 3), (0, 3))
    optimizer.step()
    assert optimizer.iterations == 1


@pytest.mark.parametrize(
    "compress",
    [
        lambda x: x.to_sparse_csr(),
        lambda x: x.to_sparse_csc(),
        lambda x: x.to_sparse_bsr((2, 2)),
        lambda x: x.to_sparse_bsc((2, 2)),
    ],
    ids=["csr", "csc", "bsr", "bsc"],
)
def test_compressed_layouts_are_refused_with_what_to_do(path: Path, compress: Any) -> None:
    params = [Parameter(torch.ones(4, 4)), Parameter(torch.ones(4, 4))]
    optimizer = AdadeltaKeras(params, **path.options)
    grad = compress(torch.eye(4))
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError) as caught:
        optimizer.apply_gradients([(torch.ones(4, 4), params[0]), (grad, params[1])])
    assert str(caught.value) == (
        f"parameter 1 of group 0 has a gradient of layout {grad.layout}; only dense and torch.sparse_coo gradients can "
        "be applied. Use .to_sparse_coo()"
    )
    assert_unchanged(optimizer, before)
    optimizer.apply_gradients([(torch.ones(4, 4), params[0]), (grad.to_sparse_coo(), params[1])])
    assert optimizer.iterations == 1


def test_differentiable_refuses_sparse_gradients() -> None:
    param = torch.ones(4, 2)
    optimizer = AdadeltaKeras([param], differentiable=True)
    param.grad = coo_gradient((4, 2), torch.float32, 3)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="has a sparse gradient, which autograd cannot follow: with differentiable"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def _state_dtype(optimizer: AdadeltaKeras, p: Tensor) -> None:
    optimizer.state[p]["acc_delta"] = optimizer.state[p]["acc_delta"].double()


def _state_overlaps(optimizer: AdadeltaKeras, p: Tensor) -> None:
    optimizer.state[p]["square_avg"] = torch.zeros(1, 2).expand(4, 2)


def _state_is_param(optimizer: AdadeltaKeras, p: Tensor) -> None:
    optimizer.state[p]["square_avg"] = p.detach()


def _state_is_negated(optimizer: AdadeltaKeras, p: Tensor) -> None:
    optimizer.state[p]["acc_delta"] = torch._neg_view(torch.zeros(4, 2))


def _values_are_state(optimizer: AdadeltaKeras, p: Tensor) -> None:
    p.grad = coo([1, 2], optimizer.state[p]["square_avg"][:2], (4, 2))


def _values_are_param(optimizer: AdadeltaKeras, p: Tensor) -> None:
    p.grad = coo([0, 1, 2, 3], p.detach(), (4, 2))


@pytest.mark.parametrize(
    ("corrupt", "error"),
    [
        (
            _state_dtype,
            r"parameter 1 of group 0 has dtype torch.float32, but its state acc_delta has dtype torch.float64",
        ),
        (_state_overlaps, "parameter 1 of group 0: its state square_avg is not a dense tensor of its own memory"),
        (_state_is_negated, "parameter 1 of group 0: its state acc_delta is a lazily conjugated or negated view"),
        (_state_is_param, "parameter 1 of group 0: it and its state square_avg share memory"),
        (_values_are_state, "parameter 1 of group 0: its gradient and its state square_avg share memory"),
        (_values_are_param, "parameter 1 of group 0: it and its gradient share memory"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(path: Path, corrupt: Any, error: str) -> None:
    params = [Parameter(torch.ones(4, 2)) for _ in range(2)]
    optimizer = AdadeltaKeras(params, **path.options)
    for p in params:
        p.grad = coo_gradient((4, 2), torch.float32, 3)
    optimizer.step()
    corrupt(optimizer, params[1])
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=error):
        optimizer.step()
    assert_unchanged(optimizer, before)
