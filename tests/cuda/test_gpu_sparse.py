"""Sparse gradients on CUDA: the bits of the CPU, one wait for the device, and what is refused."""

import warnings
from collections.abc import Callable
from typing import Any

import direct
import pytest
import torch
from cases import DTYPES, REAL_DTYPES, STEP_OPTIONS, assert_same_bits, assert_unchanged, dtype_name, gradients, randn
from cases import snapshot as snapshot_of
from op_cases import HYPERPARAMETERS, Kept, kept_sparse_lists, with_kept
from torch import Tensor
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PATHS = [{"fused": True}, {"foreach": True}, {"foreach": False}]

# The shape of a parameter and its number of sparse dimensions.
SHAPES: list[tuple[tuple[int, ...], int]] = [
    ((9, 5), 1),
    ((700, 64), 1),
    ((60,), 1),
    ((4, 3, 5), 2),
    ((3, 4), 2),
    ((2, 3), 0),
    ((), 0),
    ((4, 0), 1),
    ((30, 1500), 1),
]


def coo(indices: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=False, check_invariants=False)


def sparse_gradient(shape: tuple[int, ...], dims: int, dtype: torch.dtype, count: int, seed: int) -> Tensor:
    """Half of them are of the last row."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(size, (count,), generator=generator) for size in shape[:dims]]
    indices = torch.stack(rows) if rows else torch.zeros(0, count, dtype=torch.int64)
    indices[:, ::2] = torch.tensor(shape[:dims], dtype=torch.int64)[:, None] - 1
    return coo(indices, gradients((count, *shape[dims:]), dtype, 1, seed)[0], shape)


def step_both(pair: Any, grads: list[Tensor | None]) -> None:
    for p, q, grad in zip(pair.params, pair.cuda_params, grads, strict=True):
        p.grad, q.grad = grad, None if grad is None else grad.to(pair.device)
    pair.cpu.step()
    pair.cuda.step()


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("options", STEP_OPTIONS.values(), ids=STEP_OPTIONS)
def test_the_bits_of_the_cpu(
    options: dict[str, Any], dtype: torch.dtype, path: dict[str, bool], twins: Callable[..., Any]
) -> None:
    if dtype.is_complex:
        options = {key: value for key, value in options.items() if key != "clipvalue"}
    params = [randn(shape, dtype, torch.Generator().manual_seed(i)) for i, (shape, _) in enumerate(SHAPES)]
    pair = twins([*params, torch.ones(33)], groups=2, cuda=path, **options)
    for step in range(3):
        sparse = [
            sparse_gradient(shape, dims, dtype, (40, 0, 7)[step], 10 * step + i)
            for i, (shape, dims) in enumerate(SHAPES)
        ]
        step_both(pair, [*sparse, gradients((33,), torch.float32, 1, seed=step)[0]])
        pair.assert_same(f"at step {step}")


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@with_kept
def test_masters_and_state_of_another_dtype(
    dtype: torch.dtype, kept: Kept, layout: str, placed: Callable[..., Tensor]
) -> None:
    lists = kept_sparse_lists([((5, 3, 1, 12), dims) for dims in range(5)], dtype, kept, REAL_DTYPES, layout)
    results = []
    for device in ("cpu", "cuda"):
        *own, remainders = ([placed(x, device) for x in tensors] for tensors in lists)
        for _ in range(2):
            direct.sparse_op(*own, *HYPERPARAMETERS, **kept.options, remainders=remainders)
        results.append([own[0], *own[3:], remainders])
    for expected, actual in zip(*results, strict=True):
        for x, y in zip(expected, actual, strict=True):
            assert_same_bits(y.cpu(), x)


@pytest.mark.parametrize("grad_dtype", REAL_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_values_of_another_dtype(dtype: torch.dtype, grad_dtype: torch.dtype, twins: Callable[..., Any]) -> None:
    pair = twins([torch.zeros(60, 12, dtype=dtype)], clipnorm=0.7)
    for step in range(2):
        grad = sparse_gradient((60, 12), 1, grad_dtype, 100, step)
        pair.cpu.apply_gradients([(grad, pair.params[0])])
        pair.cuda.apply_gradients([(grad.cuda(), pair.cuda_params[0])])
        pair.assert_same()


@pytest.mark.parametrize("width", [1, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_name)
def test_one_row_touched_ten_thousand_times(dtype: torch.dtype, width: int, twins: Callable[..., Any]) -> None:
    pair = twins([torch.zeros(50, width, dtype=dtype)])
    rows = torch.full((1, 10_000), 17)
    rows[0, ::1001] = torch.arange(10)
    grad = coo(rows, gradients((10_000, width), dtype, 1)[0], (50, width))
    for _ in range(2):
        step_both(pair, [grad])
    pair.assert_same()


def test_a_large_batch(twins: Callable[..., Any]) -> None:
    """More COO entries than small sorts take, and more blocks than run at once."""
    pair = twins([torch.zeros(200_000, 32), torch.zeros(1000, 8)], global_clipnorm=0.5)
    for step in range(2):
        step_both(
            pair,
            [
                sparse_gradient((200_000, 32), 1, torch.float32, 300_000, step),
                sparse_gradient((1000, 8), 1, torch.float32, 300_000, step),
            ],
        )
        pair.assert_same(f"at step {step}")


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_tables_that_are_not_contiguous(layout: str, twins: Callable[..., Any]) -> None:
    table = torch.zeros(7, 60).t() if layout == "transposed" else torch.zeros(60, 14)[:, ::2]
    pair = twins([table])
    for step in range(2):
        step_both(pair, [sparse_gradient((60, 7), 1, torch.float32, 100, step)])
        pair.assert_same()


def test_a_model_with_tables() -> None:
    models = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        models.append(torch.nn.Embedding(500, 16, sparse=True).to(device))
    optimizers = [AdadeltaKeras(model.parameters(), 1.0) for model in models]
    for step in range(5):
        rows = torch.randint(500, (64, 3), generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(rows.to(model.weight.device)).square().sum().backward()
            optimizer.step()
        assert_same_bits(models[1].weight.cpu(), models[0].weight.detach())


def test_grad_scaler(twins: Callable[..., Any]) -> None:
    pair = twins([torch.zeros(60, 12), torch.zeros(5)])
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    scaler.scale(torch.zeros((), device="cuda"))
    for step in range(4):
        rows, dense = sparse_gradient((60, 12), 1, torch.float32, 30, step), gradients((5,), torch.float32, 1, step)[0]
        scale = scaler.get_scale()
        pair.cuda_params[0].grad, pair.cuda_params[1].grad = rows.cuda() * scale, dense.cuda() * scale
        if step == 1:
            pair.cuda_params[0].grad._values()[3, 3] = torch.inf
        else:
            pair.params[0].grad, pair.params[1].grad = rows, dense
            pair.cpu.step()
        scaler.step(pair.cuda)
        scaler.update()
    pair.assert_same()


def test_a_step_waits_for_the_device_once(twins: Callable[..., Any]) -> None:
    """However many tables there are, to check their indices."""
    pair = twins([torch.zeros(60, 12), torch.zeros(33), torch.zeros(500, 4)], groups=2, global_clipnorm=0.5)
    for step in range(3):
        grads: list[Tensor | None] = [
            sparse_gradient((60, 12), 1, torch.float32, 30, step),
            torch.ones(33),
            sparse_gradient((500, 4), 1, torch.float32, 30, step),
        ]
        for p, q, grad in zip(pair.params, pair.cuda_params, grads, strict=True):
            assert grad is not None
            p.grad, q.grad = grad, grad.cuda()
        pair.cpu.step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                pair.cuda.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
        if step > 0:  # the first one also finds out that there are sparse gradients
            assert len(waits) == 1, waits
        pair.assert_same()


@pytest.mark.parametrize("clip", [{}, {"clipnorm": 0.5}], ids=str)
def test_memory_is_bounded_by_what_is_touched(clip: dict[str, float]) -> None:
    param = Parameter(torch.zeros(1_000_000, 64, device="cuda"))
    optimizer = AdadeltaKeras([param], 1.0, fused=True, **clip)  # type: ignore[arg-type]
    param.grad = sparse_gradient((1_000_000, 64), 1, torch.float32, 1000, 0).cuda()
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 10**6
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("bad", [60, -1, 2**40])
def test_an_index_out_of_range_changes_nothing(path: dict[str, bool], bad: int) -> None:
    params = [Parameter(torch.ones(60, 4, device="cuda")) for _ in range(2)]
    optimizer = AdadeltaKeras(params, 1.0, **path)  # type: ignore[arg-type]
    for p in params:
        p.grad = sparse_gradient((60, 4), 1, torch.float32, 30, 0).cuda()
    optimizer.step()
    params[1].grad._indices()[0, 7:9] = bad  # type: ignore[union-attr]
    before = snapshot_of(optimizer)
    with pytest.raises(IndexError) as caught:
        optimizer.step()
    assert str(caught.value) == (
        f"parameter 1 of group 0 has 60 rows, but its sparse gradient has the index {bad} at position 7"
    )
    assert_unchanged(optimizer, before)


def test_a_capture_is_refused() -> None:
    param = Parameter(torch.ones(60, 4, device="cuda"))
    optimizer = AdadeltaKeras([param], fused=True, capturable=True)
    param.grad = sparse_gradient((60, 4), 1, torch.float32, 30, 0).cuda()
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    refused = pytest.raises(RuntimeError, match="has a sparse gradient, whose indices the host must check")
    with refused, torch.cuda.graph(graph):
        optimizer.step()
    torch.cuda.synchronize()
    optimizer.step()
    assert optimizer.iterations == 2
