"""csrc/cpu/sparse.cpp and csrc/sparse.h: updates by sparse gradients against the oracle, and what is refused."""

import functools
from collections.abc import Callable
from typing import Any

import direct
import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    LAYOUTS,
    REAL_DTYPES,
    assert_like_oracle,
    dtype_name,
    segment,
    segments,
)
from op_cases import (
    CLIPS,
    HYPERPARAMETERS,
    ORACLE_HYPERPARAMETERS,
    OWN_STATE,
    TABLES,
    Clip,
    Kept,
    Lists,
    adadelta,
    assert_refused,
    assert_repeated_in_order,
    assert_same_lists,
    inf,
    kept_sparse_lists,
    lay_out,
    nan,
    needs_library,
    several,
    sparse_lists,
    states_of,
    ways,
    whole_memory,
    with_kept,
)
from reference.oracle import SparseGradient
from torch import Tensor

pytestmark = needs_library

OWN = segment(2, *HYPERPARAMETERS)


def assert_like_the_oracle(
    make: Callable[[], Lists],
    clip: Clip = CLIPS["plain"],
    threads: tuple[int, ...] = (1,),
    kept: Kept = OWN_STATE,
) -> None:
    """Two steps on each instruction set, with nothing written between the elements. A sixth list holds remainders."""
    params, indices, values, *states = make()
    templates = [torch.empty(value.shape, dtype=param.dtype) for param, value in zip(params, values, strict=True)]
    hyperparameters = {**ORACLE_HYPERPARAMETERS, "maximize": clip.maximize}
    remainders = states[2] if len(states) > 2 and states[2] else [None] * len(params)
    oracles = [kept.oracle_of(p, r, **hyperparameters) for p, r in zip(params, remainders, strict=True)]
    for by_oracle, index, template, value in zip(oracles, indices, templates, values, strict=True):
        for _ in range(2):
            by_oracle.step(SparseGradient(index.numpy(), clip.apply(template, value)))
    for way in ways(threads):
        lists = make()
        written = [x for part in (lists[0], *lists[3:]) for x in part]
        gaps = [whole_memory(x).clone() for x in written]
        own = {**kept.options, "remainders": [x for part in lists[5:] for x in part]}
        for _ in range(2):
            direct.sparse_op(*lists[:5], *HYPERPARAMETERS, **clip.options(templates, lists[2]), **own)
        for remainder, by_oracle in zip(own["remainders"], oracles, strict=False):
            np.testing.assert_array_equal(remainder.numpy(), by_oracle.remainder, way)
        for i, (param, square_avg, acc_delta, by_oracle) in enumerate(zip(lists[0], *lists[3:5], oracles, strict=True)):
            state = {"square_avg": square_avg, "acc_delta": acc_delta}
            assert_like_oracle(param, state, by_oracle, f"{i} {way}")
        for x, gap in zip(written, gaps, strict=True):
            if x.numel() < gap.numel():
                now = whole_memory(x).clone()
                for memory in (now, gap):
                    memory.as_strided(x.shape, x.stride(), x.storage_offset()).zero_()
                assert torch.equal(now, gap), "what lies between the elements"


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_tables_of_every_shape(dtype: torch.dtype, name: str) -> None:
    assert_like_the_oracle(lambda: sparse_lists(TABLES, dtype), CLIPS[name].for_dtype(dtype))


