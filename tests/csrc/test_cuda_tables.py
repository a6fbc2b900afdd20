"""csrc/cuda/tables.h, emulated: how many tensors, segments and elements a launch takes."""

import pytest
import torch
from average_cases import averages_of
from cases import LAYOUTS, REAL_DTYPES, assert_same_bits, gradients, randn, segment
from emulated import (
    CHUNK,
    HYPERPARAMETERS,
    LARGE_SEGMENTS,
    LARGE_TABLE,
    OPTIONS,
    SMALL_SEGMENTS,
    SMALL_TABLE,
    TABLES,
    assert_same_square_sums,
    assert_same_update,
    emulated,
    marks,
    virtual_zeros,
)
from op_cases import Kept, Lists, adadelta, dense_lists, kept_lists, lay_out, states_of
from torch import Tensor

pytestmark = marks


def test_their_sizes() -> None:
    assert emulated.chunk() == CHUNK
    for kind, tables in enumerate(TABLES.values()):
        found = (emulated.table(kind, large, segments) for segments in (False, True) for large in (False, True))
        assert tuple(found) == tables


@pytest.mark.parametrize(
    ("count", "launches", "name"),
    [
        (SMALL_TABLE - 1, 1, "plain"),
        (SMALL_TABLE, 1, "plain"),
        (SMALL_TABLE, 1, "clipnorm"),
        (SMALL_TABLE + 1, 1, "plain"),
        (SMALL_TABLE + 1, 1, "clipnorm"),
        (LARGE_TABLE, 1, "clipnorm"),
        (LARGE_TABLE + 1, 2, "plain"),
        (LARGE_TABLE + SMALL_TABLE + 1, 2, "clipnorm"),
    ],
)
def test_number_of_tensors(count: int, launches: int, name: str) -> None:
    """With an empty tensor before each, which takes no place in a table."""
    sizes = [size for i in range(count) for size in (0, 1 + i % 9)]
    assert assert_same_update(lambda: dense_lists(sizes, torch.float32, REAL_DTYPES), **OPTIONS[name]) == launches


@pytest.mark.parametrize("name", ["plain", "clipnorm"])
@pytest.mark.parametrize(
    ("count", "tensors", "launches"),
    [
        (SMALL_SEGMENTS, 1, 1),
        (SMALL_SEGMENTS + 1, 1, 1),
        (LARGE_SEGMENTS, 1, 1),
        (LARGE_SEGMENTS + 1, 1, 2),
        (LARGE_SEGMENTS, 20, 2),
        (3 * LARGE_SEGMENTS, 1, 3),
    ],
)
def test_number_of_segments(count: int, tensors: int, launches: int, name: str) -> None:
    """A launch takes tensors until it has no room for more of them, or for another segment."""
    sizes = [1 + i % 9 for i in range(count * tensors)]
    assert assert_same_update(lambda: dense_lists(sizes), sizes=[tensors] * count, **OPTIONS[name]) == launches


@pytest.mark.parametrize("kind", list(TABLES)[1:])
def test_number_of_tensors_and_segments_with_averages_and_remainders(kind: str) -> None:
    tables = TABLES[kind]
    has_averages, kept = kind != "remainders", Kept(has_masters=kind != "averages")
    for count, tensors, launches in (
        (1, tables.small, 1),
        (1, tables.small + 1, 1),
        (1, tables.large, 1),
        (1, tables.large + 1, 2),
        (tables.small_segments, 1, 1),
        (tables.small_segments + 1, 1, 1),
        (tables.large_segments, 1, 1),
        (tables.large_segments + 1, 1, 2),
    ):
        sizes = [1 + i % 9 for i in range(count * tensors)]

        def make(sizes: list[int] = sizes) -> Lists:
            lists = kept_lists(sizes, torch.bfloat16, kept)
            return [*lists[:4], averages_of(lists[0]) if has_averages else [], lists[5]]

        assert assert_same_update(make, sizes=[tensors] * count, values=kept.options) == launches


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str) -> None:
    """Dimensions that follow each other in each of the four tensors become one."""
    shape = (3, 2, 5, 9)

    def make() -> Lists:
        grads = [lay_out(other, x) for other, x in zip(LAYOUTS, dense_lists([shape] * len(LAYOUTS))[1], strict=True)]
        params = [lay_out(layout, x) for x in dense_lists([shape] * len(grads))[0]]
        return [params, grads, *states_of(params)]

    assert_same_update(make)


