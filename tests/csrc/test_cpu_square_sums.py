"""The compiled sums of squares and the clipped update against the NumPy oracle, bit by bit; and what they refuse."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import direct
import numpy as np
import pytest
import torch
from cases import (
    COMPLEX_DTYPES,
    DTYPES,
    LAYOUTS,
    REAL_DTYPES,
    assert_like_oracle,
    assert_same_bits,
    dtype_name,
    gradients,
    oracle_of,
    order_sensitive,
    randn,
    segment,
    to_numpy,
)
from reference import oracle
from torch import Tensor

from torch_adadelta.backends import kernels

pytestmark = pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")

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


def ways() -> Iterator[str]:
    """Goes through the instruction sets up to the one in use, with 1, 2 and 3 threads each."""
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


def arithmetic_type(param: Tensor, in_double: bool = False) -> Any:
    return np.float64 if in_double or param.dtype in (torch.float64, torch.complex128) else np.float32


def in_memory_order(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient with its dimensions in the order in which the memory of the parameter has them."""
    order = sorted(range(param.dim()), key=lambda d: 0 if param.shape[d] == 1 else -param.stride(d))
    return grad.permute(order)


def clipped(grad: Tensor, T: Any, clipvalue: float = inf, scale: float = 1.0) -> np.ndarray[Any, Any]:
    """The gradient in T, or in complex T, divided by the scale and clamped."""
    values = to_numpy(grad)
    with np.errstate(over="ignore", invalid="ignore"):
        if np.iscomplexobj(values):
            return oracle.as_complex(oracle.as_real(values).astype(T) / T(scale))
        return oracle.clip_by_value(values.astype(T) / T(scale), clipvalue)


def square_sum(
    param: Tensor, grad: Tensor, clipvalue: float = inf, in_double: bool = False, scale: float = 1.0
) -> float:
    T = arithmetic_type(param, in_double)
    return oracle.square_sum(clipped(in_memory_order(param, grad), T, clipvalue, scale))


def assert_square_sums(params: list[Tensor], grads: list[Tensor], clipvalue: float = inf, **options: bool) -> None:
    expected = [square_sum(p, g, clipvalue, **options) for p, g in zip(params, grads, strict=True)]
    for way in ways():
        assert_same_bits(direct.square_sums(params, grads, clipvalue, **options), np.array(expected, np.float64), way)


# ---- Sums of squares ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_square_sums(dtype: torch.dtype, in_double: bool) -> None:
    """All sizes in one call, empty tensors first and last."""
    grads = [order_sensitive((size,), dtype, seed=i) for i, size in enumerate(SIZES)]
    assert_square_sums(grads, grads, in_double=in_double)
    grads = [gradients((size,), dtype, steps=1, seed=i)[0] for i, size in enumerate(SIZES)]
    assert_square_sums(grads, grads, inf if dtype.is_complex else 0.3, in_double=in_double)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_square_sums_of_gradients_that_ask_for_pages_ahead(dtype: torch.dtype) -> None:
    """Of a megabyte and more; the last pages have none that follow."""
    numel = 2**20 // dtype.itemsize + 133
    memory = order_sensitive((numel + 1,), dtype, seed=0)
    grads = [memory[:-1], memory[1:]]
    assert_square_sums(grads, grads)


def test_square_sums_of_many_small_tensors() -> None:
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
    assert len(set(direct.square_sums(params, [grad] * 3).tolist())) == 3


def test_square_sums_without_dimensions_or_elements() -> None:
    assert_square_sums([torch.ones(())], [torch.tensor(-3.0)])
    assert_square_sums([torch.ones(0), torch.ones(2, 0, 3)], [torch.ones(0), torch.ones(2, 0, 3)])
    nothing = direct.square_sums([], [])
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
    assert_same_bits(direct.square_sums(grads, grads), expected)
    clamped = torch.tensor([8.0, 5.0, nan, 5.0, tenth], dtype=torch.float64)
    assert_same_bits(direct.square_sums(grads, grads, 2.0), clamped)
    one = [torch.tensor([3 + 4j])]
    assert direct.square_sums(one, one).item() == 25


