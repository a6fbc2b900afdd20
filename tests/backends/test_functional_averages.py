"""Averages and the factor of the loss on every path, and averages by themselves, against the NumPy oracle."""

import math
from typing import Any

import direct
import numpy as np
import pytest
import torch
from average_cases import (
    HYPERPARAMETERS,
    MOMENTA,
    assert_averaged,
    average_dtype,
    averages_of,
    laid_like,
    oracle_after,
)
from cases import DTYPES, LAYOUTS, Path, assert_same_bits, dtype_name, gradients, randn, to_numpy
from reference.formats import join_master
from reference.oracle import scaled
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torch_adadelta.backends import functional, masters
from torch_adadelta.backends.batch import Backend, Batch, Segment

inf, nan = torch.inf, torch.nan

SHAPES = ((), (0,), (1,), (15,), (33,), (513,), (2, 0, 3), (4, 5, 129), (0,))


def lists_of(dtype: torch.dtype, shapes: Any = SHAPES, steps: int = 2) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Parameters, and their gradients in each step."""
    params = [randn(shape, dtype, torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    by_param = [gradients(shape, dtype, steps, seed=i) for i, shape in enumerate(shapes)]
    return params, [list(grads) for grads in zip(*by_param, strict=True)]


def zeros_of(params: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(param) for param in params]


@pytest.mark.parametrize("overwrites", [False, True])
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_every_shape(path: Path, dtype: torch.dtype, momentum: str, overwrites: bool) -> None:
    m = MOMENTA[momentum]
    params, grads = lists_of(dtype)
    averages, states = averages_of(params), (zeros_of(params), zeros_of(params))
    if float(m) == 0:  # what they were does not matter
        for average, value in zip(averages, (nan, inf, -inf) * 3, strict=True):
            average.fill_(value)
    expected = oracle_after(params, averages, grads, m, overwrites)
    for own in grads:
        path.update(params, own, *states, *HYPERPARAMETERS, averages=averages, ema_momentum=m, overwrites=overwrites)
    assert_averaged(params, *states, averages, expected)


@pytest.mark.parametrize("own_layout", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=dtype_name)
def test_every_layout(path: Path, dtype: torch.dtype, layout: str, own_layout: bool) -> None:
    """Averages lie as their parameters do, or in an order of their own."""
    params, grads = lists_of(dtype, [(3, 1, 5, 40), (2, 3, 4, 5)])
    params = [LAYOUTS[layout](x) for x in params]
    averages = averages_of(params)
    averages = [LAYOUTS["sliced"](x) for x in averages] if own_layout else list(map(laid_like, params, averages))
    states = (zeros_of(params), zeros_of(params))
    expected = oracle_after(params, averages, grads, 0.9, True)
    for own in grads:
        path.update(params, own, *states, *HYPERPARAMETERS, averages=averages, ema_momentum=0.9, overwrites=True)
    assert_averaged(params, *states, averages, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("backend", Backend)
def test_several_segments(backend: Backend, dtype: torch.dtype) -> None:
    """Each with a momentum of its own; parameters follow those of one segment or another."""
    params, grads = lists_of(dtype, [(5,), (600,), (3, 4), (17,)], steps=1)
    averages, states = averages_of(params), (zeros_of(params), zeros_of(params))
    momenta = ((1, 0.9, False), (2, torch.tensor(0.5), True), (0, 0.1, True), (1, 0.0, False))
    segments = [Segment(n, *HYPERPARAMETERS, ema_momentum=m, overwrites=o) for n, m, o in momenta]
    expected = [
        oracle_after([param], [average], [[grad]], momentum, overwrites)
        for param, average, grad, (momentum, overwrites) in zip(
            params, averages, grads[0], [(m, o) for n, m, o in momenta for _ in range(n)], strict=True
        )
    ]
    direct.raised(
        direct.execution.run(Batch(backend, False, False, params, grads[0], *states, segments, averages=averages))
    )
    for i, one in enumerate(expected):
        assert_averaged(*([x[i]] for x in (params, *states, averages)), one, str(i))


@pytest.mark.parametrize(
    "clip", [{}, {"clipvalue": 0.3}, {"clipnorm": 0.7}, {"clipvalue": 0.3, "clipnorm": 0.7}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=dtype_name)
def test_the_factor_of_the_loss(path: Path, dtype: torch.dtype, clip: dict[str, float]) -> None:
    """No power of two. Sums of squares are those of what was divided."""
    if dtype.is_complex:
        clip = {key: value for key, value in clip.items() if key != "clipvalue"}
    params, grads = lists_of(dtype)
    averages, states = averages_of(params), (zeros_of(params), zeros_of(params))
    expected = oracle_after(params, averages, grads, 0.9, True, loss_scale_factor=7.0, **clip)
    for own in grads:
        options: dict[str, Any] = {"clipvalue": clip.get("clipvalue"), "loss_scale_factor": 7.0}
        if "clipnorm" in clip:
            sums = functional.square_sums(params, own, clip.get("clipvalue"), loss_scale_factor=7.0)
            options |= {"clipnorm": clip["clipnorm"], "square_sums": sums}
        path.update(
            params, own, *states, *HYPERPARAMETERS, averages=averages, ema_momentum=0.9, overwrites=True, **options
        )
    assert_averaged(params, *states, averages, expected)


def test_spelled_out() -> None:
    """So that the oracle does not vouch for itself: an update that moves nothing, and an average halfway."""
    for update in (direct.single_tensor, direct.multi_tensor):
        for overwrites in (False, True):
            param, average = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 6.0])
            lists = [[param], [torch.ones(2)], [torch.ones(2)], [torch.ones(2)]]
            update(*lists, 0.0, averages=[average], ema_momentum=0.75, overwrites=overwrites)
            assert average.tolist() == [2.5, 4.0]
            assert param.tolist() == ([2.5, 4.0] if overwrites else [1.0, -2.0])


def test_autograd_records_the_average() -> None:
    """As it does the other states, whose old values stay."""
    start = torch.tensor([1.0, 2.0], requires_grad=True)
    old = torch.zeros(2)
    average = old.clone()
    lists = [[start.clone()], [torch.ones(2)], [torch.zeros(2)], [torch.zeros(2)]]
    segments = [Segment(1, 0.5, 0.9, 1e-6, ema_momentum=0.75, overwrites=True)]
    batch = Batch(Backend.SINGLE_TENSOR, False, True, *lists, segments, averages=[average])
    with torch.enable_grad():
        functional.single_tensor(batch)
    assert_same_bits(average.detach(), lists[0][0].detach())
    (lists[0][0].sum() + average.sum()).backward()
    assert start.grad is not None
    assert start.grad.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("update", [functional.single_tensor, functional.multi_tensor])
def test_nothing_is_read_on_the_host(update: Any) -> None:
    made = [[torch.ones(4, 3, device="meta") for _ in range(2)] for _ in range(5)]
    for momentum in (0.5, torch.ones(1, device="meta")):
        segments = [Segment(2, 1.0, 0.9, 1e-3, ema_momentum=momentum, overwrites=True)]
        with torch.no_grad():
            update(Batch(Backend.SINGLE_TENSOR, False, False, *made[:4], segments, averages=made[4]))
            functional.average(made[0], made[4], [None, None], momentum, True, torch.zeros((), device="meta"))


# ---- By themselves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0, nan], ids=str)
@pytest.mark.parametrize("overwrites", [False, True])
@pytest.mark.parametrize("momentum", MOMENTA)
def test_averages_by_themselves(
    momentum: str, overwrites: bool, found_inf: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every dtype and layout, in pieces and together; parameters that require gradients, and some with masters."""
    monkeypatch.setattr(functional, "_PIECE_ELEMENTS", (40, 40))
    m = MOMENTA[momentum]
    params = []
    for dtype in DTYPES:
        made, _ = lists_of(dtype, [(2, 3, 4, 5), (1, 1, 1, 3), (0, 1, 1, 2), (2, 1, 1, 5), (60, 1, 1, 1)])
        params += [LAYOUTS[layout](x.clone()) for layout in LAYOUTS for x in made]
    params.append(torch.tensor(3.0))
    generator = torch.Generator().manual_seed(1)
    remainders: list[Tensor | None] = []
    for i, param in enumerate(params):
        has_master = param.dtype is torch.bfloat16 and i % 2 == 0
        drawn = torch.randint(-(2**15), 2**15, param.shape, generator=generator, dtype=torch.int16)
        remainders.append(masters.new_remainder(param).copy_(drawn) if has_master else None)
    averages = averages_of(params)
    if float(m) == 0:
        averages[0].fill_(nan)
    averages[1:3] = map(LAYOUTS["sliced"], averages[1:3])
    changes = not found_inf
    expected = []
    for param, average, remainder in zip(params, averages, remainders, strict=True):
        p, e = to_numpy(param), to_numpy(average).copy()
        p = p if remainder is None else join_master(p, remainder.numpy())
        T = e.real.dtype.type
        if changes:
            e = scaled(e, T(float(m))) + scaled(p, T(1) - T(float(m))) if float(m) else p.astype(e.dtype)
        expected.append(torch.from_numpy(np.asarray(e)))
    initial = [masters.master_of(param, rest).clone() for param, rest in zip(params, remainders, strict=True)]
    for param in params:
        param.requires_grad_()
    flag = None if found_inf is None else torch.tensor([found_inf])
    functional.average(params, averages, remainders, m, overwrites, flag)
    for i, (param, average, rest, before, e) in enumerate(
        zip(params, averages, remainders, initial, expected, strict=True)
    ):
        assert_same_bits(average, e, str(i))
        master = masters.master_of(param, rest)
        assert_same_bits(master, e.to(master.dtype) if overwrites and changes else before, str(i))
        assert average.dtype is average_dtype(param)


