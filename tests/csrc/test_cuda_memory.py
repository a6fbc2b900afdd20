"""csrc/cuda/memory.cuh, emulated: conversions, vectors and their alignment, strides, indices beyond 32 bits."""

import pytest
import torch
from cases import DTYPES, LAYOUTS, REAL_DTYPES, assert_same_bits, dtype_name, gradients, randn, segment
from emulated import (
    CHUNK,
    HYPERPARAMETERS,
    OPTIONS,
    assert_same_square_sums,
    assert_same_update,
    emulated,
    marks,
    options_for,
    virtual_zeros,
)
from op_cases import Kept, Lists, dense, dense_lists, kept_lists, lay_out, states_of

pytestmark = marks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_every_value_of_16_bits(dtype: torch.dtype) -> None:
    """As parameter and gradient, and as what a float32 gradient is rounded to."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))

    def make() -> Lists:
        params = [values.clone(), torch.zeros(len(values), dtype=dtype), torch.zeros(len(values))]
        grads = [values[order], values.float() * (1 + 2.0**-9), values]
        return [params, grads, *states_of(params)]

    assert_same_update(make)


@pytest.mark.parametrize("shifted", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_tensors_that_are_not_aligned(dtype: torch.dtype, shifted: tuple[int, ...]) -> None:
    def make() -> Lists:
        made = dense_lists([1, 8, 33, 2051, CHUNK + 9], dtype)
        for part in shifted:
            for i, x in enumerate(made[part]):
                made[part][i] = torch.zeros(len(x) + 8, dtype=dtype)[1 + i % 3 : 1 + i % 3 + len(x)].copy_(x)
        return made

    assert_same_update(make)


@pytest.mark.parametrize("shifted", [(), (0,), (5,), (0, 5)], ids=str)
def test_masters_that_are_aligned_or_not(shifted: tuple[int, ...]) -> None:
    """Parameters and remainders."""
    kept = Kept(torch.float32, has_masters=True)

    def make() -> Lists:
        made = kept_lists([1, 8, 33, 2051, CHUNK + 9], torch.bfloat16, kept)
        for part in shifted:
            made[part][:] = [torch.zeros(len(x) + 1, dtype=x.dtype)[1:].copy_(x) for x in made[part]]
        return made

    assert assert_same_update(make, values=kept.options) == 1


@pytest.mark.parametrize("name", ["plain", "clipnorm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str, dtype: torch.dtype, name: str) -> None:
    shape = (5, 3, 1, 37)

    def make() -> Lists:
        grads = [lay_out(other, gradients(shape, dtype, steps=1)[0]) for other in LAYOUTS]
        params = [lay_out(layout, randn(shape, dtype, torch.Generator().manual_seed(i))) for i in range(len(grads))]
        return [params, grads, *states_of(params)]

    assert_same_update(make, **options_for(dtype, name))


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_strided_parameters_with_gradients_of_another_dtype(dtype: torch.dtype) -> None:
    def make() -> Lists:
        params = [lay_out("sliced", randn((7, 5, 3, 9), dtype, torch.Generator().manual_seed(0))) for _ in REAL_DTYPES]
        grads = [gradients(params[0].shape, grad_dtype, steps=1)[0] for grad_dtype in REAL_DTYPES]
        return [params, grads, *states_of(params)]

    assert assert_same_update(make) == 4
    assert assert_same_update(make, **OPTIONS["clipvalue-factor"]) == 4


def test_many_dimensions() -> None:
    """More than collapse: every other dimension of the parameter is sliced, and the gradient is transposed."""

    def make() -> Lists:
        base = torch.randn([4, 2] * 6, generator=torch.Generator().manual_seed(0))
        param = base[tuple(slice(None, None, 2) if d % 2 == 0 else slice(None) for d in range(12))]
        grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(1)).permute(*range(11, -1, -1))
        shapes = [[1] * 20 + [2, 3], []]
        params = [param, *(torch.ones(shape) for shape in shapes)]
        grads = [grad, *(torch.full(shape, 0.5) for shape in shapes)]
        return [params, grads, *states_of(params)]

    assert_same_update(make)
    assert_same_update(make, **OPTIONS["clipnorm"])


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_tensors_in_the_place_of_numbers_are_read_in_float64(layout: str) -> None:
    """For parameters of float64, values that no float32 holds."""
    values = tuple(torch.tensor(x, dtype=torch.float64) for x in (0.7, 0.93, 1e-4))
    factor = torch.tensor(0.37, dtype=torch.float64)

    def make() -> Lists:
        params, grads, *_ = dense_lists([(5, 3, 1, 37), (3, 2, 5, 9)], torch.float64)
        params = [lay_out(layout, param) for param in params]
        return [params, grads, *states_of(params)]

    assert_same_update(make, hyperparameters=values)
    assert_same_update(make, hyperparameters=values, factor_tensor=factor)


def test_expanded_gradients() -> None:
    def make() -> Lists:
        params = [torch.ones(300, 70), torch.ones(70)]
        return [params, [torch.full((70,), 0.3).expand(300, 70), torch.tensor(0.3).expand(70)], *states_of(params)]

    assert_same_update(make, **OPTIONS["clipnorm"])


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_sums_of_squares_of_gradients_that_are_not_aligned(dtype: torch.dtype) -> None:
    base = gradients((70_000,), dtype, steps=1)[0]
    grads = [base[begin:end] for begin in (1, 2, 3, 5, 8) for end in (begin + 600, 70_000)]
    assert_same_square_sums(grads, grads)


# More than 32 bits count, with or without a sign, and no multiple of a vector.
HUGE = 2**33 + CHUNK + 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("sliced", [None, 0, 1], ids=["dense", "param-sliced", "grad-sliced"])
def test_more_elements_than_32_bits_count(sliced: int | None, dtype: torch.dtype) -> None:
    """Only the first and the last blocks run; tensors before and after take their share of them."""
    edge = 2 * CHUNK + 5
    first, last = ([gradients((edge,), dtype, steps=1, seed=k + seed)[0].abs() for k in range(4)] for seed in (0, 4))
    small = [gradients((3,), dtype, steps=1, seed=k + 8)[0].abs() for k in range(4)]
    long = [virtual_zeros(2 * HUGE if k == sliced else HUGE, dtype) for k in range(4)]
    views = [x[1::2] if k == sliced else x for k, x in enumerate(long)]
    for x, begin, end in zip(views, first, last, strict=True):
        x[:edge], x[-edge:] = begin, end
    emulated.set_edge_blocks(3)
    threes = ([x, y, x.clone()] for x, y in zip(small, views, strict=True))
    emulated.adadelta_(*threes, [], [], *segment(3, *HYPERPARAMETERS))
    dense(*map(list, zip(first, last, strict=True)), *segment(2, *HYPERPARAMETERS))
    for one, begin, end in zip(views, first, last, strict=True):
        assert_same_bits(one[: 2 * CHUNK], begin[: 2 * CHUNK])
        assert_same_bits(one[-CHUNK - 5 :], end[-CHUNK - 5 :])


def test_short_rows_of_more_elements_than_32_bits_count() -> None:
    """Only the first and the last blocks run."""
    rows = 2**32 // 3 + CHUNK
    ends = [gradients((CHUNK, 3), torch.bfloat16, steps=1, seed=k)[0].abs() for k in range(4)]
    long = [virtual_zeros(4 * rows, torch.bfloat16).view(rows, 4)[:, :3] for _ in ends]
    for x, end in zip(long, ends, strict=True):
        x[-CHUNK:] = end
    emulated.set_edge_blocks(3)
    emulated.adadelta_(*([x] for x in long), [], [], *segment(1, *HYPERPARAMETERS))
    dense(*([end] for end in ends), *segment(1, *HYPERPARAMETERS))
    for x, end in zip(long, ends, strict=True):
        assert_same_bits(x[-CHUNK // 2 :], end[-CHUNK // 2 :])
