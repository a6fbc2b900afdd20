"""csrc/tensor_lists.h: what the ops refuse of lists of dense tensors, unwritten; and tensors without their memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from average_cases import average_dtype, averages_of
from cases import DTYPES, LAYOUTS, dtype_name, segment, segments
from op_cases import CALLS as OPS
from op_cases import (
    Kept,
    Lists,
    adadelta,
    assert_refused,
    assert_same_lists,
    dense,
    dense_lists,
    kept_lists,
    lay_out,
    lists_for,
    needs_library,
    with_cache,
)
from torch import Tensor

pytestmark = needs_library

OWN = segment(3, 1.0, 0.9, 1e-7)
CALLS = {"dense": dense, "cached": with_cache}


def replaced(part: int, make: Callable[[Tensor], Tensor]) -> Callable[[Lists], None]:
    """Another tensor in the place of the last parameter's, or its gradient or state."""

    def spoil(made: Lists) -> None:
        made[part][-1] = make(made[part][-1])

    return spoil


DIFFERENT_SHAPE = "parameter 2: its tensors differ in shape"
OVERLAPS = "would be written to, but overlaps itself in memory"
BAD_LISTS: list[tuple[Callable[[Lists], Any], str]] = [
    (lambda made: made[2].pop(), "the call: the lists differ in length: 3 params, 3 grads, 2 square_avgs, 3 acc_deltas"),
    (lambda made: made[0].pop(), "the call: the lists differ in length: 2 params, 3 grads, 3 square_avgs, 3 acc_deltas"),
    (lambda made: made[1].append(made[1][0]), "the call: the lists differ in length: 3 params, 4 grads"),
    *((replaced(part, lambda x: torch.ones(4, 3)), DIFFERENT_SHAPE) for part in range(4)),
    *((replaced(part, lambda x: torch.ones(12)), DIFFERENT_SHAPE) for part in range(4)),
    (replaced(3, Tensor.double), "parameter 2: its state has another dtype than the parameter"),
    (replaced(2, Tensor.half), "parameter 2: its state has another dtype than the parameter"),
    (replaced(1, Tensor.long), "parameter 2: its gradient has a dtype that the kernels do not know"),
    (replaced(0, Tensor.bool), "parameter 2: it has a dtype that the kernels do not know"),
    (replaced(2, Tensor.int), "parameter 2: its square_avg has a dtype that the kernels do not know"),
    *(
        (replaced(part, lambda x: x.to(torch.complex64)), "parameter 2: of its tensors, some are complex and some are")
        for part in range(4)
    ),
    (replaced(0, lambda x: torch.ones(1).expand(3, 4)), f"parameter 2: it {OVERLAPS}"),
    (replaced(2, lambda x: torch.ones(3, 1).expand(3, 4)), f"parameter 2: its square_avg {OVERLAPS}"),
    (replaced(3, lambda x: torch.ones(4).expand(3, 4)), f"parameter 2: its acc_delta {OVERLAPS}"),
    (replaced(0, lambda x: torch.ones(6).unfold(0, 4, 1)), f"parameter 2: it {OVERLAPS}"),
    (replaced(0, lambda x: torch.ones(11).as_strided((3, 4), (3, 1))), f"parameter 2: it {OVERLAPS}"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "error"), BAD_LISTS)
def test_lists_that_do_not_fit_are_refused_unwritten(spoil: Any, error: str) -> None:
    made = dense_lists([(5,), (2, 2), (3, 4)])
    spoil(made)
    assert_refused(dense, made, *OWN, error=error)


