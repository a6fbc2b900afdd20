"""Which of two kinds of items must be partners, where each item has one, and only some pairs fit.

Items that fit the same items are alike, and are counted instead of looked at one by one: a thousand layers of one shape
are as quickly done as one.
"""

import itertools
from collections import deque
from collections.abc import Sequence


def components(fits: Sequence[Sequence[int]], count: int) -> list[tuple[list[int], list[int]]]:
    """The connected components of a bipartite graph that have a node on the left, in the order of these.

    Args:
        fits: for each node on the left, the nodes on the right that it is connected to.
        count: of the nodes on the right.
    """
    behind: list[list[int]] = [[] for _ in range(count)]
    for left, rights in enumerate(fits):
        for right in rights:
            behind[right].append(left)
    found = []
    seen_left: set[int] = set()
    seen_right: set[int] = set()
    for start in range(len(fits)):
        if start in seen_left:
            continue
        seen_left.add(start)
        lefts, rights = [start], []
        for left in lefts:  # which grows
            for right in fits[left]:
                if right in seen_right:
                    continue
                seen_right.add(right)
                rights.append(right)
                lefts += [other for other in behind[right] if other not in seen_left]
                seen_left.update(behind[right])
        found.append((sorted(lefts), sorted(rights)))
    return found


def certain_pairs(supply: Sequence[int], demand: Sequence[int], fits: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """The pairs that are in every perfect matching; none if there is no perfect matching.

    A pair of a matching can be exchanged if and only if an alternating cycle goes through it, that is, if both are in
    one strongly connected component of the graph in which pairs of the matching lead from the right to the left, and
    all others from the left to the right. Of items that have others like them, no pair is certain.

    Args:
        supply: how many items there are of each sort on the left.
        demand: the same on the right.
        fits: for each sort on the left, the sorts on the right that its items fit.
    """
    flow = _matched(supply, demand, fits)
    if flow is None:
        return []
    size = len(supply)
    after: list[list[int]] = [[] for _ in range(size + len(demand))]
    for left, rights in enumerate(fits):
        for right in rights:
            count = flow.get((left, right), 0)
            if count:
                after[size + right].append(left)
            if count < min(supply[left], demand[right]):
                after[left].append(size + right)
    component = _strong_components(after)
    return [
        (left, right)
        for (left, right), count in flow.items()
        if count == supply[left] == demand[right] == 1 and component[left] != component[size + right]
    ]


def _matched(
    supply: Sequence[int], demand: Sequence[int], fits: Sequence[Sequence[int]]
) -> dict[tuple[int, int], int] | None:
    """How many items of each sort are partners in one perfect matching; None if there is none."""
    if sum(supply) != sum(demand):
        return None
    flow: dict[tuple[int, int], int] = {}
    partners: list[set[int]] = [set() for _ in demand]  # of the sorts on the right, those with flow
    left_over, open_demand = list(supply), list(demand)
    for start in range(len(supply)):
        while left_over[start]:
            path = _augmenting(start, fits, partners, open_demand)
            if path is None:
                return None
            pairs = list(zip(path[::2], path[1::2], strict=True))  # to be made
            undone = list(zip(path[2::2], path[1::2], strict=False))
            count = min(left_over[start], open_demand[path[-1]], *(flow[pair] for pair in undone))
            for pair in pairs:
                flow[pair] = flow.get(pair, 0) + count
                partners[pair[1]].add(pair[0])
            for pair in undone:
                flow[pair] -= count
                if not flow[pair]:
                    del flow[pair]
                    partners[pair[1]].discard(pair[0])
            left_over[start] -= count
            open_demand[path[-1]] -= count
    return flow


def _augmenting(
    start: int, fits: Sequence[Sequence[int]], partners: Sequence[set[int]], open_demand: Sequence[int]
) -> list[int] | None:
    """A shortest path, left, right, left, …, right, from a sort on the left to one on the right that has room."""
    before_left: dict[int, int] = {}
    before_right: dict[int, int] = {}
    todo = deque([start])
    while todo:
        left = todo.popleft()
        for right in fits[left]:
            if right in before_right:
                continue
            before_right[right] = left
            if open_demand[right]:
                path = [right]
                while True:
                    path.append(before_right[path[-1]])
                    if path[-1] == start:
                        return path[::-1]
                    path.append(before_left[path[-1]])
            for other in partners[right]:
                if other != start and other not in before_left:
                    before_left[other] = right
                    todo.append(other)
    return None


def _strong_components(after: Sequence[Sequence[int]]) -> list[int]:
    """For each node of a directed graph the number of its strongly connected component (Tarjan, without recursion)."""
    count = len(after)
    number = [-1] * count
    low = [0] * count
    component = [-1] * count
    stack: list[int] = []
    numbers = itertools.count()
    for root in range(count):
        if number[root] >= 0:
            continue
        path = [(root, iter(after[root]))]
        number[root] = low[root] = next(numbers)
        stack.append(root)
        while path:
            node, rest = path[-1]
            for other in rest:
                if number[other] < 0:
                    number[other] = low[other] = next(numbers)
                    stack.append(other)
                    path.append((other, iter(after[other])))
                    break
                if component[other] < 0:
                    low[node] = min(low[node], number[other])
            else:
                path.pop()
                if path:
                    low[path[-1][0]] = min(low[path[-1][0]], low[node])
                if low[node] == number[node]:
                    while component[node] < 0:
                        component[stack.pop()] = node
    return component
