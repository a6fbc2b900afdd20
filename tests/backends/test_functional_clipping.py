"""What functional.py makes of gradients before the update: clipping, factors, sums of squares. And its derivatives."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    LAYOUTS,
    REAL_DTYPES,
    assert_like_oracle,
    assert_same_bits,
    coo,
    dtype_name,
    gradients,
    oracle_of,
    order_sensitive,
    randn,
    to_numpy,
)
from reference import oracle
from torch import Tensor

from torch_adadelta.backends import functional
from torch_adadelta.backends.batch import Backend, Batch, GradientOptions, Segment

inf, nan = math.inf, math.nan
BOTH = pytest.mark.parametrize("T", [torch.float32, torch.float64], ids=dtype_name)


def numpy_type(dtype: torch.dtype, in_double: bool = False) -> Any:
    return np.float64 if in_double or dtype in (torch.float64, torch.complex128) else np.float32


def in_T(grad: Tensor, T: Any) -> np.ndarray[Any, Any]:
    """The gradient in T, or in complex T."""
    values = to_numpy(grad)
    with np.errstate(over="ignore"):
        if np.iscomplexobj(values):
            return oracle.as_complex(oracle.as_real(values).astype(T))
        return values.astype(T)


# ---- Every option in every update -----------------------------------------------------------------------------------

# Of segments: the learning rate, rho, epsilon, and whether to maximize.
SEGMENTS = (Segment(3, 1.0, 0.9375, 1e-6, False), Segment(2, 0.5, 0.75, 1e-3, True))

CLIPS: dict[str, dict[str, Any]] = {
    "clipvalue": {"clipvalue": 0.1},
    "clipvalue 0": {"clipvalue": 0.0},
    "clipvalue inf": {"clipvalue": inf},
    "clipnorm": {"clipnorm": 0.7},
    "clipnorm 0": {"clipnorm": 0.0},
    "factor": {"factor": 0.3},
    "factor in a Tensor": {"factor": torch.tensor(0.3, dtype=torch.float64)},
    "clipvalue and clipnorm": {"clipvalue": 0.1, "clipnorm": 0.2},
    "clipvalue and factor": {"clipvalue": 0.1, "factor": 0.3},
}


def expected_gradient(g: np.ndarray[Any, Any], options: dict[str, Any]) -> tuple[np.ndarray[Any, Any], Any]:
    """The clipped gradient and its sum of squares, by the oracle."""
    T = g.real.dtype.type
    if "clipvalue" in options:
        g = oracle.clip_by_value(g, options["clipvalue"])
    squares = oracle.square_sum(g)
    if "clipnorm" in options:
        return oracle.clip_by_norm(g, options["clipnorm"], squares), squares
    return oracle.scaled(g, T(float(options.get("factor", 1.0)))), squares


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in CLIPS for dtype in DTYPES if not (dtype.is_complex and "clipvalue" in name)],
    ids=lambda x: x if isinstance(x, str) else dtype_name(x),
)
@pytest.mark.parametrize("update", [functional.single_tensor, functional.multi_tensor, functional.sparse_single_tensor])
def test_gradient_options(update: Callable[[Batch], None], name: str, dtype: torch.dtype) -> None:
    """In two segments, each gradient by its own norm; sparse gradients entry by entry, before those of a row meet."""
    options = CLIPS[name]
    is_sparse = update is functional.sparse_single_tensor
    values = gradients((4, 6), dtype, 3, seed=1) + gradients((4, 6), dtype, 2, seed=2)
    values[1] = torch.zeros_like(values[1])
    if not dtype.is_complex:
        values[4][1, 2], values[3][0, 1], values[2][2, 5] = nan, -inf, inf
    rows = [[0, 3, 1, 2], [2, 0, 2, 2], [1, 2, 3, 0], [3, 2, 1, 0], [1, 1, 1, 1]]
    params = [torch.zeros(4, 6, dtype=dtype) for _ in values]
    states = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    oracles = [
        oracle_of(p, learning_rate=s.lr, rho=s.rho, epsilon=s.epsilon, maximize=s.maximize)
        for p, s in zip(params, (SEGMENTS[i] for i in (0, 0, 0, 1, 1)), strict=True)
    ]
    given, all_squares = dict(options), []
    for one, value, row in zip(oracles, values, rows, strict=True):
        g, squares = expected_gradient(in_T(value, numpy_type(dtype)), options)
        all_squares.append(squares)
        one.step(oracle.SparseGradient(np.array([row]), g) if is_sparse else g)
    if "clipnorm" in options:
        given["square_sums"] = torch.tensor(np.array(all_squares))
    grads = [coo(row, v, v.shape) for row, v in zip(rows, values, strict=True)] if is_sparse else values
    backend = Backend.MULTI_TENSOR if update is functional.multi_tensor else Backend.SINGLE_TENSOR
    batch = Batch(backend, is_sparse, False, params, grads, *states, list(SEGMENTS), GradientOptions(**given))
    update(batch)
    for i, one in enumerate(oracles):
        assert_like_oracle(params[i], {"square_avg": states[0][i], "acc_delta": states[1][i]}, one, str(i))


@BOTH
@pytest.mark.parametrize("c", [0.0, 0.1, 1.0, inf])
def test_clip_by_value_keeps_nan_and_the_sign_of_zero(T: torch.dtype, c: float) -> None:
    g = torch.tensor([0.0, -0.0, 0.1, -0.1, 0.5, -5.0, inf, -inf, nan], dtype=T)
    assert_same_bits(functional.clip_by_value(g, c), oracle.clip_by_value(g.numpy(), c))
    assert functional.clip_by_value(g, None) is g
    assert functional.clip_by_value(g, inf) is g


# ---- Sums of squares ------------------------------------------------------------------------------------------------

# Around the row of 128 lanes and the chunk of 4096.
SIZES = (0, 1, 2, 63, 127, 128, 129, 255, 4095, 4096, 4097, 8192, 12_289, 65_537, 0)


@pytest.mark.parametrize("in_double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_square_sums_over_the_fixed_tree(dtype: torch.dtype, in_double: bool) -> None:
    for make, clipvalue in (
        (order_sensitive, None),
        (lambda shape, dtype, seed: gradients(shape, dtype, 1, seed)[0], None if dtype.is_complex else 0.3),
    ):
        grads = [make((size,), dtype, seed) for seed, size in enumerate(SIZES)]
        expected = []
        for grad in grads:
            g = in_T(grad, numpy_type(dtype, in_double))
            expected.append(oracle.square_sum(g if clipvalue is None else oracle.clip_by_value(g, clipvalue)))
        result = functional.square_sums([torch.empty_like(g) for g in grads], grads, clipvalue, in_double)
        assert_same_bits(result, np.array(expected, np.float64))


@pytest.mark.parametrize(("dtype", "grad_dtype"), [*itertools.permutations(REAL_DTYPES, 2)], ids=dtype_name)
def test_square_sums_take_the_opmath_dtype_of_the_parameter(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    (grad,) = gradients((700,), grad_dtype, 1)
    result = functional.square_sums([torch.empty(700, dtype=dtype)], [grad])
    assert_same_bits(result, np.array([oracle.square_sum(in_T(grad, numpy_type(dtype)))]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", [*LAYOUTS, "expanded"])
def test_square_sums_follow_the_memory_of_the_parameter(layout: str, grad_layout: str) -> None:
    shape = (5, 7, 1, 130)
    for dtype in (torch.float32, torch.complex64):
        param = LAYOUTS[layout](randn(shape, dtype, torch.Generator().manual_seed(1)))
        grad = order_sensitive(shape, dtype, seed=2)
        grad = grad[:, :1, :, :1].expand(shape) if grad_layout == "expanded" else LAYOUTS[grad_layout](grad)
        order = sorted(range(4), key=lambda d: 0 if shape[d] == 1 else -param.stride(d))
        expected = oracle.square_sum(to_numpy(grad.permute(order)))
        assert functional.square_sums([param], [grad]).tolist() == [expected]


def test_the_order_of_the_elements_shows() -> None:
    """Else the test before this one could not fail."""
    grad = order_sensitive((5, 7, 1, 130), torch.float32, seed=2)
    params = [LAYOUTS[layout](grad) for layout in ("contiguous", "channels_last", "transposed")]
    assert len(set(functional.square_sums(params, [grad] * 3).tolist())) == 3


def test_square_sums_spelled_out() -> None:
    """So that the oracle does not vouch for itself."""
    grads = [torch.tensor(x) for x in ([3.0, -4.0], [inf, 1.0], [nan, 1.0], [1e20, 1.0], [3 + 4j, 0j])]
    result = functional.square_sums(grads, grads)
    assert_same_bits(result, torch.tensor([25.0, inf, nan, inf, 25.0], dtype=torch.float64))
    clipped = functional.square_sums(grads[:4], grads[:4], 2.0)
    assert_same_bits(clipped, torch.tensor([8.0, 5.0, nan, 5.0], dtype=torch.float64))
    nothing = functional.square_sums([], [])
    assert (nothing.shape, nothing.dtype) == ((0,), torch.float64)


def test_a_pairwise_sum_adds_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (0, 1, 2, 3, 4, 5, 7, 8, 9, 100):
        x = randn((size,), torch.float64, generator) * 10.0 ** torch.randint(-8, 8, (size,), generator=generator)
        assert_same_bits(functional.pairwise_sum(x), np.array(oracle.pairwise_sum(x.numpy())))


# ---- The factor of all gradients ------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("c", [0.0, 1e-30, 0.7, 1.0, 3e38])
@pytest.mark.parametrize("total", [0.0, 1e-90, 1e-40, 0.3, 1.0, 1e30, 1e77, inf, nan])
def test_global_factor_by_numbers_and_by_tensors(T: torch.dtype, c: float, total: float) -> None:
    """The CPU computes with Python numbers; devices, and autograd, with tensors: the same bits."""
    sums = torch.tensor([total], dtype=torch.float64)
    expected = float(oracle.global_factor(c, np.float64(total), np.float64 if T is torch.float64 else np.float32))
    by_number = functional.global_factor(c, sums, T)
    by_tensor = functional.global_factor(c, sums.clone().requires_grad_(), T)
    assert isinstance(by_number, float)
    assert isinstance(by_tensor, Tensor)
    assert by_tensor.dtype is torch.float64
    np.testing.assert_array_equal([by_number, by_tensor.item()], [expected, expected])


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 100])
def test_global_factor_adds_the_gradients_in_pairs(count: int) -> None:
    sums = torch.tensor([2.0**60] + [129.0 + i for i in range(99)], dtype=torch.float64)[:count]
    if count > 2:
        sums[1:] *= 1e-3
    expected = float(oracle.global_factor(0.7, oracle.pairwise_sum(sums.numpy()), np.float64))
    assert functional.global_factor(0.7, sums, torch.float64) == expected
    by_tensor = functional.global_factor(0.7, sums.clone().requires_grad_(), torch.float64)
    assert isinstance(by_tensor, Tensor)
    assert by_tensor.item() == expected


# ---- Derivatives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"clipvalue": 0.5}, {"clipnorm": 0.3}, {"global_clipnorm": 0.3}], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_autograd_records_the_update(options: dict[str, float], maximize: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    p, g = (randn((3,), torch.float64, generator).requires_grad_() for _ in range(2))
    a, u = (randn((3,), torch.float64, generator).abs().requires_grad_() for _ in range(2))
    hyperparameters = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.5, 0.9, 1e-3)]

    def update(p: Tensor, g: Tensor, a: Tensor, u: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        p, a, u = p.clone(), a.clone(), u.clone()
        sums = functional.square_sums([p], [g], options.get("clipvalue"))
        factor: Any = 1.0
        if "global_clipnorm" in options:
            factor = functional.global_factor(options["global_clipnorm"], sums, torch.float64)
        given = GradientOptions(
            options.get("clipvalue"), options.get("clipnorm"), sums if "clipnorm" in options else None, factor
        )
        segments = [Segment(1, *values, maximize)]
        functional.single_tensor(Batch(Backend.SINGLE_TENSOR, False, True, [p], [g], [a], [u], segments, given))
        return p, a, u

    assert torch.autograd.gradcheck(update, (p, g, a, u, *hyperparameters))


@BOTH
def test_a_norm_of_zero_has_a_finite_derivative(T: torch.dtype) -> None:
    g = torch.zeros(3, dtype=T, requires_grad=True)
    sums = functional.square_sums([g], [g])
    functional.clip(g, 0, GradientOptions(clipnorm=0.5, square_sums=sums)).sum().backward()
    assert g.grad is not None
    assert g.grad.tolist() == [1.0] * 3
    g.grad = None
    factor = functional.global_factor(0.5, functional.square_sums([g], [g]), T)
    functional.clip(g, 0, GradientOptions(factor=factor)).sum().backward()
    assert g.grad is not None  # type: ignore[unreachable]
    assert g.grad.tolist() == [1.0] * 3
