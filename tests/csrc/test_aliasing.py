"""Which memory the tensors of a call may share, as the ops see it; and accumulators that are replaced in a cache."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import assert_same_bits, gradients, segment
from torch import Tensor

from torch_adadelta.backends import kernels

pytestmark = pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")

adadelta: Any = torch.ops.torch_adadelta
Lists = list[list[Tensor]]


def lists_for(params: list[Tensor]) -> Lists:
    grads = [torch.full(p.shape, 0.5) for p in params]
    return [params, grads, *([torch.ones(p.shape) for p in params] for _ in range(2))]


def refused(lists: Lists, message: str) -> None:
    before = [[x.clone() for x in tensors] for tensors in lists]
    with pytest.raises(RuntimeError, match=rf"^torch_adadelta refuses {message}$"):
        adadelta.adadelta_(*lists, *segment(len(lists[0]), 1.0, 0.9, 1e-7))
    for tensors, copies in zip(lists, before, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_state_and_a_parameter_that_share_their_last_element(stride: int) -> None:
    base = torch.ones(19 * stride)
    lists = lists_for([base[: 9 * stride + 1 : stride], torch.ones(10)])
    lists[2][1] = base[9 * stride :: stride]
    refused(lists, "parameter 0: it and the square_avg of parameter 1 share memory that would be written to")
    lists[2][1] = base[9 * stride + 1 :: stride][:9]
    lists[0][1], lists[1][1], lists[3][1] = (torch.ones(9) for _ in range(3))
    adadelta.adadelta_(*lists, *segment(2, 1.0, 0.9, 1e-7))


def test_states_of_two_parameters() -> None:
    base = torch.ones(19)
    lists = lists_for([torch.ones(10), torch.ones(10)])
    lists[2][0], lists[3][1] = base[:10], base[9:]
    refused(lists, "parameter 0: its square_avg and the acc_delta of parameter 1 share memory that would be written to")
    lists[2][0], lists[3][1] = base[9:], base[:10]
    refused(lists, "parameter 0: its square_avg and the acc_delta of parameter 1 share memory that would be written to")


def test_a_gradient_inside_the_first_of_two_parameters_that_share_memory() -> None:
    """Behind the end of the second, which begins later: the ends of ranges that are in order need not be."""
    base = torch.ones(100)
    lists = lists_for([base, base[10:50], torch.ones(20)])
    lists[1][2] = base[60:80]
    refused(lists, "parameter 2: its gradient and parameter 0 share memory that would be written to")


def test_a_gradient_that_is_a_state() -> None:
    for state, name in ((2, "square_avg"), (3, "acc_delta")):
        lists = lists_for([torch.ones(4), torch.ones(4)])
        lists[1][1] = lists[state][1]
        refused(lists, f"parameter 1: its gradient and its {name} share memory")
        lists[1][1] = lists[state][0]
        refused(lists, f"parameter 1: its gradient and the {name} of parameter 0 share memory that would be written to")


@pytest.mark.parametrize("stride", [0, 1, 3, 1000])
def test_the_stride_of_a_dimension_of_one_element_is_no_overlap(stride: int) -> None:
    def make(own: tuple[int, ...]) -> Lists:
        params = [torch.arange(24.0).as_strided((3, 1, 4), own)]
        return [params, [torch.full((3, 1, 4), 0.5)], *([torch.ones(3, 1, 4)] for _ in range(2))]

    lists, expected = make((8, stride, 2)), make((8, 8, 2))
    for made in (lists, expected):
        adadelta.adadelta_(*made, *segment(1, 1.0, 0.9, 1e-7))
    for tensors, others in zip(lists, expected, strict=True):
        assert_same_bits(tensors[0], others[0])


# ---- Accumulators in a cache ----------------------------------------------------------------------------------------


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def large_lists() -> Lists:
    """So many, and so large, that a second thread looks at the accumulators."""
    params = [torch.ones(600) for _ in range(100)]
    grads = [gradients((600,), torch.float32, steps=1, seed=i)[0] for i in range(100)]
    return [params, grads, *([torch.zeros(600) for _ in params] for _ in range(2))]


def other_memory(x: Tensor) -> None:
    x.set_(torch.full((600,), 0.25))


def grown_memory(x: Tensor) -> None:
    x.untyped_storage().resize_(4 * 700)


def lazy_clone(x: Tensor) -> None:
    """PyTorch lets no parallel region write to one."""
    x.set_(torch._lazy_clone(x))


def other_strides(x: Tensor) -> None:
    x.set_(torch.full((1200,), 0.25)[::2])


@pytest.mark.parametrize("replace", [other_memory, grown_memory, lazy_clone, other_strides])
@pytest.mark.parametrize("which", [2, 3])
@pytest.mark.parametrize("place", [0, 99])
@pytest.mark.usefixtures("_two_threads")
def test_accumulators_that_are_replaced_while_they_are_cached(replace: Any, which: int, place: int) -> None:
    cached, plain = large_lists(), large_lists()
    number = adadelta.cache_accumulators(*cached[2:])
    own = segment(100, 1.0, 0.9, 1e-7)
    for step in range(4):
        if step == 2:
            for lists in (cached, plain):
                replace(lists[which][place])
        adadelta.adadelta_.cached(*cached[:2], number, *own)
        adadelta.adadelta_(*plain, *own)
    adadelta.drop_accumulators(number)
    for tensors, others in zip(cached, plain, strict=True):
        for x, y in zip(tensors, others, strict=True):
            assert_same_bits(x, y)


@pytest.mark.usefixtures("_two_threads")
def test_replaced_accumulators_that_do_not_fit_are_refused_and_then_forgotten() -> None:
    cached, plain = large_lists(), large_lists()
    number = adadelta.cache_accumulators(*cached[2:])
    own = segment(100, 1.0, 0.9, 1e-7)
    adadelta.adadelta_.cached(*cached[:2], number, *own)
    adadelta.adadelta_(*plain, *own)
    right = cached[3][50].clone()
    for wrong, message in (
        (torch.ones(599), "its tensors differ in shape"),
        (cached[2][40], "the acc_delta of parameter 50 share memory"),
    ):
        cached[3][50].set_(wrong)
        with pytest.raises(RuntimeError, match=message):
            adadelta.adadelta_.cached(*cached[:2], number, *own)
    cached[3][50].set_(right)
    adadelta.adadelta_.cached(*cached[:2], number, *own)
    adadelta.adadelta_(*plain, *own)
    adadelta.drop_accumulators(number)
    for tensors, others in zip(cached, plain, strict=True):
        for x, y in zip(tensors, others, strict=True):
            assert_same_bits(x, y)


def test_caches_that_take_turns() -> None:
    """Each cache has a workspace of its own."""
    made = [large_lists() for _ in range(3)]
    numbers = [adadelta.cache_accumulators(*lists[2:]) for lists in made[:2]]
    own = segment(100, 1.0, 0.9, 1e-7)
    for _ in range(3):
        for lists, number in zip(made, numbers, strict=False):
            adadelta.adadelta_.cached(*lists[:2], number, *own)
        adadelta.adadelta_(*made[2], *own)
    for number in numbers:
        adadelta.drop_accumulators(number)
    for lists in made[:2]:
        for x, y in zip(lists[0], made[2][0], strict=True):
            assert_same_bits(x, y)
