"""csrc/aliasing.h: the memory that the tensors of a call may share, as every op sees it.

That Python's rule and this one agree on drawn tensors is a test of torch_adadelta/step/validation.py.
"""

from collections.abc import Callable

import pytest
import torch
from cases import segment
from op_cases import (
    CALLS,
    Kept,
    Lists,
    adadelta,
    assert_refused,
    assert_repeated_in_order,
    assert_same_lists,
    dense,
    dense_lists,
    kept_lists,
    needs_library,
    sparse_lists,
)
from torch import Tensor

pytestmark = needs_library

OWN = segment(3, 1.0, 0.9, 1e-7)
SHARED = " share memory that would be written to$"


def lists_for(call: str) -> Lists:
    if call == "sparse":
        return sparse_lists([((4, 5), 1)] * 3)
    return dense_lists([(4, 5)] * 3)


def overlapping(base: Tensor, begin: int, stride: int) -> tuple[Tensor, Tensor]:
    """Two tensors, the first from the beginning of the memory, the second from an element on."""
    return tuple(base[at : at + 19 * stride + 1 : stride].view(4, 5) for at in (0, begin))  # type: ignore[return-value]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("one", "other", "error"),
    [
        ((0, 0), (0, 1), "parameter 0: it and parameter 1"),
        ((0, 0), (2, 1), "parameter 0: it and the square_avg of parameter 1"),
        ((3, 0), (0, 2), "parameter 0: its acc_delta and parameter 2"),
        ((2, 0), (2, 1), "parameter 0: its square_avg and the square_avg of parameter 1"),
        ((2, 1), (3, 2), "parameter 1: its square_avg and the acc_delta of parameter 2"),
        ((1, 1), (0, 0), "parameter 1: its gradient and parameter 0"),
        ((1, 0), (3, 2), "parameter 0: its gradient and the acc_delta of parameter 2"),
    ],
)
def test_their_last_or_first_element(
    one: tuple[int, int], other: tuple[int, int], error: str, call: str, stride: int
) -> None:
    """Whichever comes first in memory; and none where they only touch."""
    for is_swapped in (False, True):
        for begin in (19 * stride, 19 * stride + 1):
            lists = lists_for(call)
            first, second = (other, one) if is_swapped else (one, other)
            parts = (0, 2, 1, 3, 4) if call == "sparse" else (0, 1, 2, 3)
            slots = [0, 2, 3, 4] if call == "sparse" else list(parts)
            tensors = overlapping(torch.ones(40 * stride + 40), begin, stride)
            if call == "sparse" and stride > 1 and 1 in (one[0], other[0]):
                return  # values must be contiguous
            if call == "sparse" and 1 in (one[0], other[0]):
                for which in (one, other):
                    if which[0] == 1:
                        lists[1][which[1]] = lists[1][which[1]][:, :4]
            for (slot, row), tensor in zip((first, second), tensors, strict=True):
                lists[slots[slot]][row] = tensor
            if begin == 19 * stride:
                assert_refused(CALLS[call], lists, *OWN, error=error + SHARED)
            else:
                CALLS[call](*lists, *OWN)


@pytest.mark.parametrize(
    ("slot", "other", "error"),
    [
        (0, 1, "it and its gradient"),
        (0, 2, "it and its square_avg"),
        (0, 3, "it and its acc_delta"),
        (1, 2, "its gradient and its square_avg"),
        (1, 3, "its gradient and its acc_delta"),
        (2, 3, "its square_avg and its acc_delta"),
    ],
)
@pytest.mark.parametrize("call", CALLS)
def test_two_tensors_of_one_parameter(call: str, slot: int, other: int, error: str) -> None:
    lists = lists_for(call)
    slots = [0, 2, 3, 4] if call == "sparse" else [0, 1, 2, 3]
    base = torch.ones(60)
    if call == "sparse" and slot == 1:
        lists[1][1] = lists[1][1][:, :4]
    if call == "sparse" and other == 1:
        lists[1][1] = lists[1][1][:, :4]
    lists[slots[slot]][1], lists[slots[other]][1] = base[:20].view(4, 5), base[19:39].view(4, 5)
    assert_refused(CALLS[call], lists, *OWN, error=f"parameter 1: {error} share memory$")


