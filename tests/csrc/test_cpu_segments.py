"""csrc/cpu/segments.h: several segments in one call have the bits of a call for each."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import direct
import numpy as np
import pytest
import torch
from average_cases import averages_of
from cases import (
    LAYOUTS,
    REAL_DTYPES,
    Segments,
    assert_like_oracle,
    assert_same_bits,
    dtype_name,
    oracle_of,
    segment,
    segments,
    to_numpy,
)
from op_cases import (
    CALLS,
    HYPERPARAMETERS,
    ORACLE_HYPERPARAMETERS,
    Clip,
    Lists,
    assert_refused,
    assert_same_lists,
    dense_lists,
    lists_for,
    needs_library,
    sparse_lists,
    ways,
)
from reference.oracle import SparseGradient

pytestmark = needs_library

# Each of other hyperparameters, some of them Tensors; empty segments first, last and in between.
PARTS: list[tuple[int, tuple[Any, ...]]] = [
    (0, (9.0, 0.1, 1.0)),
    (2, (1.0, 0.95, 1e-7)),
    (3, (torch.tensor(0.5), 0.875, torch.tensor(1e-3, dtype=torch.float64))),
    (0, (torch.tensor(7.0), 0.1, 1.0, True)),
    (1, (0.25, torch.tensor([0.75], dtype=torch.bfloat16), 1e-5, True)),
    (4, (torch.tensor(2.0, dtype=torch.float16), 0.5, 0.0625)),
    (0, (9.0, 0.1, 1.0)),
]
SIZES = [size for size, _ in PARTS]
SHAPES = [(1, 2, 3, 5 + 7 * i) for i in range(sum(SIZES))]
SHAPES[3], SHAPES[-2] = (2, 0, 3, 1), (5, 7, 3, 401)
TABLES = [((9, 5), 1), ((40,), 1), ((3, 2, 6), 2), ((5, 8), 0), ((2, 0), 1)] * 2


def make(call: str, dtype: torch.dtype, layout: str = "contiguous") -> Lists:
    if call == "sparse":
        return sparse_lists(TABLES, dtype, count=29)
    lists = dense_lists(SHAPES, dtype)
    for part in (0, 2, 3):
        lists[part] = [LAYOUTS[layout](x.clone()) for x in lists[part]]
    return lists


def all_segments() -> Segments:
    return segments(*(segment(size, *values) for size, values in PARTS))


def parts() -> Iterator[tuple[slice, Segments]]:
    """The parameters of each segment that has some, and what a call for these takes."""
    for (size, values), end in zip(PARTS, itertools.accumulate(SIZES), strict=True):
        if size:
            yield slice(end - size, end), segment(size, *values)


def assert_like_calls_for_each(call: str, make: Callable[[], Lists], what: str = "", **options: Any) -> None:
    together, apart = make(), make()
    for _ in range(2):
        CALLS[call](*together, *all_segments(), **options)
        for part, own in parts():
            rest = {k: v[part] if k == "square_sums" else v for k, v in options.items()}
            CALLS[call](*(tensors[part] for tensors in apart), *own, **rest)
    assert_same_lists(together, apart, what)


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("dtype", [*REAL_DTYPES, torch.complex64], ids=dtype_name)
@pytest.mark.parametrize("call", CALLS)
def test_every_dtype(call: str, dtype: torch.dtype, layout: str) -> None:
    for way in ways((1, 3)):
        assert_like_calls_for_each(call, lambda: make(call, dtype, layout), way)


@pytest.mark.parametrize("options", [{"clipvalue": 0.3}, {"clipnorm": 0.7}, {"factor": 0.37}], ids=str)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("call", ["dense", "sparse"])
def test_gradient_options(call: str, dtype: torch.dtype, options: dict[str, float]) -> None:
    """Of which each parameter has its own norm."""
    given: dict[str, Any] = {**options, "grad_scale": torch.tensor(3.0)}
    if "clipnorm" in options:
        grads = make(call, dtype)[2 if call == "sparse" else 1]
        given["square_sums"] = direct.square_sums(grads, grads, grad_scale=given["grad_scale"])
    assert_like_calls_for_each(call, lambda: make(call, dtype), **given)


@pytest.mark.parametrize("call", CALLS)
def test_a_parameter_in_two_segments_is_updated_by_the_hyperparameters_of_each(call: str) -> None:
    def twice() -> Lists:
        lists = make(call, torch.float32)
        for part in lists if call != "sparse" else (lists[0], *lists[3:]):
            part[-1] = part[0]
        for part in lists[1:2] if call != "sparse" else lists[1:3]:
            part[-1] = part[0].clone()
        return lists

    for way in ways((1, 3)):
        assert_like_calls_for_each(call, twice, way)


def test_many_small_tensors_of_many_segments() -> None:
    """More than one thread's work, in segments of one and of several parameters."""
    counts = [1 + i % 5 for i in range(600)]
    all_of_them = segments(*(segment(count, 0.001 * i, 0.9, 1e-6) for i, count in enumerate(counts)))
    memory = [x[0].square() for x in dense_lists([sum(counts) * 40] * 1)[:2] * 2]

    def lists() -> Lists:
        return [list(x.clone().split(40)) for x in memory]

    apart = lists()
    for i, (count, end) in enumerate(zip(counts, itertools.accumulate(counts), strict=True)):
        own = segment(count, 0.001 * i, 0.9, 1e-6)
        CALLS["dense"](*(tensors[end - count : end] for tensors in apart), *own)
    expected = [[torch.cat(tensors)] for tensors in apart]
    for way in ways((1, 2, 3)):
        together = lists()
        CALLS["dense"](*together, *all_of_them)
        assert_same_lists([[torch.cat(tensors)] for tensors in together], expected, way)


