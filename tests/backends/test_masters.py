"""Masters, taken apart into bfloat16 parameters and remainders, and put together again."""

import numpy as np
import pytest
import torch
from cases import LAYOUTS, assert_same_bits
from reference.formats import join_master, split_master
from torch import Tensor

from torch_adadelta.backends import masters

# Every bfloat16, and as float32 masters: each of them with the lower halves that matter, and some anywhere.
ALL = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
HALVES = (0, 1, -1, 2**14, -(2**14), 2**15 - 1, -(2**15), 12345, -12345)


def masters_to_try() -> Tensor:
    bits = ALL.view(torch.int16).to(torch.int32) << 16
    drawn = torch.randint(-(2**31), 2**31, (10**5,), generator=torch.Generator().manual_seed(0))
    return torch.cat([*(bits | (half & 0xFFFF) for half in HALVES), drawn.to(torch.int32)]).view(torch.float32)


def remainders(param: Tensor, seed: int = 0) -> Tensor:
    """Any, of which most do not belong to the parameter."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**15), 2**15, param.shape, generator=generator).to(torch.int16)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    param = torch.empty(master.shape, dtype=torch.bfloat16)
    remainder = masters.new_remainder(param)
    masters.split_(param, remainder, master)
    return param, remainder


def test_every_master_returns() -> None:
    """The halves are those of the oracle. Every nan becomes the quiet one of its sign."""
    given = masters_to_try()
    param, remainder = split(given)
    upper, rest = split_master(given.numpy())
    np.testing.assert_array_equal(param.float().numpy().view(np.uint32), upper.view(np.uint32))
    np.testing.assert_array_equal(remainder.numpy(), rest)
    joined = masters.join(param, remainder)
    is_nan = given.isnan()
    assert torch.equal(joined.isnan(), is_nan)
    assert torch.equal(joined.view(torch.int32)[~is_nan], given.view(torch.int32)[~is_nan])
    assert not remainder[is_nan].any()
    assert torch.equal(param[is_nan].signbit(), given[is_nan].signbit())


@pytest.mark.parametrize("half", HALVES)
def test_a_stale_remainder_does_no_harm(half: int) -> None:
    """Beside every parameter: the master is finite where the parameter is, and within half a unit in the last place."""
    remainder = torch.full(ALL.shape, half, dtype=torch.int16)
    joined = masters.join(ALL, remainder)
    assert_same_bits(joined, join_master(ALL.float().numpy(), remainder.numpy()))
    assert torch.equal(joined.isnan(), ALL.isnan())
    assert not (joined.isinf() & ~ALL.isinf()).any()
    is_largest = ALL.isinf() & joined.isfinite()  # the one that a master just below infinity is rounded to
    assert not is_largest.any() or half < 0
    finite = ALL.isfinite()
    distance = (joined.view(torch.int32) - ALL.float().view(torch.int32)).abs()
    assert int(distance[finite].max()) <= 2**15
    assert torch.equal(joined[ALL == 0].abs(), torch.full((2,), max(half, 0), dtype=torch.int32).view(torch.float32))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    given = masters_to_try()[:120].view(2, 3, 4, 5)
    param, remainder = (LAYOUTS[layout](torch.zeros((2, 3, 4, 5), dtype=x)) for x in (torch.bfloat16, torch.int16))
    expected_param, expected_remainder = split(given)
    masters.store(param, remainder, given)
    assert_same_bits(param, expected_param)
    assert torch.equal(remainder, expected_remainder)
    assert_same_bits(masters.wide(param, remainder, torch.float32), masters.join(expected_param, expected_remainder))


def test_without_a_remainder_a_parameter_is_its_own_master() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        param = torch.tensor([1.0, 2.5], dtype=dtype, requires_grad=True)
        master = masters.master_of(param, None)
        assert not master.requires_grad
        assert master.data_ptr() == param.data_ptr()
        assert masters.wide(param.detach(), None, torch.float64).dtype is torch.float64
        masters.set_master(param, None, torch.tensor([3.0, 1 + 2**-20]))
        assert param.tolist() == torch.tensor([3.0, 1 + 2**-20]).to(dtype).tolist()
        masters.store(param.detach(), None, torch.tensor([1 + 2**-20, 4.0]))
        assert param.tolist() == torch.tensor([1 + 2**-20, 4.0]).to(dtype).tolist()
        assert masters.has_remainder(dtype) == (dtype is torch.bfloat16)


def test_a_master_is_set_and_read() -> None:
    param = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    remainder = masters.new_remainder(param)
    assert (remainder.dtype, remainder.shape, remainder.requires_grad) == (torch.int16, (2, 2), False)
    value = torch.tensor([[1 + 2**-20, -(2**-130)], [0.1, torch.inf]], dtype=torch.float64)
    version = param._version
    masters.set_master(param, remainder, value)
    assert param._version > version
    assert_same_bits(masters.master_of(param, remainder), value.float())
