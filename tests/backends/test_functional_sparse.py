"""Sparse gradients: every path against the oracle, bit by bit; only rows that occur are touched."""

import copy
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import direct
import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    PATHS,
    REAL_DTYPES,
    STEP_OPTIONS,
    Path,
    assert_optimizer_like_oracle,
    assert_same_bits,
    coo,
    coo_gradient,
    dtype_name,
    gradients,
    optimizer_oracle_of,
    randn,
    to_oracle,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.oracle import OracleOptimizer
from torch import Tensor
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras
from torch_adadelta.backends import functional, kernels
from torch_adadelta.backends.batch import Backend

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support", "ignore:Sparse CSR tensor support")
needs_library = pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def step_both(optimizer: AdadeltaKeras, expected: OracleOptimizer, grads: Sequence[Tensor | None]) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()
    expected.step(to_oracle(grads))
    assert_optimizer_like_oracle(optimizer, expected)


# ---- Against the oracle ---------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    **STEP_OPTIONS,
    "clipvalue+global_clipnorm": {"clipvalue": 0.5, "global_clipnorm": 0.9, "decay": 0.3},
    "clipnorm not reached": {"clipnorm": 1e8, "maximize": True},
}

# The shape of a parameter and its number of sparse dimensions.
SHAPES: list[tuple[tuple[int, ...], int]] = [
    ((9, 5), 1),  # an embedding
    ((7, 64), 1),
    ((6,), 1),  # rows of one element
    ((4, 3, 5), 2),
    ((3, 4, 2), 3),
    ((2, 3), 0),  # the whole parameter is the one row
    ((), 0),
    ((3, 2, 4, 5), 1),
    ((4, 0), 1),
    ((3, 1500), 1),  # more than the kernel holds at a time
]