BAD_AVERAGES: list[tuple[Callable[[Lists], Any], str]] = [
    (lambda made: made[4].pop(), "the call: the lists differ in length: 3 params, .*, 3 acc_deltas, 2 averages"),
    (lambda made: made[4].append(made[4][0]), "the call: the lists differ in length: 3 params, .* 4 averages"),
    (replaced(4, lambda x: torch.ones(4, 3)), DIFFERENT_SHAPE),
    (
        replaced(4, Tensor.half),
        "parameter 2: its average has another dtype than that in which the parameter is updated",
    ),
    (replaced(4, Tensor.double), "parameter 2: its average has another dtype than that in which"),
    (replaced(4, Tensor.long), "parameter 2: its average has a dtype that the kernels do not know"),
    (replaced(4, lambda x: x.to(torch.complex64)), "parameter 2: of its tensors, some are complex and some are real"),
    (replaced(4, lambda x: torch.ones(1).expand(3, 4)), f"parameter 2: its average {OVERLAPS}"),
]


@pytest.mark.parametrize(("spoil", "error"), BAD_AVERAGES)
def test_averages_that_do_not_fit_are_refused_unwritten(spoil: Any, error: str) -> None:
    made = dense_lists([(5,), (2, 2), (3, 4)])
    made.append(averages_of(made[0]))
    spoil(made)
    assert_refused(adadelta.adadelta_, made, [], *OWN, error=error)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_the_dtype_of_an_average(dtype: torch.dtype) -> None:
    """That of the update; no other is accepted."""
    params, grads, *states = dense_lists([(5,)], dtype)
    for other in DTYPES:
        made = [params, grads, *states, [torch.ones(5).to(other)]]
        if other is average_dtype(params[0]):
            adadelta.adadelta_(*made, [], *segment(1, 1.0, 0.9, 1e-7))
        else:
            error = "parameter 0: (its average has another dtype|of its tensors, some are complex)"
            with pytest.raises(RuntimeError, match=error):
                adadelta.adadelta_(*made, [], *segment(1, 1.0, 0.9, 1e-7))


@pytest.mark.parametrize("make", [lambda x: x.to("meta"), lambda x: x.to_sparse()], ids=["meta", "sparse"])
def test_averages_that_the_dispatcher_has_no_kernel_for(make: Callable[[Tensor], Tensor]) -> None:
    made = dense_lists([(5,), (3, 4)])
    before = [x.clone() for x in made[0]]
    averages = [torch.ones(5), make(torch.ones(3, 4))]
    with pytest.raises((RuntimeError, NotImplementedError), match=r"on the meta device has no elements|adadelta_"):
        adadelta.adadelta_(*made, averages, [], *segment(2, 1.0, 0.9, 1e-7))
    assert all(map(torch.equal, made[0], before))


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_written_if_the_last_parameter_is_refused(call: str, part: int) -> None:
    made = dense_lists([(5,), (2, 2), (3, 4)])
    made[part][-1] = torch.ones(3, 3, 3)
    assert_refused(CALLS[call], made, *OWN, error=DIFFERENT_SHAPE)


@pytest.mark.parametrize("make", [lambda x: x.to("meta"), lambda x: x.to_sparse()], ids=["meta", "sparse"])
@pytest.mark.parametrize("part", range(4))
def test_what_the_dispatcher_has_no_kernel_for(part: int, make: Callable[[Tensor], Tensor]) -> None:
    made = dense_lists([(5,), (2, 2), (3, 4)])
    made[part][-1] = make(made[part][-1])
    before = [x.clone() for x in (made[0][0], made[2][0], made[3][0])]
    with pytest.raises((RuntimeError, NotImplementedError), match=r"on the meta device has no elements|adadelta_"):
        dense(*made, *OWN)
    assert all(map(torch.equal, (made[0][0], made[2][0], made[3][0]), before))


# ---- State of another dtype, and masters ----------------------------------------------------------------------------

f32, f64, f16, bf16, c64 = torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64
ANOTHER = "its state has another dtype than "
MASTERLESS = "and has no master: has_masters must be 0"


