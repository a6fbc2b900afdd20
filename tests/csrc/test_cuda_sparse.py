"""csrc/cuda/sparse.cuh, emulated: updates by sparse gradients, and the search for indices out of range."""

import functools

import emulated as emulator
import pytest
import torch
from cases import COMPLEX_DTYPES, DTYPES, LAYOUTS, REAL_DTYPES, dtype_name, segment
from emulated import HYPERPARAMETERS, OPTIONS, assert_same_sparse_update, emulated, options_for
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    TABLES,
    Kept,
    Lists,
    adadelta,
    assert_same_lists,
    inf,
    kept_sparse_lists,
    lay_out,
    nan,
    sparse_lists,
    states_of,
    storage_uses,
    with_kept,
)

pytestmark = emulator.marks

_DOUBLE = (torch.float64, torch.complex128)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_tables_of_every_shape(dtype: torch.dtype, name: str) -> None:
    """Two launches a table: one for the numbers of the rows, one for the update; none for rows without elements."""
    launches = assert_same_sparse_update(lambda: sparse_lists(TABLES, dtype), **options_for(dtype, name))
    assert launches == 2 * (len(TABLES) - 1)


@pytest.mark.parametrize("name", ["plain", "clipvalue-clipnorm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_values_of_another_dtype(dtype: torch.dtype, name: str) -> None:
    value_dtypes = COMPLEX_DTYPES if dtype.is_complex else REAL_DTYPES
    tables = [table for table in (((9, 5), 1), ((7, 64), 1)) for _ in value_dtypes]
    if name == "clipvalue-clipnorm" and dtype not in _DOUBLE:
        value_dtypes = tuple(d for d in value_dtypes if d not in _DOUBLE)  # whose norms are taken after a cast
    assert_same_sparse_update(lambda: sparse_lists(tables, dtype, value_dtypes), **options_for(dtype, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=dtype_name)
def test_several_segments(dtype: torch.dtype) -> None:
    sizes = [0, 3, 2, 0, len(TABLES) - 5]
    assert_same_sparse_update(lambda: sparse_lists(TABLES, dtype), sizes=sizes, **options_for(dtype, "clipnorm"))


@pytest.mark.parametrize("name", ["plain", "both-scales-clipnorm"])
@with_kept
def test_state_of_every_kind(dtype: torch.dtype, kept: Kept, name: str) -> None:
    make = functools.partial(kept_sparse_lists, TABLES, dtype, kept)
    assert assert_same_sparse_update(make, values=kept.options, **OPTIONS[name]) == 2 * (len(TABLES) - 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@with_kept
def test_state_of_every_kind_and_layout(dtype: torch.dtype, kept: Kept, layout: str) -> None:
    """With values of every dtype."""
    tables = [((5, 3, 1, 12), dims) for dims in range(5)]
    make = functools.partial(kept_sparse_lists, tables, dtype, kept, REAL_DTYPES, layout)
    assert_same_sparse_update(make, values=kept.options)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 7, 8, 9, 127, 128, 129, 513])
def test_runs_of_entries_of_one_row(count: int) -> None:
    """Of every length around what is read ahead, in the middle and at the end."""

    def make() -> Lists:
        made = sparse_lists([((count + 3, 4), 1), ((4, 3), 1), ((4, 4), 1)], count=count)
        made[1][1] = torch.full((1, count), 1)
        made[1][2] = torch.cat([torch.full((1, count - count // 2), 3), torch.full((1, count // 2), 0)], dim=1)
        return made

    assert assert_same_sparse_update(make, (0, 1)) == (0 if count == 0 else 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=dtype_name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tables_and_state_of_any_layout(layout: str, dtype: torch.dtype) -> None:
    shape = (5, 3, 1, 12)

    def make() -> Lists:
        lists = sparse_lists([(shape, dims) for dims in range(5)], dtype)
        params = [lay_out(layout, param) for param in lists[0]]
        states = states_of(params)
        states[0][1] = lay_out("transposed", torch.zeros(shape, dtype=dtype))
        return [params, *lists[1:3], *states]

    assert_same_sparse_update(make)
    assert_same_sparse_update(make, **OPTIONS["clipnorm"])


@pytest.mark.parametrize("shifted", range(5))
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_tensors_that_are_not_aligned(dtype: torch.dtype, shifted: int) -> None:
    def make() -> Lists:
        made = sparse_lists([((9, 8), 1), ((3, 64), 1)], dtype)
        if shifted != 1:
            made[shifted][:] = [
                torch.zeros(x.numel() + 1, dtype=dtype)[1:].view(x.shape).copy_(x) for x in made[shifted]
            ]
        else:  # indices of other strides
            made[1][:] = [x.repeat_interleave(2, dim=1)[:, ::2] for x in made[1]]
        return made

    assert_same_sparse_update(make)


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
def test_values_of_another_dtype_that_are_not_aligned(dtype: torch.dtype, value_dtype: torch.dtype) -> None:
    """As vectors of their own dtype are not, beside a table that is."""
    for shifted in (1, 2):

        def make(shifted: int = shifted) -> Lists:
            made = sparse_lists([((9, 8), 1), ((3, 64), 1)], dtype, (value_dtype,))
            made[2][:] = [
                torch.zeros(x.numel() + shifted, dtype=x.dtype)[shifted:].view(x.shape).copy_(x) for x in made[2]
            ]
            return made

        assert_same_sparse_update(make)


@pytest.mark.parametrize("shifted", [0, 3, 4, 5])
def test_masters_that_are_not_aligned(shifted: int) -> None:
    """One of their tensors alone."""
    kept = Kept(torch.float32, has_masters=True)

    def make() -> Lists:
        made = kept_sparse_lists([((9, 8), 1), ((3, 64), 1)], torch.bfloat16, kept)
        made[shifted][:] = [torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x) for x in made[shifted]]
        return made

    assert_same_sparse_update(make, values=kept.options)


def test_a_parameter_listed_twice_is_updated_in_turn() -> None:
    def make() -> Lists:
        params, indices, values, square_avgs, acc_deltas = sparse_lists([((9, 5), 1)] * 3)
        return [[params[0]] * 3, indices, values, [square_avgs[0]] * 3, [acc_deltas[0]] * 3]

    assert_same_sparse_update(make)


@pytest.mark.parametrize("found_inf", [0.0, 1.0, nan])
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_nothing_is_written_if_found_inf_is_not_zero(layout: str, found_inf: float) -> None:
    def make() -> Lists:
        lists = sparse_lists([((5, 3, 2, 4), 1)])
        params = [lay_out(layout, param) for param in lists[0]]
        return [params, *lists[1:3], *states_of(params)]

    assert_same_sparse_update(make, found_inf=torch.tensor(found_inf), grad_scale=torch.tensor(2.0))
    lists = make()
    emulated.sparse_adadelta_(*lists, [], *segment(1, *HYPERPARAMETERS), found_inf=torch.tensor(found_inf))
    assert torch.equal(lists[3][0], torch.zeros(5, 3, 2, 4)) == (found_inf != 0)


def test_special_values() -> None:
    special = [inf, -inf, nan, 1e20, -1e20, 1e38, 0.0, -0.0, 1e-30, 1e-45, 0.3, -0.3]

    def make() -> Lists:
        values = torch.tensor([[x, y] for x in special for y in special])
        params = [torch.full((60, 2), -0.0)]
        return [params, [torch.arange(len(values))[None] // 3], [values], *states_of(params)]

    for name in OPTIONS:
        assert_same_sparse_update(make, **OPTIONS[name])


def test_tensor_hyperparameters() -> None:
    values = tuple(torch.tensor(x) for x in (0.7, 0.93, 1e-4))
    for options in ({}, {"factor_tensor": torch.tensor(-0.37, dtype=torch.float64)}):
        assert_same_sparse_update(lambda: sparse_lists(TABLES[:3]), hyperparameters=values, **options)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_first_index_out_of_range_is_found(seed: int) -> None:
    emulated.set_seed(seed)
    lists = sparse_lists([((9, 5), 1), ((4, 3, 2), 2), ((9, 5), 1), ((2, 3), 0), ((9, 0), 1)], count=1500)
    assert emulated.first_invalid_indices(*lists, []).tolist() == [-1] * 5
    lists[1][0][0, [1499, 700, 701]] = torch.tensor([9, -1, 2**62])
    lists[1][1][:, 1200] = torch.tensor([1, 3])  # which would be row [2, 0]
    lists[1][1][0, 1201] = -(2**63)
    lists[1][2][0, 0] = 9
    lists[1][4][0, 3] = 9
    assert emulated.first_invalid_indices(*lists, []).tolist() == [700, 1200, 0, -1, 3]


@pytest.mark.parametrize("index", [(4, 0), (-1, 1), (0, 3), (1, -1), (4, 3)], ids=str)
def test_an_index_out_of_range_in_either_of_two_dimensions(index: tuple[int, int]) -> None:
    """It is found, and no row is taken for that of the other dimension."""
    lists, expected = (sparse_lists([((4, 3, 2), 2)]) for _ in range(2))
    lists[1][0] = torch.cat([torch.tensor(index)[:, None], lists[1][0]], dim=1)
    lists[2][0] = torch.cat([torch.ones(1, 2), lists[2][0]])
    assert emulated.first_invalid_indices(*lists, []).tolist() == [0]
    emulated.sparse_adadelta_(*lists, [], *segment(1, *HYPERPARAMETERS))
    adadelta.sparse_adadelta_(*expected, [], *segment(1, *HYPERPARAMETERS))
    assert_same_lists([lists[part] for part in (0, 3, 4)], [expected[part] for part in (0, 3, 4)])


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_an_index_out_of_range_is_left_out(layout: str) -> None:
    """To raise, the device would have to be waited for; memory beside the table is not written."""
    bad = torch.tensor([-1, 5, 2**62, -(2**63), 5])

    def make(with_bad: bool) -> Lists:
        params, (indices,), (values,), *_ = sparse_lists([((5, 3, 2, 4), 1)])
        if with_bad:
            indices = torch.cat([bad[None, :2], indices, bad[None, 2:]], dim=1)
            values = torch.cat([torch.ones(2, 3, 2, 4), values, torch.ones(3, 3, 2, 4)])
        params = [lay_out(layout, param) for param in params]
        return [params, [indices], [values], *states_of(params)]

    lists, expected = make(True), make(False)
    emulated.sparse_adadelta_(*lists, [], *segment(1, *HYPERPARAMETERS))
    adadelta.sparse_adadelta_(*expected, [], *segment(1, *HYPERPARAMETERS))
    assert_same_lists([lists[part] for part in (0, 3, 4)], [expected[part] for part in (0, 3, 4)])


def test_more_entries_than_a_launch_takes() -> None:
    indices, values = torch.zeros(1, 1, dtype=torch.int64).expand(1, 2**31 * 512), torch.ones(1).expand(2**31 * 512)
    params = [torch.ones(3), torch.ones(3)]
    error = "parameter 1: it or its gradient has more elements than one launch can take"
    with pytest.raises(RuntimeError, match=f"^torch_adadelta refuses {error}"):
        emulated.first_invalid_indices(params, [indices[:, :3], indices], [values[:3], values], *states_of(params), [])


def test_without_entries_nothing_is_launched() -> None:
    """A device refuses a launch of no blocks."""
    lists, before = sparse_lists([((9, 5), 1), ((2, 3), 0)], count=0), emulated.launches()
    assert emulated.first_invalid_indices(*lists, []).tolist() == [-1, -1]
    emulated.sparse_adadelta_(*lists, [], *segment(2, *HYPERPARAMETERS))
    assert emulated.launches() == before


def test_check_only_launches_nothing() -> None:
    lists = sparse_lists([((9, 5), 1)])
    before = emulated.launches()
    emulated.sparse_adadelta_(*lists, [], *segment(1, *HYPERPARAMETERS), check_only=True)
    assert emulated.launches() == before
    assert not any(x.any() for states in lists[3:] for x in states)


@settings(max_examples=40, deadline=None)
@given(
    tables=st.lists(
        st.tuples(st.lists(st.integers(1, 6), min_size=0, max_size=4), st.integers(0, 4)), min_size=1, max_size=4
    ),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(sorted(OPTIONS)),
    count=st.integers(0, 40),
    seed=st.integers(0, 1000),
)
def test_any_sparse_update(
    tables: list[tuple[list[int], int]], dtype: torch.dtype, name: str, count: int, seed: int
) -> None:
    shapes = [(tuple(shape), min(dims, len(shape))) for shape, dims in tables]
    assert_same_sparse_update(
        lambda: sparse_lists(shapes, dtype, count=count), seeds=(seed,), **options_for(dtype, name)
    )


@pytest.mark.parametrize("options", [{}, {"clipvalue": -1.0}], ids=str)
def test_no_tensor_outlives_a_call(options: dict[str, float]) -> None:
    lists = sparse_lists([((9, 5), 1), ((4, 3, 2), 2)])
    tensors = [x for part in lists for x in part]
    before = storage_uses(tensors)
    try:
        emulated.sparse_adadelta_(*lists, [], *segment(len(lists[0]), *HYPERPARAMETERS), **options)
        emulated.first_invalid_indices(*lists, [])
    except RuntimeError:
        assert options
    assert storage_uses(tensors) == before
