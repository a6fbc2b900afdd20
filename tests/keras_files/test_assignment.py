"""Which pairs must be partners, against all perfect matchings, one by one."""

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_adadelta.keras.assignment import certain_pairs, components


def by_force(supply: list[int], demand: list[int], fits: list[list[int]]) -> set[tuple[int, int]]:
    """The pairs of items that are in every perfect matching, as pairs of sorts."""
    lefts = [sort for sort, count in enumerate(supply) for _ in range(count)]
    rights = [sort for sort, count in enumerate(demand) for _ in range(count)]
    if len(lefts) != len(rights):
        return set()
    matchings = [
        {(left, place) for left, place in enumerate(places)}
        for places in itertools.permutations(range(len(rights)))
        if all(rights[place] in fits[lefts[left]] for left, place in enumerate(places))
    ]
    always = set.intersection(*matchings) if matchings else set()
    return {(lefts[left], rights[place]) for left, place in always}


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[int], list[int], list[list[int]]]:
    supply = draw(st.lists(st.integers(1, 2), min_size=1, max_size=5))
    demand = draw(st.lists(st.integers(1, 2), min_size=1, max_size=5))
    fits = [[right for right in range(len(demand)) if draw(st.booleans())] for _ in supply]
    return supply, demand, fits


@given(graphs())
def test_a_pair_is_certain_if_it_is_in_every_perfect_matching(
    graph: tuple[list[int], list[int], list[list[int]]],
) -> None:
    if max(sum(graph[0]), sum(graph[1])) <= 7:
        found = certain_pairs(*graph)
        assert len(found) == len(set(found))
        assert set(found) == by_force(*graph)


@given(st.permutations(range(6)), st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_graphs_that_have_a_perfect_matching(places: list[int], more: set[tuple[int, int]]) -> None:
    """Which few of the graphs above have."""
    fits = [sorted({place, *(right for other, right in more if other == left)}) for left, place in enumerate(places)]
    assert set(certain_pairs([1] * 6, [1] * 6, fits)) == by_force([1] * 6, [1] * 6, fits)


@pytest.mark.parametrize(
    ("fits", "expected"),
    [
        ([[0], [0, 1], [1, 2]], {(0, 0), (1, 1), (2, 2)}),  # one after the other
        ([[0, 1], [0, 1], [1, 2]], {(2, 2)}),  # two can be exchanged
        ([[0, 1], [1, 2], [2, 0]], set()),  # all three in a circle
        ([[0, 1], [0], [0, 2]], {(0, 1), (1, 0), (2, 2)}),
        ([[0], [0], [1, 2]], set()),  # no perfect matching
        ([[], [0, 1], [1, 2]], set()),
    ],
)
def test_examples(fits: list[list[int]], expected: set[tuple[int, int]]) -> None:
    assert set(certain_pairs([1] * 3, [1] * 3, fits)) == expected


def test_of_items_that_are_alike_none_is_certain_and_what_they_leave_is() -> None:
    assert certain_pairs([2, 1], [2, 1], [[0], [0, 1]]) == [(1, 1)]
    assert certain_pairs([2], [1, 1], [[0, 1]]) == []
    assert certain_pairs([2, 1], [1, 2], [[0, 1], [1]]) == []
    assert certain_pairs([3], [2], [[0]]) == []


def test_components() -> None:
    assert components([[1], [0], [1, 3], []], 5) == [([0, 2], [1, 3]), ([1], [0]), ([3], [])]
    assert components([], 3) == []


def test_a_long_chain_needs_no_recursion_and_little_time() -> None:
    """Each item but the first fits its own partner and that of the one before: only one assignment is possible."""
    count = 3000
    fits = [[place] if not place else [place - 1, place] for place in range(count)]
    begin = time.process_time()
    assert set(certain_pairs([1] * count, [1] * count, fits)) == {(place, place) for place in range(count)}
    assert certain_pairs([1] * count, [1] * count, [*fits[1:], [0, count - 1]]) == []
    assert time.process_time() - begin < 20
