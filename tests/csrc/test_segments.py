"""Several segments in one call of an op: the bits of a call for each segment, whatever the segments are."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import direct
import pytest
import torch
from cases import (
    DTYPES,
    LAYOUTS,
    REAL_DTYPES,
    Segments,
    assert_same_bits,
    dtype_name,
    gradients,
    randn,
    segment,
    segments,
)
from torch import Tensor

from torch_adadelta.backends import kernels

pytestmark = pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")

adadelta: Any = torch.ops.torch_adadelta
Lists = list[list[Tensor]]

# Each of other hyperparameters, some of them Tensors; empty segments first, last and in between.
PARTS: list[tuple[int, tuple[Any, ...]]] = [
    (0, (9.0, 0.1, 1.0)),
    (2, (1.0, 0.95, 1e-7)),
    (3, (torch.tensor(0.5), 0.875, torch.tensor(1e-3, dtype=torch.float64))),
    (0, (torch.tensor(7.0), 0.1, 1.0, True)),
    (1, (0.25, torch.tensor([0.75], dtype=torch.bfloat16), 1e-5, True)),
    (4, (2.0, 0.5, 0.0625)),
    (0, (9.0, 0.1, 1.0)),
]
SIZES = [size for size, _ in PARTS]
COUNT = sum(SIZES)


def all_segments() -> Segments:
    return segments(*(segment(size, *values) for size, values in PARTS))


def parts() -> Iterator[tuple[slice, Segments]]:
    """The parameters of each segment that has some, and what a call for these takes."""
    for (size, values), end in zip(PARTS, itertools.accumulate(SIZES), strict=True):
        if size:
            yield slice(end - size, end), segment(size, *values)


def ways() -> Iterator[str]:
    capability, threads = kernels.cpu_capability(), torch.get_num_threads()
    try:
        for name in kernels.CPU_CAPABILITIES[: kernels.CPU_CAPABILITIES.index(capability) + 1]:
            kernels.set_cpu_capability(name)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                yield f"{name}, {count} threads"
    finally:
        kernels.set_cpu_capability(capability)
        torch.set_num_threads(threads)


def dense(dtype: torch.dtype, layout: str = "contiguous", grad_dtype: torch.dtype | None = None) -> Lists:
    shapes = [(1, 2, 3, 5 + 7 * i) for i in range(COUNT)]
    shapes[3], shapes[-2] = (2, 0, 3, 1), (5, 7, 3, 401)
    generator = torch.Generator().manual_seed(0)
    params = [LAYOUTS[layout](randn(shape, dtype, generator)) for shape in shapes]
    grads = [gradients(shape, grad_dtype or dtype, steps=1, seed=i)[0] for i, shape in enumerate(shapes)]
    states = [[LAYOUTS[layout]((x * x.conj()).clone()) for x in params] for _ in range(2)]
    return [params, grads, *states]


def sparse(dtype: torch.dtype) -> Lists:
    shapes = [((9, 5), 1), ((40,), 1), ((3, 2, 6), 2), ((5, 8), 0), ((2, 0), 1)] * 2
    generator = torch.Generator().manual_seed(0)
    made: Lists = [[], [], [], [], []]
    for shape, dims in shapes:
        param = randn(shape, dtype, generator)
        rows = [torch.randint(size, (29,), generator=generator) for size in shape[:dims]]
        indices = torch.stack(rows) if rows else torch.zeros(0, 29, dtype=torch.int64)
        values = gradients((29, *shape[dims:]), dtype, steps=1, seed=len(made[0]))[0]
        for part, x in zip(made, (param, indices, values, param.abs().to(dtype), param.abs().to(dtype)), strict=True):
            part.append(x)
    return made


def assert_like_calls_for_each(
    call: Callable[..., Any], make: Callable[[], Lists], options: dict[str, Any] | None = None, what: str = ""
) -> None:
    together, apart = make(), make()
    options = options or {}
    for _ in range(2):
        call(*together, *all_segments(), **options)
        for part, own in parts():
            rest = {k: v[part] if k == "square_sums" else v for k, v in options.items()}
            call(*(tensors[part] for tensors in apart), *own, **rest)
    for one, other in zip(together, apart, strict=True):
        for i, (x, y) in enumerate(zip(one, other, strict=True)):
            if x.is_floating_point() or x.is_complex():
                assert_same_bits(x, y, f"{i} {what}")
            else:
                assert torch.equal(x, y)


def with_cache(params: Any, grads: Any, square_avgs: Any, acc_deltas: Any, *rest: Any, **options: Any) -> None:
    number = adadelta.cache_accumulators(square_avgs, acc_deltas)
    try:
        adadelta.adadelta_.cached(params, grads, number, *rest, **options)
    finally:
        adadelta.drop_accumulators(number)


CALLS = {"lists": adadelta.adadelta_, "cached": with_cache} if kernels.is_loaded else {}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_every_dtype_and_layout(dtype: torch.dtype, layout: str) -> None:
    for call in CALLS.values():
        assert_like_calls_for_each(call, lambda: dense(dtype, layout))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_every_instruction_set_and_number_of_threads(dtype: torch.dtype, call: str) -> None:
    for way in ways():
        assert_like_calls_for_each(CALLS[call], lambda: dense(dtype), what=way)


@pytest.mark.parametrize(("dtype", "grad_dtype"), list(itertools.permutations(REAL_DTYPES, 2)))
def test_gradients_of_another_dtype(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    assert_like_calls_for_each(adadelta.adadelta_, lambda: dense(dtype, grad_dtype=grad_dtype))


@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize("clip", [{"clipvalue": 0.3}, {"clipnorm": 0.7}, {"factor": 0.37}], ids=str)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_gradient_options(dtype: torch.dtype, clip: dict[str, float], scale: float | None) -> None:
    scaled = {} if scale is None else {"grad_scale": torch.tensor(scale)}
    options: dict[str, Any] = {**clip, **scaled}
    if "clipnorm" in clip:
        options["square_sums"] = direct.square_sums(*dense(dtype)[:2], **scaled)
    assert_like_calls_for_each(adadelta.adadelta_, lambda: dense(dtype), options)


@pytest.mark.parametrize("is_clipped", [False, True])
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_sparse_gradients(dtype: torch.dtype, is_clipped: bool) -> None:
    options: dict[str, Any] = {}
    if is_clipped:
        values = sparse(dtype)[2]
        options = {"clipnorm": 0.7, "square_sums": direct.square_sums(values, values)}
    for way in ways():
        assert_like_calls_for_each(adadelta.sparse_adadelta_, lambda: sparse(dtype), options, way)


def test_sparse_gradients_of_large_tables() -> None:
    """So large that several threads work on them, and begin anywhere in one."""

    def make() -> Lists:
        params = [torch.ones(500, 1 + 700 * (i % 3)) for i in range(COUNT)]
        generator = torch.Generator().manual_seed(0)
        indices = [torch.randint(500, (1, 100), generator=generator) for _ in params]
        values = [torch.randn(100, p.shape[1], generator=generator) for p in params]
        return [params, indices, values, *([torch.zeros_like(p) for p in params] for _ in range(2))]

    for way in ways():
        assert_like_calls_for_each(adadelta.sparse_adadelta_, make, what=way)


def test_many_small_tensors_of_many_segments() -> None:
    """More than one thread's work, in segments of one and of several parameters."""
    counts = [1 + i % 5 for i in range(600)]
    hyperparameters = segments(*(segment(count, 0.001 * i, 0.9, 1e-6) for i, count in enumerate(counts)))
    total = sum(counts)
    generator = torch.Generator().manual_seed(0)
    memory = [torch.randn(total * 40, generator=generator).square() for _ in range(4)]
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        lists = [list(x.clone().split(40)) for x in memory]
        adadelta.adadelta_(*lists, *hyperparameters)
        torch.set_num_threads(before)
        results.append(lists)
    apart = [list(x.clone().split(40)) for x in memory]
    for i, (count, end) in enumerate(zip(counts, itertools.accumulate(counts), strict=True)):
        own = segment(count, 0.001 * i, 0.9, 1e-6)
        adadelta.adadelta_(*(tensors[end - count : end] for tensors in apart), *own)
    for lists in results:
        for tensors, expected in zip(lists, apart, strict=True):
            assert_same_bits(torch.cat(tensors), torch.cat(expected))


