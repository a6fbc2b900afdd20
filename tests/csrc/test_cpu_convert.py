"""csrc/cpu/kernels/convert.h: what numbers of 16 bits become, and how they are rounded, on every instruction set."""

import direct
import numpy as np
import pytest
import torch
from cases import assert_same_bits, dtype_name
from op_cases import Kept, assert_update, needs_library, ways
from reference.formats import join_master, split_master
from torch import Tensor

pytestmark = needs_library

HALVES = (torch.bfloat16, torch.float16)


def every_value(dtype: torch.dtype) -> Tensor:
    """All 65536, infinities and nans included."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_name)
def test_every_value_as_parameter_gradient_and_state(dtype: torch.dtype) -> None:
    """Each beside another; in place, and by way of a block where the gradient has another dtype."""
    values = every_value(dtype)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    params, grads = [values.clone(), values.clone()], [values[order], values[order].float()]
    assert_update(params, grads)


@pytest.mark.parametrize("param_dtype", [torch.float32, torch.float64, *HALVES], ids=dtype_name)
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_name)
def test_what_is_read_of_a_gradient(dtype: torch.dtype, param_dtype: torch.dtype) -> None:
    """With rho = 0 a step stores its square."""
    values = every_value(dtype)
    values = values[values.isfinite()]
    wide = torch.float64 if param_dtype is torch.float64 else torch.float32
    expected = values.to(wide).square().to(param_dtype)
    for way in ways():
        lists = [[torch.zeros(len(values), dtype=param_dtype)] for _ in range(4)]
        lists[1] = [values]
        direct.fused(*lists, 0.0, 0.0, 1e-7)  # type: ignore[arg-type]
        assert_same_bits(lists[2][0], expected, way)


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float32], ids=dtype_name)
def test_masters_are_put_together_and_taken_apart(state_dtype: torch.dtype) -> None:
    """A step without a gradient leaves every float as it is, and nan a nan; a stale remainder makes neither from a number."""
    kept = Kept(state_dtype, has_masters=True)
    generator = torch.Generator().manual_seed(0)
    halves = every_value(torch.bfloat16)
    remainders = torch.randint(-(2**15), 2**15, halves.shape, dtype=torch.int16, generator=generator)
    for way in ways():
        param, remainder = halves.clone(), remainders.clone()
        states = [torch.zeros(len(halves), dtype=state_dtype) for _ in range(2)]
        grads = torch.zeros(len(halves), dtype=torch.bfloat16)
        lists = [[param], [grads], *([x] for x in states)]
        direct.fused(*lists, 1.0, 0.9, 1e-6, **kept.options, remainders=[remainder])  # type: ignore[arg-type]
        masters = join_master(halves.float().numpy(), remainders.numpy())
        expected, rest = split_master(masters)
        assert_same_bits(param, expected, way)
        np.testing.assert_array_equal(remainder.numpy(), rest, way)
        assert np.array_equal(np.isnan(masters), halves.isnan().numpy())


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_name)
def test_rounding_to_nearest_ties_to_even(dtype: torch.dtype) -> None:
    """Of numbers on, beside and between two neighbours, as PyTorch rounds them."""
    values = every_value(dtype)
    finite = values[values.isfinite() & (values.float().abs() < 3e4)].float().abs()
    ties = finite * (1 + 2.0 ** -(9 if dtype is torch.bfloat16 else 12))
    up, down = (torch.nextafter(ties, torch.tensor(to)) for to in (torch.inf, 0.0))
    roots = torch.cat([finite, ties, up, down]).sqrt()
    expected = roots.square().to(dtype)
    for way in ways():
        lists = [[torch.zeros(len(roots), dtype=dtype)] for _ in range(4)]
        lists[1] = [roots]
        direct.fused(*lists, 0.0, 0.0, 1e-7)  # type: ignore[arg-type]
        assert_same_bits(lists[2][0], expected, way)
