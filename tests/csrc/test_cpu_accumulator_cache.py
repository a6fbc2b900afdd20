"""csrc/cpu/accumulator_cache: accumulators that are handed over once, and replaced meanwhile."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import segment
from op_cases import Lists, adadelta, assert_same_lists, dense, dense_lists, needs_library
from torch import Tensor

pytestmark = needs_library

HYPERPARAMETERS = (1.0, 0.9, 1e-7)


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def lists_of(count: int) -> Lists:
    """100 of them are work for two threads."""
    lists = dense_lists([600] * count)
    for state in lists[2:]:
        state[:] = [torch.zeros(600) for _ in state]
    return lists


def other_memory(x: Tensor) -> None:
    x.set_(torch.full((600,), 0.25))


def grown_memory(x: Tensor) -> None:
    x.untyped_storage().resize_(4 * 700)


def lazy_clone(x: Tensor) -> None:
    """PyTorch lets no parallel region write to one."""
    x.set_(torch._lazy_clone(x))


def other_strides(x: Tensor) -> None:
    x.set_(torch.full((1200,), 0.25)[::2])


def another_shift(x: Tensor) -> None:
    x.set_(x.untyped_storage(), 0, (600,), (1,)) if x.storage_offset() else x.set_(torch.full((601,), 0.25)[1:])


@pytest.mark.parametrize("replace", [other_memory, grown_memory, lazy_clone, other_strides, another_shift])
@pytest.mark.parametrize("which", [2, 3])
@pytest.mark.parametrize(("count", "place"), [(3, 2), (100, 0), (100, 99)])
def test_accumulators_that_are_replaced_while_they_are_cached(replace: Any, which: int, count: int, place: int) -> None:
    cached, plain = lists_of(count), lists_of(count)
    number = adadelta.cache_accumulators(*cached[2:])
    own = segment(count, *HYPERPARAMETERS)
    for step in range(4):
        if step == 2:
            for lists in (cached, plain):
                replace(lists[which][place])
        adadelta.adadelta_.cached(*cached[:2], number, *own)
        dense(*plain, *own)
    adadelta.drop_accumulators(number)
    assert_same_lists([[x.clone() for x in tensors] for tensors in cached], [[x.clone() for x in t] for t in plain])


@pytest.mark.parametrize("count", [60, 100])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda lists: torch.ones(599), "parameter 50: its tensors differ in shape"),
        (lambda lists: torch.ones(600, 1), "parameter 50: its tensors differ in shape"),
        (lambda lists: lists[2][40], "parameter 40: its square_avg and the acc_delta of parameter 50 share memory"),
        (lambda lists: lists[0][50], "parameter 50: it and its acc_delta share memory"),
        (lambda lists: torch.ones(1).expand(600), "parameter 50: its acc_delta would be written to, but overlaps"),
    ],
)
def test_replaced_accumulators_that_do_not_fit_are_refused_and_then_forgotten(
    count: int, wrong: Any, message: str
) -> None:
    cached, plain = lists_of(count), lists_of(count)
    number = adadelta.cache_accumulators(*cached[2:])
    own = segment(count, *HYPERPARAMETERS)
    adadelta.adadelta_.cached(*cached[:2], number, *own)
    dense(*plain, *own)
    right = cached[3][50].clone()
    for _ in range(2):
        cached[3][50].set_(wrong(cached))
        with pytest.raises(RuntimeError, match=f"^torch_adadelta refuses {message}"):
            adadelta.adadelta_.cached(*cached[:2], number, *own)
    cached[3][50].set_(right)
    adadelta.adadelta_.cached(*cached[:2], number, *own)
    dense(*plain, *own)
    adadelta.drop_accumulators(number)
    assert_same_lists(cached, plain)


def test_accumulators_of_another_dtype() -> None:
    cached = lists_of(3)
    number = adadelta.cache_accumulators(*cached[2:])
    own = segment(3, *HYPERPARAMETERS)
    adadelta.adadelta_.cached(*cached[:2], number, *own)
    cached[2][1].data = cached[2][1].double()
    with pytest.raises(RuntimeError, match="parameter 1: its state has another dtype than the parameter"):
        adadelta.adadelta_.cached(*cached[:2], number, *own)


def test_caches_that_take_turns() -> None:
    """Each cache has a workspace of its own, and so has a call without."""
    made = [lists_of(100) for _ in range(3)]
    numbers = [adadelta.cache_accumulators(*lists[2:]) for lists in made[:2]]
    assert numbers[0] != numbers[1]
    own = segment(100, *HYPERPARAMETERS)
    for _ in range(3):
        for lists, number in zip(made, numbers, strict=False):
            adadelta.adadelta_.cached(*lists[:2], number, *own)
        dense(*made[2], *own)
    adadelta.drop_accumulators(numbers[0])
    adadelta.adadelta_.cached(*made[1][:2], numbers[1], *own)
    dense(*made[2], *own)
    adadelta.drop_accumulators(numbers[1])
    assert_same_lists(made[1], made[2])


def test_a_number_is_never_given_twice() -> None:
    made = [lists_of(3) for _ in range(4)]
    own = segment(3, *HYPERPARAMETERS)
    numbers = [adadelta.cache_accumulators(*lists[2:]) for lists in made[:2]]
    adadelta.drop_accumulators(numbers[0])
    numbers.append(adadelta.cache_accumulators(*made[2][2:]))
    assert len(set(numbers)) == 3
    for lists, number in zip(made[1:3], numbers[1:], strict=True):
        adadelta.adadelta_.cached(*lists[:2], number, *own)
    adadelta.drop_accumulators(numbers[2])
    dense(*made[3], *own)
    for lists in made[1:3]:
        assert_same_lists(lists, made[3])
    adadelta.adadelta_.cached(*made[1][:2], numbers[1], *own)
    adadelta.drop_accumulators(numbers[1])


@pytest.mark.parametrize("count", [4, 100])
def test_other_gradients_and_parameters_for_the_same_accumulators(count: int) -> None:
    cached, plain = lists_of(count), lists_of(count)
    number = adadelta.cache_accumulators(*cached[2:])
    own = segment(count, *HYPERPARAMETERS)
    for step in range(4):
        for lists in (cached, plain):
            lists[step % 2][count - 1] = torch.full((600,), 0.5 * step)
        adadelta.adadelta_.cached(*cached[:2], number, *own)
        dense(*plain, *own)
    for part in (0, 1):
        short = [[*x[:-1], torch.ones(3)] if k == part else x for k, x in enumerate(cached[:2])]
        with pytest.raises(RuntimeError, match=f"parameter {count - 1}: its tensors differ in shape"):
            adadelta.adadelta_.cached(*short, number, *own)
    with pytest.raises(RuntimeError, match="the lists differ in length"):
        adadelta.adadelta_.cached(*(x[1:] for x in cached[:2]), number, *segment(count - 1, *HYPERPARAMETERS))
    adadelta.drop_accumulators(number)
    assert_same_lists(cached, plain)


def test_numbers_under_which_no_accumulators_are_cached() -> None:
    params, grads, *states = lists_of(2)
    before = [x.clone() for x in params]
    number = adadelta.cache_accumulators(*states)
    adadelta.drop_accumulators(number)
    adadelta.drop_accumulators(number)  # does nothing: a finalizer must not fail
    for wrong in (number, 0, -1, 2**63 - 1):
        message = f"^torch_adadelta refuses the call: no accumulators are cached under the number {wrong}$"
        with pytest.raises(RuntimeError, match=message):
            adadelta.adadelta_.cached(params, grads, wrong, *segment(2, *HYPERPARAMETERS))
    assert all(map(torch.equal, params, before))
    with pytest.raises(RuntimeError, match="the lists differ in length: 2 square_avgs, 1 acc_deltas"):
        adadelta.cache_accumulators(states[0], states[1][:1])