@functools.cache
def _steps_by_oracle(name: str, dtype: torch.dtype) -> tuple[list[Tensor], list[list[Tensor | None]], OracleOptimizer]:
    """Parameters, their gradients in three steps, and what becomes of them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [*SHAPES, ((5, 4), None)]
    start = [randn(shape, dtype, generator) for shape, _ in shapes]
    expected = optimizer_oracle_of(start, learning_rate=1.0, **OPTIONS[name])
    steps = []
    for step in range(3):
        grads: list[Tensor | None] = [
            gradients(shape, dtype, 1, seed=step)[0]
            if dims is None
            else coo_gradient(shape, dtype, (12, 0, 5)[step], dims, seed=10 * step + i)
            for i, (shape, dims) in enumerate(shapes)
        ]
        if step == 2:
            grads[1] = None
        expected.step(to_oracle(grads))
        steps.append(grads)
    return start, steps, expected


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in OPTIONS for dtype in DTYPES if not (dtype.is_complex and "clipvalue" in OPTIONS[name])],
    ids=lambda x: x if isinstance(x, str) else dtype_name(x),
)
def test_steps_are_those_of_the_oracle(path: Path, name: str, dtype: torch.dtype) -> None:
    """Sparse gradients of every number of dimensions, beside dense ones, in two groups."""
    start, steps, expected = _steps_by_oracle(name, dtype)
    params = [Parameter(p.clone()) for p in start]
    optimizer = AdadeltaKeras([{"params": params[:3]}, {"params": params[3:]}], 1.0, **OPTIONS[name], **path.options)
    for grads in steps:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
    assert_optimizer_like_oracle(optimizer, expected)


@pytest.mark.parametrize("grad_dtype", REAL_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_values_of_another_dtype(path: Path, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """They are cast before anything else, norms over mixed dtypes included: a float64 parameter is beside them."""
    options = {"clipvalue": 0.1, "global_clipnorm": 0.9}
    params = [Parameter(torch.zeros(6, 5, dtype=dtype)), Parameter(torch.zeros(3, dtype=torch.float64))]
    optimizer = AdadeltaKeras(params, 1.0, **options, **path.options)  # type: ignore[arg-type]
    expected = optimizer_oracle_of(params, learning_rate=1.0, **options)
    for step in range(3):
        dense = gradients((3,), torch.float64, 1, seed=step)[0]
        grads = [coo_gradient((6, 5), grad_dtype, 14, seed=step), dense]
        optimizer.apply_gradients(zip(grads, params, strict=True))
        expected.step(to_oracle(grads))
        assert_optimizer_like_oracle(optimizer, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("width", [1, 8, 700])
def test_one_row_touched_many_times(path: Path, width: int, dtype: torch.dtype) -> None:
    """Beside rows that are touched once: the order of the sum decides about its bits, and is that of the entries."""
    count = 2000 if width < 700 else 600
    param = Parameter(torch.zeros(20, width, dtype=dtype))
    optimizer, expected = AdadeltaKeras([param], 1.0, **path.options), optimizer_oracle_of([param], learning_rate=1.0)
    rows = torch.full((count,), 13)
    rows[::101] = torch.arange(len(rows[::101])) % 20
    step_both(optimizer, expected, [coo(rows, gradients((count, width), dtype, 1)[0], (20, width))])


def test_no_entry_counts_as_a_step_and_changes_nothing(path: Path) -> None:
    param = Parameter(torch.linspace(-1, 1, 12).reshape(4, 3))
    optimizer = AdadeltaKeras([param], 1.0, clipnorm=0.5, **path.options)
    for step in range(3):
        param.grad = coo(torch.zeros(0), torch.zeros(0, 3), (4, 3))
        optimizer.step()
        assert optimizer.iterations == step + 1
    assert torch.equal(param, torch.linspace(-1, 1, 12).reshape(4, 3))
    for key, value in optimizer.state[param].items():
        assert torch.equal(value, torch.zeros(4, 3)), key
        assert value.layout is torch.strided


def test_special_values(path: Path) -> None:
    """And zeros: a sum begins with +0, as in TensorFlow, so a -0 alone leaves a parameter of -0 as it is."""
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e20, -1e20, 1e38, 1e-30, 1e-45, 0.3, -0.3]
    values = torch.tensor([[x, y] for x in special for y in special])
    rows = torch.arange(len(values)) // 3
    for options in ({}, {"maximize": True}, {"clipvalue": 0.2}, {"clipnorm": 0.2}, {"global_clipnorm": 0.2}):
        params = [Parameter(torch.full((50, 2), -0.0)) for _ in range(2)]
        optimizer = AdadeltaKeras(params, 1.0, **options, **path.options)  # type: ignore[arg-type]
        expected = optimizer_oracle_of(params, learning_rate=1.0, **options)
        for _ in range(2):
            step_both(optimizer, expected, [coo(rows, values, (50, 2)), coo([7, 9], values[:2], (50, 2))])
        if options == {}:
            assert params[1][7].signbit().all()


def _sliced(x: Tensor) -> Tensor:
    base = torch.zeros(2 * x.shape[0], *x.shape[1:-1], 3 * x.shape[-1], dtype=x.dtype)
    return base[::2, ..., 1::3].copy_(x)


def _rows_apart(x: Tensor) -> Tensor:
    base = torch.zeros(x.shape[0], *x.shape[1:-1], x.shape[-1] + 3, dtype=x.dtype)
    return base[..., 1:-2].copy_(x)


TABLES: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.clone,
    lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    _sliced,
    _rows_apart,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=dtype_name)
@pytest.mark.parametrize("sparse_dims", [0, 1, 2, 3])
def test_any_layout_of_table_and_state(path: Path, sparse_dims: int, dtype: torch.dtype) -> None:
    shape = (5, 3, 7)
    start = randn(shape, dtype, torch.Generator().manual_seed(0))
    layouts = [(layout, state_layout) for layout in TABLES for state_layout in TABLES]
    params = [Parameter(layout(start)) for layout, _ in layouts]
    optimizer, expected = AdadeltaKeras(params, 1.0, **path.options), optimizer_oracle_of(params, learning_rate=1.0)
    for param, (_, state_layout) in zip(params, layouts, strict=True):
        optimizer.state[param] = {
            "square_avg": state_layout(torch.zeros(shape, dtype=dtype)),
            "acc_delta": torch.zeros(shape, dtype=dtype),
        }
    for step in range(2):
        step_both(optimizer, expected, [coo_gradient(shape, dtype, 9, sparse_dims, seed=step)] * len(params))


@pytest.mark.parametrize("options", [{}, {"clipnorm": 0.5}], ids=["plain", "clipnorm"])
def test_values_and_indices_of_any_layout(path: Path, options: dict[str, float]) -> None:
    """An expanded gradient, as of a sum; values in another order than that of memory; indices that are not in a row."""
    params = [Parameter(torch.zeros(6, 4, 3)) for _ in range(3)]
    optimizer = AdadeltaKeras(params, 1.0, **options, **path.options)  # type: ignore[arg-type]
    expected = optimizer_oracle_of(params, learning_rate=1.0, **options)
    indices = torch.tensor([[5, 0], [1, 2], [5, 0], [3, 3], [1, 1]]).t()
    values = gradients((3, 5), torch.float32, 1)[0].t()
    grads = [
        coo([1, 5, 1], torch.ones(1).expand(3, 4, 3), (6, 4, 3)),
        coo(indices, values, (6, 4, 3)),
        coo([0, 2], gradients((3, 4, 2), torch.float32, 1)[0].permute(2, 1, 0), (6, 4, 3)),
    ]
    assert not grads[0]._values().is_contiguous()
    assert not grads[1]._indices().is_contiguous()
    step_both(optimizer, expected, grads)


@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=0, max_size=4),
    sparse_dims=st.integers(0, 4),
    count=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(sorted(OPTIONS)),
    is_coalesced=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_gradient(
    shape: list[int], sparse_dims: int, count: int, dtype: torch.dtype, name: str, is_coalesced: bool, seed: int
) -> None:
    options = {key: v for key, v in OPTIONS[name].items() if key != "clipvalue" or not dtype.is_complex}
    start = randn(shape, dtype, torch.Generator().manual_seed(seed))
    grads = [coo_gradient(shape, dtype, count, min(sparse_dims, len(shape)), seed=seed + step) for step in range(2)]
    if is_coalesced and dtype is not torch.complex32:  # which PyTorch cannot coalesce
        grads = [grad.coalesce() for grad in grads]
    expected = optimizer_oracle_of([start], learning_rate=1.0, **options)
    for grad in grads:
        expected.step(to_oracle([grad]))
    for path in (PATHS[0], PATHS[-1]):
        param = Parameter(start.clone())
        optimizer = AdadeltaKeras([param], 1.0, **options, foreach=path.options.get("foreach"))
        for param.grad in grads:
            optimizer.step()
        assert_optimizer_like_oracle(optimizer, expected, path.name)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize(
    ("shape", "count"), [((3000, 64), 5000), ((70, 9000), 90), ((200_000, 1), 150_000), ((300, 64), 40_000)]
)
def test_the_same_bits_for_any_number_of_threads(
    shape: tuple[int, int], count: int, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    """Enough entries for several threads to share the rows, and to meet in the middle of one."""
    grad = coo_gradient(shape, dtype, count)
    results = []
    for number in (1, 2, 3, 8):
        threads(number)
        param = Parameter(randn(shape, dtype, torch.Generator().manual_seed(0)))
        optimizer = AdadeltaKeras([param], 1.0, fused=True, clipnorm=0.5)
        for _ in range(2):
            param.grad = grad
            optimizer.step()
        results.append([param, *optimizer.state[param].values()])
    param = Parameter(randn(shape, dtype, torch.Generator().manual_seed(0)))
    optimizer = AdadeltaKeras([param], 1.0, foreach=False, clipnorm=0.5)
    for _ in range(2):
        param.grad = grad
        optimizer.step()
    for others in results:
        for one, other in zip(others, [param, *optimizer.state[param].values()], strict=True):
            assert torch.equal(one.detach(), other.detach())


# ---- Layers ---------------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """Two tables around a dense layer."""

    def __init__(self, is_sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = torch.nn.Embedding(50, 8, padding_idx=0, sparse=is_sparse)
        self.linear = torch.nn.Linear(8, 3)
        self.bag = torch.nn.EmbeddingBag(30, 8, mode="sum", sparse=is_sparse)

    def forward(self, words: Tensor, bag: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.words(words).mean(1) + self.bag(bag))
        return logits.square().sum()


@pytest.mark.parametrize(
    "options",
    [{}, {"global_clipnorm": 0.3}, {"learning_rate": lambda: 0.5}],
    ids=["plain", "global_clipnorm", "callable"],
)
def test_a_model_with_tables(path: Path, options: dict[str, Any]) -> None:
    model = Model(is_sparse=True)
    params = list(model.parameters())
    optimizer = AdadeltaKeras(params, **{"learning_rate": 1.0, **options}, **path.options)
    numbers = {key: value() if callable(value) else value for key, value in options.items()}
    expected = optimizer_oracle_of(params, **{"learning_rate": 1.0, **numbers})
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        if step == 2:  # training goes on from a checkpoint
            state_dict = optimizer.state_dict()
            optimizer = AdadeltaKeras(params, **{"learning_rate": 1.0, **options}, **path.options)
            optimizer.load_state_dict(state_dict)
        index_dtype = (torch.int32, torch.int64)[step % 2]
        words = torch.randint(50, (6, 5), generator=generator, dtype=index_dtype)
        bag = torch.randint(30, (6, 4), generator=generator, dtype=index_dtype)
        optimizer.zero_grad()
        for _ in range(2):  # gradients that autograd has added up
            model(words, bag).backward()
        grads = [p.grad for p in params]
        assert [grad.is_sparse for grad in grads if grad is not None] == [True, False, False, True]
        before = [copy.deepcopy(grad) for grad in grads]
        optimizer.step()
        expected.step(to_oracle(grads))
        assert_optimizer_like_oracle(optimizer, expected)
        for grad, kept in zip(grads, before, strict=True):
            assert grad is not None
            assert torch.equal(grad.to_dense(), kept.to_dense())


def test_minimize_and_apply_gradients(path: Path) -> None:
    tables = [torch.nn.Embedding(7, 3, sparse=True) for _ in range(2)]
    with torch.no_grad():
        tables[1].weight.copy_(tables[0].weight)
    optimizers = [AdadeltaKeras([table.weight], 1.0, **path.options) for table in tables]
    rows = torch.tensor([6, 0, 6])
    optimizers[0].minimize(lambda: tables[0](rows).square().sum(), [tables[0].weight])
    (grad,) = torch.autograd.grad(tables[1](rows).square().sum(), [tables[1].weight])
    assert grad.is_sparse
    optimizers[1].apply_gradients([(grad, tables[1].weight)])
    assert torch.equal(tables[0].weight, tables[1].weight)
    assert tables[0].weight.grad is None


def test_a_parameter_with_both_kinds_of_gradient_is_updated_in_the_order_given(path: Path) -> None:
    param, other = Parameter(torch.zeros(4, 2)), Parameter(torch.zeros(4, 2))
    optimizer = AdadeltaKeras([param, other], 1.0, **path.options)
    expected = optimizer_oracle_of([param, other], learning_rate=1.0)
    dense, rows = gradients((4, 2), torch.float32, 2), coo_gradient((4, 2), torch.float32, 5)
    pairs = [(rows, param), (dense[0], other), (dense[1], param), (rows, other), (rows, param)]
    optimizer.apply_gradients(pairs)
    for grad, target in pairs:
        expected.step([*to_oracle([grad]), None] if target is param else [None, *to_oracle([grad])])
    expected.iterations = 1
    assert_optimizer_like_oracle(optimizer, expected)


def test_gradients_may_change_their_kind_from_step_to_step(path: Path) -> None:
    param = Parameter(torch.zeros(4, 2))
    optimizer, expected = AdadeltaKeras([param], 1.0, **path.options), optimizer_oracle_of([param], learning_rate=1.0)
    for step in range(4):
        dense = gradients((4, 2), torch.float32, 1, seed=step)[0]
        step_both(optimizer, expected, [coo_gradient((4, 2), torch.float32, 5, seed=step) if step % 2 else dense])


# ---- AMP --------------------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=dtype_name)
def test_grad_scaler(dtype: torch.dtype, name: str) -> None:
    """The fused update unscales sparse gradients, and skips those that are not finite, by itself."""
    options = {"learning_rate": 1.0, **OPTIONS[name]}
    start = [torch.zeros(9, 4, dtype=dtype), torch.zeros(5)]
    params, plain = [Parameter(p.clone()) for p in start], [Parameter(p.clone()) for p in start]
    inside, never = AdadeltaKeras(params, fused=True, **options), AdadeltaKeras(plain, fused=True, **options)
    scale = 2.0**4
    for step in range(4):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(torch.zeros(()))
        # GradScaler coalesces float16.
        rows, dense = coo_gradient((9, 4), dtype, 12, seed=step).coalesce(), gradients((5,), torch.float32, 1, step)[0]
        params[0].grad, params[1].grad = (rows * scale).coalesce(), dense * scale
        if step == 2:
            params[0].grad._values()[1, 1] = torch.inf
        scaler.step(inside)
        scaler.update()
        if step != 2:
            plain[0].grad, plain[1].grad = rows, dense
            never.step()
    for one, other in zip(inside.get_weights(), never.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert all(map(torch.equal, params, plain))
    assert inside.iterations == 3


# ---- Only the rows that occur ---------------------------------------------------------------------------------------

GUARDED = """
import ctypes, mmap, sys
import numpy as np, torch
from torch_adadelta import AdadeltaKeras