def one_parameter(
    call: str, dtype: torch.dtype, state_dtypes: tuple[torch.dtype, torch.dtype], remainder: torch.dtype | None
) -> Lists:
    """In the order of the op; without a remainder for None."""
    ones = torch.ones(4)
    grads = (
        [[ones.to(dtype, copy=True)]]
        if call == "dense"
        else [[torch.tensor([[0, 2]])], [ones[:2].to(dtype, copy=True)]]
    )
    states = [[ones.to(state_dtype, copy=True)] for state_dtype in state_dtypes]
    averages: Lists = [[]] if call == "dense" else []
    remainders = [] if remainder is None else [ones.to(remainder, copy=True)]
    return [[ones.to(dtype, copy=True)], *grads, *states, *averages, remainders]


@pytest.mark.parametrize("call", ["dense", "sparse"])
@pytest.mark.parametrize(
    ("dtype", "state_dtypes", "remainder", "state_dtype", "has_masters", "error"),
    [
        *((dtype, (dtype, dtype), None, 0, False, None) for dtype in (f32, f64, f16, bf16, c64)),
        *((dtype, (f32, f32), None, 1, False, None) for dtype in (f32, f16, bf16)),
        *((dtype, (bf16, bf16), None, 2, False, None) for dtype in (f32, f16, bf16)),
        *((bf16, (state, state), torch.int16, code, True, None) for code, state in enumerate((bf16, f32, bf16))),
        *((dtype, (dtype, dtype), None, 0, True, None) for dtype in (f32, f64)),
        (f32, (bf16, bf16), None, 2, True, None),
        # The state.
        (f32, (bf16, bf16), None, 0, False, f"{ANOTHER}the parameter$"),
        (bf16, (f32, f32), None, 0, False, f"{ANOTHER}the parameter$"),
        (bf16, (f32, bf16), None, 1, False, f"{ANOTHER}its state_dtype$"),
        (bf16, (bf16, f32), None, 1, False, f"{ANOTHER}its state_dtype$"),
        (f32, (f32, f32), None, 2, False, f"{ANOTHER}its state_dtype$"),
        (f16, (f16, f16), None, 1, False, f"{ANOTHER}its state_dtype$"),
        (f32, (f16, f16), None, 0, False, f"{ANOTHER}the parameter$"),
        (bf16, (f16, f16), None, 2, False, f"{ANOTHER}its state_dtype$"),
        *((f64, (f64, f64), None, k, False, f"it is float64, .*state_dtype must be 0, not {k}$") for k in (1, 2)),
        *((c64, (c64, c64), None, k, False, f"it is complex, .*state_dtype must be 0, not {k}$") for k in (1, 2)),
        # The remainder.
        (bf16, (bf16, bf16), None, 0, True, "it has a master, but no remainder$"),
        (bf16, (bf16, bf16), torch.int16, 0, False, "it has a remainder, but has_masters is 0$"),
        *((x, (x, x), torch.int16, 0, True, "it has a remainder, but is not bfloat16$") for x in (f32, f64)),
        *((x, (x, x), torch.int16, 0, False, "it has a remainder, but is not bfloat16$") for x in (f32, f16)),
        (f16, (f16, f16), None, 0, True, f"it is float16, {MASTERLESS}$"),
        (c64, (c64, c64), None, 0, True, f"it is complex, {MASTERLESS}$"),
        *((bf16, (bf16, bf16), x, 0, True, "its remainder has another dtype than int16$") for x in (f16, bf16, f32)),
        *(
            (bf16, (bf16, bf16), x, 0, True, "its remainder has a dtype that the kernels do not know")
            for x in (torch.int32, torch.uint8, torch.uint16)
        ),
        (bf16, (torch.int16, bf16), torch.int16, 0, True, "its square_avg has a dtype that the kernels do not know"),
    ],
)
def test_state_and_remainders_that_a_segment_asks_for(
    call: str,
    dtype: torch.dtype,
    state_dtypes: tuple[torch.dtype, torch.dtype],
    remainder: torch.dtype | None,
    state_dtype: int,
    has_masters: bool,
    error: str | None,
) -> None:
    lists = one_parameter(call, dtype, state_dtypes, remainder)
    op = adadelta.adadelta_ if call == "dense" else adadelta.sparse_adadelta_
    own = segment(1, 1.0, 0.9, 1e-7, state_dtype=state_dtype, has_masters=has_masters)
    if error is not None:
        assert_refused(op, lists, *own, error=f"parameter 0: {error}")
        return
    before = lists[0][0].clone()
    op(*lists, *own)
    assert not torch.equal(lists[0][0], before)
    if call == "sparse":
        assert adadelta.first_invalid_indices(*lists).tolist() == [-1]


