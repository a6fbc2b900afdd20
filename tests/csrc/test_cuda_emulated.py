"""The CUDA kernels and what launches them, compiled as C++ and run thread by thread, against the CPU kernels, bit by bit.

What an emulator cannot show: the GPU's own arithmetic (IEEE by the flags of the build), races between threads (none
shares memory with another, but for the sums in a block; the emulated order is shuffled), and speed.
"""

import ctypes
import math
import mmap
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    COMPLEX_DTYPES,
    DTYPES,
    LAYOUTS,
    REAL_DTYPES,
    Segments,
    assert_same_bits,
    dtype_name,
    gradients,
    order_sensitive,
    randn,
    segment,
    segments,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from torch_adadelta.backends import kernels

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++")

pytestmark = [
    pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed"),
    pytest.mark.skipif(COMPILER is None, reason="no g++"),
    pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the source tree"),
]

inf, nan = torch.inf, torch.nan
Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]

cpu = torch.ops.torch_adadelta
emulated = torch.ops.torch_adadelta_emulated

SMALL_TABLE, LARGE_TABLE, CHUNK = 64, 600, 16384
SMALL_SEGMENTS, LARGE_SEGMENTS = 13, 42  # that find room beside the tensors
HYPERPARAMETERS = (0.75, 0.9, 1e-6)


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("emulator") / "emulated.so"
    sources = ROOT / "tests" / "csrc" / "cuda_emulator"
    command = [
        str(COMPILER),
        "-std=c++20",
        "-O1",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-ffp-contract=off",
        # A vector at an address that is no multiple of its size, or an index beyond an array, is an illegal instruction.
        "-fsanitize=alignment,bounds",
        "-fsanitize-undefined-trap-on-error",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        *(f"-I{path}" for path in (sources / "include", *include_paths())),
        str(sources / "emulated_ops.cpp"),
        *(f"-L{path}" for path in library_paths()),
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
        "-o",
        str(path),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    torch.ops.load_library(str(path))
    assert (emulated.small_table(), emulated.large_table(), emulated.chunk()) == (SMALL_TABLE, LARGE_TABLE, CHUNK)
    assert (emulated.small_segments(), emulated.large_segments()) == (SMALL_SEGMENTS, LARGE_SEGMENTS)


@pytest.fixture(autouse=True)
def in_order() -> Iterator[None]:
    yield
    emulated.set_seed(0)
    emulated.set_edge_blocks(0)


def whole_memory(x: Tensor) -> Tensor:
    """All that a tensor's storage holds, so that a write beside the tensor shows."""
    count = x.untyped_storage().nbytes() // x.element_size()
    return x.detach().as_strided((count,), (1,), 0)


def lay_out(layout: str, x: Tensor) -> Tensor:
    """The same values in memory of one of LAYOUTS, whose gaps are zero."""
    result = LAYOUTS[layout](x)
    values = result.clone()
    whole_memory(result).zero_()
    return result.copy_(values)


def several(sizes: list[int], maximize: bool = False) -> Segments:
    """Segments that differ, some by a Tensor."""
    rates = [torch.tensor(0.01 * i) if i % 3 == 2 else 0.75 - 0.01 * i for i in range(len(sizes))]
    return segments(
        *(segment(size, rates[i], 0.9 - 0.001 * i, 1e-6, maximize != (i % 2 == 1)) for i, size in enumerate(sizes))
    )


def assert_same_update(
    make: Callable[[], Lists],
    seeds: tuple[int, ...] = (0, 1),
    sizes: list[int] | None = None,
    hyperparameters: tuple[Any, ...] = HYPERPARAMETERS,
    maximize: bool = False,
    **options: Any,
) -> int:
    """Runs two steps on the CPU and emulated, on what `make` makes, and returns the number of launches of a step.

    `square_sums=True` stands for the sums of the squares of the gradients; `sizes` are those of segments.
    """
    results = []
    launches = 0
    for op, seed in ((cpu, 0), *((emulated, seed) for seed in seeds)):
        lists = make()
        if op is emulated:
            emulated.set_seed(seed)
        given = dict(options)
        if options.get("square_sums") is True:
            given["square_sums"] = cpu.grad_square_sums(*lists[:2], options.get("clipvalue"))
        for _ in range(2):
            before = emulated.launches()
            own = several(sizes, maximize) if sizes else segment(len(lists[0]), *hyperparameters, maximize)
            op.adadelta_(*lists, *own, **given)
            launches = emulated.launches() - before
        results.append(lists)
    for others in results[1:]:
        for name, tensors, expected in zip(
            ("param", "grad", "square_avg", "acc_delta"), others, results[0], strict=True
        ):
            for i, (x, y) in enumerate(zip(tensors, expected, strict=True)):
                assert_same_bits(whole_memory(x), whole_memory(y), f"{name} {i}")
    return launches


def lists_of(
    sizes: tuple[int, ...] | list[int], dtype: torch.dtype, grad_dtypes: tuple[torch.dtype, ...] = ()
) -> Lists:
    params = [randn((size,), dtype, torch.Generator().manual_seed(i)) for i, size in enumerate(sizes)]
    dtypes = grad_dtypes or (dtype,)
    grads = [gradients((size,), dtypes[i % len(dtypes)], steps=1, seed=i)[0] for i, size in enumerate(sizes)]
    return params, grads, *states_of(params)


def states_of(params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Zeros beside each parameter, where the parameter itself has its elements, and 1 in the gaps of its memory."""

    def state(param: Tensor) -> Tensor:
        memory = torch.ones_like(whole_memory(param))
        return memory.as_strided(param.shape, param.stride(), param.storage_offset()).zero_()

    return [state(param) for param in params], [state(param) for param in params]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "maximize": {"maximize": True},
    "clipvalue": {"clipvalue": 0.3},
    "clipnorm": {"clipnorm": 0.7, "square_sums": True},
    "clipnorm-not-reached": {"clipnorm": 1e7, "square_sums": True, "maximize": True},
    "clipvalue-clipnorm": {"clipvalue": 0.3, "clipnorm": 0.7, "square_sums": True},
    "factor": {"factor": 0.37},
    "clipvalue-factor": {"clipvalue": 0.3, "factor": 0.37, "maximize": True},
    "scale": {"grad_scale": torch.tensor(3.0)},
    "scale-clipvalue-factor": {"grad_scale": torch.tensor(0.3), "clipvalue": 0.3, "factor": 0.37},
}


def options_for(dtype: torch.dtype, name: str) -> dict[str, Any]:
    options = dict(OPTIONS[name])
    if dtype.is_complex:
        options.pop("clipvalue", None)
    return options


# Around the vectors of 2, 4 and 8 elements and their rounds of 512 threads.
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 511, 512, 513, 1023, 1025, 2047, 2049, 4095, 4097, 0)


# ---- The update -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_update(dtype: torch.dtype, name: str) -> None:
    """All sizes in one launch, empty tensors first and last."""
    assert assert_same_update(lambda: lists_of(SIZES, dtype), **options_for(dtype, name)) == 1


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_update_around_chunks(dtype: torch.dtype) -> None:
    sizes = [CHUNK - 1, CHUNK, CHUNK + 1, 3, 2 * CHUNK, 2 * CHUNK + 5, 3 * CHUNK - 8]
    assert assert_same_update(lambda: lists_of(sizes, dtype), **OPTIONS["clipvalue-clipnorm"]) == 1


@pytest.mark.parametrize("name", ["plain", "clipvalue-clipnorm", "scale-clipvalue-factor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_update_by_gradients_of_another_dtype(dtype: torch.dtype, name: str) -> None:
    grad_dtypes = COMPLEX_DTYPES if dtype.is_complex else REAL_DTYPES
    sizes = [n for n in (1, 7, 8, 9, 700, 2051) for _ in grad_dtypes]
    assert assert_same_update(lambda: lists_of(sizes, dtype, grad_dtypes), **options_for(dtype, name)) == 1


def test_parameters_of_every_dtype_in_one_call() -> None:
    def make() -> Lists:
        made = [lists_of([5, 0, 700, 40_000], dtype, REAL_DTYPES) for dtype in REAL_DTYPES]
        return tuple([made[k % 4][part][k // 4] for k in range(16)] for part in range(4))  # type: ignore[return-value]

    assert assert_same_update(make, **OPTIONS["clipvalue-clipnorm"]) == 4


@pytest.mark.parametrize("shifted", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_tensors_that_are_not_aligned(dtype: torch.dtype, shifted: tuple[int, ...]) -> None:
    def make() -> Lists:
        made = lists_of([1, 8, 33, 2051, CHUNK + 9], dtype)
        for part in shifted:
            for i, x in enumerate(made[part]):
                made[part][i] = torch.zeros(len(x) + 8, dtype=dtype)[1 + i % 3 : 1 + i % 3 + len(x)].copy_(x)
        return made

    assert_same_update(make)


def test_neighbours_are_not_written() -> None:
    """Parameters and state that share their storages, as views of flat buffers do."""
    sizes = [4, 3, 8, 1, 515, 7, 2048, 5]

    def make() -> Lists:
        flat = [torch.randn(sum(sizes), generator=torch.Generator().manual_seed(k)).square() for k in range(4)]
        return tuple(list(x.split(sizes)) for x in flat)  # type: ignore[return-value]

    assert assert_same_update(make, **OPTIONS["clipnorm"]) == 1


@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "channels_last", "sliced"])
@pytest.mark.parametrize("name", ["plain", "clipnorm"])
def test_gradient_that_is_the_parameter(name: str, layout: str) -> None:
    def make() -> Lists:
        param = lay_out(layout, randn((3, 5, 7, 20), torch.float32, torch.Generator().manual_seed(0)))
        return [param], [param.detach()], *states_of([param])

    assert_same_update(make, **OPTIONS[name])


def test_parameters_that_share_memory_are_updated_in_turn() -> None:
    def make() -> Lists:
        base = torch.ones(9000)
        params = [base[:6000], base[3000:], base[1000:2000].view(10, 100).t(), base[:6000]]
        grads = [gradients(tuple(p.shape), torch.float32, steps=1, seed=i)[0] for i, p in enumerate(params)]
        return params, grads, *([torch.zeros(p.shape) for p in params] for _ in range(2))  # type: ignore[return-value]

    assert assert_same_update(make) == 4


@pytest.mark.parametrize(("begin", "launches"), [(9, 2), (10, 1)])
def test_parameters_that_share_their_last_element_only(begin: int, launches: int) -> None:
    def make() -> Lists:
        base = torch.ones(30)
        params = [base[:10], base[begin : begin + 10]]
        return params, [torch.full((10,), 0.5) for _ in params], *([torch.zeros(10) for _ in params] for _ in range(2))  # type: ignore[return-value]

    assert assert_same_update(make) == launches


@pytest.mark.parametrize("name", ["plain", "clipnorm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_update_of_any_layout(layout: str, dtype: torch.dtype, name: str) -> None:
    shape = (5, 3, 1, 37)

    def make() -> Lists:
        grads = [lay_out(other, gradients(shape, dtype, steps=1)[0]) for other in LAYOUTS]
        params = [lay_out(layout, randn(shape, dtype, torch.Generator().manual_seed(i))) for i in range(len(grads))]
        return params, grads, *states_of(params)

    assert_same_update(make, **options_for(dtype, name))


@pytest.mark.parametrize("grad_dtype", REAL_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_strided_update_by_gradients_of_another_dtype(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    def make() -> Lists:
        param = lay_out("sliced", randn((7, 5, 3, 90), dtype, torch.Generator().manual_seed(0)))
        return [param], [gradients(param.shape, grad_dtype, steps=1)[0]], *states_of([param])

    assert assert_same_update(make) == 1
    assert assert_same_update(make, **OPTIONS["clipvalue-factor"]) == 1


def test_update_of_many_dimensions() -> None:
    """More than collapse: every other dimension of the parameter is sliced, and the gradient is transposed."""

    def make() -> Lists:
        base = torch.randn([4, 2] * 6, generator=torch.Generator().manual_seed(0))
        param = base[tuple(slice(None, None, 2) if d % 2 == 0 else slice(None) for d in range(12))]
        grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(1)).permute(*range(11, -1, -1))
        shapes = [[1] * 20 + [2, 3], []]
        params = [param, *(torch.ones(shape) for shape in shapes)]
        grads = [grad, *(torch.full(shape, 0.5) for shape in shapes)]
        return params, grads, *states_of(params)

    assert_same_update(make)
    assert_same_update(make, **OPTIONS["clipnorm"])


def test_expanded_gradient() -> None:
    def make() -> Lists:
        params = [torch.ones(300, 70), torch.ones(70)]
        return params, [torch.full((70,), 0.3).expand(300, 70), torch.tensor(0.3).expand(70)], *states_of(params)

    assert_same_update(make, **OPTIONS["clipnorm"])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_special_values(dtype: torch.dtype, name: str) -> None:
    special = [inf, -inf, nan, 1e20, -1e20, 1e200, 0.0, -0.0, 1e-30, 1e-45, 1e-310, 6e-8, 65504.0, 65520.0, 0.3, -0.3]

    def make() -> Lists:
        grads = [torch.tensor(special * 3), *(torch.tensor([value, 1.0, -3.0]) for value in special), torch.zeros(40)]
        grads = [torch.tensor(x.tolist(), dtype=torch.float64).to(dtype) for x in grads]
        params = [torch.tensor(special * 3, dtype=torch.float64).to(dtype)[: len(x)].clone() for x in grads]
        return params, grads, *states_of(params)

    assert_same_update(make, **OPTIONS[name])


@pytest.mark.parametrize("tensor_dtype", REAL_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_tensor_hyperparameters(dtype: torch.dtype, tensor_dtype: torch.dtype) -> None:
    *tensors, factor = [torch.tensor(value, dtype=torch.float64).to(tensor_dtype) for value in (0.7, 0.93, 1e-4, -0.37)]
    assert_same_update(lambda: lists_of([5, 700], dtype), hyperparameters=tuple(tensors), factor_tensor=factor)
    assert_same_update(lambda: lists_of([5, 700], dtype), hyperparameters=tuple(tensors))


@pytest.mark.parametrize("found_inf", [0.0, -0.0, 1.0, 2.0, nan])
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_found_inf(layout: str, found_inf: float) -> None:
    def make() -> Lists:
        param = lay_out(layout, torch.ones(2, 3, 4, 50))
        return [param], [torch.full((2, 3, 4, 50), inf)], *states_of([param])

    assert_same_update(make, found_inf=torch.tensor(found_inf), grad_scale=torch.tensor([[2.0]]))
    lists = make()
    emulated.adadelta_(*lists, *segment(1, *HYPERPARAMETERS), found_inf=torch.tensor(found_inf))
    assert torch.equal(lists[0][0], torch.ones(2, 3, 4, 50)) == (found_inf != 0)
    assert torch.equal(lists[2][0], torch.zeros(2, 3, 4, 50)) == (found_inf != 0)


@pytest.mark.parametrize("name", ["plain", "clipnorm"])
@pytest.mark.parametrize(
    ("count", "launches"),
    [
        (SMALL_TABLE - 1, 1),
        (SMALL_TABLE, 1),
        (SMALL_TABLE + 1, 1),
        (LARGE_TABLE - 1, 1),
        (LARGE_TABLE, 1),
        (LARGE_TABLE + 1, 2),
        (2 * LARGE_TABLE + SMALL_TABLE + 1, 3),
    ],
)
def test_number_of_tensors_around_the_size_of_tables(count: int, launches: int, name: str) -> None:
    """With an empty tensor before each, which takes no place in a table, and strided ones, which take a launch each."""

    def make() -> Lists:
        return lists_of([size for i in range(count) for size in (0, 1 + i % 9)], torch.float32, REAL_DTYPES)

    assert assert_same_update(make, seeds=(1,), **OPTIONS[name]) == launches


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_several_segments(dtype: torch.dtype, name: str) -> None:
    """In one launch; empty segments, and a segment of empty tensors only, take no place."""
    sizes = [0, 3, 1, 0, len(SIZES) - 5, 1, 0]
    assert assert_same_update(lambda: lists_of(SIZES, dtype), sizes=sizes, **options_for(dtype, name)) == 1


@pytest.mark.parametrize(
    ("count", "tensors", "launches"),
    [
        (SMALL_SEGMENTS, 1, 1),
        (SMALL_SEGMENTS + 1, 1, 1),
        (LARGE_SEGMENTS, 1, 1),
        (LARGE_SEGMENTS + 1, 1, 2),
        (LARGE_SEGMENTS, 15, 2),
        (LARGE_SEGMENTS + 1, 12, 2),
        (3 * LARGE_SEGMENTS, 1, 3),
    ],
)
@pytest.mark.parametrize("name", ["plain", "clipnorm"])
def test_number_of_segments_around_the_size_of_tables(count: int, tensors: int, launches: int, name: str) -> None:
    """A launch takes tensors until it has no room for more of them, or for another segment."""

    def make() -> Lists:
        return lists_of([1 + i % 9 for i in range(count * tensors)], torch.float32)

    assert assert_same_update(make, seeds=(1,), sizes=[tensors] * count, **OPTIONS[name]) == launches


def test_segments_of_every_dtype_and_layout() -> None:
    shape = (3, 2, 5, 9)

    def make() -> Lists:
        kinds = [(dtype, layout) for dtype in REAL_DTYPES for layout in ("contiguous", "sliced")]
        params = [lay_out(layout, randn(shape, dtype, torch.Generator().manual_seed(1))) for dtype, layout in kinds * 2]
        return params, [gradients(shape, p.dtype, steps=1)[0] for p in params], *states_of(params)

    assert assert_same_update(make, sizes=[3, 0, 6, 7], **OPTIONS["clipvalue-clipnorm"]) == 4 + 8


def test_check_only_launches_nothing() -> None:
    lists = lists_of([5, 700], torch.float32)
    before = emulated.launches()
    emulated.adadelta_(*lists, *segment(2, *HYPERPARAMETERS), check_only=True)
    tables = sparse_lists([((9, 5), 1)], torch.float32)
    emulated.sparse_adadelta_(*tables, *segment(1, *HYPERPARAMETERS), check_only=True)
    assert emulated.launches() == before
    assert not any(x.any() for states in (*lists[2:], *tables[3:]) for x in states)


def test_nothing_to_do() -> None:
    assert assert_same_update(lambda: lists_of([0, 0, 0], torch.float32)) == 0


@settings(max_examples=60, deadline=None)
@given(
    tensors=st.lists(
        st.tuples(
            st.sampled_from(REAL_DTYPES),
            st.sampled_from(REAL_DTYPES),
            st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(1, 9), st.integers(1, 70)),
            st.sampled_from(sorted(LAYOUTS)),
            st.sampled_from(sorted(LAYOUTS)),
        ),
        min_size=1,
        max_size=12,
    ),
    name=st.sampled_from(sorted(OPTIONS)),
    seed=st.integers(0, 1000),
)
def test_any_lists(tensors: list[tuple[Any, ...]], name: str, seed: int) -> None:
    def make() -> Lists:
        params, grads = [], []
        for i, (dtype, grad_dtype, shape, layout, grad_layout) in enumerate(tensors):
            params.append(lay_out(layout, randn(shape, dtype, torch.Generator().manual_seed(i))))
            grads.append(lay_out(grad_layout, gradients(shape, grad_dtype, steps=1, seed=i)[0]))
        return params, grads, *states_of(params)

    assert_same_update(make, seeds=(seed,), **OPTIONS[name])
    params, grads, *_ = make()
    assert_same_square_sums(params, grads, seeds=(seed,), **SQUARE_OPTIONS[sorted(SQUARE_OPTIONS)[seed % 4]])


def test_tens_of_thousands_of_tensors() -> None:
    sizes = [i % 4 for i in range(20_000)]
    memory = [gradients((sum(sizes),), torch.float32, steps=1, seed=k)[0].abs() for k in range(4)]
    results = []
    for op in (cpu, emulated):
        lists = [list(x.clone().split(sizes)) for x in memory]
        before = emulated.launches()
        op.adadelta_(*lists, *segment(len(sizes), *HYPERPARAMETERS))
        assert emulated.launches() - before == (-(-15_000 // LARGE_TABLE) if op is emulated else 0)
        results.append([torch.cat(tensors) for tensors in lists])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert_same_bits(actual, expected)


def virtual_zeros(count: int, dtype: torch.dtype) -> Tensor:
    """Memory of which no more exists than is written to."""
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which Python 3.12 has no name for
        memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    except (OSError, OverflowError, ValueError):
        pytest.skip(f"needs {count * dtype.itemsize / 2**30:.0f} GiB of addresses")
    return torch.frombuffer(memory, dtype=dtype)


# More than 32 bits count, with or without a sign, and no multiple of a vector.
HUGE = 2**33 + CHUNK + 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("sliced", [None, 0, 1], ids=["dense", "param-sliced", "grad-sliced"])
def test_more_elements_than_32_bits_count(sliced: int | None, dtype: torch.dtype) -> None:
    """Only the first and the last blocks run; tensors before and after take their share of them."""
    edge = 2 * CHUNK + 5
    first, last = ([gradients((edge,), dtype, steps=1, seed=k + seed)[0].abs() for k in range(4)] for seed in (0, 4))
    small = [gradients((3,), dtype, steps=1, seed=k + 8)[0].abs() for k in range(4)]
    long = [virtual_zeros(2 * HUGE if k == sliced else HUGE, dtype) for k in range(4)]
    views = [x[1::2] if k == sliced else x for k, x in enumerate(long)]
    for x, begin, end in zip(views, first, last, strict=True):
        x[:edge], x[-edge:] = begin, end
    emulated.set_edge_blocks(3)
    threes = ([x, y, x.clone()] for x, y in zip(small, views, strict=True))
    emulated.adadelta_(*threes, *segment(3, *HYPERPARAMETERS))
    cpu.adadelta_(*map(list, zip(first, last, strict=True)), *segment(2, *HYPERPARAMETERS))
    for one, begin, end in zip(views, first, last, strict=True):
        assert_same_bits(one[: 2 * CHUNK], begin[: 2 * CHUNK])
        assert_same_bits(one[-CHUNK - 5 :], end[-CHUNK - 5 :])


@pytest.mark.parametrize("part", range(4))
def test_lists_that_do_not_fit_are_refused_unwritten(part: int) -> None:
    lists = lists_of([5, 4], torch.float32)
    lists[part][1] = torch.ones(3)
    for check_only in (True, False):
        with pytest.raises(RuntimeError, match=r"^torch_adadelta refuses parameter 1: its tensors differ in shape"):
            emulated.adadelta_(*lists, *segment(2, *HYPERPARAMETERS), check_only=check_only)
    assert torch.equal(lists[3][0], torch.zeros(5))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"grad_scale": torch.ones(2)}, "grad_scale must be a CPU tensor of one element"),
        ({"grad_scale": torch.ones(1).double()}, "grad_scale must have the dtype float32"),
        ({"found_inf": torch.ones(0)}, "found_inf must be a CPU tensor of one element"),
        ({"found_inf": torch.ones(1).long()}, "found_inf must have the dtype float32"),
        ({"square_sums": torch.ones(1).double()}, "clipnorm and square_sums must be given together"),
        ({"clipvalue": -1.0}, "clipvalue must be a number >= 0, got -1"),
        ({"lr": torch.ones(2)}, "the lr of segment 0 must be a CPU tensor of one element"),
    ],
)
@pytest.mark.parametrize("namespace", ["torch_adadelta", "torch_adadelta_emulated"])
def test_options_that_do_not_fit_are_refused(namespace: str, options: dict[str, Any], error: str) -> None:
    options = dict(options)
    own = segment(1, options.pop("lr", 0.75), 0.9, 1e-6)
    with pytest.raises(RuntimeError, match=f"^torch_adadelta refuses the call: {error}"):
        getattr(torch.ops, namespace).adadelta_(*lists_of([5], torch.float32), *own, **options)


def test_no_tensor_outlives_a_call() -> None:
    lists = lists_of([5, 70_000], torch.float32)
    scalars = [torch.ones(1) for _ in range(5)]
    *tensors, grad_scale, found_inf = scalars

    def uses() -> list[int]:
        tensors = [x for part in lists for x in part] + scalars
        return [torch._C._storage_Use_Count(x.untyped_storage()._cdata) for x in tensors]

    before = uses()
    for factor in (1.0, nan):
        sums = emulated.grad_square_sums(*lists[:2], grad_scale=grad_scale)
        try:
            options = {"grad_scale": grad_scale, "found_inf": found_inf, "factor": factor}
            emulated.adadelta_(*lists, *segment(2, *tensors), clipnorm=1.0, square_sums=sums, **options)
        except RuntimeError:
            assert math.isnan(factor)
        assert torch._C._storage_Use_Count(sums.untyped_storage()._cdata) == 2
    assert uses() == before


# ---- Sums of squares ------------------------------------------------------------------------------------------------

SQUARE_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipvalue": {"clipvalue": 0.3},
    "in-double": {"in_double": True},
    "scale": {"grad_scale": torch.tensor(0.3), "clipvalue": 2.0},
}


def assert_same_square_sums(
    params: list[Tensor], grads: list[Tensor], seeds: tuple[int, ...] = (0, 1), **options: Any
) -> int:
    expected = cpu.grad_square_sums(params, grads, **options)
    launches = 0
    for seed in seeds:
        emulated.set_seed(seed)
        before = emulated.launches()
        assert_same_bits(emulated.grad_square_sums(params, grads, **options), expected)
        launches = emulated.launches() - before
    return launches


# Around the row of 128 lanes, the chunk of 4096, the unit of 65536 elements, and of several units.
SUM_SIZES = (0, 1, 3, 4, 5, 127, 128, 129, 131, 255, 511, 4095, 4096, 4097, 12289, 65535, 65536, 65537, 131_073, 0)


@pytest.mark.parametrize("name", SQUARE_OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_square_sums(dtype: torch.dtype, name: str) -> None:
    options = dict(SQUARE_OPTIONS[name])
    if dtype.is_complex:
        options.pop("clipvalue", None)
    for make in (lambda *args: gradients(*args[:2], steps=1, seed=args[2])[0], order_sensitive):
        grads = [make((size,), dtype, i) for i, size in enumerate(SUM_SIZES)]
        assert assert_same_square_sums(grads, grads, **options) == 2


@pytest.mark.parametrize("units", [2, 3, 5, 6, 7, 8])
def test_square_sums_of_units(units: int) -> None:
    for seed in range(3):
        grads = [order_sensitive((units * 65536 - 100,), torch.bfloat16, seed).float(), torch.ones(3)]
        assert assert_same_square_sums(grads, grads, seeds=(0,)) == 2


def test_square_sums_of_more_units_than_a_block_has_threads() -> None:
    grad = torch.cat([order_sensitive((1100 * 65536 // 44,), torch.float32, seed) for seed in range(4)] * 11)[:-77]
    assert assert_same_square_sums([grad], [grad], seeds=(0,)) == 2


@pytest.mark.parametrize("dtypes", [REAL_DTYPES, COMPLEX_DTYPES], ids=["real", "complex"])
def test_square_sums_of_gradients_of_another_dtype(dtypes: tuple[torch.dtype, ...]) -> None:
    pairs = [(dtype, grad_dtype) for dtype in dtypes for grad_dtype in dtypes]
    params = [torch.empty(4700, dtype=dtype) for dtype, _ in pairs]
    grads = [gradients((4700,), dtype, steps=1, seed=i)[0] for i, (_, dtype) in enumerate(pairs)]
    assert assert_same_square_sums(params, grads) == 1
    assert assert_same_square_sums(params, grads, in_double=True) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=dtype_name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_square_sums_follow_the_memory_of_the_parameter(layout: str, dtype: torch.dtype) -> None:
    shape = (5, 7, 1, 130)
    param = LAYOUTS[layout](randn(shape, dtype, torch.Generator().manual_seed(1)))
    grad = order_sensitive(shape, dtype, 0)
    grads = [lay_out(grad) for lay_out in (*LAYOUTS.values(), lambda x: x[:, :1, :, :1].expand(shape))]
    assert_same_square_sums([param] * len(grads), grads)
    assert_same_square_sums([param] * len(grads), grads, in_double=True)


def test_strided_square_sums_of_several_units() -> None:
    grads = [gradients((300, 700), torch.float32, steps=1)[0].t(), gradients((700, 300), torch.float32, steps=1)[0]]
    params = [torch.ones(700, 300), torch.ones(300, 700).t()]
    assert assert_same_square_sums(params, grads, seeds=(1,)) == 3


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_square_sums_of_tensors_that_are_not_aligned(dtype: torch.dtype) -> None:
    base = gradients((70_000,), dtype, steps=1)[0]
    grads = [base[begin:end] for begin in (1, 2, 3, 5, 8) for end in (begin + 600, 70_000)]
    assert_same_square_sums(grads, grads, seeds=(0,))


@pytest.mark.parametrize("clipvalue", [None, inf, 2.0, 0.0, 1e300])
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_square_sums_of_special_values(dtype: torch.dtype, clipvalue: float | None) -> None:
    special = [inf, -inf, nan, 1e20, -1e20, 1e200, 0.0, -0.0, 1e-30, 1e-45, 2.0, -2.0]
    grads = [torch.tensor([value, 1.0, -3.0], dtype=torch.float64).to(dtype) for value in special]
    assert_same_square_sums(grads, grads, clipvalue=clipvalue)


@pytest.mark.parametrize(
    ("count", "launches"),
    [(0, 0), (SMALL_TABLE, 1), (SMALL_TABLE + 1, 1), (LARGE_TABLE, 1), (LARGE_TABLE + 1, 2), (2 * LARGE_TABLE + 1, 3)],
)
def test_square_sums_of_as_many_tensors_as_a_table_holds(count: int, launches: int) -> None:
    sizes = [0] + [size for i in range(count) for size in (1 + i % 9, 0)]
    grads = [gradients((size,), torch.float32, steps=1, seed=i)[0] for i, size in enumerate(sizes)]
    assert assert_same_square_sums(grads, grads, seeds=(1,)) == launches


@pytest.mark.parametrize(("count", "launches"), [(LARGE_TABLE, 2), (LARGE_TABLE + 1, 4)])
def test_square_sums_of_as_many_large_tensors_as_a_table_holds(count: int, launches: int) -> None:
    """Only their two first and last units are summed, and those of ones that are added up in two launches."""
    grad = torch.zeros(65537)
    grads = [grad] * count
    emulated.set_edge_blocks(1)
    before = emulated.launches()
    emulated.grad_square_sums(grads, grads)
    assert emulated.launches() - before == launches


@pytest.mark.parametrize(
    ("param_dtype", "dtype"),
    [(torch.bfloat16, torch.bfloat16), (torch.float64, torch.float16), (torch.complex64, torch.complex64)],
    ids=dtype_name,
)
@pytest.mark.parametrize("is_sliced", [False, True], ids=["dense", "sliced"])
def test_square_sums_of_more_elements_than_32_bits_count(
    is_sliced: bool, param_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """All is zero but the first and the last units, and zeros change no sum.

    So large that the memory for the units, too, comes from the system, and is zero where no block wrote.
    """
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator kept of other tests is not zero
    unit = 65536
    count = 2**38 + unit + 7
    edges = [gradients((n,), dtype, steps=1, seed=n)[0] for n in (unit, unit + 7)]
    memory = virtual_zeros(2 * count if is_sliced else count, dtype)
    grad = memory[::2] if is_sliced else memory
    grad[:unit], grad[-unit - 7 :] = edges
    param = virtual_zeros(count, param_dtype)
    emulated.set_edge_blocks(2)
    actual = emulated.grad_square_sums([param], [grad])
    expected = cpu.grad_square_sums([param[: len(edge)] for edge in edges], edges)
    assert actual.tolist() == [expected[0].item() + expected[1].item()]


# ---- Sparse gradients -----------------------------------------------------------------------------------------------

SparseLists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def assert_same_sparse_update(
    make: Callable[[], SparseLists],
    seeds: tuple[int, ...] = (0, 1),
    sizes: list[int] | None = None,
    hyperparameters: tuple[Any, ...] = HYPERPARAMETERS,
    maximize: bool = False,
    **options: Any,
) -> int:
    """As `assert_same_update`, for sparse gradients; the order of blocks and threads must not matter."""
    results = []
    launches = 0
    for op, seed in ((cpu, 0), *((emulated, seed) for seed in seeds)):
        lists = make()
        if op is emulated:
            emulated.set_seed(seed)
        given = dict(options)
        if options.get("square_sums") is True:
            values = [
                x.to(torch.promote_types(x.dtype, torch.float64 if p.dtype in _DOUBLE else torch.float32))
                for x, p in zip(lists[2], lists[0], strict=True)
            ]
            given["square_sums"] = cpu.grad_square_sums(values, values, options.get("clipvalue"))
        for _ in range(2):
            before = emulated.launches()
            own = several(sizes, maximize) if sizes else segment(len(lists[0]), *hyperparameters, maximize)
            op.sparse_adadelta_(*lists, *own, **given)
            launches = emulated.launches() - before
        results.append(lists)
    names = ("param", "indices", "values", "square_avg", "acc_delta")
    for others in results[1:]:
        for name, tensors, expected in zip(names, others, results[0], strict=True):
            for i, (x, y) in enumerate(zip(tensors, expected, strict=True)):
                if name == "indices":
                    assert torch.equal(x, y)
                else:
                    assert_same_bits(whole_memory(x), whole_memory(y), f"{name} {i}")
    return launches


_DOUBLE = (torch.float64, torch.complex128)


def sparse_lists(
    shapes: list[tuple[tuple[int, ...], int]],
    dtype: torch.dtype,
    value_dtypes: tuple[torch.dtype, ...] = (),
    count: int = 23,
) -> SparseLists:
    """Tables of these shapes and numbers of sparse dimensions; half of the occurrences are of one row."""
    params, all_indices, all_values = [], [], []
    dtypes = value_dtypes or (dtype,)
    for i, (shape, dims) in enumerate(shapes):
        generator = torch.Generator().manual_seed(i)
        rows = [torch.randint(size, (count,), generator=generator) for size in shape[:dims]]
        indices = torch.stack(rows) if rows else torch.zeros(0, count, dtype=torch.int64)
        indices[:, ::2] = torch.tensor(shape[:dims], dtype=torch.int64)[:, None] - 1
        params.append(randn(shape, dtype, generator))
        all_indices.append(indices)
        all_values.append(gradients((count, *shape[dims:]), dtypes[i % len(dtypes)], steps=1, seed=i)[0])
    return params, all_indices, all_values, *states_of(params)


# Rows of one element, of no vector's and of many vectors' length; several pieces; several and no sparse dimensions.
TABLES = [
    ((9, 5), 1),
    ((7, 64), 1),
    ((40,), 1),
    ((3, 2, 6), 2),
    ((3, 4), 2),
    ((5, 8), 0),
    ((), 0),
    ((4, 132), 1),
    ((3, 1030), 1),
    ((2, 0), 1),
]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_sparse_update(dtype: torch.dtype, name: str) -> None:
    """Two launches a table: one for the numbers of the rows, one for the update; none for rows without elements."""
    launches = assert_same_sparse_update(lambda: sparse_lists(TABLES, dtype), **options_for(dtype, name))
    assert launches == 2 * (len(TABLES) - 1)


@pytest.mark.parametrize("name", ["plain", "clipvalue-clipnorm", "scale-clipvalue-factor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_sparse_update_by_values_of_another_dtype(dtype: torch.dtype, name: str) -> None:
    value_dtypes = COMPLEX_DTYPES if dtype.is_complex else REAL_DTYPES
    tables = [table for table in (((9, 5), 1), ((7, 64), 1)) for _ in value_dtypes]
    if name == "clipvalue-clipnorm" and dtype not in _DOUBLE:
        value_dtypes = tuple(d for d in value_dtypes if d not in _DOUBLE)  # whose norms are taken after a cast
    assert_same_sparse_update(lambda: sparse_lists(tables, dtype, value_dtypes), **options_for(dtype, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=dtype_name)
def test_several_segments_of_sparse_gradients(dtype: torch.dtype) -> None:
    sizes = [0, 3, 2, 0, len(TABLES) - 5]
    assert_same_sparse_update(lambda: sparse_lists(TABLES, dtype), sizes=sizes, **options_for(dtype, "clipnorm"))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 7, 8, 9, 127, 128, 129, 513])
def test_sparse_update_around_what_is_read_ahead(count: int) -> None:
    """Runs of every length up to the count, in the middle and at the end."""

    def make() -> SparseLists:
        made = sparse_lists([((count + 3, 4), 1), ((4, 3), 1), ((4, 4), 1)], torch.float32, count=count)
        made[1][1] = torch.full((1, count), 1)
        made[1][2] = torch.cat([torch.full((1, count - count // 2), 3), torch.full((1, count // 2), 0)], dim=1)
        return made

    assert assert_same_sparse_update(make) == (0 if count == 0 else 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_name)
def test_sparse_update_of_one_row_many_times(dtype: torch.dtype) -> None:
    def make() -> SparseLists:
        made = sparse_lists([((50, 12), 1)], dtype, count=3000)
        made[1][0][0, 100:2900] = 17
        return made

    assert_same_sparse_update(make, seeds=(1,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=dtype_name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_update_of_any_layout(layout: str, dtype: torch.dtype) -> None:
    shape = (5, 3, 1, 12)

    def make() -> SparseLists:
        params, indices, values, *states = sparse_lists([(shape, dims) for dims in range(5)], dtype)
        params = [lay_out(layout, param) for param in params]
        states = [list(state) for state in states_of(params)]
        states[0][1] = lay_out("transposed", torch.zeros(shape, dtype=dtype))
        return params, indices, values, *states  # type: ignore[return-value]

    assert_same_sparse_update(make)
    assert_same_sparse_update(make, **OPTIONS["clipnorm"])


@pytest.mark.parametrize("shifted", range(5))
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_sparse_update_of_tensors_that_are_not_aligned(dtype: torch.dtype, shifted: int) -> None:
    def make() -> SparseLists:
        made = sparse_lists([((9, 8), 1), ((3, 64), 1)], dtype)
        if shifted != 1:
            made[shifted][:] = [
                torch.zeros(x.numel() + 1, dtype=dtype)[1:].view(x.shape).copy_(x) for x in made[shifted]
            ]
        else:  # indices of other strides
            made[1][:] = [x.repeat_interleave(2, dim=1)[:, ::2] for x in made[1]]
        return made

    assert_same_sparse_update(make)


def test_sparse_updates_of_one_parameter_follow_each_other() -> None:
    def make() -> SparseLists:
        params, indices, values, square_avgs, acc_deltas = sparse_lists([((9, 5), 1)] * 3, torch.float32)
        return [params[0]] * 3, indices, values, [square_avgs[0]] * 3, [acc_deltas[0]] * 3

    assert_same_sparse_update(make)


@pytest.mark.parametrize("found_inf", [0.0, 1.0, nan])
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_sparse_update_and_found_inf(layout: str, found_inf: float) -> None:
    def make() -> SparseLists:
        params, indices, values, *_ = sparse_lists([((5, 3, 2, 4), 1)], torch.float32)
        params = [lay_out(layout, param) for param in params]
        return params, indices, values, *states_of(params)

    assert_same_sparse_update(make, found_inf=torch.tensor(found_inf), grad_scale=torch.tensor(2.0))
    lists = make()
    emulated.sparse_adadelta_(*lists, *segment(len(lists[0]), *HYPERPARAMETERS), found_inf=torch.tensor(found_inf))
    assert torch.equal(lists[3][0], torch.zeros(5, 3, 2, 4)) == (found_inf != 0)


def test_sparse_update_of_special_values() -> None:
    special = [inf, -inf, nan, 1e20, -1e20, 1e38, 0.0, -0.0, 1e-30, 1e-45, 0.3, -0.3]

    def make() -> SparseLists:
        values = torch.tensor([[x, y] for x in special for y in special])
        params = [torch.full((60, 2), -0.0)]
        return params, [torch.arange(len(values))[None] // 3], [values], *states_of(params)

    for name in OPTIONS:
        assert_same_sparse_update(make, **OPTIONS[name])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_first_index_out_of_range_is_found(seed: int) -> None:
    emulated.set_seed(seed)
    lists = sparse_lists(
        [((9, 5), 1), ((4, 3, 2), 2), ((9, 5), 1), ((2, 3), 0), ((9, 0), 1)], torch.float32, count=1500
    )
    assert emulated.first_invalid_indices(*lists).tolist() == [-1] * 5
    lists[1][0][0, [1499, 700, 701]] = torch.tensor([9, -1, 2**62])
    lists[1][1][1, 1200] = 3
    lists[1][1][0, 1201] = -(2**63)
    lists[1][2][0, 0] = 9
    lists[1][4][0, 3] = 9
    assert emulated.first_invalid_indices(*lists).tolist() == [700, 1200, 0, -1, 3]
    assert cpu.first_invalid_indices(*lists).tolist() == [700, 1200, 0, -1, 3]


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_an_index_out_of_range_is_left_out(layout: str) -> None:
    """To raise, the device would have to be waited for; memory beside the table is not written."""
    bad = torch.tensor([-1, 5, 2**62, -(2**63), 5])

    def make(with_bad: bool) -> SparseLists:
        params, (indices,), (values,), *_ = sparse_lists([((5, 3, 2, 4), 1)], torch.float32)
        if with_bad:
            indices = torch.cat([bad[None, :2], indices, bad[None, 2:]], dim=1)
            values = torch.cat([torch.ones(2, 3, 2, 4), values, torch.ones(3, 3, 2, 4)])
        params = [lay_out(layout, param) for param in params]
        return params, [indices], [values], *states_of(params)

    lists, expected = make(True), make(False)
    emulated.sparse_adadelta_(*lists, *segment(len(lists[0]), *HYPERPARAMETERS))
    cpu.sparse_adadelta_(*expected, *segment(len(expected[0]), *HYPERPARAMETERS))
    for part in (0, 3, 4):
        assert_same_bits(whole_memory(lists[part][0]), whole_memory(expected[part][0]))


@settings(max_examples=40, deadline=None)
@given(
    tables=st.lists(
        st.tuples(st.lists(st.integers(1, 6), min_size=0, max_size=4), st.integers(0, 4)), min_size=1, max_size=4
    ),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(sorted(OPTIONS)),
    count=st.integers(0, 40),
    seed=st.integers(0, 1000),
)
def test_any_sparse_update(
    tables: list[tuple[list[int], int]], dtype: torch.dtype, name: str, count: int, seed: int
) -> None:
    shapes = [(tuple(shape), min(dims, len(shape))) for shape, dims in tables]
    assert_same_sparse_update(
        lambda: sparse_lists(shapes, dtype, count=count), seeds=(seed,), **options_for(dtype, name)
    )


def test_no_tensor_outlives_a_sparse_call() -> None:
    lists = sparse_lists([((9, 5), 1), ((4, 3, 2), 2)], torch.float32)

    def uses() -> list[int]:
        return [torch._C._storage_Use_Count(x.untyped_storage()._cdata) for part in lists for x in part]

    before = uses()
    for options in ({}, {"clipvalue": -1.0}):
        try:
            emulated.sparse_adadelta_(*lists, *segment(len(lists[0]), *HYPERPARAMETERS), **options)
            emulated.first_invalid_indices(*lists)
        except RuntimeError:
            assert options
    assert uses() == before