class Largest(TorchDispatchMode):
    """How many elements the largest of the new tensors has."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(argument.alias_info is not None for argument in func._schema.returns):
            results = result if isinstance(result, list | tuple) else [result]
            self.numel = max(self.numel, sum(x.numel() for x in results if isinstance(x, Tensor)))
        return result


@pytest.mark.parametrize("momentum", [0.9, torch.tensor(0.9)], ids=["number", "tensor"])
@pytest.mark.parametrize("found_inf", [None, torch.zeros(())], ids=["plain", "found_inf"])
def test_they_take_little_memory(momentum: Any, found_inf: Tensor | None) -> None:
    """However large one is, and however many there are."""
    params = [torch.ones(3, 2**16, dtype=torch.bfloat16), *(torch.ones(1000) for _ in range(200))]
    averages = [torch.zeros(x.shape) for x in params]
    with Largest() as largest:
        functional.average(params, averages, [None] * len(params), momentum, True, found_inf)
    assert 1000 <= largest.numel <= 2**16
    assert math.isclose(float(averages[0][2, -1]), 0.1, rel_tol=1e-6)
    assert math.isclose(float(averages[-1][-1]), 0.1, rel_tol=1e-6)


def test_none() -> None:
    functional.average([], [], [], 0.9, True)
    functional.average([torch.ones(0)], [torch.ones(0)], [None], 0.9, True, torch.zeros(1))
