"""csrc/cpu/blocks.h: tensors of any layout, read and written in blocks, and nothing between their elements."""

import direct
import pytest
import torch
from cases import DTYPES, LAYOUTS, REAL_DTYPES, assert_same_bits, dtype_name, gradients, randn
from op_cases import CLIPS, HYPERPARAMETERS, Kept, assert_update, kept_lists, lay_out, needs_library

pytestmark = needs_library


@pytest.mark.parametrize("name", ["plain", "clipvalue-clipnorm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_and_gradients_of_any_layout(layout: str, dtype: torch.dtype, name: str) -> None:
    """Of more than a block, whose innermost dimension ends amid one."""
    shape = (5, 3, 1, 37)
    grads = [lay_out(other, gradients(shape, dtype, steps=1)[0]) for other in LAYOUTS]
    grads.append(gradients((5, 1, 1, 37), dtype, steps=1)[0].expand(shape))
    generator = torch.Generator().manual_seed(5)
    params = [lay_out(layout, randn(shape, dtype, generator)) for _ in grads]
    assert_update(params, grads, CLIPS[name].for_dtype(dtype))


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_gradients_of_another_dtype(dtype: torch.dtype, layout: str) -> None:
    shape = (5, 3, 1, 37)
    grads = [lay_out(layout, gradients(shape, other, steps=1)[0]) for other in REAL_DTYPES]
    params = [lay_out(layout, randn(shape, dtype, torch.Generator().manual_seed(5))) for _ in grads]
    assert_update(params, grads)


def test_many_dimensions() -> None:
    """Every other dimension of the parameter is sliced, and the gradient is transposed."""
    base = torch.randn([4, 2] * 6, generator=torch.Generator().manual_seed(0))
    param = base[tuple(slice(None, None, 2) if d % 2 == 0 else slice(None) for d in range(12))]
    grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(1)).permute(*range(11, -1, -1))
    params = [param, torch.ones([1] * 20 + [2, 3]), torch.ones(())]
    grads = [grad, torch.full([1] * 20 + [2, 3], 0.5), torch.tensor(-0.25)]
    assert_update(params, grads, CLIPS["clipnorm"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=dtype_name)
def test_state_of_another_layout_than_the_parameter(dtype: torch.dtype) -> None:
    shape = (5, 3, 2, 37)
    values = [randn(shape, dtype, torch.Generator().manual_seed(k)).abs() for k in range(4)]
    expected = [[x.clone()] for x in values]
    direct.fused(*expected, 1.0, 0.9, 1e-6)  # type: ignore[arg-type]
    for i, layout in enumerate(LAYOUTS):
        names = [list(LAYOUTS)[(i + k) % len(LAYOUTS)] for k in range(4)]
        lists = [[lay_out(name, x.clone())] for name, x in zip(names, values, strict=True)]
        direct.fused(*lists, 1.0, 0.9, 1e-6)  # type: ignore[arg-type]
        for one, other in zip(lists, expected, strict=True):
            assert_same_bits(one[0], other[0], layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masters_of_any_layout(layout: str) -> None:
    """Beside remainders of another, of more than a block."""
    kept = Kept(torch.float32, has_masters=True)
    lists = kept_lists([(5, 3, 2, 37)], torch.bfloat16, kept)
    expected = [[x.clone() for x in part] for part in lists]
    direct.fused(*expected[:4], *HYPERPARAMETERS, **kept.options, remainders=expected[5])
    for other in LAYOUTS:
        own = [[lay_out(layout if k < 5 else other, x.clone()) for x in part] for k, part in enumerate(lists)]
        direct.fused(*own[:4], *HYPERPARAMETERS, **kept.options, remainders=own[5])
        for k in (0, 2, 3):
            assert_same_bits(own[k][0], expected[k][0], other)
        assert torch.equal(own[5][0], expected[5][0]), other
    assert_update([lay_out(layout, x) for x in lists[0]], lists[1], kept=kept)
