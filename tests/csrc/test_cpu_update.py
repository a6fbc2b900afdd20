"""csrc/cpu/update.cpp and the loops of kernels/update.h: every dtype and gradient option against the NumPy oracle."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import direct
import numpy as np
import pytest
import torch
from average_cases import HYPERPARAMETERS as AVERAGED
from average_cases import MOMENTA, assert_averaged, averages_of, laid_like, oracle_after
from cases import (
    COMPLEX_DTYPES,
    DTYPES,
    LAYOUTS,
    REAL_DTYPES,
    assert_same_bits,
    dtype_name,
    gradients,
    randn,
    segment,
    segments,
)
from op_cases import (
    CALLS,
    CLIPS,
    HYPERPARAMETERS,
    KEPT,
    OWN_STATE,
    Clip,
    Kept,
    Lists,
    adadelta,
    assert_repeated_in_order,
    assert_same_lists,
    assert_update,
    dense_lists,
    inf,
    lay_out,
    nan,
    needs_library,
    several,
    states_of,
    ways,
    whole_memory,
    with_kept,
)
from torch import Tensor

pytestmark = needs_library

# Around the groups and blocks of the loops, empty tensors first and last.
SIZES = (0, 1, 15, 16, 17, 31, 32, 33, 63, 65, 129, 511, 512, 513, 1025, 5000, 0)


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_every_size_in_one_call(dtype: torch.dtype, name: str) -> None:
    params, grads, *_ = dense_lists(SIZES, dtype)
    assert_update(params, grads, CLIPS[name].for_dtype(dtype))


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("dtype", [*REAL_DTYPES, torch.complex64], ids=dtype_name)
def test_parts_of_a_large_tensor(dtype: torch.dtype, layout: str) -> None:
    """Which two threads take, and which begin anywhere in it."""
    shapes = [(1, 1, 1, 3), (3, 1, 5, 4001)]
    params, grads, *_ = dense_lists(shapes, dtype)
    assert_update([lay_out(layout, x) for x in params], grads, threads=(2,))
    assert_update(
        [x.clone() for x in params], [x.to(torch.promote_types(dtype, torch.float64)) for x in grads], threads=(2,)
    )


@pytest.mark.parametrize("name", ["plain", "clipnorm", "clipvalue-factor"])
@pytest.mark.parametrize("dtypes", [REAL_DTYPES, COMPLEX_DTYPES], ids=["real", "complex"])
def test_gradients_of_another_dtype(dtypes: tuple[torch.dtype, ...], name: str) -> None:
    for dtype in dtypes:
        params, grads, *_ = dense_lists([700, 700, 700, 700], dtype, dtypes)
        assert_update(params, grads, CLIPS[name].for_dtype(dtype), dtype_name(dtype))


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_special_values(dtype: torch.dtype, name: str) -> None:
    special = [inf, -inf, nan, 1e20, -1e20, 1e200, 0.0, -0.0, 1e-30, 1e-45, 0.3, -0.3]
    grads = [torch.tensor(special), *(torch.tensor([value, 1.0, -3.0]) for value in special), torch.zeros(40)]
    grads = [grad.double().to(dtype) for grad in grads]
    clip = CLIPS[name]
    zero = clip._replace(
        clipvalue=0.0 if clip.clipvalue < inf else inf, clipnorm=None if clip.clipnorm is None else 0.0, factor=0.0
    )
    for chosen in (clip, zero):
        assert_update([torch.ones_like(grad) for grad in grads], grads, chosen, str(chosen))


def test_the_largest_clipvalue() -> None:
    """Which clamps infinities alone."""
    grads = [torch.tensor([inf, -inf, nan, 3e38, -1.0, 0.0] * 7)]
    assert_update([torch.ones(42)], grads, Clip(clipvalue=torch.finfo(torch.float32).max))


@pytest.mark.parametrize("factor", [nan, inf, 0.0, -0.0, 1.0, -1.0, 1e300])
def test_any_factor_as_number_and_as_tensor(factor: float) -> None:
    grad = gradients((300,), torch.float32, steps=1)[0]
    assert_update([torch.ones(300)], [grad], Clip(factor=factor))
    by_number, by_tensor = ([[torch.ones(300)], [grad], [torch.ones(300)], [torch.ones(300)]] for _ in range(2))
    direct.fused(*by_number, *HYPERPARAMETERS, factor=factor)
    direct.fused(*by_tensor, *HYPERPARAMETERS, factor=torch.tensor(factor, dtype=torch.float64))
    assert_same_lists(by_number, by_tensor)


@pytest.mark.parametrize("found_inf", [0.0, -0.0, 1.0, inf, nan])
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=dtype_name)
def test_nothing_is_written_if_found_inf_is_not_zero(dtype: torch.dtype, layout: str, found_inf: float) -> None:
    """Whatever the gradient holds; and if it is zero, the step is what it would be without."""
    shape = (5, 3, 2, 40)
    params = [lay_out(layout, randn(shape, dtype, torch.Generator().manual_seed(k))) for k in range(2)]
    grads = [gradients(shape, dtype, steps=1, seed=k)[0] for k in range(2)]
    grads[0][1, 2, 1, 7] = inf if found_inf else 0.3
    given = {"found_inf": torch.tensor([found_inf]), "grad_scale": torch.full((1, 1), 3.0)}
    for way in ways():
        lists, expected = (
            [[x.clone() for x in params], grads, *([x.abs().to(dtype) for x in params] for _ in range(2))]
            for _ in range(2)
        )
        if found_inf == 0:
            direct.fused(*expected, *HYPERPARAMETERS, grad_scale=torch.tensor(3.0))  # type: ignore[arg-type]
        direct.fused(*lists, *HYPERPARAMETERS, **given)  # type: ignore[arg-type]
        assert_same_lists(lists, expected, way)
    assert given["found_inf"].view(torch.int32).equal(torch.tensor([found_inf]).view(torch.int32))
    assert given["grad_scale"].item() == 3.0


def test_spelled_out() -> None:
    """So that the oracle does not vouch for itself: with rho = 0, square_avg is the square of the clipped gradient."""
    three, four = torch.tensor([3.0, -4.0, nan]), torch.tensor([1.0, 1.0, 0.0])

    def square_avg(grad: Tensor, rho: float = 0.0, **options: Any) -> list[float]:
        lists = [[torch.ones(3)], [grad], [torch.zeros(3)], [torch.zeros(3)]]
        direct.fused(*lists, 1.0, rho, 1e-6, **options)
        return lists[2][0].tolist()

    sums = torch.tensor([25.0], dtype=torch.float64)
    assert square_avg(three, clipvalue=2.0)[:2] == [4.0, 4.0]
    assert math.isnan(square_avg(three, clipvalue=2.0)[2])
    assert square_avg(four, clipnorm=2.5, square_sums=sums) == [0.25, 0.25, 0.0]
    assert square_avg(four, clipnorm=10.0, square_sums=sums) == [1.0, 1.0, 0.0]
    assert square_avg(four, factor=4.0) == [16.0, 16.0, 0.0]
    assert square_avg(four * 8, clipvalue=6.0, factor=0.5, maximize=True) == [9.0, 9.0, 0.0]
    assert math.isnan(square_avg(four, clipnorm=2.5, square_sums=sums * nan)[0])
    assert square_avg(four, clipnorm=2.5, square_sums=sums * inf) == [0.0, 0.0, 0.0]
    # 1 - rho is subtracted in float32.
    assert square_avg(four, rho=0.9) == [float(np.float32(1) - np.float32(0.9))] * 2 + [0.0]


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_name)
def test_gradients_that_are_added_up(dtype: torch.dtype, name: str) -> None:
    """As of the COO entries of a row, clipped one by one; here the last is zero."""
    for way in ways():
        expected, (params, (grad,), *states) = (dense_lists([(2, 300)], dtype) for _ in range(2))
        options = CLIPS[name].options(params, [grad])
        direct.fused(*expected, *HYPERPARAMETERS, **options)
        values = torch.cat([grad, torch.zeros_like(grad[:1])])
        direct.sparse_op(params, [torch.tensor([[0, 1, 0]])], [values], *states, *HYPERPARAMETERS, **options)
        assert_same_lists([params, *states], [expected[0], *expected[2:]], way)


# ---- State of another dtype, and masters ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLIPS)
@with_kept
def test_state_of_every_kind(dtype: torch.dtype, kept: Kept, name: str) -> None:
    params, grads, *_ = dense_lists(SIZES, dtype)
    assert_update(params, grads, CLIPS[name], kept=kept)


@pytest.mark.parametrize("is_decoupled", [False, True])
@with_kept
def test_weight_decay_of_masters(dtype: torch.dtype, kept: Kept, is_decoupled: bool) -> None:
    """Which is of the master, not of the rounded parameter."""
    params, grads, *_ = dense_lists(SIZES, dtype)
    for name in ("plain", "both-scales-clipnorm"):
        assert_update(params, grads, CLIPS[name], kept=kept, weight_decay=0.3, is_decoupled=is_decoupled)


@pytest.mark.parametrize("layout", LAYOUTS)
@with_kept
def test_state_of_every_kind_and_layout(dtype: torch.dtype, kept: Kept, layout: str) -> None:
    """With gradients of every dtype; and parts of a large tensor, which two threads take."""
    params, grads, *_ = dense_lists([(2, 3, 4, 70)] * 4 + [(1, 1, 1, 3), (3, 1, 5, 4001)], dtype, REAL_DTYPES)
    assert_update([lay_out(layout, x) for x in params], grads, threads=(2,), kept=kept)


@with_kept
def test_special_values_of_every_kind(dtype: torch.dtype, kept: Kept) -> None:
    special = [inf, -inf, nan, 3.3e38, -3.38e38, 1e20, 0.0, -0.0, 1e-30, 1e-40, -1e-45, 0.3]
    values = torch.tensor(special, dtype=torch.float64).to(dtype)
    grads = [values.repeat_interleave(len(special)), values, values.flip(0)]
    params = [values.repeat(len(special)), values.clone(), torch.ones(len(special)).to(dtype)]
    for is_decoupled in (False, True):  # a weight decay of 0 makes no nan of an infinite parameter
        assert_update([x.clone() for x in params], grads, kept=kept, is_decoupled=is_decoupled)


@pytest.mark.parametrize("overwrites", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@with_kept
def test_averages_of_every_kind(dtype: torch.dtype, kept: Kept, layout: str, overwrites: bool) -> None:
    """Averages follow masters, and what overwrites a master is not rounded."""
    params, grads, *_ = dense_lists([(1, 1, 1, n) for n in (0, 1, 33, 513, 2049, 4100)], dtype)
    params = [lay_out(layout, x) for x in params]
    averages = averages_of(params)
    for momentum in (0.9, 0.0):
        assert_averaged_update(params, grads, averages, momentum, overwrites, kept=kept)


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_no_remainder_is_written_if_found_inf_is_not_zero(layout: str) -> None:
    kept = Kept(torch.float32, has_masters=True)
    params, grads, *_ = dense_lists([(2, 3, 4, 50)], torch.bfloat16)
    params = [lay_out(layout, x) for x in params]
    lists = [params, grads, *states_of(params, torch.float32), [], kept.remainders_of(params)]
    before = [[x.clone() for x in part] for part in lists]
    for options in ({"found_inf": torch.ones(1)}, {"check_only": True}):
        adadelta.adadelta_(*lists, *segment(1, *HYPERPARAMETERS, **kept.options), **options)
        assert all(
            torch.equal(x, y)
            for part, copies in zip(lists, before, strict=True)
            for x, y in zip(part, copies, strict=True)
        )


def test_segments_of_every_kind_in_one_call() -> None:
    """Each as by itself; but for those with remainders, which have a call of their own."""
    for has_remainders in (False, True):
        kinds = [kind for kind in KEPT if bool(kind[1].remainders_of([torch.ones(1, dtype=kind[0])])) == has_remainders]
        parts: list[Lists] = []
        for i, (dtype, kept) in enumerate(kinds):
            params, grads, *_ = dense_lists([40 + i, 5], dtype)
            parts.append([params, grads, *states_of(params, kept.state_dtype), [], kept.remainders_of(params)])
        copies = [[[x.clone() for x in part] for part in lists] for lists in parts]
        own = [segment(2, *HYPERPARAMETERS, **kept.options) for _, kept in kinds]
        together = [[x for lists in copies for x in lists[k]] for k in range(6)]
        adadelta.adadelta_(*together, *segments(*own))
        for lists, copied, one in zip(parts, copies, own, strict=True):
            adadelta.adadelta_(*lists, *one)
            assert_same_lists(lists, copied)


# ---- Averages -------------------------------------------------------------------------------------------------------


def assert_averaged_update(
    params: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    momentum: Any,
    overwrites: bool,
    threads: Sequence[int] = (1,),
    kept: Kept = OWN_STATE,
    **options: Any,
) -> None:
    """One step on every instruction set, as the oracle has it. What lies between the elements stays."""
    remainders = kept.remainders_of(params)
    expected = oracle_after(params, averages, [grads], momentum, overwrites, kept=kept, remainders=remainders)
    written = [*params, *averages, *remainders]
    initial = [x.clone() for x in written]
    for way in ways(threads):
        for x, values in zip(written, initial, strict=True):
            x.copy_(values)
        states = states_of(params, kept.state_dtype)
        gaps = [gaps_of(x) for x in written]
        own = {"averages": averages, "ema_momentum": momentum, "overwrites": overwrites}
        direct.fused(params, grads, *states, *AVERAGED, **own, **options, **kept.options, remainders=remainders)
        assert_averaged(params, *states, averages, expected, way)
        for x, one in zip(remainders, expected.oracles, strict=bool(remainders)):
            np.testing.assert_array_equal(x.numpy(), one.remainder, f"remainder {way}")
        for x, gap in zip(written, gaps, strict=True):
            assert_same_bits(gaps_of(x), gap, way)


def gaps_of(x: Tensor) -> Tensor:
    memory = whole_memory(x).clone()
    memory.as_strided(x.shape, x.stride(), x.storage_offset()).zero_()
    return memory


@pytest.mark.parametrize("overwrites", [False, True])
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_averages_of_every_size(dtype: torch.dtype, momentum: str, overwrites: bool) -> None:
    params, grads, *_ = dense_lists([*SIZES, 4095, 4096, 4097, 8200], dtype)
    averages = averages_of(params)
    if float(MOMENTA[momentum]) == 0:
        for average, value in zip(averages[-3:], (nan, inf, -inf), strict=True):
            average.fill_(value)
    assert_averaged_update(params, grads, averages, MOMENTA[momentum], overwrites)


@pytest.mark.parametrize("own", ["contiguous", "alike", "sliced", "misaligned"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*REAL_DTYPES, torch.complex64], ids=dtype_name)
def test_averages_of_every_layout(dtype: torch.dtype, layout: str, own: str) -> None:
    """With gradients of the parameter's dtype and of another."""
    for grad_dtype in (dtype, torch.complex128 if dtype.is_complex else torch.float64):
        params, grads, *_ = dense_lists([(2, 3, 4, 70), (1, 1, 1, 3)], dtype, [grad_dtype])
        params = [lay_out(layout, x) for x in params]
        averages = averages_of(params)
        averages = list(map(laid_like, params, averages)) if own == "alike" else [lay_out(own, x) for x in averages]
        assert_averaged_update(params, grads, averages, 0.9, True)


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_averages_of_parts_of_a_large_tensor(dtype: torch.dtype, layout: str) -> None:
    params, grads, *_ = dense_lists([(1, 1, 1, 3), (3, 1, 5, 4001)], dtype)
    params = [lay_out(layout, x) for x in params]
    assert_averaged_update(params, grads, list(map(laid_like, params, averages_of(params))), 0.9, True, threads=(2,))