@pytest.mark.parametrize("dtype", COMPLEX_DTYPES[:2], ids=dtype_name)
def test_square_sums_of_a_lazily_conjugated_gradient(dtype: torch.dtype) -> None:
    grad = randn((700,), dtype, torch.Generator().manual_seed(2))
    assert_same_bits(direct.square_sums([grad], [grad.conj()]), direct.square_sums([grad], [grad]))


@pytest.mark.parametrize(
    ("params", "grads", "clipvalue", "error"),
    [
        ([torch.ones(2)] * 2, [torch.ones(2)], inf, "the lists differ in length: 2 params, 1 grads"),
        ([torch.ones(2)] * 2, [torch.ones(2), torch.ones(3)], inf, "parameter 1: its tensors differ in shape"),
        ([torch.ones(2)] * 2, [torch.ones(2), torch.ones(2).long()], inf, "parameter 1: its gradient has a dtype"),
        ([torch.ones(2).long()], [torch.ones(2)], inf, "parameter 0: it has a dtype"),
        ([torch.ones(2)], [torch.ones(2) * 1j], inf, "parameter 0: of its tensors, some are complex"),
        ([torch.ones(2), torch.ones(2) * 1j], [torch.ones(2), torch.ones(2) * 1j], 0.5, "parameter 1: clipvalue is 0.5, but it is"),
        ([torch.ones(2)], [torch.ones(2)], -1.0, "clipvalue must be a number >= 0, got -1"),
        ([torch.ones(2)], [torch.ones(2)], nan, "clipvalue must be a number >= 0, got nan"),
        ([torch.ones(2)], [torch.ones(2, device="meta")], inf, "a tensor on the meta device has no elements"),
        ([torch.ones(2)], [torch.ones(2).to_sparse()], inf, "grad_square_sums"),
    ],
)  # fmt: skip
def test_square_sums_refuse(params: list[Tensor], grads: list[Tensor], clipvalue: float, error: str) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match=error):
        direct.square_sums(params, grads, clipvalue)


@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=dtype_name)
def test_opcheck_of_square_sums(dtype: torch.dtype) -> None:
    grads = [randn(shape, dtype, torch.Generator().manual_seed(3)) for shape in ((3, 4), (0,), (), (300,))]
    op = torch.ops.torch_adadelta.grad_square_sums.default
    torch.library.opcheck(op, (grads, grads))
    torch.library.opcheck(op, (grads, grads, inf if dtype.is_complex else 0.5, True))


# ---- The clipped update ---------------------------------------------------------------------------------------------


class Clip(NamedTuple):
    """The clip options of a call, and what the oracle makes of them."""

    clipvalue: float = inf
    clipnorm: float | None = None
    factor: float = 1.0
    maximize: bool = False
    scale: float = 1.0

    def options(self, params: list[Tensor], grads: list[Tensor]) -> dict[str, Any]:
        options: dict[str, Any] = {"maximize": self.maximize, "clipvalue": self.clipvalue}
        scaled = {} if self.scale == 1.0 else {"grad_scale": torch.tensor(self.scale)}
        options |= scaled
        if self.clipnorm is None:
            return options | {"factor": self.factor}
        sums = direct.square_sums(params, grads, self.clipvalue, **scaled)
        return options | {"clipnorm": self.clipnorm, "square_sums": sums}

    def apply(self, param: Tensor, grad: Tensor) -> np.ndarray[Any, Any]:
        T = arithmetic_type(param)
        scale = float(np.float32(self.scale))
        g = clipped(grad, T, self.clipvalue, scale)
        if self.clipnorm is not None:
            g = oracle.clip_by_norm(g, self.clipnorm, square_sum(param, grad, self.clipvalue, scale=scale))
        else:
            reals = oracle.as_real(g) if np.iscomplexobj(g) else g
            with np.errstate(all="ignore"):
                reals = reals * T(self.factor)
            g = oracle.as_complex(reals) if np.iscomplexobj(g) else reals
        return g


