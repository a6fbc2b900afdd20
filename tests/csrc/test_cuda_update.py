"""csrc/cuda/update.cuh, emulated: every dtype and gradient option, and what a call launches."""

import functools
from typing import Any

import emulated as emulator
import pytest
import torch
from average_cases import MOMENTA, averages_of, laid_like
from cases import (
    COMPLEX_DTYPES,
    DTYPES,
    LAYOUTS,
    REAL_DTYPES,
    dtype_name,
    gradients,
    randn,
    segment,
    segments,
)
from emulated import (
    CHUNK,
    HYPERPARAMETERS,
    LARGE_SEGMENTS,
    OPTIONS,
    assert_same_update,
    emulated,
    options_for,
    virtual_zeros,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    KEPT,
    Kept,
    Lists,
    adadelta,
    assert_same_lists,
    dense_lists,
    inf,
    kept_lists,
    lay_out,
    nan,
    states_of,
    storage_uses,
    with_kept,
)

pytestmark = emulator.marks

# Around the vectors of 2, 4 and 8 elements and their rounds of 512 threads.
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 511, 512, 513, 1025, 2047, 2049, 4095, 4097, 0)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_every_size_in_one_launch(dtype: torch.dtype, name: str) -> None:
    """Empty tensors first and last."""
    assert assert_same_update(lambda: dense_lists(SIZES, dtype), **options_for(dtype, name)) == 1


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_around_chunks(dtype: torch.dtype) -> None:
    sizes = [CHUNK - 1, CHUNK, CHUNK + 1, 3, 2 * CHUNK, 2 * CHUNK + 5, 3 * CHUNK - 8]
    assert assert_same_update(lambda: dense_lists(sizes, dtype), (0, 1), **OPTIONS["clipvalue-clipnorm"]) == 1


