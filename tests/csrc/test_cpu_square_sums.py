"""csrc/cpu/square_sums.cpp and the tree of csrc/square_sums.h against the NumPy oracle, bit by bit; what is refused."""

from typing import Any

import direct
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
    order_sensitive,
    randn,
)
from op_cases import inf, nan, needs_library, square_sum, storage_uses, ways
from torch import Tensor

from torch_adadelta.backends import kernels

pytestmark = needs_library

# Around the row of 128 lanes, the chunk of 4096, the unit of 65536 elements that a thread sums, and of several units.
SIZES = (
    0, 1, 2, 63, 64, 65, 127, 128, 129, 255, 511, 512, 513, 4095, 4096, 4097, 12289, 65535, 65536, 65537, 300_001, 0,
)  # fmt: skip


def assert_square_sums(
    params: list[Tensor], grads: list[Tensor], clipvalue: float = inf, threads: Any = (1,), **options: Any
) -> None:
    expected = [square_sum(p, g, clipvalue, **options) for p, g in zip(params, grads, strict=True)]
    given: dict[str, Any] = {"grad_scale": torch.tensor(options.pop("scale"))} if "scale" in options else {}
    if "loss_scale" in options:
        given["loss_scale_factor"] = options.pop("loss_scale")
    for way in ways(threads):
        actual = direct.square_sums(params, grads, clipvalue, **options, **given)
        assert_same_bits(actual, np.array(expected, np.float64), way)


