"""What the backends and the step say to each other."""

import pytest
import torch
from cases import DTYPES, LAYOUTS, dtype_name, randn
from torch import Tensor
from torch.nn import Parameter

from torch_adadelta.backends.batch import (
    NO_OPTIONS,
    STATE_KEYS,
    Backend,
    Batch,
    GradientOptions,
    Segment,
    has_state,
    new_state_of,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_new_state_is_zeros_like_the_parameter(layout: str, dtype: torch.dtype) -> None:
    param = Parameter(LAYOUTS[layout](randn((2, 3, 1, 5), dtype, torch.Generator().manual_seed(0))))
    state = new_state_of(param)
    assert tuple(state) == STATE_KEYS == ("square_avg", "acc_delta")
    expected = torch.zeros_like(param)
    for value in state.values():
        assert type(value) is Tensor
        assert (value.dtype, value.stride(), value.requires_grad) == (dtype, expected.stride(), False)
        assert not torch.view_as_real(value).any() if dtype.is_complex else not value.any()
    assert state["square_avg"].data_ptr() != state["acc_delta"].data_ptr()


def test_state_of_this_optimizer_is_known_by_its_keys() -> None:
    assert not has_state(None)
    assert not has_state({})
    assert not has_state({"step": 1})
    assert not has_state(["acc_delta"])
    for key in STATE_KEYS:
        assert has_state({"step": 1, key: torch.ones(1)})


def test_a_batch_names_its_lists_in_the_order_of_the_ops() -> None:
    made = [[torch.full((1,), float(i))] for i in range(4)]
    wholes = tuple([torch.full((1,), float(i))] for i in range(4, 8))
    batch = Batch(Backend.FUSED, False, False, *made, [Segment(1, 1.0, 0.9, 1e-7, False)])
    assert all(one is other for one, other in zip(batch.lists, made, strict=True))
    assert all(one is other for one, other in zip(batch.owners, made, strict=True))
    batch.wholes = wholes  # type: ignore[assignment]
    assert batch.owners is wholes
    assert all(one is other for one, other in zip(batch.lists, made, strict=True))
    assert batch.gradient_options is NO_OPTIONS
    assert not batch.has_begun
    assert GradientOptions(None, None, None, 1.0, None, None, 1.0) == NO_OPTIONS


def test_a_batch_with_averages_names_them_last() -> None:
    made = [[torch.full((1,), float(10 * i + k)) for k in range(3)] for i in range(5)]
    segments = [Segment(1, 1.0, 0.9, 1e-7), Segment(2, 0.5, 0.9, 1e-7, ema_momentum=0.9, overwrites=True)]
    options = GradientOptions(clipnorm=1.0, square_sums=torch.arange(3.0).double(), loss_scale_factor=2.0)
    batch = Batch(Backend.FUSED, False, False, *made[:4], segments, options, averages=made[4])
    assert all(one is other for one, other in zip(batch.lists, made, strict=True))
    assert all(one is other for one, other in zip(batch.owners, made, strict=True))
    for k, row in enumerate(batch.rows):
        assert all(len(own) == 1 and own[0] is tensors[k] for own, tensors in zip(row.lists, made, strict=True))
        assert row.segments == [segments[min(k, 1)]._replace(size=1)]
        assert row.gradient_options._replace(square_sums=None) == options._replace(square_sums=None)
        assert row.gradient_options.square_sums is not None
        assert row.gradient_options.square_sums.tolist() == [k]
    batch.averages = []
    assert len(batch.lists) == 4
    assert all(row.averages == [] and len(row.lists) == 4 for row in batch.rows)
