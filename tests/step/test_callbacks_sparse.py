"""Callbacks that are given sparse gradients, and return them."""

from typing import Any

import pytest
import torch
from cases import (
    Path,
    assert_optimizer_like_oracle,
    assert_unchanged,
    coo,
    coo_gradient,
    gradients,
    optimizer_oracle_of,
    snapshot,
    to_numpy,
    to_oracle,
)
from reference.oracle import SparseGradient
from torch import Tensor
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")


@pytest.mark.parametrize("kind", ["gradient_aggregator", "gradient_transformers"])
def test_callbacks_see_sparse_gradients_in_T_and_may_overwrite_them(path: Path, kind: str) -> None:
    seen: list[Tensor] = []

    def triple(pairs: Any) -> Any:
        (grad, param), (dense, other) = pairs
        seen.append(grad)
        grad._values().mul_(3)
        grad._indices()[0, 0] = 1
        return [(grad, param), (3 * dense, other)]

    params = [Parameter(torch.zeros(6, 4, dtype=torch.bfloat16)), Parameter(torch.zeros(3))]
    optimizer = AdadeltaKeras(params, 1.0, **{kind: triple if "agg" in kind else [triple]}, **path.options)
    expected = optimizer_oracle_of(params, learning_rate=1.0)
    for step in range(2):
        grad = coo_gradient((6, 4), torch.bfloat16, 9, seed=step)
        dense = gradients((3,), torch.float32, 1, seed=step)[0]
        kept = grad._indices().clone(), grad._values().clone()
        params[0].grad, params[1].grad = grad, dense
        optimizer.step()
        assert seen[-1]._values().dtype is torch.float32
        assert not seen[-1].is_coalesced()
        assert torch.equal(grad._indices(), kept[0])
        assert torch.equal(grad._values(), kept[1])
        indices = kept[0].clone()
        indices[0, 0] = 1
        expected.step([SparseGradient(indices.numpy(), 3 * to_numpy(kept[1])), 3 * to_numpy(dense)])
        assert_optimizer_like_oracle(optimizer, expected)


def test_callbacks_see_whether_a_gradient_is_coalesced(path: Path) -> None:
    """As Keras' users know it: `indices()` and `values()` are for coalesced gradients only."""
    seen: list[Tensor] = []

    def look(pairs: Any) -> Any:
        seen.extend((pairs[0][0].indices(), pairs[0][0].values()))
        return pairs

    param = Parameter(torch.zeros(6, 4, dtype=torch.bfloat16))
    optimizer = AdadeltaKeras([param], 1.0, gradient_transformers=[look], **path.options)
    param.grad = coo_gradient((6, 4), torch.bfloat16, 9, seed=0).coalesce()
    optimizer.step()
    assert torch.equal(seen[0], param.grad.indices())
    assert torch.equal(seen[1], param.grad.values().float())


def test_callbacks_may_return_another_kind(path: Path) -> None:
    """A dense gradient for a sparse one, and the other way round."""
    params = [Parameter(torch.zeros(6, 4)), Parameter(torch.zeros(6, 4))]
    rows = torch.tensor([5, 0])

    def swap(pairs: Any) -> Any:
        (one, p), (other, q) = pairs
        return [(one.to_dense(), p), (coo(rows, other[rows], (6, 4)), q)]

    optimizer = AdadeltaKeras(params, 1.0, gradient_transformers=[swap], **path.options)
    expected = optimizer_oracle_of(params, learning_rate=1.0)
    one, other = coo([1, 3], gradients((2, 4), torch.float32, 1)[0], (6, 4)), gradients((6, 4), torch.float32, 1)[0]
    params[0].grad, params[1].grad = one, other
    optimizer.step()
    expected.step(to_oracle([one.to_dense(), coo(rows, other[rows], (6, 4))]))
    assert_optimizer_like_oracle(optimizer, expected)


def test_a_callback_that_returns_bad_indices_or_another_layout_changes_nothing(path: Path) -> None:
    def bad_index(pairs: Any) -> Any:
        pairs[0][0]._indices()[0, 2] = 6
        return pairs

    for callback, error, match in (
        (
            bad_index,
            IndexError,
            "parameter 0 of group 0 has 6 rows, but its sparse gradient has the index 6 at position 2",
        ),
        (
            lambda pairs: [(g.to_dense().to_sparse_csr(), p) for g, p in pairs],
            ValueError,
            r"layout torch.sparse_csr for parameter 0 of group 0; .* Use \.to_sparse_coo\(\)",
        ),
    ):
        param = Parameter(torch.ones(6, 4))
        optimizer = AdadeltaKeras([param], gradient_transformers=[callback], **path.options)  # type: ignore[list-item]
        param.grad = coo_gradient((6, 4), torch.float32, 5)
        before = snapshot(optimizer)
        with pytest.raises(error, match=match):
            optimizer.step()
        assert_unchanged(optimizer, before)