@pytest.mark.parametrize("name", ["plain", "clipvalue-factor"])
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_values_of_another_dtype(dtype: torch.dtype, name: str) -> None:
    assert_like_the_oracle(lambda: sparse_lists([((9, 5), 1), ((3, 640), 1)] * 4, dtype, REAL_DTYPES), CLIPS[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=dtype_name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tables_and_state_of_any_layout(layout: str, dtype: torch.dtype) -> None:
    shape = (5, 3, 1, 12)

    def make() -> Lists:
        lists = sparse_lists([(shape, dims) for dims in range(5)], dtype)
        params = [lay_out(layout, param) for param in lists[0]]
        states = states_of(params)
        states[0][1] = lay_out("transposed", torch.zeros(shape, dtype=dtype))
        return [params, *lists[1:3], *states]

    assert_like_the_oracle(make)


@pytest.mark.parametrize("name", ["plain", "clipvalue-factor", "both-scales-clipnorm"])
@with_kept
def test_state_of_every_kind(dtype: torch.dtype, kept: Kept, name: str) -> None:
    make = functools.partial(kept_sparse_lists, [*TABLES, ((3, 9001), 1)], dtype, kept)
    assert_like_the_oracle(make, CLIPS[name], threads=(2,), kept=kept)


@pytest.mark.parametrize("layout", LAYOUTS)
@with_kept
def test_state_of_every_kind_and_layout(dtype: torch.dtype, kept: Kept, layout: str) -> None:
    """With values of every dtype."""
    tables = [((5, 3, 1, 12), dims) for dims in range(5)]
    make = functools.partial(kept_sparse_lists, tables, dtype, kept, REAL_DTYPES, layout)
    assert_like_the_oracle(make, kept=kept)


@pytest.mark.parametrize("count", [0, 1, 2, 9, 10, 17, 300])
def test_runs_of_entries_of_one_row(count: int) -> None:
    """Of every length up to the count, in the middle and at the end; more rows than one byte counts."""

    def make() -> Lists:
        lists = sparse_lists([((count + 3, 4), 1), ((4, 3), 1), ((4, 4), 1), ((70_000, 1), 1)], count=count)
        lists[1][1] = torch.full((1, count), 1)
        lists[1][2] = torch.cat([torch.full((1, count - count // 2), 3), torch.full((1, count // 2), 0)], dim=1)
        lists[1][3] = (torch.arange(count)[None] * 65_537 + 255) % 70_000
        return lists

    assert_like_the_oracle(make)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_rows_that_are_cut(dtype: torch.dtype) -> None:
    """Into pieces of 4096 elements, which threads share."""
    assert_like_the_oracle(lambda: sparse_lists([((3, 9001), 1), ((5,), 1), ((40, 70), 1)], dtype), threads=(1, 2))


def test_a_parameter_listed_twice_is_updated_in_order() -> None:
    assert_repeated_in_order("sparse")


def test_several_segments() -> None:
    """Each as by itself."""
    together, apart = ([[x.clone() for x in part] for part in sparse_lists(TABLES)] for _ in range(2))
    sizes, numbers, tensors = several([1] * len(TABLES))
    adadelta.sparse_adadelta_(*together, [], sizes, numbers, tensors)
    count = len(numbers) // len(TABLES)
    for i in range(len(TABLES)):
        row = slice(i * count, (i + 1) * count)
        adadelta.sparse_adadelta_(*(part[i : i + 1] for part in apart), [], [1], numbers[row], tensors[row])
    assert_same_lists(together, apart)


def test_indices_of_any_layout() -> None:
    def make(is_plain: bool) -> Lists:
        lists = sparse_lists([((5, 4, 3), 2), ((40, 3), 1)])
        if not is_plain:
            lists[1][0] = lists[1][0].t().contiguous().t()
            lists[1][1] = lists[1][1].repeat_interleave(2, dim=1)[:, ::2]
        return lists

    lists, expected = make(False), make(True)
    for made in (lists, expected):
        adadelta.sparse_adadelta_(*made, [], *OWN)
    for part in (0, 3, 4):
        assert all(map(torch.equal, lists[part], expected[part]))


@pytest.mark.parametrize("name", CLIPS)
def test_special_values(name: str) -> None:
    special = [inf, -inf, nan, 1e20, -1e20, 1e38, 0.0, -0.0, 1e-30, 1e-45, 0.3, -0.3]

    def make() -> Lists:
        values = torch.tensor([[x, y] for x in special for y in special])
        params = [torch.full((60, 2), -0.0)]
        return [params, [torch.arange(len(values))[None] // 3], [values], *states_of(params)]

    assert_like_the_oracle(make, CLIPS[name])


@pytest.mark.parametrize("found_inf", [0.0, 1.0, nan])
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_nothing_is_written_if_found_inf_is_not_zero(layout: str, found_inf: float) -> None:
    def make() -> Lists:
        lists = sparse_lists([((5, 3, 2, 4), 1)])
        params = [lay_out(layout, param) for param in lists[0]]
        return [params, *lists[1:3], *states_of(params)]

    lists, expected = make(), make()
    adadelta.sparse_adadelta_(*lists, [], *segment(1, *HYPERPARAMETERS), found_inf=torch.tensor(found_inf))
    if found_inf == 0:
        adadelta.sparse_adadelta_(*expected, [], *segment(1, *HYPERPARAMETERS))
    assert_same_lists(lists, expected)


def test_spelled_out() -> None:
    """With rho = 0 the state of a row is the square of its gradient; other rows are neither read nor written."""
    param = torch.tensor([1.0, nan, 1.0, 1.0])
    lists = [
        [param],
        [torch.tensor([[3, 0, 3]])],
        [torch.tensor([1.0, 2.0, 4.0])],
        *([torch.ones(4)] for _ in range(2)),
    ]
    lists[3][0][1] = nan
    direct.sparse_op(*lists, 0.0, 0.0, 1e-7)
    assert lists[3][0][[0, 2, 3]].tolist() == [4.0, 1.0, 25.0]
    assert torch.isnan(lists[3][0][1])
    assert lists[4][0][[1, 2]].tolist() == [1.0, 1.0]


def test_check_only_and_empty_lists() -> None:
    lists, expected = sparse_lists(TABLES[:2]), sparse_lists(TABLES[:2])
    adadelta.sparse_adadelta_(*lists, [], *OWN, check_only=True)
    assert_same_lists(lists, expected)
    direct.sparse_fused([], [], [], [], *HYPERPARAMETERS)


# ---- What is refused ------------------------------------------------------------------------------------------------


def replaced(part: int, make: Callable[[Tensor], Tensor]) -> Callable[[Lists], None]:
    def spoil(lists: Lists) -> None:
        lists[part][-1] = make(lists[part][-1])

    return spoil


NOT_A_GRADIENT = "parameter 1: its indices and values do not make a gradient of its shape"
NOT_INDICES = "parameter 1: its indices are not a dense matrix of int64"
BAD_LISTS: list[tuple[Callable[[Lists], Any], str]] = [
    (lambda lists: lists[1].pop(), "the call: the lists differ in length: 2 params, 1 indices, 2 values, 2 square_avgs, 2"),
    (lambda lists: lists[4].pop(), "the call: the lists differ in length: 2 params, 2 indices, 2 values, 2 square_avgs, 1"),
    (replaced(1, lambda x: x.int()), NOT_INDICES),
    (replaced(1, lambda x: x[0]), NOT_INDICES),
    (replaced(1, lambda x: x[:, 1:]), NOT_A_GRADIENT),
    (replaced(1, lambda x: x.repeat(5, 1)), NOT_A_GRADIENT),
    (replaced(1, lambda x: x[:1]), NOT_A_GRADIENT),
    (replaced(2, lambda x: x[:, :1]), NOT_A_GRADIENT),
    (replaced(2, lambda x: x[:, :, None]), NOT_A_GRADIENT),
    (replaced(2, lambda x: x + 0j), "parameter 1: of its tensors, some are complex and some are real"),
    (replaced(2, lambda x: x.long()), "parameter 1: its gradient has a dtype that the kernels do not know"),
    (replaced(3, lambda x: x.double()), "parameter 1: its state has another dtype than the parameter"),
    (replaced(4, lambda x: x.half()), "parameter 1: its state has another dtype than the parameter"),
    (replaced(4, lambda x: x[:1]), "parameter 1: its tensors differ in shape"),
    (replaced(3, lambda x: x[:, :1]), "parameter 1: its tensors differ in shape"),
    (replaced(0, lambda x: x[:1].expand(3, 2, 5)), "parameter 1: it would be written to, but overlaps itself"),
    (replaced(3, lambda x: x[:1].expand(3, 2, 5)), "parameter 1: its square_avg would be written to, but overlaps itself"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "error"), BAD_LISTS)
def test_lists_that_do_not_fit_are_refused_unwritten(spoil: Any, error: str) -> None:
    lists = sparse_lists([((9, 4), 1), ((3, 2, 5), 2)])
    spoil(lists)
    assert_refused(adadelta.sparse_adadelta_, lists, [], *OWN, error=error)
    with pytest.raises(RuntimeError, match=f"^torch_adadelta refuses {error}"):
        adadelta.first_invalid_indices(*lists, [])


@pytest.mark.parametrize("part", [0, 2, 3, 4])
def test_tensors_on_the_meta_device(part: int) -> None:
    lists = sparse_lists([((9, 4), 1), ((3, 2, 5), 2)])
    lists[part][-1] = lists[part][-1].to("meta")
    for call in (
        lambda: adadelta.sparse_adadelta_(*lists, [], *OWN),
        lambda: adadelta.first_invalid_indices(*lists, []),
    ):
        with pytest.raises(RuntimeError, match="a tensor on the meta device has no elements to update"):
            call()


def test_values_that_are_not_contiguous() -> None:
    lists = sparse_lists([((9, 4), 1), ((9, 4), 1)])
    lists[2][1] = lists[2][1].t().contiguous().t()
    assert_refused(
        adadelta.sparse_adadelta_, lists, [], *OWN, error="parameter 1: the values of its gradient are not contiguous"
    )


@pytest.mark.parametrize("weight_decay", [0.01, torch.tensor(0.01), torch.tensor(0.0)], ids=repr)
def test_weight_decay_of_rows(weight_decay: float | Tensor) -> None:
    own = segments(segment(1, *HYPERPARAMETERS), segment(1, *HYPERPARAMETERS, weight_decay=weight_decay))
    error = "the call: weight_decay is for whole parameters, not for the rows of sparse gradients"
    assert_refused(adadelta.sparse_adadelta_, sparse_lists(TABLES[:2]), [], *own, error=error)


def test_the_first_index_out_of_range() -> None:
    lists = sparse_lists([((9, 5), 1), ((4, 3, 2), 2), ((9, 5), 1), ((2, 3), 0), ((9, 0), 1)], count=1500)
    assert adadelta.first_invalid_indices(*lists, []).tolist() == [-1] * 5
    lists[1][0][0, [1499, 700, 701]] = torch.tensor([9, -1, 2**62])
    lists[1][1][:, 1200] = torch.tensor([1, 3])  # which would be row [2, 0]
    lists[1][1][0, 1201] = -(2**63)
    lists[1][2][0, 0] = 9
    lists[1][4][0, 3] = 9
    assert adadelta.first_invalid_indices(*lists, []).tolist() == [700, 1200, 0, -1, 3]
    for i, position in ((0, 700), (1, 1200), (2, 0), (4, 3)):
        one = [tensors[i : i + 1] for tensors in lists]
        error = f"parameter 0: index {position} of its gradient is out of range"
        before = [x.clone() for part in (0, 3, 4) for x in one[part]]
        with pytest.raises(RuntimeError, match=f"^torch_adadelta refuses {error}"):
            adadelta.sparse_adadelta_(*one, [], *segment(1, *HYPERPARAMETERS))
        assert all(map(torch.equal, [x for part in (0, 3, 4) for x in one[part]], before))


@pytest.mark.parametrize("spoil", [0, -1], ids=["freed", "shortened"])
@pytest.mark.parametrize("which", range(5))
def test_tensors_without_their_memory(which: int, spoil: int) -> None:
    lists = [
        [torch.ones(4, 3)],
        [torch.zeros(1, 2, dtype=torch.int64)],
        *([torch.ones(count, 3)] for count in (2, 4, 4)),
    ]
    storage = lists[which][0].untyped_storage()
    storage.resize_(0 if spoil == 0 else storage.nbytes() - 1)
    name = ["it", "the memory of its indices", "its gradient", "its square_avg", "its acc_delta"][which]
    for op, arguments in (("sparse_adadelta_", ([], *segment(1, 1.0, 0.9, 1e-7))), ("first_invalid_indices", ([],))):
        message = f"^torch_adadelta refuses parameter 0: {name} .*its storage was resized"
        with pytest.raises(RuntimeError, match=message):
            getattr(adadelta, op)(*lists, *arguments)


@pytest.mark.parametrize("begin", [0, 2, 5])
@pytest.mark.parametrize("which", [0, 3, 4])
@pytest.mark.parametrize("of_another", [False, True])
def test_indices_in_memory_that_is_written_to(which: int, of_another: bool, begin: int) -> None:
    """Once the first rows were updated, they would name rows anywhere. One is enough."""
    memory = torch.zeros(16 + 16)
    lists: Lists = [[torch.zeros(8, 2), torch.zeros(8, 2)] for _ in range(5)]
    lists[1] = [torch.zeros(1, 4, dtype=torch.int64) for _ in range(2)]
    lists[2] = [torch.ones(4, 2) for _ in range(2)]
    lists[which][1] = memory[:16].view(8, 2)
    row = 1 - of_another
    lists[1][row] = memory.view(torch.int64)[begin : begin + 4][None]
    error = f"parameter {row}: its indices share memory with a tensor that would be written to"
    assert_refused(adadelta.sparse_adadelta_, lists, [], *OWN, error=error)
    lists[1][row] = memory.view(torch.int64)[8:12][None]
    adadelta.sparse_adadelta_(*lists, [], *OWN)
