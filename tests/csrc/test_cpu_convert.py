"""csrc/cpu/kernels/convert.h: what numbers of 16 bits become, and how they are rounded, on every instruction set."""

import direct
import numpy as np
import pytest
import torch
from cases import assert_same_bits, dtype_name
from op_cases import OWN_STATE, Kept, assert_update, needs_library, states_of, ways
from reference.formats import join_master, split_master
from torch import Tensor

pytestmark = needs_library

HALVES = (torch.bfloat16, torch.float16)


def every_value(dtype: torch.dtype) -> Tensor:
    """All 65536, infinities and nans included, and the first 13 again, which fill no group."""
    return torch.arange(-(2**15), 2**15 + 13, dtype=torch.int32).to(torch.int16).view(dtype)


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
    remainders[::7], remainders[1::7] = -(2**15), 2**15 - 1
    halves[-13:], remainders[-13:] = -0.0, -(2**15)  # which split_master never makes, in the part that fills no group
    for way in ways((1, 2)):
        param, remainder = halves.clone(), remainders.clone()
        states = [torch.zeros(len(halves), dtype=state_dtype) for _ in range(2)]
        grads = torch.zeros(len(halves), dtype=torch.bfloat16)
        lists = [[param], [grads], *([x] for x in states)]
        direct.fused(*lists, 1.0, 0.9, 1e-6, **kept.options, remainders=[remainder])  # type: ignore[arg-type]
        masters = join_master(halves.float().numpy(), remainders.numpy())
        expected, rest = split_master(masters)
        np.testing.assert_array_equal(param.view(torch.int16).numpy(), expected.view(np.int32) >> 16, way)
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


@pytest.mark.parametrize(("dtype", "kept"), [(torch.float32, Kept(torch.bfloat16)), (torch.bfloat16, OWN_STATE)])
def test_every_nan_of_float32_becomes_the_same_one(dtype: torch.dtype, kept: Kept) -> None:
    """In a group and after the last; some would become infinity or zero if they were rounded."""
    nans = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -(2**23) + 1, -(2**22), -1], dtype=torch.int32)
    grads = [nans.view(torch.float32).repeat(count) for count in (1, 40)]
    for way in ways():
        params = [torch.ones(len(grad), dtype=dtype) for grad in grads]
        states = states_of(params, torch.bfloat16)
        direct.fused(params, grads, *states, 1.0, 0.9, 1e-6, **kept.options)
        for state in (*states[0], *states[1]):
            assert (state.view(torch.int16) == 0x7FC0).all(), way
