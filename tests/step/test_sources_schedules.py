"""Hyperparameters of schedules and callables: the values of each step, and what is refused."""

from typing import Any

import pytest
import torch
from cases import Path, assert_same_bits, dtype_name, to_numpy
from keras_training import Halving, advance, assert_same_training, make_params, set_gradients
from reference.oracle import OracleOptimizer
from torch.nn import Parameter
from training import path as path

from torch_adadelta import AdadeltaKeras, schedules
from torch_adadelta.schedules import ExponentialDecay


def test_values_replace_each_other(path: Path) -> None:
    """Number, Tensor, callable and schedule, assigned in any order."""
    optimizer = AdadeltaKeras(make_params(), 1.0, **path.options)
    oracle = OracleOptimizer([p.detach().numpy() for p in optimizer.param_groups[0]["params"]])
    schedule = ExponentialDecay(1.0, 2, 0.5)
    for step, (value, expected) in enumerate(
        [
            (schedule, 1.0),
            (0.25, 0.25),
            (lambda: 0.75, 0.75),
            (torch.tensor(0.5), 0.5),
            (Halving(1.0), 0.0625),
            (torch.tensor([2.0]), 2.0),
        ]
    ):
        optimizer.lr = value
        assert optimizer.learning_rate is value
        oracle.learning_rate = expected
        set_gradients(optimizer, step)
        grads = [p.grad.numpy() for p in optimizer.param_groups[0]["params"]]
        optimizer.step()
        oracle.step(grads)
    for param, one in zip(optimizer.param_groups[0]["params"], oracle.oracles, strict=True):
        assert_same_bits(param, one.p)


def test_a_zero_learning_rate_before_the_first_step_makes_state_only(path: Path) -> None:
    """As PyTorch's distributed checkpointing does, to have state to load into."""
    optimizer = AdadeltaKeras(make_params(), ExponentialDecay(1.0, 2, 0.5), **path.options)
    was = optimizer.param_groups[0]["lr"]
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    optimizer.param_groups[0]["lr"] = was
    assert optimizer.iterations == 0
    assert all(not state[key].any() for state in optimizer.state.values() for key in state)
    assert len(optimizer.state) == 2
    plain = AdadeltaKeras(make_params(), ExponentialDecay(1.0, 2, 0.5), **path.options)
    advance(optimizer, 3)
    advance(plain, 3)
    assert_same_training(optimizer, plain)
    optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(RuntimeError, match="would overwrite that"):
        optimizer.step()


def test_a_scheduler_of_torch_with_decay(path: Path) -> None:
    optimizer = AdadeltaKeras(make_params(), 1.0, decay=0.5, **path.options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    oracle = OracleOptimizer([p.detach().numpy() for p in optimizer.param_groups[0]["params"]], decay=0.5)
    for step, lr in enumerate([1.0, 1.0, 0.5, 0.5, 0.25]):
        oracle.learning_rate = lr
        set_gradients(optimizer, step)
        grads = [p.grad.numpy() for p in optimizer.param_groups[0]["params"]]
        optimizer.step()
        oracle.step(grads)
        scheduler.step()
    for param, one in zip(optimizer.param_groups[0]["params"], oracle.oracles, strict=True):
        assert_same_bits(param, one.p)


@pytest.mark.parametrize("iterations", [2**24 + 1, 70000])
def test_decay_far_into_training(path: Path, iterations: int) -> None:
    """The step is cast to T: float32 does not know every number beyond 2**24; a 16-bit step would be infinite."""
    params = [Parameter(torch.ones(3, dtype=d)) for d in (torch.float32, torch.float64, torch.float16, torch.bfloat16)]
    dtypes = [dtype_name(p.dtype) for p in params]
    optimizer = AdadeltaKeras(params, 1.0, decay=0.3, **path.options)
    oracle = OracleOptimizer([to_numpy(p) for p in params], 1.0, decay=0.3, dtypes=dtypes)
    optimizer.iterations = oracle.iterations = iterations
    set_gradients(optimizer)
    grads = [to_numpy(p.grad) for p in params]
    optimizer.step()
    oracle.step(grads)
    for param, one in zip(params, oracle.oracles, strict=True):
        assert_same_bits(param, one.p)


@pytest.mark.parametrize(
    "lr", [0.5, torch.tensor(0.5), ExponentialDecay(0.5, 3, 0.7)], ids=["number", "Tensor", "schedule"]
)
def test_capturable_computes_decay_with_tensors_to_the_same_bits(path: Path, lr: Any) -> None:
    one, other = (
        AdadeltaKeras(make_params((3,), (70,)), lr, decay=0.3, capturable=capturable, **path.options)
        for capturable in (False, True)
    )
    advance(one, 4)
    advance(other, 4)
    assert_same_training(one, other)


def test_a_schedule_that_starts_at_zero_counts_its_first_step(path: Path) -> None:
    schedule = schedules.CosineDecay(0.0, 10, warmup_target=1.0, warmup_steps=5)
    optimizer = AdadeltaKeras(make_params(), schedule, **path.options)
    advance(optimizer, 1)
    assert optimizer.iterations == 1
    fresh = AdadeltaKeras(make_params(), schedule, **path.options)
    for p in fresh.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    fresh.step()  # as distributed checkpointing steps, with a learning rate that is zero already
    assert fresh.iterations == 0
    assert len(fresh.state) == 2
