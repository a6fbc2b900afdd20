"""csrc/cpu/parallel.h: the same bits for any number of threads, which share all elements of a call."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import direct
import pytest
import torch
from cases import REAL_DTYPES, assert_same_bits, dtype_name, segment
from op_cases import (
    CALLS,
    CLIPS,
    adadelta,
    assert_repeated_in_order,
    assert_same_lists,
    assert_update,
    dense_lists,
    is_enough_memory,
    needs_library,
    sparse_lists,
)
from torch import Tensor

pytestmark = needs_library


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["plain", "clipvalue-clipnorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_large_tensors_beside_small_ones(dtype: torch.dtype, name: str) -> None:
    """Around the 32768 elements from which on there is another thread, and the 8192 that it takes at a time."""
    params, grads, *_ = dense_lists([3, 70_000, 0, 5, 32_768 - 8, 1, 100_001], dtype)
    assert_update(params, grads, CLIPS[name], threads=(1, 2, 3))


@pytest.mark.parametrize("count", [32_767, 32_768, 32_769, 65_535, 65_537])
def test_around_a_share(count: int) -> None:
    params, grads, *_ = dense_lists([count])
    assert_update(params, grads, threads=(2, 3, 7))


def test_many_small_tensors() -> None:
    sizes = [i % 97 for i in range(3000)]
    flat = [x.abs() for x in dense_lists([sum(sizes)] * 4)[0]]
    results = []
    for count in (1, 2, 3):
        with threads(count):
            lists = [list(x.clone().split(sizes)) for x in flat]
            direct.fused(*lists, 1.0, 0.95, 1e-7)  # type: ignore[arg-type]
            results.append([[torch.cat(x)] for x in lists])
    whole = [[x.clone()] for x in flat]
    direct.fused(*whole, 1.0, 0.95, 1e-7)  # type: ignore[arg-type]
    for result in results:
        assert_same_lists(result, whole)


@pytest.mark.parametrize("call", CALLS)
def test_a_parameter_listed_twice_is_updated_in_order(call: str) -> None:
    assert_repeated_in_order(call)


@pytest.mark.parametrize("shape", [(60, 10_000), (3000, 40)], ids=str)
def test_sparse_rows_on_several_threads(shape: tuple[int, int]) -> None:
    """Long rows are cut, and short ones shared out."""
    results = []
    for count in (1, 2, 3, 7):
        with threads(count):
            lists = sparse_lists([(shape, 1), ((4,), 1), (shape, 1)], count=3000 if shape[1] < 100 else 70)
            for _ in range(2):
                adadelta.sparse_adadelta_(*lists, [], *segment(3, 1.0, 0.9, 1e-6))
            results.append(lists)
    for result in results[1:]:
        assert_same_lists(result, results[0])


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_flushing_of_denormals_is_that_of_the_calling_thread(dtype: torch.dtype) -> None:
    """`torch.set_flush_denormal` changes the thread that calls it; the other threads must calculate like it."""
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor cannot flush denormal numbers")
    count = 1_000_000  # so that a second thread has time to wake up
    tiny = torch.full((count,), torch.finfo(dtype).tiny / 8, dtype=torch.float64).to(dtype)
    indices = torch.arange(count)[None]
    roots = [torch.full((count,), torch.finfo(dtype).tiny, dtype=torch.float64).sqrt().to(dtype) / 4]

    def results(*, flushes: bool, count: int) -> list[Tensor]:
        tensors = [tiny.clone() for _ in range(6)]
        dense, sparse = [[tensor] for tensor in tensors[:3]], [[tensor] for tensor in tensors[3:]]
        with threads(count):
            torch.set_flush_denormal(flushes)
            try:
                direct.fused(dense[0], [tiny], dense[1], dense[2], 1.0, 0.95, 1e-7, False)
                direct.sparse_op(sparse[0], [indices], [tiny], sparse[1], sparse[2], 1.0, 0.95, 1e-7)
                sums = direct.square_sums(roots, roots)
            finally:
                torch.set_flush_denormal(False)
        return [*tensors, sums]

    with threads(2):
        torch.zeros(count).add_(1.0)  # so that the threads were there before
    kept, flushed = results(flushes=False, count=1), results(flushes=True, count=1)
    if dtype is not torch.float16:  # which has no denormal numbers in float32
        assert not torch.equal(kept[1], flushed[1])
        assert not torch.equal(kept[-1], flushed[-1])
    for flushes, expected in ((True, flushed), (False, kept)):
        for one, other in zip(results(flushes=flushes, count=2), expected, strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("call", ["dense", "sparse", "square_sums"])
def test_other_threads_keep_denormals_after_a_call_that_flushed_them(call: str) -> None:
    """They are PyTorch's, and go on with what it computes."""
    count = 1_000_000
    params, grads, square_avgs, acc_deltas = ([torch.ones(count)] for _ in range(4))

    def tiny_is_kept() -> bool:
        return bool((torch.full((count,), 1e-40) * 1.0 != 0).all())

    with threads(2):
        if not torch.set_flush_denormal(False):
            pytest.skip("this processor cannot flush denormal numbers")
        assert tiny_is_kept()  # and the threads were there before
        torch.set_flush_denormal(True)
        try:
            if call == "dense":
                direct.fused(params, grads, square_avgs, acc_deltas, 1.0, 0.95, 1e-7)
            elif call == "sparse":
                indices = [torch.arange(count)[None]]
                direct.sparse_op(params, indices, grads, square_avgs, acc_deltas, 1.0, 0.95, 1e-7)
            else:
                direct.square_sums(grads, grads)
        finally:
            torch.set_flush_denormal(False)
        assert tiny_is_kept()


@pytest.mark.slow
def test_more_elements_than_an_int32_counts() -> None:
    """2**31 + 3 of them, in one 16-bit parameter; the last ones as in a short one."""
    if not is_enough_memory(18):
        pytest.skip("needs 18 GB of available memory")
    count = 2**31 + 3
    long: Any = [[torch.full((count,), value, dtype=torch.bfloat16)] for value in (1.0, 0.5, 0.25, 0.125)]
    short: Any = [[tensors[0][-7:].clone()] for tensors in long]
    direct.fused(*long, 1.0, 0.9375, 1e-7, False)
    direct.fused(*short, 1.0, 0.9375, 1e-7, False)
    for one, other in zip(long, short, strict=True):
        assert_same_bits(one[0][-7:], other[0])
        assert_same_bits(one[0][:7], other[0])
