"""GradScaler: the fused update unscales and skips by itself; the Python paths leave that to the scaler."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    REAL_DTYPES,
    STEP_OPTIONS,
    Path,
    assert_same_bits,
    dtype_name,
    gradients,
    to_numpy,
)
from reference.oracle import OracleOptimizer
from torch import Tensor
from torch.nn import Parameter
from training import path as path

from torch_adadelta import AdadeltaKeras, schedules
from torch_adadelta.backends import kernels

needs_library = pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")

OPTIONS: dict[str, dict[str, Any]] = {
    **STEP_OPTIONS,
    "schedule": {"learning_rate": schedules.InverseTimeDecay(1.0, 2, 0.5)},
    "masters": {"master_weights": True, "state_dtype": torch.float32, "use_ema": True, "weight_decay": 0.1},
    "bfloat16 state": {"state_dtype": torch.bfloat16},
    "aggregator": {"gradient_aggregator": lambda pairs: [(3 * g, p) for g, p in pairs]},
}


def make(**options: Any) -> AdadeltaKeras:
    second = torch.bfloat16 if "state_dtype" in options else torch.float64
    params = [Parameter(torch.ones(n, dtype=d)) for n, d in ((300, torch.float32), (7, second), (5, torch.float32))]
    return AdadeltaKeras(params, **{"learning_rate": 1.0, **options})


def params_of(optimizer: AdadeltaKeras) -> list[Tensor]:
    return optimizer.param_groups[0]["params"]


def set_gradients(optimizer: AdadeltaKeras, scale: float, step: int) -> list[Tensor]:
    for i, p in enumerate(params_of(optimizer)):
        (grad,) = gradients(p.shape, p.dtype, 1, seed=10 * step + i)
        p.grad = grad * scale
    return [p.grad for p in params_of(optimizer) if p.grad is not None]


def scaler_of(scale: float) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.zeros(()))  # makes the scale
    return scaler


def assert_same_training(one: AdadeltaKeras, other: AdadeltaKeras) -> None:
    for x, y in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(x, y)
    for (p, master), (q, other_master) in zip(one.master_params(), other.master_params(), strict=True):
        assert_same_bits(p, q)
        assert_same_bits(master, other_master)


@needs_library
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_unscaling_inside_the_step_is_unscaling_before_it(options: dict[str, Any]) -> None:
    """Bit by bit for a power of two, and the same as a step with gradients that were never scaled."""
    scale = 2.0**16
    inside, before, never = (make(fused=True, **options) for _ in range(3))
    for step in range(4):
        for optimizer, unscales in ((inside, False), (before, True)):
            scaler = scaler_of(scale)
            grads = set_gradients(optimizer, scale, step)
            copies = [g.clone() for g in grads]
            if unscales:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            if not unscales:
                assert all(map(torch.equal, grads, copies)), "the user's gradient was written to"
        set_gradients(never, 1.0, step)
        never.step()
    assert_same_training(inside, before)
    assert_same_training(inside, never)
    assert inside.iterations == 4
    assert isinstance(inside.param_groups[0]["iterations"], Tensor)
    assert not hasattr(inside, "grad_scale")
    assert inside.found_inf is None


@needs_library
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("unscales", [False, True])
def test_a_gradient_that_is_not_finite_changes_nothing(options: dict[str, Any], value: float, unscales: bool) -> None:
    optimizer, undisturbed = make(fused=True, **options), make(fused=True, **options)
    for step in range(4):
        scaler = scaler_of(4.0)
        grads = set_gradients(optimizer, 4.0, step)
        if step in (0, 2):
            grads[0][5] = value
        before = [p.detach().clone() for p in params_of(optimizer)], optimizer.get_weights()
        if unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step in (0, 2):
            assert scaler.get_scale() == 2.0
            assert all(map(torch.equal, params_of(optimizer), before[0]))
            for now, was in zip(optimizer.get_weights(), before[1], strict=True):
                np.testing.assert_array_equal(now, was)
        else:
            set_gradients(undisturbed, 1.0, step)
            undisturbed.step()
    assert_same_training(optimizer, undisturbed)
    assert optimizer.iterations == 2


@needs_library
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("clip", [{}, {"clipvalue": 0.5}, {"clipnorm": 0.7}, {"global_clipnorm": 0.9}], ids=str)
def test_the_scale_divides_in_the_opmath_dtype(dtype: torch.dtype, clip: dict[str, float]) -> None:
    """Not a product with the rounded inverse, which a scale of 3 would betray."""
    param = Parameter(torch.zeros(700, dtype=dtype))
    optimizer = AdadeltaKeras([param], 1.0, fused=True, **clip)  # type: ignore[arg-type]
    oracle = OracleOptimizer([np.zeros(700, np.float64 if dtype is torch.float64 else np.float32)], 1.0,
                             dtypes=[dtype_name(dtype)], **clip)  # type: ignore[arg-type] # fmt: skip
    for grad in gradients((700,), dtype, 3):
        param.grad = grad
        optimizer.grad_scale = torch.tensor([3.0])
        optimizer.found_inf = torch.tensor([0.0])
        optimizer.step()
        g = to_numpy(grad)
        oracle.step([g / g.dtype.type(3)])
    assert_same_bits(param, oracle.oracles[0].p)
    assert_same_bits(optimizer.state[param]["square_avg"], oracle.oracles[0].square_avg)
    assert_same_bits(optimizer.state[param]["acc_delta"], oracle.oracles[0].acc_delta)


def test_the_python_paths_leave_it_to_the_scaler(path: Path) -> None:
    optimizer = make(**path.options)
    assert optimizer._step_supports_amp_scaling == bool(path.options.get("fused"))
    plain = make(**path.options)
    for step in range(2):
        set_gradients(optimizer, 4.0, step)
        scaler_of(4.0).step(optimizer)
        set_gradients(plain, 1.0, step)
        plain.step()
    assert_same_training(optimizer, plain)


@needs_library
def test_a_checkpoint_after_scaled_steps() -> None:
    one = make(fused=True)
    set_gradients(one, 4.0, 0)
    scaler_of(4.0).step(one)
    other = make(fused=True)
    other.load_state_dict(one.state_dict())
    assert other.param_groups[0]["iterations"] == 1
    assert isinstance(other.param_groups[0]["iterations"], int)
