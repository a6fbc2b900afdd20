"""The opmath dtype, the roundings to it, and the exact roots."""

import math
import warnings
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from cases import COMPLEX_DTYPES, DTYPES, assert_same_bits, dtype_name
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from torch_adadelta.backends import opmath

CPU = torch.device("cpu")
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_opmath_dtype(dtype: torch.dtype) -> None:
    expected = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
    assert opmath.opmath_dtype(dtype) is expected
    params = [torch.ones(2, dtype=dtype), torch.ones(2, dtype=torch.float16)]
    assert opmath.opmath_dtypes(params) == {expected, torch.float32}
    assert opmath.opmath_dtypes(params[:1]) == {expected}
    assert opmath.opmath_dtypes([]) == set()
    assert opmath.wide_dtype(params[0]) is (expected.to_complex() if dtype.is_complex else expected)


@pytest.mark.parametrize("dtype", COMPLEX_DTYPES, ids=dtype_name)
def test_complex_tensors_are_pairs_of_reals_in_the_same_memory(dtype: torch.dtype) -> None:
    x = torch.tensor([1 + 2j, 3 - 4j]).to(dtype)
    pairs = opmath.as_real(x)
    assert pairs.tolist() == [[1, 2], [3, -4]]
    assert pairs.data_ptr() == x.data_ptr()
    if dtype is not torch.complex32:
        assert opmath.as_real(x.conj()).tolist() == [[1, -2], [3, 4]]
    assert opmath.as_real(x.real) is not None
    real = torch.ones(2)
    assert opmath.as_real(real) is real


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float64(1), True), (np.int8(1), True), (np.array(1.0), True), (np.ones(1), False), (1.0, False),
        (torch.tensor(1.0), False), (np, False), (None, False),
    ],
    ids=repr,
)  # fmt: skip
def test_numpy_scalars(value: Any, expected: bool) -> None:
    assert opmath.is_numpy_scalar(value) is expected


# ---- Roundings ------------------------------------------------------------------------------------------------------

# A tie goes to the even neighbour; what is nearer to infinity than to the largest float32 becomes infinite.
ROUNDED = [
    0.1, 0.95, -1e-46, 1e-45, 1 + 2**-24, 1 + 3 * 2**-24, 3.4028235677973366e38, 3.4028235677973362e38, math.inf, math.nan,
]  # fmt: skip


@pytest.mark.parametrize("number", ROUNDED)
def test_roundings_of_numbers(number: float) -> None:
    with np.errstate(over="ignore"):
        expected = float(np.float32(number))
    for actual in (opmath.round_to_float32(number), opmath.rounded(number, torch.float32)):
        np.testing.assert_array_equal(actual, expected)
        assert math.copysign(1, actual) == math.copysign(1, expected)
    np.testing.assert_array_equal(opmath.cast(number, torch.float32, CPU), expected)
    np.testing.assert_array_equal(opmath.rounded(number, torch.float64), number)
    np.testing.assert_array_equal(opmath.cast(number, torch.float64, CPU), number)


@BOTH
@pytest.mark.parametrize("value", [torch.tensor(0.1, dtype=torch.float64), torch.tensor([[0.3]]), torch.tensor(1)])
def test_a_tensor_is_cast_where_it_is_to_be_used(dtype: torch.dtype, value: Tensor) -> None:
    result = opmath.cast(value, dtype, CPU)
    assert isinstance(result, Tensor)
    assert result.shape == ()
    assert_same_bits(result, value.to(dtype).reshape(()))
    assert opmath.cast(value, dtype, torch.device("meta")).device.type == "meta"  # type: ignore[union-attr]


@BOTH
def test_one_minus_rho_is_subtracted_in_the_opmath_dtype(dtype: torch.dtype) -> None:
    for number in (0.95, 0.9, 0.0, 1.0, 1e-8, 0.3):
        expected = 1 - torch.tensor(number, dtype=dtype)
        rho = opmath.cast(number, dtype, CPU)
        assert opmath.one_minus(rho, dtype) == expected.item()
        as_tensor = opmath.one_minus(torch.tensor(rho, dtype=dtype), dtype)
        assert isinstance(as_tensor, Tensor)
        assert_same_bits(as_tensor, expected)
    assert opmath.one_minus(opmath.rounded(0.95, torch.float32), torch.float32) == 0.050000011920928955


