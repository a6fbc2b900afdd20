"""The compiled sums of squares and the clipped update against the NumPy oracle, bit by bit; and what they refuse."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    COMPLEX_DTYPES,
    DTYPES,
    LAYOUTS,
    REAL_DTYPES,
    assert_same_bits,
    dtype_name,
    gradients,
    randn,
    to_numpy,
)
from reference import oracle
from torch import Tensor

from torch_adadelta import ops

pytestmark = pytest.mark.skipif(not ops.is_loaded, reason="the compiled library is not installed")

inf, nan = torch.inf, torch.nan

# Around the row of 128 lanes, the chunk of 4096, the unit of 65536 elements that a thread sums, and of several units.
SIZES = (
    0,
    1,
    2,
    63,
    64,
    65,
    127,
    128,
    129,
    255,
    511,
    512,
    513,
    4095,
    4096,
    4097,
    12289,
    65535,
    65536,
    65537,
    300_001,
    0,
)


@pytest.fixture(params=ops.CPU_CAPABILITIES, autouse=True)
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    if not ops.is_loaded:
        yield request.param
        return
    try:
        before = ops.set_cpu_capability(request.param)
    except RuntimeError:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    ops.set_cpu_capability(before)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def order_sensitive(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers whose sum of squares shows in which order they were added, as that of most numbers does not.

    The square of one of them is so large that each of the others is half a unit in its last place, or a little more.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    values = 2.0**-19 * (1 + torch.rand(math.prod(shape), dtype=torch.float64, generator=generator)).to(wide)
    if len(values):
        values[int(torch.randint(0, len(values), (), generator=generator))] = 2.0**8
    return values.view(tuple(shape)).to(dtype)


def arithmetic_type(param: Tensor, in_double: bool = False) -> Any:
    return np.float64 if in_double or param.dtype in (torch.float64, torch.complex128) else np.float32


def in_memory_order(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient with its dimensions in the order in which the memory of the parameter has them."""
    order = sorted(range(param.dim()), key=lambda d: 0 if param.shape[d] == 1 else -param.stride(d))
    return grad.permute(order)


def clipped(grad: Tensor, T: Any, clipvalue: float = inf) -> np.ndarray[Any, Any]:
    """The gradient in T, or in complex T, clamped."""
    values = to_numpy(grad)
    with np.errstate(over="ignore"):
        if np.iscomplexobj(values):
            return oracle.as_complex(oracle.as_real(values).astype(T))
        return oracle.clip_by_value(values.astype(T), clipvalue)


def square_sum(param: Tensor, grad: Tensor, clipvalue: float = inf, in_double: bool = False) -> float:
    return oracle.square_sum(clipped(in_memory_order(param, grad), arithmetic_type(param, in_double), clipvalue))


def assert_square_sums(params: list[Tensor], grads: list[Tensor], clipvalue: float = inf, **options: bool) -> None:
    expected = [square_sum(p, g, clipvalue, **options) for p, g in zip(params, grads, strict=True)]
    assert_same_bits(ops.grad_square_sums(params, grads, clipvalue, **options), np.array(expected, np.float64))


# ---- Sums of squares ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_square_sums(dtype: torch.dtype, in_double: bool, threads: int) -> None:
    """All sizes in one call, empty tensors first and last."""
    grads = [order_sensitive((size,), dtype, seed=i) for i, size in enumerate(SIZES)]
    assert_square_sums(grads, grads, in_double=in_double)
    grads = [gradients((size,), dtype, steps=1, seed=i)[0] for i, size in enumerate(SIZES)]
    assert_square_sums(grads, grads, inf if dtype.is_complex else 0.3, in_double=in_double)