@pytest.mark.parametrize(
    ("part", "row", "error"),
    [
        (0, 1, "parameter 1: it and its average share memory$"),
        (1, 1, "parameter 1: its gradient and its average share memory$"),
        (2, 1, "parameter 1: its square_avg and its average share memory$"),
        (3, 1, "parameter 1: its acc_delta and its average share memory$"),
        (0, 0, f"parameter 0: it and the average of parameter 1{SHARED}"),
        (0, 2, f"parameter 1: its average and parameter 2{SHARED}"),
        (1, 0, f"parameter 0: its gradient and the average of parameter 1{SHARED}"),
        (1, 2, f"parameter 2: its gradient and the average of parameter 1{SHARED}"),
        (3, 2, f"parameter 1: its average and the acc_delta of parameter 2{SHARED}"),
        (4, 0, f"parameter 0: its average and the average of parameter 1{SHARED}"),
    ],
)
def test_an_average_has_memory_of_its_own(part: int, row: int, error: str) -> None:
    """An element in common is refused, none is not, whatever was found of the call before."""
    for begin in (19, 20):
        lists = lists_for("dense")
        lists.append([torch.ones(4, 5) for _ in range(3)])
        adadelta.adadelta_(*lists, [], *OWN)
        tensors = overlapping(torch.ones(60), begin, 1)
        lists[4][1], lists[part][row] = tensors
        if begin == 19:
            assert_refused(adadelta.adadelta_, lists, [], *OWN, error=error)
        else:
            adadelta.adadelta_(*lists, [], *OWN)


@pytest.mark.parametrize(
    ("part", "row", "error"),
    [
        (0, 1, "parameter 1: it and its remainder share memory$"),
        (1, 1, "parameter 1: its gradient and its remainder share memory$"),
        (3, 1, "parameter 1: its acc_delta and its remainder share memory$"),
        (0, 0, f"parameter 0: it and the remainder of parameter 1{SHARED}"),
        (1, 2, f"parameter 2: its gradient and the remainder of parameter 1{SHARED}"),
        (2, 2, f"parameter 1: its remainder and the square_avg of parameter 2{SHARED}"),
        (5, 0, f"parameter 0: its remainder and the remainder of parameter 1{SHARED}"),
    ],
)
def test_a_remainder_has_memory_of_its_own(part: int, row: int, error: str) -> None:
    own = segment(3, 1.0, 0.9, 1e-7, has_masters=True)
    for begin in (19, 20):
        lists = kept_lists([(4, 5)] * 3, torch.bfloat16, Kept(has_masters=True))
        adadelta.adadelta_(*lists, *own)
        tensors = overlapping(torch.ones(60, dtype=torch.bfloat16), begin, 1)
        lists[5][1], lists[part][row] = tensors[0].view(torch.int16), tensors[1].view(lists[part][row].dtype)
        if begin == 19:
            assert_refused(adadelta.adadelta_, lists, *own, error=error)
        else:
            adadelta.adadelta_(*lists, *own)


def test_a_parameter_listed_twice_has_the_same_average_twice() -> None:
    lists = lists_for("dense")
    lists.append([torch.ones(4, 5) for _ in range(3)])
    for part in (0, 2, 3, 4):
        lists[part][2] = lists[part][0]
    adadelta.adadelta_(*lists, [], *OWN)
    lists[4][2] = torch.ones(4, 5)
    shared = " and the square_avg of parameter 2| and the acc_delta of parameter 2| and parameter 2"
    with pytest.raises(RuntimeError, match=f"parameter 0: it(s square_avg|s acc_delta|)({shared}){SHARED}"):
        adadelta.adadelta_(*lists, [], *OWN)


@pytest.mark.parametrize("part", [0, 2, 3])
@pytest.mark.parametrize("call", ["dense", "cached"])
def test_a_parameter_listed_twice_has_all_its_state_twice(call: str, part: int) -> None:
    """With one of the three another, it is no longer the same parameter."""
    lists = lists_for(call)
    for same in (0, 2, 3):
        lists[same][2] = lists[same][0]
    CALLS[call](*lists, *OWN)
    lists[part][2] = torch.ones(4, 5)
    shared = " and the square_avg of parameter 2| and the acc_delta of parameter 2| and parameter 2"
    with pytest.raises(RuntimeError, match=f"parameter 0: it(s square_avg|s acc_delta|)({shared}){SHARED}"):
        CALLS[call](*lists, *OWN)


@pytest.mark.parametrize("call", CALLS)
def test_a_parameter_listed_twice_is_updated_in_order(call: str) -> None:
    assert_repeated_in_order(call)


def test_a_longer_view_of_a_parameter_is_not_the_same_parameter() -> None:
    memory = [torch.ones(9) for _ in range(3)]
    lists = [
        [memory[0][:6], memory[0]],
        [torch.ones(6), torch.ones(9)],
        *([x[:6], x.clone()] for x in memory[1:]),
    ]
    assert_refused(CALLS["dense"], lists, *segment(2, 1.0, 0.9, 1e-7), error=f"parameter 0: it and parameter 1{SHARED}")


