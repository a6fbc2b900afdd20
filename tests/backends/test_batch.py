"""What the backends and the step say to each other."""

from typing import Any

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
@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16])
def test_new_state_is_zeros_like_the_parameter(
    layout: str, dtype: torch.dtype, state_dtype: torch.dtype | None
) -> None:
    param = Parameter(LAYOUTS[layout](randn((2, 3, 1, 5), dtype, torch.Generator().manual_seed(0))))
    state = new_state_of(param, state_dtype)
    assert tuple(state) == STATE_KEYS == ("square_avg", "acc_delta")
    expected = torch.zeros_like(param)
    for value in state.values():
        assert type(value) is Tensor
        assert (value.dtype, value.stride(), value.requires_grad) == (state_dtype or dtype, expected.stride(), False)
        assert not torch.view_as_real(value).any() if value.is_complex() else not value.any()
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
    wholes = tuple([torch.full((1,), float(i))] for i in range(4, 10))
    batch = Batch(Backend.FUSED, False, False, *made, [Segment(1, 1.0, 0.9, 1e-7, False)])
    assert all(one is other for one, other in zip(batch.lists, made, strict=False))
    assert all(one is other for one, other in zip(batch.owners, made, strict=False))
    assert batch.lists[4:] == ([None], [None])
    batch.wholes = wholes
    assert batch.owners is wholes
    assert all(one is other for one, other in zip(batch.lists, made, strict=False))
    assert batch.gradient_options is NO_OPTIONS
    assert not batch.has_begun
    assert GradientOptions(None, None, None, 1.0, None, None, 1.0) == NO_OPTIONS


@pytest.mark.parametrize("names", [(), ("averages",), ("remainders",), ("averages", "remainders")], ids=str)
def test_a_batch_has_averages_and_remainders_or_none(names: tuple[str, ...]) -> None:
    made = [[torch.full((1,), float(10 * i + k)) for k in range(3)] for i in range(6)]
    segments = [Segment(1, 1.0, 0.9, 1e-7), Segment(2, 0.5, 0.9, 1e-7, ema_momentum=0.9, overwrites=True)]
    options = GradientOptions(clipnorm=1.0, square_sums=torch.arange(3.0).double(), loss_scale_factor=2.0)
    kind = Backend.SINGLE_TENSOR, True, False
    given = {name: tensors for name, tensors in zip(("averages", "remainders"), made[4:], strict=True) if name in names}
    batch = Batch(*kind, *made[:4], segments, options, **given)
    none: list[Any] = [None] * 3
    expected = [*made[:4], given.get("averages", none), given.get("remainders", none)]
    assert list(batch.lists) == expected
    assert batch.owners == batch.lists
    assert batch.segment_of_rows == [segments[0], segments[1], segments[1]]
    for k, row in enumerate(batch.rows):
        assert (row.backend, row.is_sparse, row.is_differentiable) == kind
        assert all(len(own) == 1 and own[0] is tensors[k] for own, tensors in zip(row.lists, expected, strict=True))
        assert row.segments == [segments[min(k, 1)]._replace(size=1)]
        assert row.gradient_options._replace(square_sums=None) == options._replace(square_sums=None)
        assert row.gradient_options.square_sums is not None
        assert row.gradient_options.square_sums.tolist() == [k]
    batch.gradient_options = NO_OPTIONS
    assert all(row.gradient_options == NO_OPTIONS for row in batch.rows)


def test_the_dtype_of_state_is_that_of_the_segment_or_of_the_parameter() -> None:
    for number, dtype in enumerate((torch.float16, torch.float32, torch.bfloat16)):
        segment = Segment(1, 1.0, 0.9, 1e-7, state_dtype=number)
        assert segment.state_dtype_of(torch.ones(1, dtype=torch.float16)) is dtype