libc = ctypes.CDLL(None, use_errno=True)
page, height, width = mmap.PAGESIZE, 1_000_000, 64

def table():
    memory = mmap.mmap(-1, height * width * 4)  # pages that nobody touches take no memory
    return memory, torch.frombuffer(memory, dtype=torch.float32).view(height, width)

rows = torch.tensor([0, 999_999, 500_000, 0, 123_456, 500_001, 999_999])
tables = [table() for _ in range(3)]
for memory, tensor in tables:
    address, total = tensor.data_ptr(), height * width * 4
    touched = sorted({int(row) * width * 4 // page for row in rows})
    edges = [-1, *touched, total // page]
    for before, after in zip(edges, edges[1:]):
        length = (after - before - 1) * page
        if length:
            assert libc.mprotect(ctypes.c_void_p(address + (before + 1) * page), ctypes.c_size_t(length), 0) == 0

param = torch.nn.Parameter(tables[0][1])
for name in sys.argv[1:]:
    options = {"single_tensor": {"foreach": False}, "multi_tensor": {"foreach": True}, "fused": {"fused": True}}[name]
    for clip in ({}, {"clipvalue": 0.5, "clipnorm": 0.1}, {"global_clipnorm": 0.1}, {"gradient_transformers": [list]}):
        print(name, clip, file=sys.stderr, flush=True)
        optimizer = AdadeltaKeras([param], 1.0, **clip, **options)
        optimizer.state[param] = {"square_avg": tables[1][1], "acc_delta": tables[2][1]}
        for _ in range(3):
            param.grad = torch.sparse_coo_tensor(rows[None], torch.ones(7, width), (height, width), check_invariants=True)
            optimizer.step()
assert all((tensor[rows] != 0).all() for _, tensor in tables)
print("done", flush=True)
import os; os._exit(0)
"""


def test_rows_that_do_not_occur_are_neither_read_nor_written() -> None:
    """Of a table of 1,000,000 x 64 and its state all other pages are protected: to touch them ends the process."""
    names = ["single_tensor", "multi_tensor", "fused"][: 3 if kernels.is_loaded else 2]
    command = [sys.executable, "-c", GUARDED, *names]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (result.stdout, result.returncode) == ("done\n", 0), result.stderr


@pytest.mark.parametrize("clip", [{}, {"clipnorm": 0.1}, {"global_clipnorm": 0.1, "clipvalue": 1.0}], ids=str)
@pytest.mark.parametrize("name", ["single_tensor", "fused"])
def test_memory_is_bounded_by_what_is_touched(name: str, clip: dict[str, float]) -> None:
    if name == "fused" and not kernels.is_loaded:
        pytest.skip("the compiled library is not installed")
    param = Parameter(torch.empty(1_000_000, 64))
    param.grad = coo_gradient((1_000_000, 64), torch.float32, 1000)
    options = {"fused": True} if name == "fused" else {"foreach": False}
    optimizer = AdadeltaKeras([param], **clip, **options)  # type: ignore[arg-type]
    optimizer.state[param] = {key: torch.empty(1_000_000, 64) for key in ("square_avg", "acc_delta")}
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    touched = param.grad._values().numel() * 4
    assert allocated < (30 if name == "single_tensor" else 0.1) * touched


# ---- The parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_transposed", [False, True])
def test_coo_components_are_resolved_and_contiguous(is_transposed: bool) -> None:
    values = torch.tensor([[1 + 2j, 3 - 1j], [0j, -1j]])
    values = values.t() if is_transposed else values
    for lazy in (values, values.conj(), torch._neg_view(values.real), torch._neg_view(values.conj())):
        grad = coo([4, 1], lazy, (5, 2))
        indices, parts = functional.coo_components(grad)
        assert indices.tolist() == [[4, 1]]
        assert (parts.is_contiguous(), parts.is_conj(), parts.is_neg()) == (True, False, False)
        assert parts.tolist() == lazy.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=dtype_name)
def test_values_in_T(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """They are cast only where their own T is another."""
    if dtype.is_complex != grad_dtype.is_complex:
        return
    grad = coo_gradient((5, 3), grad_dtype, 4)
    (values,) = functional.values_in_T([torch.empty(5, 3, dtype=dtype)], [grad])
    T, own_T = (torch.float64 if d in (torch.float64, torch.complex128) else torch.float32 for d in (dtype, grad_dtype))
    expected = grad_dtype if T is own_T else T.to_complex() if dtype.is_complex else T
    assert_same_bits(values, grad._values().to(expected))


BAD_INDICES: list[tuple[tuple[int, ...], Any, int]] = [
    ((5, 2), [0, 4, 2], -1),
    ((5, 2), [0, 5, 2, 9], 1),
    ((5, 2), [-1, 5], 0),
    ((5, 2), [0, 2**40, -(2**63)], 1),
    ((5, 2), [], -1),
    ((0, 2), [0], 0),
    ((4, 3, 2), [[3, 0, 3, 3], [2, 2, 3, -1]], 2),
    ((4, 3, 2), [[4, 0], [0, 0]], 0),
    ((2,), torch.zeros(0, 3, dtype=torch.int64), -1),
]


@pytest.mark.parametrize("backend", [Backend.SINGLE_TENSOR, Backend.FUSED], ids=lambda b: b.value)
def test_the_first_invalid_index_of_each_gradient(backend: Backend) -> None:
    if backend is Backend.FUSED and not kernels.is_loaded:
        pytest.skip("the compiled library is not installed")
    params = [torch.zeros(shape) for shape, _, _ in BAD_INDICES]
    grads = []
    for shape, indices, _ in BAD_INDICES:
        index = torch.as_tensor(indices, dtype=torch.int64)
        index = index if index.dim() > 1 else index[None]
        grads.append(coo(index, torch.zeros(index.shape[1], *shape[len(index) :]), shape))
    states = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    found = direct.first_invalid_indices(backend, params, grads, *states)
    assert found.dtype is torch.int64
    assert found.tolist() == [first for _, _, first in BAD_INDICES]


def test_autograd_notices_that_the_table_has_changed(path: Path) -> None:
    param = Parameter(torch.ones(4, 2))
    loss = (param * param).sum()
    param.grad = coo_gradient((4, 2), torch.float32, 3)
    AdadeltaKeras([param], **path.options).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