def test_what_gradients_may_share() -> None:
    """All of them one, or some elements, or those that lie between the parameters."""
    memory = torch.arange(100.0)
    expected = dense_lists([(4, 5)] * 3)
    lists = dense_lists([(4, 5)] * 3)
    grads: list[Callable[[int], Tensor]] = [
        lambda i: memory[:20].view(4, 5),
        lambda i: memory[i : i + 20].view(4, 5),
        lambda i: memory[i : i + 1].expand(4, 5),
    ]
    for grad in grads:
        lists[1] = [grad(i) for i in range(3)]
        expected[1] = [grad(i).clone() for i in range(3)]
        CALLS["dense"](*lists, *OWN)
        CALLS["dense"](*expected, *OWN)
        for part in (0, 2, 3):
            assert all(map(torch.equal, lists[part], expected[part]))


def test_views_of_one_buffer() -> None:
    """Parameters, gradients and state in one memory, none of which touch."""
    memory = torch.rand(12 * 20, generator=torch.Generator().manual_seed(0))
    lists = [[memory[20 * (4 * i + k) :][:20] for i in range(3)] for k in range(4)]
    expected = [[x.clone() for x in tensors] for tensors in lists]
    for made in (lists, expected):
        CALLS["dense"](*made, *OWN)
    for tensors, others in zip(lists, expected, strict=True):
        assert all(map(torch.equal, tensors, others))


@pytest.mark.parametrize("call", ["dense", "cached"])
def test_memory_that_is_known_from_the_call_before(call: str) -> None:
    """A call compares each tensor's memory with what it was; what was refused is not known to be good."""
    good, own = dense_lists([(20,)] * 3), OWN
    number = adadelta.cache_accumulators(*good[2:])

    def update(lists: Lists) -> None:
        if call == "cached":
            adadelta.adadelta_.cached(*lists[:2], number, *own)
        else:
            dense(*lists, *own)

    twin = dense_lists([(20,)] * 3)
    for part, tensor in ((1, good[2][0]), (1, good[0][0]), (1, good[0][2]), (0, good[0][0]), (0, good[3][1])):
        for _ in range(2):
            bad = [list(x) for x in good]
            bad[part][2] = tensor
            with pytest.raises(RuntimeError, match="share memory"):
                update(bad)
        update(good)
        dense(*twin, *own)
    own = segment(2, 1.0, 0.9, 1e-7)
    if call == "dense":  # fewer, and then as many again
        update([x[:2] for x in good])
        dense(*(x[:2] for x in twin), *own)
        bad = [list(x) for x in good]
        bad[2][2] = good[2][1]
        own = OWN
        with pytest.raises(RuntimeError, match="share memory"):
            update(bad)
    adadelta.drop_accumulators(number)
    assert_same_lists(good, twin)


def test_the_memory_of_a_parameter_that_is_gone() -> None:
    """It is no longer written to: a gradient of the next call may lie there."""
    lists = dense_lists([(20,)] * 3)
    dense(*lists, *OWN)
    fewer = [lists[0][:2], [lists[0][2], lists[1][1]], *(states[:2] for states in lists[2:])]
    expected = [[x.clone() for x in tensors] for tensors in fewer]
    for made in (fewer, expected):
        dense(*made, *segment(2, 1.0, 0.9, 1e-7))
    assert_same_lists(fewer, expected)


def test_empty_tensors_share_nothing() -> None:
    memory = torch.ones(20)
    lists = [[memory, memory[5:5]], [torch.ones(20), memory[3:3]], *([torch.ones(20), memory[7:7]] for _ in range(2))]
    CALLS["dense"](*lists, *segment(2, 1.0, 0.9, 1e-7))


@pytest.mark.parametrize("stride", [0, 1, 3, 1000])
def test_the_stride_of_a_dimension_of_one_element_is_no_overlap(stride: int) -> None:
    def make(own: tuple[int, ...]) -> Lists:
        params = [torch.arange(24.0).as_strided((3, 1, 4), own)]
        return [params, [torch.full((3, 1, 4), 0.5)], *([torch.ones(3, 1, 4)] for _ in range(2))]

    lists, expected = make((8, stride, 2)), make((8, 8, 2))
    for made in (lists, expected):
        dense(*made, *segment(1, 1.0, 0.9, 1e-7))
    assert_same_lists(lists, expected)