@pytest.mark.parametrize("part", [4, 5], ids=["averages", "remainders"])
def test_strides_of_averages_and_remainders(part: int) -> None:
    """Dimensions that follow each other in all other tensors stay apart where they do not in these."""
    kept = Kept(has_masters=part == 5)

    def make() -> Lists:
        lists = kept_lists([(3, 2, 5, 9)] * len(LAYOUTS), torch.bfloat16, kept)
        lists[4] = averages_of(lists[0])
        lists[part] = [lay_out(layout, x) for layout, x in zip(LAYOUTS, lists[part], strict=True)]
        return lists

    assert_same_update(make, values={**kept.options, "ema_momentum": 0.9, "overwrites": True})


def test_columns_of_a_square_matrix() -> None:
    """Its rows are as far apart as it has rows, but do not follow each other."""

    def columns(seed: int) -> Tensor:
        return randn((5, 5), torch.float32, torch.Generator().manual_seed(seed))[:, :3]

    assert_same_update(lambda: [[columns(0)], [columns(1)], *states_of([columns(0)])])
    assert_same_square_sums([torch.ones(5, 3)], [columns(1)])


def test_dimensions_of_equal_strides() -> None:
    """As in a gradient of sliding windows."""
    grad = randn((9,), torch.float32, torch.Generator().manual_seed(0)).unfold(0, 4, 1)
    assert_same_update(lambda: [[torch.ones(6, 4)], [grad], *states_of([torch.ones(6, 4)])])
    assert_same_square_sums([torch.ones(6, 4)], [grad])


def test_tensors_of_several_chunks() -> None:
    """Beside small ones."""
    assert assert_same_update(lambda: dense_lists([CHUNK + 1, 3, 2 * CHUNK + 5, 1, CHUNK])) == 1
    grads = [gradients((size,), torch.float32, steps=1, seed=size)[0] for size in (70_000, 3, 200_000, 1)]
    assert assert_same_square_sums(grads, grads) == 2


def test_more_dimensions_than_a_table_takes() -> None:
    """64, of which the parts of a complex number are one. By strides like these, no two dimensions become one."""
    shape = (2, *[1] * 62, 3)
    strides = (6, *(7 + d % 2 * 4 for d in range(62)), 2)
    param = torch.ones(200, dtype=torch.complex64).as_strided(shape, strides)
    values = torch.ones(1, *shape[1:], dtype=torch.complex64)
    lists = [[param], [torch.tensor([[1]])], [values], [torch.zeros_like(param)], [torch.zeros_like(param)]]
    with pytest.raises(RuntimeError, match=r"^torch_adadelta refuses parameter 0: .*more than 64 dimensions"):
        emulated.sparse_adadelta_(*lists, [], *segment(1, *HYPERPARAMETERS))


def test_more_blocks_than_a_launch_takes() -> None:
    """2^31 of them, for values of 2^40 elements of which none exists."""
    values = virtual_zeros(2**40, torch.bfloat16).view(2**20, 2**20)
    indices = torch.zeros(1, 2**20, dtype=torch.int64)
    tables = [torch.zeros(2, 2**20, dtype=torch.bfloat16) for _ in range(3)]
    lists = [tables[:1], [indices], [values], tables[1:2], tables[2:]]
    error = "parameter 0: it or its gradient has more elements than one launch can take"
    with pytest.raises(RuntimeError, match=f"^torch_adadelta refuses {error}"):
        emulated.sparse_adadelta_(*lists, [], *segment(1, *HYPERPARAMETERS))


@pytest.mark.slow
def test_tens_of_thousands_of_tensors() -> None:
    sizes = [i % 4 for i in range(20_000)]
    memory = [gradients((sum(sizes),), torch.float32, steps=1, seed=k)[0].abs() for k in range(4)]
    results = []
    for op in (adadelta, emulated):
        lists = [list(x.clone().split(sizes)) for x in memory]
        before = emulated.launches()
        op.adadelta_(*lists, [], [], *segment(len(sizes), *HYPERPARAMETERS))
        assert emulated.launches() - before == (-(-15_000 // LARGE_TABLE) if op is emulated else 0)
        results.append([torch.cat(tensors) for tensors in lists])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize(
    ("count", "launches"), [(0, 0), (SMALL_TABLE, 1), (SMALL_TABLE + 1, 1), (LARGE_TABLE, 1), (LARGE_TABLE + 1, 2)]
)
def test_number_of_gradients(count: int, launches: int) -> None:
    sizes = [0] + [size for i in range(count) for size in (1 + i % 9, 0)]
    grads = [gradients((size,), torch.float32, steps=1, seed=i)[0] for i, size in enumerate(sizes)]
    assert assert_same_square_sums(grads, grads) == launches
