"""The update on CUDA against that on the CPU, bit by bit: dtypes, sizes, layouts, tables, aliases, huge tensors."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import direct
import pytest
import torch
from average_cases import averages_of
from cases import COMPLEX_DTYPES, DTYPES, LAYOUTS, REAL_DTYPES, assert_same_bits, dtype_name, gradients, randn
from op_cases import Kept, kept_lists, with_kept
from torch import Tensor

from torch_adadelta.backends import kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CHUNK = 16384  # elements that a block updates

# Around vectors (2 to 8 elements), threads of a block, and chunks.
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 17, 511, 513, 4095, 4097, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5, 0)

VALUES = (1.0, 0.949999988079071, 1e-7, False)  # lr, rho, epsilon, maximize

Lists = list[list[Tensor]]


def make_lists(shapes: list[tuple[int, ...]], dtype: torch.dtype, grad_dtype: torch.dtype, seed: int = 0) -> Lists:
    """Parameters, gradients and state as it is amid a training, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    params = [randn(shape, dtype, generator) for shape in shapes]
    grads = [gradients(shape, grad_dtype, 1, seed=seed + i)[0] for i, shape in enumerate(shapes)]

    def state() -> list[Tensor]:
        return [positive(randn(shape, dtype, generator)) for shape in shapes]

    return [params, grads, state(), state()]


def positive(x: Tensor) -> Tensor:
    if x.is_complex():
        pairs = torch.view_as_real(x)
        return torch.view_as_complex(pairs.abs())
    return x.abs()


def assert_same_update(lists: Lists, placed: Callable[..., Tensor], steps: int = 2, values: Any = VALUES) -> None:
    """Updates copies on the CPU and on the device, by the compiled kernels, and compares all that was written."""
    here, there = ([[placed(x, device) for x in tensors] for tensors in lists] for device in ("cpu", "cuda"))
    on_cpu = direct.fused if kernels.is_loaded else direct.single_tensor
    for _ in range(steps):
        on_cpu(*here, *values)  # type: ignore[arg-type]
        direct.fused(*there, *values)  # type: ignore[arg-type]
    for name, expected, actual in zip(("param", "grad", "square_avg", "acc_delta"), here, there, strict=True):
        for index, (x, y) in enumerate(zip(expected, actual, strict=True)):
            assert_same_bits(y.cpu(), x, f"{name} {index}, {tuple(x.shape)}, {x.stride()}")


@pytest.mark.parametrize("grad_dtype", REAL_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_dtypes_and_sizes(dtype: torch.dtype, grad_dtype: torch.dtype, placed: Callable[..., Tensor]) -> None:
    assert_same_update(make_lists([(n,) for n in SIZES], dtype, grad_dtype), placed)


@pytest.mark.parametrize("grad_dtype", COMPLEX_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("dtype", COMPLEX_DTYPES, ids=dtype_name)
def test_complex_dtypes_and_sizes(dtype: torch.dtype, grad_dtype: torch.dtype, placed: Callable[..., Tensor]) -> None:
    assert_same_update(make_lists([(n,) for n in SIZES], dtype, grad_dtype), placed)


@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "sliced"])
@pytest.mark.parametrize("grad_dtype", [None, torch.float32], ids=["own", "float32"])
@with_kept
def test_masters_and_state_of_another_dtype(
    dtype: torch.dtype, kept: Kept, grad_dtype: torch.dtype | None, layout: str, placed: Callable[..., Tensor]
) -> None:
    """With averages and without, as the CPU has them."""
    lists = kept_lists([(1, 1, 1, n) for n in SIZES], dtype, kept, [grad_dtype or dtype], layout)
    averages = averages_of(lists[0])
    on_cpu = direct.fused if kernels.is_loaded else direct.single_tensor
    for options in ({}, {"averages": averages, "ema_momentum": 0.9, "overwrites": True}):
        results = []
        for device, update in (("cpu", on_cpu), ("cuda", direct.fused)):
            params, grads, square_avgs, acc_deltas, _, remainders = ([placed(x, device) for x in xs] for xs in lists)
            own: dict[str, Any] = {**options, **kept.options, "remainders": remainders}
            if options:
                own["averages"] = [placed(x, device) for x in averages]
            for _ in range(2):
                update(params, grads, square_avgs, acc_deltas, *VALUES, **own)  # type: ignore[arg-type]
            results.append([params, square_avgs, acc_deltas, remainders, own.get("averages", [])])
        for expected, actual in zip(*results, strict=True):
            for x, y in zip(expected, actual, strict=True):
                assert_same_bits(y.cpu(), x)


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_short_vectors_tails_and_gaps(dtype: torch.dtype, placed: Callable[..., Tensor]) -> None:
    """Small enough for compute-sanitizer; see scripts/gpu_check.sh."""
    lists = make_lists([(0,), (1,), (7,), (1031,), (3, 17, 1, 9), ()], dtype, torch.float32)
    for tensors in lists:
        tensors[4] = LAYOUTS["sliced"](tensors[4])
        tensors[3] = LAYOUTS["misaligned"](tensors[3])
    assert_same_update(lists, placed)