@pytest.mark.parametrize(
    ("dtype", "state_dtypes", "remainder", "error"),
    [
        (f32, (f16, f16), None, f"{ANOTHER}the parameter"),
        (f32, (f32, bf16), None, f"{ANOTHER}the parameter"),
        (f64, (f32, f32), None, f"{ANOTHER}the parameter"),
        (f32, (f32, f32), torch.int16, "it has a remainder, but is not bfloat16"),
        (f16, (f16, f16), torch.int16, "it is float16, and has no master"),
        (bf16, (bf16, bf16), f32, "its remainder has another dtype than int16"),
    ],
)
def test_what_no_segment_asks_for(
    dtype: torch.dtype, state_dtypes: tuple[torch.dtype, torch.dtype], remainder: torch.dtype | None, error: str
) -> None:
    lists = one_parameter("sparse", dtype, state_dtypes, remainder)
    with pytest.raises(RuntimeError, match=f"^torch_adadelta refuses parameter 0: {error}"):
        adadelta.first_invalid_indices(*lists)


MASTERS = segment(3, 1.0, 0.9, 1e-7, has_masters=True)
BAD_REMAINDERS: list[tuple[Callable[[Lists], Any], str]] = [
    (lambda made: made[5].pop(), "the call: the lists differ in length: 3 params, .*, 3 acc_deltas, 2 remainders"),
    (lambda made: made[5].append(made[5][0]), "the call: the lists differ in length: 3 params, .* 4 remainders"),
    (replaced(5, lambda x: x.t().contiguous()), DIFFERENT_SHAPE),
    (replaced(5, lambda x: x[:1, :1].expand(3, 4)), f"parameter 2: its remainder {OVERLAPS}"),
    (replaced(5, lambda x: x.to(c64)), "parameter 2: of its tensors, some are complex and some are real"),
]


@pytest.mark.parametrize(("spoil", "error"), BAD_REMAINDERS)
def test_remainders_that_do_not_fit_are_refused_unwritten(spoil: Any, error: str) -> None:
    made = kept_lists([(5,), (2, 2), (3, 4)], bf16, Kept(has_masters=True))
    spoil(made)
    assert_refused(adadelta.adadelta_, made, *MASTERS, error=error)


@pytest.mark.parametrize("call", ["dense", "cached", "sparse"])
def test_masters_without_remainders_are_refused_by_every_op(call: str) -> None:
    lists = lists_for(call)
    for tensors in lists:
        tensors[:] = [x if x.dtype is torch.int64 else x.to(bf16) for x in tensors]
    assert_refused(OPS[call], lists, *MASTERS, error="parameter 0: it has a master, but no remainder")


# ---- Tensors without their memory -----------------------------------------------------------------------------------


def freed(x: Tensor) -> None:
    x.untyped_storage().resize_(0)


def shortened(x: Tensor) -> None:
    x.untyped_storage().resize_(x.untyped_storage().nbytes() - 1)


