"""Averages of parameters in tests of backends and ops: what they begin with, and what the oracle makes of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from cases import assert_like_oracle, assert_same_bits, dtype_name, optimizer_oracle_of, randn, to_numpy
from reference.oracle import OracleOptimizer
from torch import Tensor

from torch_adadelta.backends.opmath import opmath_dtype

HYPERPARAMETERS = (0.75, float(np.float32(0.9)), 1e-6)

# Numbers and Tensors; with 0 an average is a copy.
MOMENTA = {"0": 0.0, "0.9": 0.9, "1": 1.0, "tensor": torch.tensor(0.7), "tensor-0": torch.zeros(1)}


def average_dtype(param: Tensor) -> torch.dtype:
    """T, or the complex dtype of T."""
    T = opmath_dtype(param.dtype)
    return T.to_complex() if param.is_complex() else T


def averages_of(params: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """Normal numbers, contiguous."""
    generator = torch.Generator().manual_seed(seed)
    return [randn(param.shape, average_dtype(param), generator) for param in params]


def laid_like(param: Tensor, average: Tensor) -> Tensor:
    """The same values, where the parameter has its elements in memory."""
    count = param.untyped_storage().nbytes() // param.element_size()
    memory = torch.ones(count, dtype=average.dtype)
    return memory.as_strided(param.shape, param.stride(), param.storage_offset()).copy_(average)


def oracle_after(
    params: Sequence[Tensor],
    averages: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor]],
    momentum: Any,
    overwrites: bool,
    scale: float = 1.0,
    kept: Any = None,
    remainders: Sequence[Tensor] = (),
    **options: Any,
) -> OracleOptimizer:
    """The oracle of optimizers after the steps with these gradients, which are divided by a scale first.

    `kept` is a `Kept` of op_cases.py.
    """
    if kept is not None:
        name = None if kept.state_dtype is None else dtype_name(kept.state_dtype)
        options |= {"master_weights": kept.has_masters, "state_dtype": name}
    lr, rho, epsilon = HYPERPARAMETERS
    oracle = optimizer_oracle_of(
        params,
        learning_rate=lr,
        rho=rho,
        epsilon=epsilon,
        use_ema=True,
        ema_momentum=float(momentum),
        ema_overwrite_frequency=1 if overwrites else None,
        **options,
    )
    for one, remainder in zip(oracle.oracles, remainders, strict=bool(remainders)):
        one.remainder = remainder.numpy().copy()
    oracle.averages = [to_numpy(x).copy() for x in averages]
    oracle.iterations = 1  # at 0 the momentum is 0
    for own in grads:
        values = []
        for one, grad in zip(oracle.oracles, own, strict=True):
            g = one.gradient(to_numpy(grad))
            with np.errstate(all="ignore"):
                values.append(g if scale == 1 else (g / g.real.dtype.type(scale)))
        oracle.step(values)
    return oracle


def assert_averaged(
    params: Sequence[Tensor],
    square_avgs: Sequence[Tensor],
    acc_deltas: Sequence[Tensor],
    averages: Sequence[Tensor],
    oracle: OracleOptimizer,
    what: str = "",
) -> None:
    assert oracle.averages is not None
    rows = zip(params, square_avgs, acc_deltas, averages, oracle.oracles, oracle.averages, strict=True)
    for i, (param, square_avg, acc_delta, average, one, expected) in enumerate(rows):
        assert_like_oracle(param, {"square_avg": square_avg, "acc_delta": acc_delta}, one, f"{i} {what}")
        assert_same_bits(average, expected, f"average {i} {what}")