@pytest.mark.parametrize("path", [direct.single_tensor, direct.multi_tensor], ids=["single_tensor", "multi_tensor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_python_paths_on_cuda(path: direct.Update, dtype: torch.dtype, placed: Callable[..., Tensor]) -> None:
    lists = make_lists([(n,) for n in SIZES] + [(5, 3), ()], dtype, dtype)
    python, fused = ([[placed(x) for x in tensors] for tensors in lists] for _ in range(2))
    for _ in range(3):
        path(*python, *VALUES)  # type: ignore[arg-type]
        direct.fused(*fused, *VALUES)  # type: ignore[arg-type]
    for x, y in zip(itertools.chain(*python), itertools.chain(*fused), strict=True):
        assert_same_bits(x.cpu(), y.cpu())


@pytest.mark.parametrize(("layout", "grad_layout"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_layouts(layout: str, grad_layout: str, placed: Callable[..., Tensor]) -> None:
    params, grads, square_avgs, acc_deltas = make_lists([(3, 17, 1, 90)] * 2, torch.float32, torch.float32)
    lists = [
        [LAYOUTS[layout](x) for x in params],
        [LAYOUTS[grad_layout](x) for x in grads],
        [LAYOUTS[layout](square_avgs[0]), LAYOUTS[grad_layout](square_avgs[1])],  # one state of a layout of its own
        [LAYOUTS[layout](x) for x in acc_deltas],
    ]
    assert_same_update(lists, placed)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_every_dtype(layout: str, dtype: torch.dtype, placed: Callable[..., Tensor]) -> None:
    lists = make_lists([(3, 17, 2, 90)], dtype, dtype)
    assert_same_update([[LAYOUTS[layout](x) for x in tensors] for tensors in lists], placed)


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("which", range(4), ids=("param", "grad", "square_avg", "acc_delta"))
def test_offsets_that_are_not_aligned(which: int, dtype: torch.dtype, placed: Callable[..., Tensor]) -> None:
    """One of the four tensors begins some elements after 16 bytes do."""
    lists = make_lists([(CHUNK + 3,)] * 8, dtype, dtype)
    for offset, x in enumerate(list(lists[which])):
        base = torch.zeros(x.numel() + offset, dtype=dtype)
        lists[which][offset] = base[offset:].copy_(x)
    assert_same_update(lists, placed)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 127, 128, 129, 599, 600, 601, 1199, 1201, 2000])
@pytest.mark.parametrize("empty", ["none", "first and last", "every other", "all but one"])
def test_tables(count: int, empty: str, placed: Callable[..., Tensor]) -> None:
    """Around the 64 and 600 tensors that a launch takes, with tensors of none, one or two chunks among them."""
    sizes = [1 + 37 * i % 50 if i % 97 else CHUNK + i for i in range(count)]
    for i in range(count):
        is_empty = {
            "none": False,
            "first and last": i in (0, count - 1),
            "every other": i % 2 == 0,
            "all but one": i != count // 2,
        }
        sizes[i] = 0 if is_empty[empty] else sizes[i]
    assert_same_update(make_lists([(n,) for n in sizes], torch.float32, torch.float32), placed, steps=1)


@pytest.mark.parametrize("count", [64, 65, 600, 601])
def test_tables_of_mixed_dtypes(count: int, placed: Callable[..., Tensor]) -> None:
    lists: Lists = [[], [], [], []]
    for i in range(count):
        dtype = DTYPES[i % len(DTYPES)]
        for tensors, more in zip(lists, make_lists([(1 + i % 13,)], dtype, dtype, seed=i), strict=True):
            tensors += more
    assert_same_update(lists, placed)


def test_nothing_but_empty_tensors(placed: Callable[..., Tensor]) -> None:
    assert_same_update(make_lists([(0,), (3, 0), (0, 0)], torch.float32, torch.float32), placed)
    direct.fused([], [], [], [], *VALUES)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_no_dimensions(dtype: torch.dtype, placed: Callable[..., Tensor]) -> None:
    assert_same_update(make_lists([(), (1,), (1, 1)], dtype, dtype), placed)


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_expanded_gradients(dtype: torch.dtype, placed: Callable[..., Tensor]) -> None:
    lists = make_lists([(6, 5, 9)] * 3, dtype, dtype)
    lists[1] = [
        gradients((), dtype, 1)[0].expand(6, 5, 9),
        gradients((5, 1), dtype, 1)[0].expand(6, 5, 9),
        gradients((6, 1, 9), dtype, 1)[0].expand(6, 5, 9),
    ]
    assert_same_update(lists, placed)


def test_maximize_and_other_hyperparameters(placed: Callable[..., Tensor]) -> None:
    lists = make_lists([(1000,), (7,)], torch.float32, torch.float32)
    for values in ((0.5, 0.0, 1e-3, True), (1.0, 1.0, 1e-7, True), (0.0, 0.9, 1e-30, False)):
        assert_same_update(lists, placed, values=values)


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_special_values(dtype: torch.dtype, placed: Callable[..., Tensor]) -> None:
    special = [math.inf, -math.inf, math.nan, 0.0, -0.0, 1e20, 1e-20, 1e-30, 1e-42, 3e38, -65504.0]
    grads = torch.tensor(special, dtype=torch.float64).to(dtype)
    for state in (torch.zeros_like(grads), torch.full_like(grads, 1e-6), torch.full_like(grads, 1e-8) / 4096):
        for param in (torch.zeros_like(grads), -torch.zeros_like(grads), torch.ones_like(grads)):
            assert_same_update([[param], [grads], [state], [state.clone()]], placed)


def test_memory_that_is_shared(placed: Callable[..., Tensor]) -> None:
    """A parameter listed twice is updated in turn; whatever else shares memory is refused before any write."""
    lists = make_lists([(300,)] * 3, torch.float32, torch.float32)
    results = []
    for device in ("cpu", "cuda"):
        params, grads, square_avgs, acc_deltas = ([placed(x, device) for x in tensors] for tensors in lists)
        twice = [[x[0], x[1], x[0]] for x in (params, square_avgs, acc_deltas)]
        direct.fused(twice[0], grads, *twice[1:], *VALUES)
        results.append([*params, *square_avgs, *acc_deltas])
        before = [x.clone() for x in results[-1]]
        for bad_params, bad_grads in ((params, [*grads[:2], params[2]]), ([*params[:2], params[0]], grads)):
            with pytest.raises(RuntimeError, match="share memory"):
                direct.fused(bad_params, bad_grads, square_avgs, acc_deltas, *VALUES)
        assert all(map(torch.equal, results[-1], before))
    for expected, actual in zip(*results, strict=True):
        assert_same_bits(actual.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_tens_of_thousands_of_tensors(dtype: torch.dtype) -> None:
    sizes = [1 + i % 31 for i in range(30_000)]
    flat = [tensors[0] for tensors in make_lists([(sum(sizes),)], dtype, dtype)]
    results = []
    for device in ("cpu", "cuda"):
        columns = [list(x.to(device, copy=True).split(sizes)) for x in flat]
        # Of their own memory, so that none is aligned because its neighbours are.
        columns = [[x.clone() for x in column] for column in columns]
        direct.fused(*columns, *VALUES)  # type: ignore[call-arg]
        results.append([torch.cat(column) for column in columns])
    for expected, actual in zip(*results, strict=True):
        assert_same_bits(actual.cpu(), expected)


# ---- More than 2^31 elements ----------------------------------------------------------------------------------------

PIECE = 2**28
HUGE = 2**31 + PIECE + 12345
TO_SPARE = 2**32


def needs_memory(needed: int) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free device memory, there are {free / 2**30:.0f}")


def fill(x: Tensor, piece: int, which: int) -> None:
    """One piece of one of the four tensors; state is not negative."""
    generator = torch.Generator("cuda").manual_seed(4 * piece + which)
    x.uniform_(0.0 if which > 1 else -1.0, 1.0, generator=generator)


def pieces(n: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + PIECE, n)) for begin in range(0, n, PIECE)]


def test_more_than_2_to_the_31_elements() -> None:
    needs_memory(4 * 2 * HUGE + TO_SPARE)
    whole = [torch.empty(HUGE, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
    for index, (begin, end) in enumerate(pieces(HUGE)):
        for which, x in enumerate(whole):
            fill(x[begin:end], index, which)
    direct.fused(*[[x] for x in whole], *VALUES)  # type: ignore[arg-type]
    for index, (begin, end) in enumerate(pieces(HUGE)):
        expected = [torch.empty(end - begin, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
        for which, x in enumerate(expected):
            fill(x, index, which)
        before = [[x[-5000:].cpu()] for x in expected]
        direct.fused(*[[x] for x in expected], *VALUES)  # type: ignore[arg-type]
        for x, y in zip(whole, expected, strict=True):
            assert torch.equal(x[begin:end].view(torch.int16), y.view(torch.int16)), f"elements {begin} to {end}"
        direct.fused(*before, *VALUES)  # type: ignore[arg-type]
        for x, (y,) in zip(expected, before, strict=True):
            assert_same_bits(x[-5000:].cpu(), y)


def test_a_gap_of_more_than_2_to_the_31_elements() -> None:
    """A parameter that is not dense, and spans more than 32 bits can count."""
    needs_memory(2 * (2**31 + 4096) + TO_SPARE)
    base = torch.zeros(2**31 + 4096, dtype=torch.bfloat16, device="cuda")
    param = base.as_strided((2, 33), (2**31, 3))
    lists = make_lists([(2, 33)], torch.bfloat16, torch.bfloat16)
    param.copy_(lists[0][0])
    others = [[x.cuda() for x in tensors] for tensors in lists[1:]]
    direct.fused([param], *others, *VALUES)  # type: ignore[arg-type]
    direct.fused(*lists, *VALUES)  # type: ignore[arg-type]
    assert_same_bits(param.cpu(), lists[0][0])
    assert_same_bits(others[1][0].cpu(), lists[2][0])
    assert_same_bits(others[2][0].cpu(), lists[3][0])


def test_the_norm_of_more_than_2_to_the_31_elements() -> None:
    """A piece of a power of two of elements is a subtree of the sum."""
    needs_memory(2 * HUGE + TO_SPARE)
    grad = torch.empty(HUGE, dtype=torch.bfloat16, device="cuda")
    for index, (begin, end) in enumerate(pieces(HUGE)):
        fill(grad[begin:end], index, 1)
    parts = [grad[begin:end] for begin, end in pieces(HUGE)]
    sums = direct.square_sums(parts, parts).tolist()
    while len(sums) > 1:
        sums = [sum(sums[i : i + 2]) for i in range(0, len(sums), 2)]
    assert direct.square_sums([grad], [grad]).tolist() == sums