def test_denormal_averages_are_kept() -> None:
    params, grads = [torch.full((40,), 1e-40)], [torch.zeros(40)]
    assert_averaged_update(params, grads, [torch.full((40,), -3e-41)], 0.9, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_averages_with_scales_and_clipping(dtype: torch.dtype) -> None:
    params, grads, *_ = dense_lists(SIZES, dtype)
    averages = averages_of(params)
    clip = CLIPS["both-scales-clipnorm"]
    expected = oracle_after(
        params,
        averages,
        [grads],
        0.9,
        False,
        clip.scale,
        loss_scale_factor=clip.loss_scale,
        clipvalue=0.3,
        clipnorm=0.7,
    )
    states = states_of(params)
    options = clip.options(params, grads)
    direct.fused(params, grads, *states, *AVERAGED, averages=averages, ema_momentum=0.9, **options)
    assert_averaged(params, *states, averages, expected)


def test_averages_of_several_segments() -> None:
    """Each as by itself."""
    sizes = [2, 0, 1, 3, len(SIZES) - 6]
    for dtype in (torch.float32, torch.float16, torch.float64):
        lists, expected = dense_lists(SIZES, dtype), dense_lists(SIZES, dtype)
        averages, others = averages_of(lists[0]), averages_of(lists[0])
        own_sizes, numbers, tensors = several(sizes)
        CALLS["dense"](*lists, own_sizes, numbers, tensors, averages=averages)
        begin, count = 0, len(numbers) // len(sizes)
        for k, size in enumerate(sizes):
            rows, own = slice(begin, begin + size), slice(k * count, (k + 1) * count)
            parts = [x[rows] for x in expected]
            if size:
                CALLS["dense"](*parts, [size], numbers[own], tensors[own], averages=others[rows])
            begin += size
        assert_same_lists([*lists, averages], [*expected, others])


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_no_average_is_written_if_found_inf_is_not_zero(layout: str) -> None:
    lists = dense_lists([(2, 3, 4, 50)])
    averages = [lay_out(layout, x) for x in averages_of(lists[0])]
    before = [x.clone() for x in (lists[0][0], averages[0])]
    for options in ({"found_inf": torch.ones(1)}, {"check_only": True}):
        own = segment(1, *AVERAGED, ema_momentum=0.9, overwrites=True)
        CALLS["dense"](*lists, *own, averages=averages, **options)
        assert all(map(torch.equal, (lists[0][0], averages[0]), before))


def test_a_parameter_listed_twice_has_one_average() -> None:
    """Which follows it twice, in order."""
    lists, expected = dense_lists([40_000, 40_000]), dense_lists([40_000])
    averages, others = averages_of(lists[0]), averages_of(expected[0])
    averages[1] = averages[0]
    for part in (0, 2, 3):
        lists[part][1] = lists[part][0]
    own = {"ema_momentum": 0.9, "overwrites": True}
    for i in range(2):
        CALLS["dense"](expected[0], lists[1][i : i + 1], *expected[2:], *segment(1, *AVERAGED, **own), averages=others)
    for way in ways((2,)):
        copies = [[x.clone() for x in part[:1]] * 2 for part in (lists[0], *lists[2:], averages)]
        own_lists = [copies[0], lists[1], *copies[1:3]]
        CALLS["dense"](*own_lists, *segment(2, *AVERAGED, **own), averages=copies[3])
        assert_same_lists([x[:1] for x in copies], [expected[0], *expected[2:], others], way)


@pytest.mark.parametrize("call", ["dense", "cached"])
def test_check_only_writes_nothing(call: str) -> None:
    lists, expected = dense_lists([5, 700]), dense_lists([5, 700])
    CALLS[call](*lists, *segment(2, *HYPERPARAMETERS), check_only=True)
    assert_same_lists(lists, expected)


def test_empty_lists() -> None:
    direct.fused([], [], [], [], *HYPERPARAMETERS)
    direct.check([], [], [], [])


@pytest.mark.parametrize("call", ["dense", "cached"])
def test_a_parameter_listed_twice_is_updated_in_order(call: str) -> None:
    assert_repeated_in_order(call)


def test_threads_update_lists_of_their_own_at_once() -> None:
    """Without the interpreter's lock: what one call works on is not that of another."""
    together = Barrier(2, timeout=60)

    def updated(count: int, *, at_once: bool) -> Lists:
        lists = dense_lists([1 + i % 70 for i in range(count)])
        if at_once:
            together.wait()
        for _ in range(100):
            CALLS["dense"](*lists, *segment(count, *HYPERPARAMETERS))
        return lists

    expected = [updated(count, at_once=False) for count in (300, 200)]
    with ThreadPoolExecutor(2) as executor:
        results = [executor.submit(updated, count, at_once=True) for count in (300, 200)]
        for result, lists in zip(results, expected, strict=True):
            assert_same_lists(result.result(), lists)