# ---- Exact roots ----------------------------------------------------------------------------------------------------
def _hard_numbers(dtype: torch.dtype) -> Tensor:
    """Random numbers of every magnitude; squares, and their neighbours, whose roots are close calls."""
    generator = np.random.default_rng(0)
    kind = np.float32 if dtype is torch.float32 else np.float64
    info = np.finfo(kind)
    exponents = generator.uniform(info.minexp - info.nmant, info.maxexp, 200_000)
    spread = np.exp2(exponents.astype(np.float64)).astype(kind)
    squares = np.square(generator.uniform(0.5, 2, 200_000).astype(kind))
    near = [squares, np.nextafter(squares, kind(0)), np.nextafter(squares, kind(9))]
    one = np.array(
        [0, -0.0, 1, np.nextafter(kind(1), kind(0)), info.smallest_subnormal, info.tiny, info.max, np.inf, np.nan], kind
    )
    return torch.from_numpy(np.concatenate([spread, *near, one]))


def _roots(x: Tensor) -> np.ndarray[Any, Any]:
    """By the C library, whose float64 root is exact, and rounds to the exact float32 root."""
    roots = [math.sqrt(value) if value >= 0 else math.nan for value in x.tolist()]
    return np.array(roots, np.float32 if x.dtype is torch.float32 else np.float64)


@BOTH
@pytest.mark.parametrize("has_numpy", [True, False], ids=["NumPy", "without NumPy"])
def test_exact_sqrt_is_that_of_ieee_754(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, has_numpy: bool) -> None:
    x = _hard_numbers(dtype)
    expected = _roots(x)
    if not has_numpy:
        monkeypatch.setattr(opmath, "np", None)
    copy = x.clone()
    assert_same_bits(opmath.exact_sqrt(x), expected)
    assert_same_bits(x, copy)
    assert opmath.exact_sqrt_(copy) is copy
    assert_same_bits(copy, expected)
    strided = x[::2].clone()
    wide = torch.zeros(2 * len(strided), dtype=dtype)
    opmath.exact_sqrt_(wide[::2].copy_(strided))
    assert_same_bits(wide[::2], expected[::2])
    assert not wide[1::2].any()
    assert_same_bits(opmath.exact_sqrt(x[::2]), expected[::2])
    assert_same_bits(opmath.exact_sqrt(x[0]), expected[0])
    assert_same_bits(opmath.corrected_sqrt(x), expected)
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        assert opmath.exact_sqrt(-torch.ones(3, dtype=dtype)).isnan().all()


def test_the_root_by_numpy_is_a_root_within_half_an_ulp() -> None:
    """By exact fractions, for the C library might use what NumPy uses."""
    x = _hard_numbers(torch.float64)
    x = x[x.isfinite() & (x > 0)][::400]
    for value, root in zip(x.tolist(), opmath.exact_sqrt(x).tolist(), strict=True):
        below, above = ((Fraction(root) + Fraction(math.nextafter(root, to))) / 2 for to in (0.0, math.inf))
        assert below**2 <= Fraction(value) <= above**2


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names = [*getattr(self, "names", []), func.name()]
        return func(*args, **(kwargs or {}))


class _Subclass(Tensor):
    """Whose elements are in no memory that NumPy could see."""

    def numpy(self, **kwargs: Any) -> Any:
        raise RuntimeError("no memory")