@pytest.mark.parametrize("in_double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_every_size_in_one_call(dtype: torch.dtype, in_double: bool) -> None:
    """Empty tensors first and last; with numbers that show the order of the sum, and clamped ones."""
    grads = [order_sensitive((size,), dtype, seed=i) for i, size in enumerate(SIZES)]
    assert_square_sums(grads, grads, threads=(1, 2, 3), in_double=in_double)
    grads = [gradients((size,), dtype, steps=1, seed=i)[0] for i, size in enumerate(SIZES)]
    assert_square_sums(grads, grads, inf if dtype.is_complex else 0.3, in_double=in_double)


@pytest.mark.parametrize("clipvalue", [inf, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_divided_by_scales(dtype: torch.dtype, clipvalue: float) -> None:
    """By one or both; that of the loss is none that float32 has."""
    grads = [gradients((size,), dtype, steps=1, seed=size)[0] for size in (3, 130, 513, 4097)]
    for scales in ({"scale": 3.0}, {"loss_scale": 0.7}, {"scale": 3.0, "loss_scale": 0.7}):
        assert_square_sums(grads, grads, inf if dtype.is_complex else clipvalue, **scales)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_gradients_that_ask_for_pages_ahead(dtype: torch.dtype) -> None:
    """Of a megabyte and more; the last pages have none that follow."""
    numel = 2**20 // dtype.itemsize + 133
    memory = order_sensitive((numel + 1,), dtype, seed=0)
    grads = [memory[:-1], memory[1:]]
    assert_square_sums(grads, grads)


def test_many_small_tensors() -> None:
    """Units of many gradients in one thread's range, and ranges that begin inside a gradient."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 700, (900,), generator=generator).tolist()
    sizes[300], sizes[301] = 70_000, 200_000
    grads = [order_sensitive((size,), torch.float32, seed=i) for i, size in enumerate(sizes)]
    assert_square_sums(grads, grads, threads=(1, 2, 3))


@pytest.mark.parametrize("dtypes", [REAL_DTYPES, COMPLEX_DTYPES], ids=["real", "complex"])
def test_gradients_of_another_dtype(dtypes: tuple[torch.dtype, ...]) -> None:
    pairs = [(dtype, grad_dtype) for dtype in dtypes for grad_dtype in dtypes]
    params = [torch.empty(4700, dtype=dtype) for dtype, _ in pairs]
    grads = [gradients((4700,), dtype, steps=1, seed=i)[0] for i, (_, dtype) in enumerate(pairs)]
    assert_square_sums(params, grads)
    assert_square_sums(params, grads, in_double=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=dtype_name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_memory_of_the_parameter_has_the_order(layout: str, dtype: torch.dtype) -> None:
    shape = (5, 7, 1, 130)
    param = LAYOUTS[layout](randn(shape, dtype, torch.Generator().manual_seed(1)))
    grads = [
        lay_out(order_sensitive(shape, dtype, seed=0))
        for lay_out in (
            *LAYOUTS.values(),
            lambda grad: grad[:, :1, :, :1].expand(shape),
            lambda grad: grad.as_strided(shape, (1, 1, 1, 1)),
        )
    ]
    assert_square_sums([param] * len(grads), grads)
    assert_square_sums([param] * len(grads), grads, in_double=True)


def test_the_order_of_the_elements_shows() -> None:
    """Else the tests before this one could not fail."""
    grad = order_sensitive((5, 7, 1, 130), torch.float32, seed=0)
    params = [LAYOUTS[layout](grad) for layout in ("contiguous", "channels_last", "transposed")]
    assert len(set(direct.square_sums(params, [grad] * 3).tolist())) == 3


def test_nothing_to_sum() -> None:
    assert_square_sums([torch.ones(())], [torch.tensor(-3.0)])
    assert_square_sums([torch.ones(0), torch.ones(2, 0, 3)], [torch.ones(0), torch.ones(2, 0, 3)])
    nothing = direct.square_sums([], [])
    assert nothing.shape == (0,)
    assert nothing.dtype is torch.float64


@pytest.mark.parametrize("clipvalue", [inf, 2.0, 0.0, 1e30, 1e300])
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_special_values(dtype: torch.dtype, clipvalue: float) -> None:
    special = [inf, -inf, nan, 1e20, -1e20, 1e200, 0.0, -0.0, 1e-30, 1e-45, 2.0, -2.0]
    grads = [torch.tensor([value, 1.0, -3.0]).to(torch.float64) for value in special]
    for grad_dtype in (dtype, torch.float64):
        cast = [grad.to(grad_dtype) for grad in grads]
        assert_square_sums([torch.empty(3, dtype=dtype)] * len(cast), cast, clipvalue)


def test_spelled_out() -> None:
    """So that the oracle does not vouch for itself."""
    grads = [torch.tensor(x) for x in ([3.0, -4.0], [inf, 1.0], [nan, 1.0], [1e20, 1.0], [0.1])]
    tenth = float(torch.tensor(0.1) * torch.tensor(0.1))
    expected = torch.tensor([25.0, inf, nan, inf, tenth], dtype=torch.float64)
    assert_same_bits(direct.square_sums(grads, grads), expected)
    clamped = torch.tensor([8.0, 5.0, nan, 5.0, tenth], dtype=torch.float64)
    assert_same_bits(direct.square_sums(grads, grads, 2.0), clamped)
    one = [torch.tensor([3 + 4j])]
    assert direct.square_sums(one, one).item() == 25
    halved = direct.square_sums(grads[:1], grads[:1], grad_scale=torch.tensor([[2.0]]))
    assert halved.item() == 6.25


@pytest.mark.parametrize("dtype", COMPLEX_DTYPES[:2], ids=dtype_name)
def test_a_lazily_conjugated_gradient(dtype: torch.dtype) -> None:
    grad = randn((700,), dtype, torch.Generator().manual_seed(2))
    assert_same_bits(direct.square_sums([grad], [grad.conj()]), direct.square_sums([grad], [grad]))


TWO = torch.ones(2)


@pytest.mark.parametrize(
    ("params", "grads", "options", "error"),
    [
        ([TWO] * 2, [TWO], {}, "the lists differ in length: 2 params, 1 grads"),
        ([TWO] * 2, [TWO, torch.ones(3)], {}, "parameter 1: its tensors differ in shape"),
        ([TWO] * 2, [TWO, TWO.long()], {}, "parameter 1: its gradient has a dtype"),
        ([TWO.long()], [TWO], {}, "parameter 0: it has a dtype"),
        ([TWO], [TWO * 1j], {}, "parameter 0: of its tensors, some are complex"),
        ([TWO, TWO * 1j], [TWO, TWO * 1j], {"clipvalue": 0.5}, "parameter 1: clipvalue is 0.5, but it is"),
        ([TWO], [TWO], {"clipvalue": -1.0}, "clipvalue must be a number >= 0, got -1"),
        ([TWO], [TWO], {"clipvalue": nan}, "clipvalue must be a number >= 0, got nan"),
        ([TWO], [TWO], {"grad_scale": TWO}, "grad_scale must be a CPU tensor of one element"),
        ([TWO], [TWO], {"grad_scale": TWO[:1].double()}, "grad_scale must have the dtype float32"),
        ([TWO], [TWO.to("meta")], {}, "a tensor on the meta device has no elements"),
        ([TWO], [TWO.to_sparse()], {}, "grad_square_sums"),
    ],
)
def test_what_is_refused(params: list[Tensor], grads: list[Tensor], options: dict[str, Any], error: str) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match=error):
        direct.square_sums(params, grads, **options)


def test_a_sum_that_nobody_holds_is_freed() -> None:
    result = direct.square_sums([TWO], [TWO])
    assert storage_uses([result]) == storage_uses([torch.ones(1)])


def test_a_call_does_not_remember_the_one_before() -> None:
    """Clipping is for real numbers, and the lists of a call are kept for the next one."""
    for dtype, clipvalue in ((torch.complex64, None), (torch.float32, 0.5)):
        ones = [torch.ones(3, dtype=dtype)]
        sums = kernels.square_sums(ones, ones, clipvalue)
        assert isinstance(sums, torch.Tensor)
        assert sums.tolist() == [3.0 if clipvalue is None else 0.75]