@pytest.mark.parametrize("call", CALLS)
def test_parameters_that_share_memory_in_several_segments(call: str) -> None:
    """A parameter in two segments is updated in turn, by the hyperparameters of each."""

    def make() -> Lists:
        base, states = torch.ones(90_000), [torch.ones(60_000) for _ in range(2)]
        params = [base[:60_000], base[30_000:], base[:60_000]] + [torch.ones(5)] * (COUNT - 3)
        grads = [torch.full(p.shape, 0.1 * (i + 1)) for i, p in enumerate(params)]
        own = [torch.ones(5) for _ in range(2)]
        return [
            params,
            grads,
            *([x, torch.ones(60_000), x] + [y] * (COUNT - 3) for x, y in zip(states, own, strict=True)),
        ]

    for way in ways():
        assert_like_calls_for_each(CALLS[call], make, what=way)


@pytest.mark.parametrize("call", [*CALLS, "sparse"])
def test_check_only_writes_nothing(call: str) -> None:
    make = (lambda: sparse(torch.float32)) if call == "sparse" else (lambda: dense(torch.float32))
    made, expected = make(), make()
    op = adadelta.sparse_adadelta_ if call == "sparse" else CALLS[call]
    op(*made, *all_segments(), check_only=True)
    for tensors, others in zip(made, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(tensors, others, strict=True))


@pytest.mark.parametrize("call", [*CALLS, "sparse"])
def test_nothing_of_any_segment_is_written_if_one_parameter_is_refused(call: str) -> None:
    make = (lambda: sparse(torch.float32)) if call == "sparse" else (lambda: dense(torch.float32))
    op = adadelta.sparse_adadelta_ if call == "sparse" else CALLS[call]
    for part in (0, *((2, 3, 4) if call == "sparse" else (1, 2, 3))):
        made, expected = make(), make()
        made[part][-1] = torch.ones(3, 3, 3)
        with pytest.raises(RuntimeError, match=f"^torch_adadelta refuses parameter {COUNT - 1}: its "):
            op(*made, *all_segments())
        for tensors, others in zip(made, expected, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(tensors[:-1], others[:-1], strict=True))


def test_opcheck() -> None:
    torch.library.opcheck(adadelta.adadelta_.default, (*dense(torch.float32), *all_segments()))
    torch.library.opcheck(adadelta.sparse_adadelta_.default, (*sparse(torch.float32), *all_segments()))


def test_no_hyperparameter_outlives_a_call() -> None:
    tensors = [value for _, values in PARTS for value in values if isinstance(value, Tensor)]

    def uses() -> list[int]:
        return [torch._C._storage_Use_Count(x.untyped_storage()._cdata) for x in tensors]

    before = uses()
    for clipvalue in (None, -1.0):
        for call in (*CALLS.values(), adadelta.sparse_adadelta_):
            made = sparse(torch.float32) if call is adadelta.sparse_adadelta_ else dense(torch.float32)
            try:
                call(*made, *all_segments(), clipvalue=clipvalue)
            except RuntimeError:
                assert clipvalue is not None
    assert uses() == before