def at_an_offset(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(count + 100, dtype=dtype)[100:]


NAMES = ["it", "its gradient", "its square_avg", "its acc_delta"]


@pytest.mark.parametrize("calls_before", [0, 1])
@pytest.mark.parametrize("check_only", [False, True])
@pytest.mark.parametrize(
    ("spoil", "which"), [(spoil, which) for spoil in (freed, shortened) for which in range(4) if (spoil, which) != (shortened, 1)]
)  # fmt: skip
@pytest.mark.parametrize("is_cached", [False, True])
def test_tensors_without_their_memory(
    is_cached: bool, spoil: Callable[[Tensor], None], which: int, check_only: bool, calls_before: int
) -> None:
    """As FSDP leaves parameters between uses; the second call of a kind is looked at less closely than the first.

    Not looked for: a gradient that is shorter. Nothing is written to it, and to ask for its storage costs each step.
    """
    lists = [[torch.ones(4), at_an_offset(5)] for _ in range(4)]
    params, grads, *states = lists
    number = adadelta.cache_accumulators(*states)

    def call(check_only: bool = False) -> None:
        own = segment(2, 1.0, 0.9, 1e-7)
        if is_cached:
            adadelta.adadelta_.cached(params, grads, number, *own, check_only=check_only)
        else:
            dense(*lists, *own, check_only=check_only)

    for _ in range(calls_before):
        call()
    spoil(lists[which][1])
    before = [tensors[0].clone() for tensors in lists]
    message = rf"parameter 1: {NAMES[which]} (has no|reaches beyond its) memory: its storage was resized"
    with pytest.raises(RuntimeError, match=f"^torch_adadelta refuses {message}"):
        call(check_only)
    for tensors, was in zip(lists, before, strict=True):
        assert torch.equal(tensors[0], was)


@pytest.mark.parametrize("calls_before", [0, 1])
@pytest.mark.parametrize("spoil", [freed, shortened])
@pytest.mark.parametrize(("part", "name"), [(4, "its average"), (5, "its remainder")])
def test_an_average_or_remainder_without_its_memory(
    part: int, name: str, spoil: Callable[[Tensor], None], calls_before: int
) -> None:
    dtypes = [*[torch.bfloat16] * 4, torch.float32, torch.int16]
    lists = [[torch.ones(4, dtype=dtype), at_an_offset(5, dtype)] for dtype in dtypes]
    own = segment(2, 1.0, 0.9, 1e-7, has_masters=True)
    for _ in range(calls_before):
        adadelta.adadelta_(*lists, *own)
    spoil(lists[part][1])
    before = lists[0][0].clone()
    error = f"parameter 1: {name} (has no|reaches beyond its) memory: its storage was resized"
    with pytest.raises(RuntimeError, match=f"^torch_adadelta refuses {error}"):
        adadelta.adadelta_(*lists, *own)
    assert torch.equal(lists[0][0], before)


# ---- Tensors that are accepted --------------------------------------------------------------------------------------


def test_a_tensor_of_any_layout_that_does_not_overlap() -> None:
    """Its strides may leave gaps, and be those of a permutation; a stride too small by one is an overlap."""
    for shape, strides, fits in (
        ((3, 4), (4, 1), True),
        ((3, 4), (1, 3), True),
        ((3, 4), (5, 1), True),
        ((3, 4), (1, 2), False),
        ((3, 4), (3, 1), False),
        ((2, 3, 4), (12, 4, 1), True),
        ((2, 3, 4), (1, 8, 2), True),
        ((2, 3, 4), (4, 8, 1), True),
        ((2, 3, 4), (3, 8, 1), False),
        ((2, 1, 4), (4, 0, 1), True),
    ):
        param = torch.ones(100).as_strided(shape, strides)
        lists = [[param], *([torch.ones(shape)] for _ in range(3))]
        if fits:
            dense(*lists, *segment(1, 1.0, 0.9, 1e-7))
        else:
            assert_refused(dense, lists, *segment(1, 1.0, 0.9, 1e-7), error=f"parameter 0: it {OVERLAPS}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [f32, bf16, c64], ids=dtype_name)
def test_tensors_of_any_layout_are_updated_as_contiguous_ones(dtype: torch.dtype, layout: str) -> None:
    """With gradients of another layout, and of another dtype."""
    own = segment(2, 1.0, 0.9, 1e-7)
    for other in LAYOUTS:
        expected = dense_lists([(2, 3, 1, 5)] * 2, dtype, (dtype, torch.complex128 if dtype.is_complex else f64))
        lists = [[lay_out(other if k == 1 else layout, x.clone()) for x in part] for k, part in enumerate(expected)]
        dense(*lists, *own)
        dense(*expected, *own)
        for part in (0, 2, 3):
            assert all(map(torch.equal, lists[part], expected[part])), other


@pytest.mark.parametrize("part", [0, 2, 3])
def test_complex_tensors_without_the_last_of_their_memory(part: int) -> None:
    lists = dense_lists([4], c64)
    shortened(lists[part][0])
    error = "parameter 0: .* reaches beyond its memory: its storage was resized"
    with pytest.raises(RuntimeError, match=f"^torch_adadelta refuses {error}"):
        dense(*lists, *segment(1, 1.0, 0.9, 1e-7))


def test_state_and_remainders_are_those_of_their_segment() -> None:
    made = [kept_lists([5], dtype, Kept(state)) for dtype, state in ((f32, bf16), (f32, f32))]
    lists = [[x for one in made for x in one[k]] for k in range(6)]
    codes = [segment(1, 1.0, 0.9, 1e-7, state_dtype=code) for code in (2, 1)]
    adadelta.adadelta_(*lists, *segments(*codes))
    error = "parameter 0: its state has another dtype than its state_dtype"
    assert_refused(adadelta.adadelta_, lists, *segments(*reversed(codes)), error=error)
    masters = [segment(1, 1.0, 0.9, 1e-7, has_masters=has_masters) for has_masters in (True, False)]
    lists = kept_lists([5, 6], bf16, Kept(has_masters=True))
    error = "parameter 1: it has a remainder, but has_masters is 0"
    assert_refused(adadelta.adadelta_, lists, *segments(*masters), error=error)


# ---- Accumulators that are known ------------------------------------------------------------------------------------


def strided(*sizes_and_strides: tuple[int, ...]) -> Callable[[Tensor], Any]:
    return lambda x: x.set_(x.untyped_storage(), 0, *sizes_and_strides)


def reinterpreted(x: Tensor) -> None:
    x.data = x.view(torch.int32)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (Tensor.t_, None),
        (strided((3, 4), (4, 1)), "its tensors differ in shape"),
        (strided((16,), (1,)), "its tensors differ in shape"),
        (reinterpreted, "its (square_avg|acc_delta) has a dtype that the kernels do not know"),
    ],
    ids=["strides", "sizes", "dimensions", "dtype"],
)
@pytest.mark.parametrize("which", [2, 3])
def test_a_cached_accumulator_that_changes_in_its_memory(
    which: int, change: Callable[[Tensor], Any], error: str | None
) -> None:
    cached, plain = dense_lists([(4, 4)] * 3), dense_lists([(4, 4)] * 3)
    number = adadelta.cache_accumulators(*cached[2:])
    adadelta.adadelta_.cached(*cached[:2], number, *OWN)
    dense(*plain, *OWN)
    address = cached[which][1].data_ptr()
    change(cached[which][1])
    assert cached[which][1].data_ptr() == address
    if error is None:
        change(plain[which][1])
        adadelta.adadelta_.cached(*cached[:2], number, *OWN)
        dense(*plain, *OWN)
        assert_same_lists(cached, plain)
    else:
        call = adadelta.adadelta_.cached
        assert_refused(
            lambda *lists, **options: call(*lists[:2], number, *OWN, **options), cached, error=f"parameter 1: {error}"
        )
    adadelta.drop_accumulators(number)