@pytest.mark.parametrize("name", ["plain", "clipvalue-clipnorm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_gradients_of_another_dtype(dtype: torch.dtype, name: str) -> None:
    grad_dtypes = COMPLEX_DTYPES if dtype.is_complex else REAL_DTYPES
    sizes = [n for n in (1, 7, 8, 700, 2051) for _ in grad_dtypes]
    assert assert_same_update(lambda: dense_lists(sizes, dtype, grad_dtypes), **options_for(dtype, name)) == 1


def test_parameters_of_every_dtype_in_one_call() -> None:
    """A launch for each; those of one follow each other in no table of another."""

    def make() -> Lists:
        made = [dense_lists([5, 0, 700, 20_000], dtype, REAL_DTYPES) for dtype in REAL_DTYPES]
        return [[made[k % 4][part][k // 4] for k in range(16)] for part in range(4)]

    assert assert_same_update(make, **OPTIONS["clipvalue-clipnorm"]) == 4
    assert assert_same_update(make) == 4


def test_neighbours_are_not_written() -> None:
    """Parameters and state that share their storages, as views of flat buffers do."""
    sizes = [4, 3, 8, 1, 515, 7, 2048, 5]

    def make() -> Lists:
        flat = [torch.randn(sum(sizes), generator=torch.Generator().manual_seed(k)).square() for k in range(4)]
        return [list(x.split(sizes)) for x in flat]

    assert assert_same_update(make, **OPTIONS["clipnorm"]) == 1


@pytest.mark.parametrize("step", [1, 2], ids=["dense", "sliced"])
def test_more_elements_than_31_bits_count(step: int) -> None:
    """Only the first and the last blocks run."""
    count = 2**31 + CHUNK + 5
    ends = [gradients((CHUNK,), torch.bfloat16, steps=1, seed=k)[0].abs() for k in range(4)]
    long = [virtual_zeros(step * count, torch.bfloat16)[::step] for _ in ends]
    for x, end in zip(long, ends, strict=True):
        x[-CHUNK:] = end
    emulated.set_edge_blocks(2)
    emulated.adadelta_(*([x] for x in long), [], [], *segment(1, *HYPERPARAMETERS))
    adadelta.adadelta_(*([x] for x in ends), [], [], *segment(1, *HYPERPARAMETERS))
    assert_same_lists([[x[-CHUNK:].clone() for x in long]], [ends])


@pytest.mark.parametrize("shifted", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_one_tensor_that_is_not_aligned(dtype: torch.dtype, shifted: int) -> None:
    """Beside others that are."""

    def make() -> Lists:
        made = dense_lists([8, 700], dtype)
        made[shifted][:] = [torch.zeros(len(x) + 1, dtype=dtype)[1:].copy_(x) for x in made[shifted]]
        return made

    assert assert_same_update(make) == 1


def test_a_parameter_listed_twice_is_updated_in_turn() -> None:
    """One launch for each entry, of the same and of another layout."""

    def make() -> Lists:
        lists = dense_lists([6000, (10, 40), 6000])
        lists[0][1] = lists[0][1].t().contiguous().t()
        for part in (0, 2, 3):
            lists[part][2] = lists[part][0]
        return lists

    assert assert_same_update(make) == 3
    assert assert_same_update(make, sizes=[1, 1, 1], **OPTIONS["clipnorm"]) == 3


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_special_values(dtype: torch.dtype, name: str) -> None:
    special = [inf, -inf, nan, 1e20, -1e20, 1e200, 0.0, -0.0, 1e-30, 1e-45, 1e-310, 6e-8, 65504.0, 65520.0, 0.3, -0.3]

    def make() -> Lists:
        grads = [torch.tensor(special * 3), *(torch.tensor([value, 1.0, -3.0]) for value in special), torch.zeros(40)]
        grads = [torch.tensor(x.tolist(), dtype=torch.float64).to(dtype) for x in grads]
        params = [torch.tensor(special * 3, dtype=torch.float64).to(dtype)[: len(x)].clone() for x in grads]
        return [params, grads, *states_of(params)]

    assert_same_update(make, **OPTIONS[name])


@pytest.mark.parametrize("tensor_dtype", REAL_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_tensor_hyperparameters(dtype: torch.dtype, tensor_dtype: torch.dtype) -> None:
    *tensors, factor = [torch.tensor(value, dtype=torch.float64).to(tensor_dtype) for value in (0.7, 0.93, 1e-4, -0.37)]
    for options in ({}, {"factor_tensor": factor}):
        assert_same_update(lambda: dense_lists([5, 700], dtype), hyperparameters=tuple(tensors), **options)


@pytest.mark.parametrize("found_inf", [0.0, -0.0, 1.0, nan])
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_nothing_is_written_if_found_inf_is_not_zero(layout: str, found_inf: float) -> None:
    def make() -> Lists:
        param = lay_out(layout, torch.ones(2, 3, 4, 50))
        return [[param], [torch.full((2, 3, 4, 50), inf)], *states_of([param])]

    assert_same_update(make, found_inf=torch.tensor(found_inf), grad_scale=torch.tensor([[2.0]]))
    lists = make()
    emulated.adadelta_(*lists, [], [], *segment(1, *HYPERPARAMETERS), found_inf=torch.tensor(found_inf))
    assert torch.equal(lists[0][0], torch.ones(2, 3, 4, 50)) == (found_inf != 0)
    assert torch.equal(lists[2][0], torch.zeros(2, 3, 4, 50)) == (found_inf != 0)


@pytest.mark.parametrize("name", ["plain", "clipvalue-clipnorm", "scale"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_several_segments(dtype: torch.dtype, name: str) -> None:
    """In one launch; empty segments, and a segment of empty tensors only, take no place."""
    sizes = [0, 3, 1, 0, len(SIZES) - 5, 1, 0]
    assert assert_same_update(lambda: dense_lists(SIZES, dtype), sizes=sizes, **options_for(dtype, name)) == 1


def test_segments_of_every_dtype_and_layout() -> None:
    shape = (3, 2, 5, 9)

    def make() -> Lists:
        kinds = [(dtype, layout) for dtype in REAL_DTYPES for layout in ("contiguous", "sliced")]
        params = [lay_out(layout, randn(shape, dtype, torch.Generator().manual_seed(1))) for dtype, layout in kinds * 2]
        return [params, [gradients(shape, p.dtype, steps=1)[0] for p in params], *states_of(params)]

    for name in ("plain", "clipvalue-clipnorm"):
        assert assert_same_update(make, sizes=[3, 0, 6, 7], **OPTIONS[name]) == 4 + 8


# ---- Averages -------------------------------------------------------------------------------------------------------


def with_averages(lists: Lists, layout: str | None = None) -> Lists:
    """The lists with averages, which lie as their parameters do, or contiguous, or in another layout."""
    averages = averages_of(lists[0])
    if layout is not None:
        return [*lists, [lay_out(layout, x) for x in averages]]
    return [*lists, list(map(laid_like, lists[0], averages))]


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("name", ["plain", "clipvalue-clipnorm", "both-scales-clipnorm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_averages_of_every_size(dtype: torch.dtype, name: str, momentum: str) -> None:
    def make() -> Lists:
        lists = with_averages(dense_lists(SIZES, dtype))
        if float(MOMENTA[momentum]) == 0:
            lists[4][-2].fill_(nan)
        return lists

    for overwrites in (False, True):
        values = {"ema_momentum": MOMENTA[momentum], "overwrites": overwrites}
        assert assert_same_update(make, values=values, **options_for(dtype, name)) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_averages_of_every_layout(dtype: torch.dtype, layout: str) -> None:
    """Of parameters that are contiguous or not, with gradients of their dtype or another."""
    grad_dtypes = COMPLEX_DTYPES if dtype.is_complex else REAL_DTYPES
    for param_layout, own in (("contiguous", layout), (layout, "contiguous"), (layout, None)):

        def make(param_layout: str = param_layout, own: str | None = own) -> Lists:
            params, grads, *_ = dense_lists([(2, 3, 4, 9)] * 4, dtype, grad_dtypes)
            params = [lay_out(param_layout, x) for x in params]
            return with_averages([params, grads, *states_of(params)], own)

        assert_same_update(make, values={"ema_momentum": 0.9, "overwrites": True})


def test_averages_around_chunks() -> None:
    sizes = [CHUNK - 1, CHUNK, CHUNK + 1, 3, 2 * CHUNK + 5]
    for dtype in (torch.float32, torch.bfloat16):
        make = functools.partial(lambda dtype: with_averages(dense_lists(sizes, dtype)), dtype)
        assert assert_same_update(make, (0, 1), values={"ema_momentum": 0.9}) == 1


def test_an_average_that_is_not_aligned() -> None:
    def make() -> Lists:
        lists = with_averages(dense_lists([(1, 1, 1, 700)]))
        return [*lists[:4], [lay_out("misaligned", x) for x in lists[4]]]

    assert assert_same_update(make, values={"ema_momentum": 0.9}) == 1


def test_averages_of_several_segments() -> None:
    sizes = [0, 3, 1, 0, len(SIZES) - 5, 1, 0]
    for dtype in (torch.float32, torch.float16):
        make = functools.partial(lambda dtype: with_averages(dense_lists(SIZES, dtype)), dtype)
        assert assert_same_update(make, sizes=sizes) == 1


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_no_average_is_written_if_found_inf_is_not_zero(layout: str) -> None:
    lists = dense_lists([(2, 3, 4, 50)])
    averages = [lay_out(layout, x) for x in averages_of(lists[0])]
    before = [x.clone() for x in (lists[0][0], averages[0])]
    own = segment(1, *HYPERPARAMETERS, ema_momentum=0.9, overwrites=True)
    emulated.adadelta_(*lists, averages, [], *own, found_inf=torch.ones(1))
    assert_same_lists([[lists[0][0], averages[0].contiguous()]], [before])


# ---- State of another dtype, and masters ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "clipvalue-clipnorm", "both-scales-clipnorm"])
@with_kept
def test_state_of_every_kind(dtype: torch.dtype, kept: Kept, name: str) -> None:
    make = functools.partial(kept_lists, SIZES, dtype, kept)
    assert assert_same_update(make, values=kept.options, **OPTIONS[name]) == 1


@pytest.mark.parametrize("is_decoupled", [False, True])
@with_kept
def test_weight_decay_of_every_kind(dtype: torch.dtype, kept: Kept, is_decoupled: bool) -> None:
    for layout in ("contiguous", "sliced"):
        make = functools.partial(kept_lists, [(1, 2, 3, 40)], dtype, kept, layout=layout)
        values = {**kept.options, "weight_decay": 0.3, "is_decoupled": is_decoupled}
        assert assert_same_update(make, values=values) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@with_kept
def test_state_of_every_kind_and_layout(dtype: torch.dtype, kept: Kept, layout: str) -> None:
    """With gradients of every dtype."""
    make = functools.partial(kept_lists, [(2, 3, 4, 9)] * 4 + [(1, 1, 1, 2051)] * 4, dtype, kept, REAL_DTYPES, layout)
    assert_same_update(make, values=kept.options, **OPTIONS["clipvalue-clipnorm"])


@with_kept
def test_each_tensor_of_another_layout(dtype: torch.dtype, kept: Kept) -> None:
    names = list(LAYOUTS)

    def make() -> Lists:
        made = kept_lists([(2, 3, 4, 9)] * len(names), dtype, kept)
        for part in (0, 2, 3, 5):
            made[part][:] = [lay_out(names[(i + part) % len(names)], x) for i, x in enumerate(made[part])]
        return made

    assert_same_update(make, values=kept.options)


@with_kept
def test_state_of_every_kind_around_chunks(dtype: torch.dtype, kept: Kept) -> None:
    make = functools.partial(kept_lists, [CHUNK - 1, CHUNK, CHUNK + 1, 3, 2 * CHUNK + 5], dtype, kept)
    assert assert_same_update(make, (0, 1), values=kept.options) == 1


@pytest.mark.parametrize("overwrites", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "sliced"])
@with_kept
def test_averages_of_every_kind(dtype: torch.dtype, kept: Kept, layout: str, overwrites: bool) -> None:
    shapes = [(1, 1, 1, size) for size in (0, 1, 8, 700, 2049)]

    def make() -> Lists:
        lists = kept_lists(shapes, dtype, kept, layout=layout)
        return [*lists[:4], averages_of(lists[0]), lists[5]]

    assert_same_update(make, values={**kept.options, "ema_momentum": 0.9, "overwrites": overwrites})


def test_state_of_every_kind_in_one_call() -> None:
    """A launch for each, but for those with remainders, which have a call of their own."""
    for has_remainders, launches in ((False, 7), (True, 2)):
        kinds = [kind for kind in KEPT if bool(kind[1].remainders_of([torch.ones(1, dtype=kind[0])])) == has_remainders]

        def run(op: Any, kinds: Any = kinds) -> Lists:
            parts = [kept_lists([40 + i, (3, 20, 50)[:i]], dtype, kept) for i, (dtype, kept) in enumerate(kinds)]
            together = [[x for lists in parts for x in lists[k]] for k in range(6)]
            op.adadelta_(*together, *segments(*(segment(2, *HYPERPARAMETERS, **kept.options) for _, kept in kinds)))
            return together

        expected, before = run(adadelta), emulated.launches()
        assert_same_lists(run(emulated), expected)
        assert emulated.launches() - before == launches


# ---- Launches -------------------------------------------------------------------------------------------------------


def test_a_segment_more_than_a_launch_takes() -> None:
    count = LARGE_SEGMENTS + 1
    assert assert_same_update(lambda: dense_lists([3] * count), sizes=[1] * count) == 2


def test_what_launches_nothing() -> None:
    lists = dense_lists([5, 700])
    before = emulated.launches()
    emulated.adadelta_(*lists, [], [], *segment(2, *HYPERPARAMETERS), check_only=True)
    assert emulated.launches() == before
    assert not any(x.any() for states in lists[2:] for x in states)
    assert assert_same_update(lambda: dense_lists([0, 0, 0])) == 0


@settings(max_examples=40, deadline=None)
@given(
    tensors=st.lists(
        st.tuples(
            st.sampled_from(REAL_DTYPES),
            st.sampled_from(REAL_DTYPES),
            st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(1, 9), st.integers(1, 70)),
            st.sampled_from(sorted(LAYOUTS)),
            st.sampled_from(sorted(LAYOUTS)),
        ),
        min_size=1,
        max_size=8,
    ),
    name=st.sampled_from(sorted(OPTIONS)),
    seed=st.integers(0, 1000),
)
def test_any_lists(tensors: list[tuple[Any, ...]], name: str, seed: int) -> None:
    def make() -> Lists:
        params, grads = [], []
        for i, (dtype, grad_dtype, shape, layout, grad_layout) in enumerate(tensors):
            params.append(lay_out(layout, randn(shape, dtype, torch.Generator().manual_seed(i))))
            grads.append(lay_out(grad_layout, gradients(shape, grad_dtype, steps=1, seed=i)[0]))
        return [params, grads, *states_of(params)]

    assert_same_update(make, seeds=(seed,), **OPTIONS[name])


@pytest.mark.parametrize("part", range(4))
def test_lists_that_do_not_fit_are_refused_unwritten(part: int) -> None:
    lists = dense_lists([5, 4])
    lists[part][1] = torch.ones(3)
    before = emulated.launches()
    for check_only in (True, False):
        with pytest.raises(RuntimeError, match=r"^torch_adadelta refuses parameter 1: its tensors differ in shape"):
            emulated.adadelta_(*lists, [], [], *segment(2, *HYPERPARAMETERS), check_only=check_only)
    assert emulated.launches() == before


@pytest.mark.parametrize("factor", [1.0, nan])
def test_no_tensor_outlives_a_call(factor: float) -> None:
    lists = dense_lists([5, 70_000])
    scalars = [torch.ones(1) for _ in range(5)]
    *tensors, grad_scale, found_inf = scalars
    everything = [x for part in lists for x in part] + scalars
    before = storage_uses(everything)
    sums = emulated.grad_square_sums(*lists[:2], grad_scale=grad_scale)
    options = {"grad_scale": grad_scale, "found_inf": found_inf, "factor": factor}
    try:
        emulated.adadelta_(*lists, [], [], *segment(2, *tensors), clipnorm=1.0, square_sums=sums, **options)
    except RuntimeError:
        assert factor != 1
    assert storage_uses([sums]) == storage_uses([torch.ones(1)])
    assert storage_uses(everything) == before
