"""Sparse gradients: every path against the oracle, bit by bit; only rows that occur are touched; what is refused."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    PATHS,
    REAL_DTYPES,
    STEP_OPTIONS,
    Path,
    assert_same_bits,
    assert_unchanged,
    dtype_name,
    gradients,
    randn,
    snapshot,
    to_numpy,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.oracle import OracleOptimizer, SparseGradient
from torch import Tensor
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras
from torch_adadelta.backends import kernels

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support", "ignore:Sparse CSR tensor support")
needs_library = pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")

Grads = Sequence[Tensor | None]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def coo(indices: Any, values: Tensor, shape: Sequence[int]) -> Tensor:
    """A gradient that is not coalesced. `indices` of one dimension are rows."""
    indices = torch.as_tensor(indices, dtype=torch.int64)
    if indices.dim() == 1:
        indices = indices[None]
    return torch.sparse_coo_tensor(indices, values, tuple(shape), is_coalesced=False, check_invariants=False)


def occurrences(
    shape: Sequence[int], dtype: torch.dtype, count: int, sparse_dims: int = 1, seed: int = 0, hot: int = 3
) -> Tensor:
    """A gradient with `count` occurrences; half of them are of the first `hot` indices of a dimension, or its last."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for size in shape[:sparse_dims]:
        anywhere = torch.randint(size, (count,), generator=generator)
        few = torch.randint(-1, min(hot, size - 1), (count,), generator=generator) % size
        rows.append(torch.where(torch.rand(count, generator=generator) < 0.5, anywhere, few))
    indices = torch.stack(rows) if rows else torch.zeros(0, count, dtype=torch.int64)
    values = gradients((count, *shape[sparse_dims:]), dtype, 1, seed)[0]
    return coo(indices, values, shape)


def to_oracle(grads: Grads) -> list[np.ndarray | SparseGradient | None]:
    return [
        None
        if grad is None
        else SparseGradient(grad._indices().numpy(), to_numpy(grad._values()))
        if grad.is_sparse
        else to_numpy(grad)
        for grad in grads
    ]


def oracle_of(params: Sequence[Tensor], **options: Any) -> OracleOptimizer:
    return OracleOptimizer([to_numpy(p) for p in params], dtypes=[dtype_name(p.dtype) for p in params], **options)


def assert_like_oracle(optimizer: AdadeltaKeras, expected: OracleOptimizer, what: str = "") -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, (param, one) in enumerate(zip(params, expected.oracles, strict=True)):
        state = optimizer.state.get(param) or {key: torch.zeros_like(param) for key in ("square_avg", "acc_delta")}
        for name, actual, wanted in (
            ("square_avg", state["square_avg"], one.square_avg),
            ("acc_delta", state["acc_delta"], one.acc_delta),
            ("param", param, one.p),
        ):
            assert_same_bits(actual, wanted, f"{name} of parameter {index} {what}")
    assert optimizer.iterations == expected.iterations


def step_both(optimizer: AdadeltaKeras, expected: OracleOptimizer, grads: Grads) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()
    expected.step(to_oracle(grads))
    assert_like_oracle(optimizer, expected)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", OPTIONS)
def test_steps_are_those_of_the_oracle(path: Path, name: str, dtype: torch.dtype) -> None:
    """Sparse gradients of every number of dimensions, beside dense ones, in two groups."""
    options = dict(OPTIONS[name])
    if dtype.is_complex and options.pop("clipvalue", None) and not options:
        pytest.skip("clipvalue is for real numbers")
    generator = torch.Generator().manual_seed(0)
    shapes = [*SHAPES, ((5, 4), None)]
    params = [Parameter(randn(shape, dtype, generator)) for shape, _ in shapes]
    optimizer = AdadeltaKeras([{"params": params[:3]}, {"params": params[3:]}], 1.0, **options, **path.options)
    expected = oracle_of(params, learning_rate=1.0, **options)
    for step in range(3):
        grads: list[Tensor | None] = [
            gradients(shape, dtype, 1, seed=step)[0]
            if dims is None
            else occurrences(shape, dtype, (12, 0, 5)[step], dims, seed=10 * step + i)
            for i, (shape, dims) in enumerate(shapes)
        ]
        if step == 2:
            grads[1] = None
        step_both(optimizer, expected, grads)