def test_square_sums_of_many_small_tensors(threads: int) -> None:
    """Units of many gradients in one thread's range, and ranges that begin inside a gradient."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 700, (900,), generator=generator).tolist()
    sizes[300], sizes[301] = 70_000, 200_000
    grads = [order_sensitive((size,), torch.float32, seed=i) for i, size in enumerate(sizes)]
    assert_square_sums(grads, grads)


@pytest.mark.parametrize("dtypes", [REAL_DTYPES, COMPLEX_DTYPES], ids=["real", "complex"])
def test_square_sums_of_gradients_of_another_dtype(dtypes: tuple[torch.dtype, ...]) -> None:
    pairs = [(dtype, grad_dtype) for dtype in dtypes for grad_dtype in dtypes]
    params = [torch.empty(4700, dtype=dtype) for dtype, _ in pairs]
    grads = [gradients((4700,), dtype, steps=1, seed=i)[0] for i, (_, dtype) in enumerate(pairs)]
    assert_square_sums(params, grads)
    assert_square_sums(params, grads, in_double=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=dtype_name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_square_sums_follow_the_memory_of_the_parameter(layout: str, dtype: torch.dtype) -> None:
    shape = (5, 7, 1, 130)
    param = LAYOUTS[layout](randn(shape, dtype, torch.Generator().manual_seed(1)))
    grads = [
        lay_out(grad)
        for grad in (order_sensitive(shape, dtype, seed) for seed in range(3))
        for lay_out in (*LAYOUTS.values(), lambda grad: grad[:, :1, :, :1].expand(shape))
    ]
    assert_square_sums([param] * len(grads), grads)
    assert_square_sums([param] * len(grads), grads, in_double=True)


def test_the_order_of_the_elements_shows() -> None:
    """Else the tests before this one could not fail."""
    grad = order_sensitive((5, 7, 1, 130), torch.float32, seed=0)
    params = [LAYOUTS[layout](grad) for layout in ("contiguous", "channels_last", "transposed")]
    assert len(set(ops.grad_square_sums(params, [grad] * 3).tolist())) == 3


def test_square_sums_without_dimensions_or_elements() -> None:
    assert_square_sums([torch.ones(())], [torch.tensor(-3.0)])
    assert_square_sums([torch.ones(0), torch.ones(2, 0, 3)], [torch.ones(0), torch.ones(2, 0, 3)])
    nothing = ops.grad_square_sums([], [])
    assert nothing.shape == (0,)
    assert nothing.dtype is torch.float64


@pytest.mark.parametrize("clipvalue", [inf, 2.0, 0.0, 1e30, 1e300])
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_square_sums_of_special_values(dtype: torch.dtype, clipvalue: float) -> None:
    special = [inf, -inf, nan, 1e20, -1e20, 1e200, 0.0, -0.0, 1e-30, 1e-45, 2.0, -2.0]
    grads = [torch.tensor([value, 1.0, -3.0]).to(torch.float64) for value in special]
    for grad_dtype in (dtype, torch.float64):
        cast = [grad.to(grad_dtype) for grad in grads]
        assert_square_sums([torch.empty(3, dtype=dtype)] * len(cast), cast, clipvalue)


def test_square_sums_spelled_out() -> None:
    """So that the oracle does not vouch for itself."""
    grads = [torch.tensor(x) for x in ([3.0, -4.0], [inf, 1.0], [nan, 1.0], [1e20, 1.0], [0.1])]
    tenth = float(torch.tensor(0.1) * torch.tensor(0.1))
    expected = torch.tensor([25.0, inf, nan, inf, tenth], dtype=torch.float64)
    assert_same_bits(ops.grad_square_sums(grads, grads), expected)
    clamped = torch.tensor([8.0, 5.0, nan, 5.0, tenth], dtype=torch.float64)
    assert_same_bits(ops.grad_square_sums(grads, grads, 2.0), clamped)
    one = [torch.tensor([3 + 4j])]
    assert ops.grad_square_sums(one, one).item() == 25


@pytest.mark.parametrize("dtype", COMPLEX_DTYPES[:2], ids=dtype_name)
def test_square_sums_of_a_lazily_conjugated_gradient(dtype: torch.dtype) -> None:
    grad = randn((700,), dtype, torch.Generator().manual_seed(2))
    assert_same_bits(ops.grad_square_sums([grad], [grad.conj()]), ops.grad_square_sums([grad], [grad]))


@pytest.mark.parametrize(
    ("params", "grads", "clipvalue", "error"),
    [
        ([torch.ones(2)] * 2, [torch.ones(2)], inf, "the lists differ in length: 2 params, 1 grads"),
        ([torch.ones(2)] * 2, [torch.ones(2), torch.ones(3)], inf, "the tensors of parameter 1 differ in shape"),
        ([torch.ones(2)] * 2, [torch.ones(2), torch.ones(2).long()], inf, r"grads\[1\] has a dtype"),
        ([torch.ones(2).long()], [torch.ones(2)], inf, r"params\[0\] has a dtype"),
        ([torch.ones(2)], [torch.ones(2) * 1j], inf, "of the tensors of parameter 0, some are complex"),
        ([torch.ones(2), torch.ones(2) * 1j], [torch.ones(2), torch.ones(2) * 1j], 0.5, "clipvalue is 0.5, but param.* 1"),
        ([torch.ones(2)], [torch.ones(2)], -1.0, "clipvalue must be a number >= 0, got -1"),
        ([torch.ones(2)], [torch.ones(2)], nan, "clipvalue must be a number >= 0, got nan"),
        ([torch.ones(2)], [torch.ones(2, device="meta")], inf, "a tensor on the meta device has no elements"),
        ([torch.ones(2)], [torch.ones(2).to_sparse()], inf, "grad_square_sums"),
    ],
)  # fmt: skip
def test_square_sums_refuse(params: list[Tensor], grads: list[Tensor], clipvalue: float, error: str) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match=error):
        ops.grad_square_sums(params, grads, clipvalue)


@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=dtype_name)
def test_opcheck_of_square_sums(dtype: torch.dtype) -> None:
    grads = [randn(shape, dtype, torch.Generator().manual_seed(3)) for shape in ((3, 4), (0,), (), (300,))]
    op = torch.ops.torch_adadelta.grad_square_sums.default
    torch.library.opcheck(op, (grads, grads))
    torch.library.opcheck(op, (grads, grads, inf if dtype.is_complex else 0.5, True))