@pytest.mark.parametrize("tensor_dtype", REAL_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_tensors_in_the_place_of_numbers(dtype: torch.dtype, tensor_dtype: torch.dtype) -> None:
    """Each is read as it is."""
    values = [torch.tensor(value, dtype=torch.float64).to(tensor_dtype) for value in (0.7, 0.93, 1e-4)]
    numbers = [value.item() for value in values]
    for mask in range(1, 8):
        chosen = [values[k] if mask >> k & 1 else numbers[k] for k in range(3)]
        by_number, by_tensor = dense_lists([70], dtype), dense_lists([70], dtype)
        CALLS["dense"](*by_number, *segment(1, *numbers))
        CALLS["dense"](*by_tensor, *segment(1, *chosen))
        assert_same_lists(by_tensor, by_number)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_the_values_of_each_segment_are_those_of_the_oracle(dtype: torch.dtype) -> None:
    lists = dense_lists([40, 50, 60], dtype)
    rows = [(1.0, 0.95, 1e-7, False), (0.5, 0.875, 1e-3, True), (0.25, 0.5, 0.0625, False)]
    for i, (lr, rho, epsilon, maximize) in enumerate(rows):
        by_oracle = oracle_of(lists[0][i], learning_rate=lr, rho=rho, epsilon=epsilon, maximize=maximize)
        by_oracle.step(to_numpy(lists[1][i]))
        row = [[tensors[i].clone()] for tensors in lists]
        CALLS["dense"](
            *row, *segments(segment(0, 9.0, 0.1, 1.0), segment(1, lr, float(np.float32(rho)), epsilon, maximize))
        )
        assert_like_oracle(row[0][0], {"square_avg": row[2][0], "acc_delta": row[3][0]}, by_oracle)


def test_the_average_of_each_segment_has_its_momentum() -> None:
    lists = dense_lists([40, 50, 60])
    averages, rows = averages_of(lists[0]), [(0.9, True), (0.0, False), (torch.tensor(0.7), False)]
    before = [x.clone() for x in averages]
    own = (segment(1, *HYPERPARAMETERS, ema_momentum=momentum, overwrites=is_on) for momentum, is_on in rows)
    CALLS["dense"](*lists, *segments(*own), averages=averages)
    alone = dense_lists([40, 50, 60])
    CALLS["dense"](*alone, *segment(3, *HYPERPARAMETERS))
    for (momentum, is_on), param, average, was, updated in zip(rows, lists[0], averages, before, alone[0], strict=True):
        m = torch.tensor(float(momentum))
        expected = m * was + (1 - m) * updated
        assert_same_bits(average, expected)
        assert_same_bits(param, expected if is_on else updated)


@pytest.mark.parametrize(
    ("sizes", "listed"),
    [
        ([2], "2"),
        ([4], "4"),
        ([], ""),
        ([2, 0], "2, 0"),
        ([4, -1], "4, -1"),
        ([-1, 4], "-1, 4"),
        ([2**63 - 1, 2**63 - 1, 5], "9223372036854775807, 9223372036854775807, 5"),
    ],
)
@pytest.mark.parametrize("call", CALLS)
def test_sizes_that_do_not_add_up(call: str, sizes: list[int], listed: str) -> None:
    own = segments(*(segment(size, *HYPERPARAMETERS) for size in sizes))
    error = f"the call: the sizes of the segments are {listed}, which do not add up to 3 parameters"
    assert_refused(CALLS[call], lists_for(call), *own, error=error)


@pytest.mark.parametrize("is_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("call", ["dense", "sparse"])
def test_a_factor_of_float64_is_that_of_the_oracle(call: str, is_tensor: bool) -> None:
    """One that no float32 holds, for parameters of float64."""
    factor = {"factor_tensor": torch.tensor(0.37, dtype=torch.float64)} if is_tensor else {"factor": 0.37}
    lists = make(call, torch.float64)
    params, grads = lists[0], lists[2 if call == "sparse" else 1]
    oracles = [oracle_of(p, **ORACLE_HYPERPARAMETERS) for p in params]
    for _ in range(2):
        CALLS[call](*lists, *segment(len(params), *HYPERPARAMETERS), **factor)
    for i, (param, square_avg, acc_delta, by_oracle) in enumerate(zip(params, *lists[-2:], oracles, strict=True)):
        grad = Clip(factor=0.37).apply(param, grads[i])
        for _ in range(2):
            by_oracle.step(SparseGradient(lists[1][i].numpy(), grad) if call == "sparse" else grad)
        assert_like_oracle(param, {"square_avg": square_avg, "acc_delta": acc_delta}, by_oracle, str(i))