CLIPS = {
    "clipvalue": Clip(clipvalue=0.3),
    "clipnorm": Clip(clipnorm=0.7),
    "clipnorm-not-reached": Clip(clipnorm=1e7),
    "factor": Clip(factor=0.37),
    "clipvalue-clipnorm": Clip(clipvalue=0.3, clipnorm=0.7, maximize=True),
    "clipvalue-factor": Clip(clipvalue=0.3, factor=0.37, maximize=True),
    "maximize": Clip(factor=-1.0, maximize=True),
    # No power of two: to multiply by the inverse would show.
    "scale": Clip(scale=3.0),
    "scale-clipvalue-factor": Clip(scale=0.3, clipvalue=0.3, factor=0.37),
    "scale-clipnorm": Clip(scale=3.0, clipnorm=0.7, maximize=True),
}

HYPERPARAMETERS = (1.0, float(np.float32(0.9)), 1e-6)


def clip_of(name: str, dtype: torch.dtype) -> Clip:
    return CLIPS[name]._replace(clipvalue=inf) if dtype.is_complex else CLIPS[name]


def assert_clipped_update(params: list[Tensor], grads: list[Tensor], clip: Clip, what: str = "") -> None:
    """Two steps, the second with state that is not zero."""
    oracles = [oracle_of(p, learning_rate=1.0, rho=0.9, epsilon=1e-6, maximize=clip.maximize) for p in params]
    for param, grad, by_oracle in zip(params, grads, oracles, strict=True):
        clipped_grad = clip.apply(param, grad)
        by_oracle.step(clipped_grad)
        by_oracle.step(clipped_grad)
    initial = [param.clone() for param in params]
    for way in ways():
        for param, values in zip(params, initial, strict=True):
            param.copy_(values)
        states = [[torch.zeros_like(param) for param in params] for _ in range(2)]
        for _ in range(2):
            direct.fused(params, grads, *states, *HYPERPARAMETERS, **clip.options(params, grads))
        for i, (param, *state, by_oracle) in enumerate(zip(params, *states, oracles, strict=True)):
            named = dict(zip(("square_avg", "acc_delta"), state, strict=True))
            assert_like_oracle(param, named, by_oracle, f"{what} {i} {way}")


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_clipped_update(dtype: torch.dtype, name: str) -> None:
    """Sizes around the groups and blocks of the loops, in one call, empty tensors first and last."""
    sizes = (0, 1, 15, 16, 17, 31, 32, 33, 63, 65, 129, 511, 513, 5000, 0)
    params = [randn((size,), dtype, torch.Generator().manual_seed(size)) for size in sizes]
    grads = [gradients((size,), dtype, steps=1, seed=i)[0] for i, size in enumerate(sizes)]
    assert_clipped_update(params, grads, clip_of(name, dtype))