@BOTH
@pytest.mark.parametrize("kind", ["vmap", "jvp", "FakeTensor", "dispatch mode", "subclass", "compiled"])
def test_exact_sqrt_of_what_numpy_cannot_see(kind: str, dtype: torch.dtype) -> None:
    x = torch.tensor([2.0, 3.0, 5.0, 1e-40], dtype=dtype)
    if kind == "vmap":
        root = torch.func.vmap(opmath.exact_sqrt)(x)
    elif kind == "jvp":
        root, _ = torch.func.jvp(opmath.exact_sqrt, (x,), (x,))
    elif kind == "dispatch mode":
        with _Mode() as seen:
            root = opmath.exact_sqrt(x)
        assert "aten::sqrt" in seen.names
    elif kind == "subclass":
        root = opmath.exact_sqrt(x.as_subclass(_Subclass))
        assert type(root) is _Subclass
        root = root.as_subclass(Tensor)
    elif kind == "compiled":
        root = torch.compile(opmath.exact_sqrt, fullgraph=True, backend="eager")(x)
    else:
        with FakeTensorMode() as mode:
            assert opmath.exact_sqrt(mode.from_tensor(x)).shape == (4,)
        return
    assert_same_bits(root, _roots(x))


# Between two numbers of 16 bits, and a little more: rounded to float32 first, some would be exactly between them.
_BETWEEN = [
    sign * 2.0**exponent * (1 + k / 2048 + tiny)
    for sign in (1, -1)
    for exponent in (-130, -24, -14, -1, 0, 15, 127)
    for k in (0, 1, 3, 4, 8, 12, 1020, 2036, 2045)
    for tiny in (0.0, 2.0**-40, -(2.0**-40), 2.0**-24, -(2.0**-25))
]
_SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e300, -1e300, 1e-300, 65519.999999, 65520.0, 3.4e38]


def _nearest(x: float, dtype: torch.dtype) -> float:
    """By exact distances, ties to the even one; beyond the largest the next power of two stands for infinity."""
    guess = torch.tensor(x).to(dtype)
    if not math.isfinite(x) or x == 0:
        return float(guess)
    around = [torch.nextafter(guess, torch.tensor(to, dtype=dtype)) for to in (-math.inf, math.inf)]
    limit = {torch.float16: 2.0**16, torch.bfloat16: 2.0**128}[dtype]

    def key(y: Tensor) -> tuple[Fraction, int]:
        value = Fraction(float(y)) if y.isfinite() else Fraction(math.copysign(limit, float(y)))
        return abs(value - Fraction(x)), int(y.view(torch.int16)) & 1

    return float(min([guess, *around], key=key))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
def test_what_is_stored_is_rounded_once(dtype: torch.dtype) -> None:
    x = torch.tensor([*_BETWEEN, *_SPECIAL], dtype=torch.float64)
    stored = opmath.stored(x, dtype)
    assert stored.dtype is dtype
    assert_same_bits(
        stored.double(), torch.tensor([_nearest(value, dtype) for value in x.tolist()], dtype=torch.float64)
    )
    assert not torch.equal(stored.nan_to_num(), x.to(dtype).nan_to_num())  # what PyTorch does
    as_complex = torch.complex(x, x.flip(0))
    if dtype is torch.float16:
        assert torch.equal(
            torch.view_as_real(opmath.stored(as_complex, torch.complex32)).nan_to_num(),
            torch.stack([stored, stored.flip(0)], -1).nan_to_num(),
        )


def test_what_is_stored_is_a_copy() -> None:
    for dtype in DTYPES:
        x = torch.ones(2, dtype=dtype)
        stored = opmath.stored(x, dtype)
        assert (stored.dtype, stored.data_ptr() != x.data_ptr()) == (dtype, True)


def test_exact_sqrt_of_a_device_is_its_own() -> None:
    x = torch.ones(3, device="meta")
    assert opmath.exact_sqrt(x).is_meta


def test_exact_sqrt_is_differentiable_twice() -> None:
    x = torch.tensor([0.3, 1.0, 7.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(opmath.exact_sqrt, x)
    assert torch.autograd.gradgradcheck(opmath.exact_sqrt, x)
    assert_same_bits(opmath.exact_sqrt(x).detach(), _roots(x))
    assert not opmath.exact_sqrt(x.detach()).requires_grad