@pytest.mark.parametrize("grad_dtype", REAL_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("options", [{}, {"clipvalue": 0.1, "global_clipnorm": 0.9}], ids=["plain", "clipped"])
def test_values_of_another_dtype(
    path: Path, dtype: torch.dtype, grad_dtype: torch.dtype, options: dict[str, float]
) -> None:
    """They are cast before anything else, norms over mixed dtypes included: a float64 parameter is beside them."""
    params = [Parameter(torch.zeros(6, 5, dtype=dtype)), Parameter(torch.zeros(3, dtype=torch.float64))]
    optimizer = AdadeltaKeras(params, 1.0, **options, **path.options)  # type: ignore[arg-type]
    expected = oracle_of(params, learning_rate=1.0, **options)
    for step in range(3):
        dense = gradients((3,), torch.float64, 1, seed=step)[0]
        grads = [occurrences((6, 5), grad_dtype, 14, seed=step), dense]
        optimizer.apply_gradients(zip(grads, params, strict=True))
        expected.step(to_oracle(grads))
        assert_like_oracle(optimizer, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("width", [1, 8, 700])
def test_one_row_touched_ten_thousand_times(path: Path, width: int, dtype: torch.dtype) -> None:
    """Beside rows that are touched once: the order of the sum decides about its bits, and is that of occurrence."""
    count = 10_000 if width < 700 else 1000
    param = Parameter(torch.zeros(20, width, dtype=dtype))
    optimizer, expected = AdadeltaKeras([param], 1.0, **path.options), oracle_of([param], learning_rate=1.0)
    rows = torch.full((count,), 13)
    rows[::1001] = torch.arange(len(rows[::1001])) % 20
    step_both(optimizer, expected, [coo(rows, gradients((count, width), dtype, 1)[0], (20, width))])


def test_the_first_the_last_and_all_rows(path: Path) -> None:
    params = [Parameter(randn((300, 3), torch.float32, torch.Generator().manual_seed(i))) for i in range(3)]
    optimizer, expected = AdadeltaKeras(params, 1.0, **path.options), oracle_of(params, learning_rate=1.0)
    shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    for step in range(2):
        rows = [torch.tensor([0]), torch.tensor([299, 0, 299]), torch.cat([shuffled, shuffled.flip(0)])]
        values = [gradients((len(r), 3), torch.float32, 1, seed=10 * step + i)[0] for i, r in enumerate(rows)]
        step_both(optimizer, expected, [coo(r, v, (300, 3)) for r, v in zip(rows, values, strict=True)])


def test_all_rows_once_is_the_dense_step(path: Path) -> None:
    params = [Parameter(torch.linspace(-1, 1, 60).reshape(12, 5)) for _ in range(2)]
    optimizers = [AdadeltaKeras([p], 1.0, **path.options) for p in params]
    for step in range(3):
        grad = gradients((12, 5), torch.float32, 1, seed=step)[0].abs() + 1e-8  # 0 + -0 is not -0
        order = torch.randperm(12, generator=torch.Generator().manual_seed(step))
        params[0].grad, params[1].grad = grad, coo(order, grad[order], (12, 5))
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(optimizers[0].variables(), optimizers[1].variables(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(*params)


def test_coalesced_gradients(path: Path) -> None:
    param = Parameter(torch.zeros(9, 4))
    optimizer, expected = AdadeltaKeras([param], 1.0, **path.options), oracle_of([param], learning_rate=1.0)
    for step in range(2):
        grad = occurrences((9, 4), torch.float32, 20, seed=step).coalesce()
        assert grad.is_coalesced()
        step_both(optimizer, expected, [grad])


def test_no_occurrence_counts_as_a_step_and_changes_nothing(path: Path) -> None:
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
        expected = oracle_of(params, learning_rate=1.0, **options)
        for _ in range(2):
            step_both(optimizer, expected, [coo(rows, values, (50, 2)), coo([7, 9], values[:2], (50, 2))])
        if options == {}:
            assert params[1][7].signbit().all()


def _transposed(x: Tensor) -> Tensor:
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def _sliced(x: Tensor) -> Tensor:
    base = torch.zeros(2 * x.shape[0], *x.shape[1:-1], 3 * x.shape[-1], dtype=x.dtype)
    return base[::2, ..., 1::3].copy_(x)


def _rows_apart(x: Tensor) -> Tensor:
    base = torch.zeros(x.shape[0], *x.shape[1:-1], x.shape[-1] + 3, dtype=x.dtype)
    return base[..., 1:-2].copy_(x)


TABLES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(),
    "transposed": _transposed,
    "sliced": _sliced,
    "rows_apart": _rows_apart,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=dtype_name)
@pytest.mark.parametrize("sparse_dims", [0, 1, 2, 3])
@pytest.mark.parametrize("state_layout", TABLES)
@pytest.mark.parametrize("layout", TABLES)
def test_any_layout_of_table_and_state(
    path: Path, layout: str, state_layout: str, sparse_dims: int, dtype: torch.dtype
) -> None:
    shape = (5, 3, 7)
    start = randn(shape, dtype, torch.Generator().manual_seed(0))
    param = Parameter(torch.zeros(0, dtype=dtype))
    param.data = TABLES[layout](start)
    optimizer, expected = AdadeltaKeras([param], 1.0, **path.options), oracle_of([start], learning_rate=1.0)
    optimizer.state[param] = {
        "square_avg": TABLES[state_layout](torch.zeros(shape, dtype=dtype)),
        "acc_delta": torch.zeros(shape, dtype=dtype),
    }
    for step in range(2):
        step_both(optimizer, expected, [occurrences(shape, dtype, 9, sparse_dims, seed=step)])


@pytest.mark.parametrize("options", [{}, {"clipnorm": 0.5}], ids=["plain", "clipnorm"])
def test_values_and_indices_of_any_layout(path: Path, options: dict[str, float]) -> None:
    """An expanded gradient, as of a sum; values in another order than that of memory; indices that are not in a row."""
    params = [Parameter(torch.zeros(6, 4, 3)) for _ in range(3)]
    optimizer = AdadeltaKeras(params, 1.0, **options, **path.options)  # type: ignore[arg-type]
    expected = oracle_of(params, learning_rate=1.0, **options)
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
    seed=st.integers(0, 1000),
)
def test_any_gradient(shape: list[int], sparse_dims: int, count: int, dtype: torch.dtype, name: str, seed: int) -> None:
    options = {key: v for key, v in OPTIONS[name].items() if key != "clipvalue" or not dtype.is_complex}
    start = randn(shape, dtype, torch.Generator().manual_seed(seed))
    grads = [occurrences(shape, dtype, count, min(sparse_dims, len(shape)), seed=seed + step) for step in range(2)]
    expected = oracle_of([start], learning_rate=1.0, **options)
    for grad in grads:
        expected.step(to_oracle([grad]))
    for path in (PATHS[0], PATHS[-1]):
        param = Parameter(start.clone())
        optimizer = AdadeltaKeras([param], 1.0, **options, foreach=path.options.get("foreach"))
        for param.grad in grads:
            optimizer.step()
        assert_like_oracle(optimizer, expected, path.name)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=dtype_name)
@pytest.mark.parametrize(
    ("shape", "count"), [((3000, 64), 5000), ((70, 9000), 90), ((200_000, 1), 150_000), ((300, 64), 40_000)]
)
def test_the_same_bits_for_any_number_of_threads(
    shape: tuple[int, int], count: int, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    """Enough occurrences for several threads to share the rows, and to meet in the middle of one."""
    grad = occurrences(shape, dtype, count)
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


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=dtype_name)
@pytest.mark.parametrize(
    "options",
    [{}, {"global_clipnorm": 0.3}, {"learning_rate": lambda: 0.5}],
    ids=["plain", "global_clipnorm", "callable"],
)
def test_a_model_with_tables(path: Path, options: dict[str, Any], index_dtype: torch.dtype) -> None:
    model = Model(is_sparse=True)
    params = list(model.parameters())
    optimizer = AdadeltaKeras(params, **{"learning_rate": 1.0, **options}, **path.options)
    numbers = {key: value() if callable(value) else value for key, value in options.items()}
    expected = oracle_of(params, **{"learning_rate": 1.0, **numbers})
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
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
        assert_like_oracle(optimizer, expected)
        for grad, kept in zip(grads, before, strict=True):
            assert grad is not None
            assert torch.equal(grad.to_dense(), kept.to_dense())


def test_training_goes_on_from_a_checkpoint(path: Path) -> None:
    def train(model: Model, optimizer: AdadeltaKeras, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            model(
                torch.randint(50, (4, 3), generator=generator), torch.randint(30, (4, 2), generator=generator)
            ).backward()
            optimizer.step()

    whole, first, second = (Model(is_sparse=True) for _ in range(3))
    train(whole, AdadeltaKeras(whole.parameters(), 1.0, **path.options), range(6))
    optimizer = AdadeltaKeras(first.parameters(), 1.0, **path.options)
    train(first, optimizer, range(3))
    second.load_state_dict(first.state_dict())
    resumed = AdadeltaKeras(second.parameters(), **path.options)
    resumed.load_state_dict(optimizer.state_dict())
    train(second, resumed, range(3, 6))
    for one, other in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_state_is_made_when_a_gradient_first_comes(path: Path) -> None:
    tables = [Parameter(torch.ones(5, 3)) for _ in range(2)]
    optimizer = AdadeltaKeras(tables, **path.options)
    tables[0].grad = coo([1], torch.ones(1, 3), (5, 3))
    optimizer.step()
    assert list(optimizer.state) == tables[:1]
    assert all(value.shape == (5, 3) and not value.is_sparse for value in optimizer.state[tables[0]].values())


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
    expected = oracle_of([param, other], learning_rate=1.0)
    dense, rows = gradients((4, 2), torch.float32, 2), occurrences((4, 2), torch.float32, 5)
    pairs = [(rows, param), (dense[0], other), (dense[1], param), (rows, other), (rows, param)]
    optimizer.apply_gradients(pairs)
    for grad, target in pairs:
        expected.step([*to_oracle([grad]), None] if target is param else [None, *to_oracle([grad])])
    expected.iterations = 1
    assert_like_oracle(optimizer, expected)


def test_gradients_may_change_their_kind_from_step_to_step(path: Path) -> None:
    param = Parameter(torch.zeros(4, 2))
    optimizer, expected = AdadeltaKeras([param], 1.0, **path.options), oracle_of([param], learning_rate=1.0)
    for step in range(4):
        dense = gradients((4, 2), torch.float32, 1, seed=step)[0]
        step_both(optimizer, expected, [occurrences((4, 2), torch.float32, 5, seed=step) if step % 2 else dense])


# ---- Callbacks and AMP ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gradient_aggregator", "gradient_transformers"])
def test_callbacks_see_sparse_gradients_in_T_and_may_overwrite_them(path: Path, kind: str) -> None:
    seen: list[Tensor] = []

    def triple(pairs: Any) -> Any:
        (grad, param), (dense, other) = pairs
        seen.append(grad)
        grad._values().mul_(3)
        grad._indices()[0, 0] = 1
        return [(grad, param), (3 * dense, other)]

    params = [Parameter(torch.zeros(6, 4, dtype=torch.bfloat16)), Parameter(torch.zeros(3))]
    optimizer = AdadeltaKeras(params, 1.0, **{kind: triple if "agg" in kind else [triple]}, **path.options)
    expected = oracle_of(params, learning_rate=1.0)
    for step in range(2):
        grad = occurrences((6, 4), torch.bfloat16, 9, seed=step)
        dense = gradients((3,), torch.float32, 1, seed=step)[0]
        kept = grad._indices().clone(), grad._values().clone()
        params[0].grad, params[1].grad = grad, dense
        optimizer.step()
        assert seen[-1]._values().dtype is torch.float32
        assert not seen[-1].is_coalesced()
        assert torch.equal(grad._indices(), kept[0])
        assert torch.equal(grad._values(), kept[1])
        indices = kept[0].clone()
        indices[0, 0] = 1
        expected.step([SparseGradient(indices.numpy(), 3 * to_numpy(kept[1])), 3 * to_numpy(dense)])
        assert_like_oracle(optimizer, expected)


def test_callbacks_may_return_another_kind(path: Path) -> None:
    """A dense gradient for a sparse one, and the other way round."""
    params = [Parameter(torch.zeros(6, 4)), Parameter(torch.zeros(6, 4))]
    rows = torch.tensor([5, 0])

    def swap(pairs: Any) -> Any:
        (one, p), (other, q) = pairs
        return [(one.to_dense(), p), (coo(rows, other[rows], (6, 4)), q)]

    optimizer = AdadeltaKeras(params, 1.0, gradient_transformers=[swap], **path.options)
    expected = oracle_of(params, learning_rate=1.0)
    one, other = coo([1, 3], gradients((2, 4), torch.float32, 1)[0], (6, 4)), gradients((6, 4), torch.float32, 1)[0]
    params[0].grad, params[1].grad = one, other
    optimizer.step()
    expected.step(to_oracle([one.to_dense(), coo(rows, other[rows], (6, 4))]))
    assert_like_oracle(optimizer, expected)


def test_a_callback_that_returns_bad_indices_or_another_layout_changes_nothing(path: Path) -> None:
    def bad_index(pairs: Any) -> Any:
        pairs[0][0]._indices()[0, 2] = 6
        return pairs

    for callback, error, match in (
        (
            bad_index,
            IndexError,
            "parameter 0 of group 0 has 6 rows, but its sparse gradient has the index 6 at position 2",
        ),
        (
            lambda pairs: [(g.to_dense().to_sparse_csr(), p) for g, p in pairs],
            ValueError,
            r"layout torch.sparse_csr for parameter 0 of group 0; .* Use \.to_sparse_coo\(\)",
        ),
    ):
        param = Parameter(torch.ones(6, 4))
        optimizer = AdadeltaKeras([param], gradient_transformers=[callback], **path.options)  # type: ignore[list-item]
        param.grad = occurrences((6, 4), torch.float32, 5)
        before = snapshot(optimizer)
        with pytest.raises(error, match=match):
            optimizer.step()
        assert_unchanged(optimizer, before)


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
        rows, dense = occurrences((9, 4), dtype, 12, seed=step).coalesce(), gradients((5,), torch.float32, 1, step)[0]
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
options = {"single_tensor": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}[sys.argv[1]]
for clip in ({}, {"clipvalue": 0.5, "clipnorm": 0.1}, {"global_clipnorm": 0.1}, {"gradient_transformers": [list]}):
    optimizer = AdadeltaKeras([param], 1.0, **clip, **options)
    optimizer.state[param] = {"square_avg": tables[1][1], "acc_delta": tables[2][1]}
    for _ in range(3):
        param.grad = torch.sparse_coo_tensor(rows[None], torch.ones(7, width), (height, width), check_invariants=True)
        optimizer.step()
assert all((tensor[rows] != 0).all() for _, tensor in tables)
print("done", flush=True)
import os; os._exit(0)
"""


@pytest.mark.parametrize("name", ["single_tensor", "foreach", "fused"])
def test_rows_that_do_not_occur_are_neither_read_nor_written(name: str) -> None:
    """Of a table of 1,000,000 x 64 and its state all other pages are protected: to touch them ends the process."""
    if name == "fused" and not kernels.is_loaded:
        pytest.skip("the compiled library is not installed")
    result = subprocess.run(
        [sys.executable, "-c", GUARDED, name], capture_output=True, text=True, check=False, timeout=120
    )
    assert (result.stdout, result.returncode) == ("done\n", 0), result.stderr


@pytest.mark.parametrize("clip", [{}, {"clipnorm": 0.1}, {"global_clipnorm": 0.1, "clipvalue": 1.0}], ids=str)
@pytest.mark.parametrize("name", ["single_tensor", "fused"])
def test_memory_is_bounded_by_what_is_touched(name: str, clip: dict[str, float]) -> None:
    if name == "fused" and not kernels.is_loaded:
        pytest.skip("the compiled library is not installed")
    param = Parameter(torch.empty(1_000_000, 64))
    param.grad = occurrences((1_000_000, 64), torch.float32, 1000)
    options = {"fused": True} if name == "fused" else {"foreach": False}
    optimizer = AdadeltaKeras([param], **clip, **options)  # type: ignore[arg-type]
    optimizer.state[param] = {key: torch.empty(1_000_000, 64) for key in ("square_avg", "acc_delta")}
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    touched = param.grad._values().numel() * 4
    assert allocated < (30 if name == "single_tensor" else 0.1) * touched


# ---- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [5, -1, 2**40, -(2**63)])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_an_index_out_of_range_changes_nothing(path: Path, bad: int, steps_before: int) -> None:
    """In the last of several parameters, at the last occurrence of several: all is checked before the first write."""
    params = [("dense", Parameter(torch.ones(3))), *((f"table{i}", Parameter(torch.ones(5, 3))) for i in range(3))]
    optimizer = AdadeltaKeras([{"params": params[:2]}, {"params": params[2:]}], 1.0, **path.options)
    for step in range(steps_before + 1):
        params[0][1].grad = torch.ones(3)
        for _, param in params[1:]:
            param.grad = occurrences((5, 3), torch.float32, 6, seed=step)
        if step < steps_before:
            optimizer.step()
    params[-1][1].grad = coo([0, 4, 2, bad, 3, bad], torch.ones(6, 3), (5, 3))
    before = snapshot(optimizer)
    with pytest.raises(IndexError) as caught:
        optimizer.step()
    assert str(caught.value) == (
        f"parameter 1 of group 1 ('table2') has 5 rows, but its sparse gradient has the index {bad} at position 3"
    )
    assert_unchanged(optimizer, before)
    assert optimizer.iterations == steps_before


def test_an_index_of_several_dimensions_out_of_range(path: Path) -> None:
    param = Parameter(torch.ones(4, 3, 2))
    optimizer = AdadeltaKeras([param], **path.options)
    param.grad = coo([[3, 0, 3], [2, 3, -1]], torch.ones(3, 2), (4, 3, 2))
    before = snapshot(optimizer)
    with pytest.raises(IndexError) as caught:
        optimizer.step()
    assert str(caught.value) == (
        "parameter 0 of group 0 has shape (4, 3, 2), but its sparse gradient has the index (0, 3) at position 1"
    )
    assert_unchanged(optimizer, before)


def test_an_index_into_an_empty_table(path: Path) -> None:
    param = Parameter(torch.ones(0, 3))
    optimizer = AdadeltaKeras([param], **path.options)
    param.grad = coo([0], torch.ones(1, 3), (0, 3))
    with pytest.raises(IndexError, match="has 0 rows, but its sparse gradient has the index 0 at position 0"):
        optimizer.step()
    param.grad = coo([], torch.ones(0, 3), (0, 3))
    optimizer.step()
    assert optimizer.iterations == 1


@pytest.mark.parametrize(
    "compress",
    [
        lambda x: x.to_sparse_csr(),
        lambda x: x.to_sparse_csc(),
        lambda x: x.to_sparse_bsr((2, 2)),
        lambda x: x.to_sparse_bsc((2, 2)),
    ],
    ids=["csr", "csc", "bsr", "bsc"],
)
def test_compressed_layouts_are_refused_with_what_to_do(path: Path, compress: Any) -> None:
    params = [Parameter(torch.ones(4, 4)), Parameter(torch.ones(4, 4))]
    optimizer = AdadeltaKeras(params, **path.options)
    grad = compress(torch.eye(4))
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError) as caught:
        optimizer.apply_gradients([(torch.ones(4, 4), params[0]), (grad, params[1])])
    assert str(caught.value) == (
        f"parameter 1 of group 0 has a gradient of layout {grad.layout}; only dense and torch.sparse_coo gradients can "
        "be applied. Use .to_sparse_coo()"
    )
    assert_unchanged(optimizer, before)
    optimizer.apply_gradients([(torch.ones(4, 4), params[0]), (grad.to_sparse_coo(), params[1])])
    assert optimizer.iterations == 1


def test_differentiable_refuses_sparse_gradients() -> None:
    param = torch.ones(4, 2)
    optimizer = AdadeltaKeras([param], differentiable=True)
    param.grad = occurrences((4, 2), torch.float32, 3)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="has a sparse gradient, which autograd cannot follow: with differentiable"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def _state_dtype(optimizer: AdadeltaKeras, p: Tensor) -> None:
    optimizer.state[p]["acc_delta"] = optimizer.state[p]["acc_delta"].double()


def _state_overlaps(optimizer: AdadeltaKeras, p: Tensor) -> None:
    optimizer.state[p]["square_avg"] = torch.zeros(1, 2).expand(4, 2)


def _state_is_param(optimizer: AdadeltaKeras, p: Tensor) -> None:
    optimizer.state[p]["square_avg"] = p.detach()


def _state_is_negated(optimizer: AdadeltaKeras, p: Tensor) -> None:
    optimizer.state[p]["acc_delta"] = torch._neg_view(torch.zeros(4, 2))


def _values_are_state(optimizer: AdadeltaKeras, p: Tensor) -> None:
    p.grad = coo([1, 2], optimizer.state[p]["square_avg"][:2], (4, 2))


def _values_are_param(optimizer: AdadeltaKeras, p: Tensor) -> None:
    p.grad = coo([0, 1, 2, 3], p.detach(), (4, 2))


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (
            _state_dtype,
            r"parameter 1 of group 0 has dtype torch.float32, but its state acc_delta has dtype torch.float64",
        ),
        (_state_overlaps, "parameter 1 of group 0: its state square_avg is not a dense tensor of its own memory"),
        (_state_is_negated, "parameter 1 of group 0: its state acc_delta is a lazily conjugated or negated view"),
        (_state_is_param, "parameter 1 of group 0: it and its state square_avg share memory"),
        (_values_are_state, "parameter 1 of group 0: its gradient and its state square_avg share memory"),
        (_values_are_param, "parameter 1 of group 0: it and its gradient share memory"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(path: Path, spoil: Any, error: str) -> None:
    params = [Parameter(torch.ones(4, 2)) for _ in range(2)]
    optimizer = AdadeltaKeras(params, **path.options)
    for p in params:
        p.grad = occurrences((4, 2), torch.float32, 3)
    optimizer.step()
    spoil(optimizer, params[1])
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=error):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_autograd_notices_that_the_table_has_changed(path: Path) -> None:
    param = Parameter(torch.ones(4, 2))
    loss = (param * param).sum()
    param.grad = occurrences((4, 2), torch.float32, 3)
    AdadeltaKeras([param], **path.options).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