@pytest.mark.parametrize("found_inf", [0.0, -0.0, 1.0, 2.0, inf, nan])
@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=dtype_name)
def test_nothing_is_written_if_found_inf_is_not_zero(dtype: torch.dtype, layout: str, found_inf: float) -> None:
    """Whatever the gradient holds; and if it is zero, the step is what it would be without."""
    shape = (5, 3, 2, 400)
    params = [LAYOUTS[layout](randn(shape, dtype, torch.Generator().manual_seed(k))) for k in range(2)]
    grads = [gradients(shape, dtype, steps=1, seed=k)[0] for k in range(2)]
    grads[0][1, 2, 1, 7] = inf if found_inf else 0.3
    given = {"found_inf": torch.tensor([found_inf]), "grad_scale": torch.full((1, 1), 3.0)}
    for way in ways():
        skips = found_inf != 0
        lists, expected = ([[x.clone() for x in params], grads, *([x.abs().to(dtype) for x in params] for _ in range(2))]
                           for _ in range(2))  # fmt: skip
        if not skips:
            direct.fused(*expected, *HYPERPARAMETERS, grad_scale=torch.tensor(3.0))  # type: ignore[arg-type]
        direct.fused(*lists, *HYPERPARAMETERS, **given)  # type: ignore[arg-type]
        for column, expected_column in zip(lists, expected, strict=True):
            for x, y in zip(column, expected_column, strict=True):
                assert_same_bits(x, y, way)
        assert all(torch.equal(x, y) for x, y in zip(lists[0], params, strict=True)) == skips
    assert given["found_inf"].view(torch.int32).equal(torch.tensor([found_inf]).view(torch.int32))
    assert given["grad_scale"].item() == 3.0


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
@pytest.mark.parametrize(
    ("tensor", "error"),
    [
        (torch.ones(2), "must be a CPU tensor of one element"),
        (torch.ones(0), "must be a CPU tensor of one element"),
        (torch.ones(1, dtype=torch.float64), "must have the dtype float32"),
        (torch.ones(1, dtype=torch.bfloat16), "must have the dtype float32"),
    ],
    ids=["two", "none", "float64", "bfloat16"],
)
def test_scales_that_do_not_fit_are_refused(name: str, tensor: Tensor, error: str) -> None:
    lists = [[torch.ones(5)] for _ in range(4)]
    with pytest.raises(RuntimeError, match=f"{name} {error}"):
        direct.fused(*lists, *HYPERPARAMETERS, **{name: tensor})  # type: ignore[arg-type]
    assert all(torch.equal(x, torch.ones(5)) for (x,) in lists)
    if name == "grad_scale":
        with pytest.raises(RuntimeError, match=f"{name} {error}"):
            direct.square_sums(*lists[:2], grad_scale=tensor)


