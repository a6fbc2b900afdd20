"""Optimizers that have taken some steps, what a step writes of them, and the comparison of two of them."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from cases import PATHS, REAL_DTYPES, Path, assert_same_bits, dtype_name, gradients, randn, to_numpy
from reference.oracle import OracleOptimizer
from torch import Tensor
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras
from torch_adadelta.backends import kernels


@pytest.fixture(params=[*PATHS[:2], PATHS[2]._replace(name="fused", capability=None)], ids=lambda path: path.name)
def path(request: pytest.FixtureRequest) -> Path:
    """Each backend, for modules whose tests concern no instruction set: imported there, it replaces that of conftest."""
    chosen: Path = request.param
    if chosen.name == "fused" and not kernels.is_loaded:
        pytest.skip("the compiled library is not installed")
    return chosen


def params_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def tensors_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Each parameter, and its state by the names of the keys."""
    return [
        tensor
        for param in params_of(optimizer)
        for tensor in (param, *(optimizer.state[param][key] for key in sorted(optimizer.state.get(param, {}))))
    ]


def give_gradients(params: Iterable[Any], seed: int) -> list[Any]:
    """Others for each parameter and each seed; returned, too."""
    grads = []
    for index, param in enumerate(params):
        (param.grad,) = gradients(param.shape, param.dtype, 1, seed=100 * seed + index)
        grads.append(param.grad)
    return grads


def advance(optimizer: torch.optim.Optimizer, steps: int = 1, seed: int = 0) -> None:
    """Takes steps with gradients of their own."""
    for step in range(seed, seed + steps):
        give_gradients(params_of(optimizer), step)
        optimizer.step()


def groups_of_two(params: list[Any]) -> list[dict[str, Any]]:
    return [{"params": params[begin : begin + 2]} for begin in range(0, len(params), 2)]


def trained(path: Path, steps: int = 2, groups: int = 2, **options: Any) -> tuple[AdadeltaKeras, list[Parameter]]:
    """An optimizer of groups of two parameters after some steps, with new gradients, and its parameters."""
    params = [Parameter(torch.zeros(5)) for _ in range(2 * groups)]
    optimizer = AdadeltaKeras(groups_of_two(params), **{"learning_rate": 1.0, **path.options, **options})
    advance(optimizer, steps)
    give_gradients(params, steps)
    return optimizer, params


def stepped(path: Path, steps: int = 3, **options: Any) -> AdadeltaKeras:
    """An optimizer of two groups of every real dtype, after some steps."""
    generator = torch.Generator().manual_seed(7)
    groups = [{"params": [Parameter(randn((5, 3), dtype, generator)) for dtype in REAL_DTYPES]} for _ in range(2)]
    optimizer = AdadeltaKeras([{**groups[0], "lr": 0.5}, groups[1]], 1.0, **options, **path.options)
    advance(optimizer, steps)
    return optimizer


def assert_same_training(one: torch.optim.Optimizer, other: torch.optim.Optimizer, what: Any = "") -> None:
    """Parameters, state and the count of steps agree, bit by bit."""
    ours, theirs = params_of(one), params_of(other)
    assert len(ours) == len(theirs)
    for index, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        assert_same_bits(p, q.detach(), f"parameter {index} {what}")
        assert one.state.get(p, {}).keys() == other.state.get(q, {}).keys(), what
        for key, tensor in one.state.get(p, {}).items():
            assert_same_bits(tensor, other.state[q][key], f"{key} of parameter {index} {what}")
    counts = [[int(group["iterations"]) for group in each.param_groups] for each in (one, other)]
    assert counts[0] == counts[1], what


def oracle_of_all(params: Sequence[Tensor], **options: Any) -> OracleOptimizer:
    """The oracle of an optimizer of these parameters."""
    dtypes = [dtype_name(p.dtype) for p in params]
    # NumPy keeps the strides, and with them the order in which squares are summed.
    return OracleOptimizer([to_numpy(p) for p in params], **{"learning_rate": 1.0, "dtypes": dtypes, **options})


def numpy_or_none(grads: Iterable[Tensor | None]) -> list[np.ndarray | None]:
    return [None if g is None else to_numpy(g) for g in grads]


def assert_like_oracles(optimizer: AdadeltaKeras, expected: OracleOptimizer, what: str = "") -> None:
    """All parameters and both accumulators, bit by bit."""
    for index, (param, one) in enumerate(zip(params_of(optimizer), expected.oracles, strict=True)):
        state = optimizer.state.get(param) or dict.fromkeys(("square_avg", "acc_delta"), torch.zeros_like(param))
        assert_same_bits(state["square_avg"], one.square_avg, f"square_avg of parameter {index} {what}")
        assert_same_bits(state["acc_delta"], one.acc_delta, f"acc_delta of parameter {index} {what}")
        assert_same_bits(param, one.p, f"parameter {index} {what}")
    assert optimizer.iterations == expected.iterations