@pytest.mark.parametrize("name", ["clipvalue-clipnorm", "clipvalue-factor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_clipped_update_of_large_tensors(dtype: torch.dtype, name: str) -> None:
    sizes = (3, 70_000, 5, 200_001)
    params = [randn((size,), dtype, torch.Generator().manual_seed(size)) for size in sizes]
    grads = [gradients((size,), dtype, steps=1, seed=i)[0] for i, size in enumerate(sizes)]
    assert_clipped_update(params, grads, CLIPS[name])


@pytest.mark.parametrize("name", ["clipnorm", "clipvalue-clipnorm", "clipvalue-factor"])
@pytest.mark.parametrize("dtypes", [REAL_DTYPES, COMPLEX_DTYPES], ids=["real", "complex"])
def test_clipped_update_by_gradients_of_another_dtype(dtypes: tuple[torch.dtype, ...], name: str) -> None:
    for dtype in dtypes:
        grads = [gradients((700,), grad_dtype, steps=1, seed=i)[0] for i, grad_dtype in enumerate(dtypes)]
        params = [randn((700,), dtype, torch.Generator().manual_seed(4)) for _ in grads]
        assert_clipped_update(params, grads, clip_of(name, dtype), dtype_name(dtype))


@pytest.mark.parametrize("name", ["clipnorm", "clipvalue-clipnorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=dtype_name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_clipped_update_of_any_layout(layout: str, dtype: torch.dtype, name: str) -> None:
    shape = (5, 3, 1, 37)
    grads = [LAYOUTS[grad_layout](gradients(shape, dtype, steps=1)[0]) for grad_layout in LAYOUTS]
    generator = torch.Generator().manual_seed(5)
    params = [LAYOUTS[layout](randn(shape, dtype, generator)) for _ in grads]
    assert_clipped_update(params, grads, clip_of(name, dtype))


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_clipped_update_by_special_values(dtype: torch.dtype, name: str) -> None:
    special = [inf, -inf, nan, 1e20, -1e20, 1e200, 0.0, -0.0, 1e-30, 1e-45, 0.3, -0.3]
    grads = [torch.tensor(special), *(torch.tensor([value, 1.0, -3.0]) for value in special), torch.zeros(40)]
    grads = [grad.double().to(dtype) for grad in grads]
    clip = CLIPS[name]
    zero = clip._replace(
        clipvalue=0.0 if clip.clipvalue < inf else inf, clipnorm=None if clip.clipnorm is None else 0.0, factor=0.0
    )
    for chosen in (clip, zero):
        assert_clipped_update([torch.ones_like(grad) for grad in grads], grads, chosen, str(chosen))


@pytest.mark.parametrize("factor", [nan, inf, 0.0, -0.0, 1.0, -1.0, 1e300])
def test_any_factor_as_number_and_as_tensor(factor: float) -> None:
    grad = gradients((300,), torch.float32, steps=1)[0]
    assert_clipped_update([torch.ones(300)], [grad], Clip(factor=factor))
    by_number, by_tensor = ([[torch.ones(300)], [grad], [torch.ones(300)], [torch.ones(300)]] for _ in range(2))
    direct.fused(*by_number, *HYPERPARAMETERS, factor=factor)
    direct.fused(*by_tensor, *HYPERPARAMETERS, factor=torch.tensor(factor, dtype=torch.float64))
    for one, other in zip(by_number, by_tensor, strict=True):
        assert_same_bits(one[0], other[0])


def test_clipped_spelled_out() -> None:
    """So that the oracle does not vouch for itself: with rho = 0, square_avg is the square of the clipped gradient."""
    three, four = torch.tensor([3.0, -4.0, nan]), torch.tensor([1.0, 1.0, 0.0])

    def square_avg(grad: Tensor, **options: Any) -> list[float]:
        lists = [[torch.ones(3)], [grad], [torch.zeros(3)], [torch.zeros(3)]]
        direct.fused(*lists, 1.0, 0.0, 1e-6, **options)
        return lists[2][0].tolist()

    sums = torch.tensor([25.0], dtype=torch.float64)
    assert square_avg(three, clipvalue=2.0)[:2] == [4.0, 4.0]
    assert math.isnan(square_avg(three, clipvalue=2.0)[2])
    assert square_avg(four, clipnorm=2.5, square_sums=sums) == [0.25, 0.25, 0.0]
    assert square_avg(four, clipnorm=10.0, square_sums=sums) == [1.0, 1.0, 0.0]
    assert square_avg(four, factor=4.0) == [16.0, 16.0, 0.0]
    assert square_avg(four * 8, clipvalue=6.0, factor=0.5, maximize=True) == [9.0, 9.0, 0.0]
    assert math.isnan(square_avg(four, clipnorm=2.5, square_sums=sums * nan)[0])
    assert square_avg(four, clipnorm=2.5, square_sums=sums * inf) == [0.0, 0.0, 0.0]


def test_clipped_gradient_that_is_the_parameter_and_parameters_that_share_memory() -> None:
    param = torch.arange(-600.0, 600.0)
    by_oracle = oracle_of(param, learning_rate=1.0, rho=0.9, epsilon=1e-6)
    by_oracle.step(CLIPS["clipnorm"].apply(param, param))
    lists = [[param], [param.detach()], [torch.zeros(1200)], [torch.zeros(1200)]]
    direct.fused(*lists, *HYPERPARAMETERS, **CLIPS["clipnorm"].options([param], [param]))
    assert_like_oracle(param, {"square_avg": lists[2][0], "acc_delta": lists[3][0]}, by_oracle)

    grads = [gradients((60_000,), torch.float32, steps=1, seed=i)[0] for i in range(2)]
    results = []
    for together in (True, False):
        base = torch.ones(90_000)
        params = [base[:60_000], base[30_000:]]
        states = [[torch.zeros(60_000) for _ in params] for _ in range(2)]
        options = CLIPS["clipvalue-clipnorm"].options(params, grads)
        sums = options.pop("square_sums")
        for part in [slice(0, 2)] if together else [slice(0, 1), slice(1, 2)]:
            lists = [params[part], grads[part], states[0][part], states[1][part]]
            direct.fused(*lists, *HYPERPARAMETERS, **options, square_sums=sums[part])
        results.append(base)
    assert_same_bits(*results)


_ONE = torch.ones(1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"clipvalue": -1.0}, "clipvalue must be a number >= 0, got -1"),
        ({"clipvalue": nan}, "clipvalue must be a number >= 0, got nan"),
        ({"clipvalue": 0.5}, "parameter 1: clipvalue is 0.5, but it is complex"),
        ({"clipnorm": 1.0}, "clipnorm and square_sums must be given together"),
        ({"square_sums": _ONE}, "clipnorm and square_sums must be given together"),
        ({"clipnorm": -2.0, "square_sums": _ONE.expand(3)}, "clipnorm must be a number >= 0, got -2"),
        ({"clipnorm": nan, "square_sums": _ONE.expand(3)}, "clipnorm must be a number >= 0, got nan"),
        ({"clipnorm": 1.5, "square_sums": torch.ones(3).double(), "factor": 0.5}, "clipnorm is 1.5, but a factor"),
        ({"clipnorm": 1.5, "square_sums": torch.ones(3).double(), "factor": _ONE}, "clipnorm is 1.5, but a factor"),
        ({"clipnorm": 1.0, "square_sums": torch.ones(3)}, "square_sums must be .* for each of 3 parameters"),
        ({"clipnorm": 1.0, "square_sums": torch.ones(2).double()}, "square_sums must be .* for each of 3 parameters"),
        ({"clipnorm": 1.0, "square_sums": torch.ones(3, 1).double()}, "square_sums must be .* for each of 3 param"),
        ({"clipnorm": 1.0, "square_sums": torch.ones(6).double()[::2]}, "square_sums must be a contiguous float64"),
        ({"clipnorm": 1.0, "square_sums": torch.ones(3, device="meta").double()}, "a tensor on the meta device"),
        ({"factor": torch.ones(2)}, "factor_tensor must be a CPU tensor of one element"),
        ({"factor": torch.ones(1).long()}, "factor_tensor must have a floating-point dtype"),
    ],
)
def test_clip_options_that_do_not_fit_are_refused_unwritten(options: dict[str, Any], error: str) -> None:
    made = [[torch.ones(3, dtype=dtype) for dtype in (torch.float32, torch.complex64, torch.float64)] for _ in range(4)]
    for state in made[2:]:
        state[:] = [x.clone() for x in state]
    with pytest.raises(RuntimeError, match=error):
        direct.fused(*made, *HYPERPARAMETERS, **options)
    for tensors in made:
        for tensor in tensors:
            assert torch.equal(tensor, torch.ones_like(tensor))


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=dtype_name)
def test_opcheck_of_the_clipped_update(dtype: torch.dtype, name: str) -> None:
    params, grads = ([randn((n,), dtype, torch.Generator().manual_seed(n + k)) for n in (5, 0, 40)] for k in (0, 1))
    states = [[torch.ones_like(param) for param in params] for _ in range(2)]
    options = clip_of(name, dtype).options(params, grads)
    maximize = options.pop("maximize")
    torch.library.opcheck(
        torch.ops.torch_adadelta.adadelta_.default,
        (params, grads, *states, *segment(3, *HYPERPARAMETERS, maximize)),
        options,
    )
    if "factor" in options:
        options |= {"factor_tensor": torch.tensor(options.pop("factor"), dtype=torch.float64)}
        torch.library.opcheck(
            torch.ops.torch_adadelta.adadelta_.default,
            (params, grads, *states, *segment(3, *HYPERPARAMETERS, maximize)),
            options,
        )


def test_no_tensor_outlives_a_clipped_call() -> None:
    params, grads, sums, factor = [torch.ones(5)], [torch.ones(5)], torch.ones(1).double(), torch.ones(1).double()

    def uses() -> list[int]:
        return [torch._C._storage_Use_Count(x.untyped_storage()._cdata) for x in (*params, *grads, sums, factor)]

    before = uses()
    states = [[torch.ones(5)], [torch.ones(5)]]
    for options in ({"clipnorm": 1.0, "square_sums": sums}, {"factor": factor}, {"clipnorm": 1.0, "factor": factor}):
        for _ in range(3):
            try:
                direct.fused(params, grads, *states, *HYPERPARAMETERS, **options)
            except RuntimeError:
                assert len(options) == 2
        results = direct.square_sums(params, grads), torch.ones(1)
        counts = [torch._C._storage_Use_Count(x.untyped_storage()._cdata) for x in results]
        assert counts[0] == counts[1]
    assert uses() == before
