"""Clipping on every path against the oracle: values, norms, the factor of all gradients, and what GradScaler adds."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import direct
import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import (
    DTYPES,
    LAYOUTS,
    PATHS,
    REAL_DTYPES,
    Path,
    assert_same_bits,
    assert_unchanged,
    coo_gradient,
    dtype_name,
    gradients,
    randn,
    snapshot,
    to_numpy,
    to_oracle,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Processes
from reference import oracle
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter
from training import assert_like_oracles, assert_same_training, give_gradients, numpy_or_none, oracle_of_all

from torch_adadelta import AdadeltaKeras, schedules
from torch_adadelta.backends import kernels
from torch_adadelta.backends.batch import Backend, Batch
from torch_adadelta.backends.functional import global_factor, square_sums
from torch_adadelta.step import clipping
from torch_adadelta.step.clipping import Clipping, set_gradient_options

# Every option, and every pair of options that may be combined.
CLIPS: list[dict[str, Any]] = [
    {"clipvalue": 0.5},
    {"clipnorm": 0.7},
    {"global_clipnorm": 0.9},
    {"clipvalue": 0.5, "clipnorm": 0.7},
    {"clipvalue": 0.5, "global_clipnorm": 0.9},
]


def clip_id(clip: dict[str, Any]) -> str:
    return "+".join(clip) or "unclipped"


# ---- Against the oracle ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", CLIPS, ids=clip_id)
@pytest.mark.parametrize("T", [torch.float32, torch.float64, None], ids=["float32", "float64", "both"])
def test_clipped_steps_are_those_of_the_oracle(path: Path, clip: dict[str, Any], T: torch.dtype | None) -> None:
    """Every dtype of an opmath dtype T. The common norm is taken in the widest, the others in that of each parameter."""
    generator = torch.Generator().manual_seed(1)
    wide = (torch.float64, torch.complex128)
    dtypes = [d for d in (REAL_DTYPES if "clipvalue" in clip else DTYPES) if T is None or (d in wide) == (T is wide[0])]
    shapes = [(5, 3), (), (0, 2), (4099,), (2, 3, 4)]
    params = [Parameter(randn(shape, dtype, generator)) for shape, dtype in zip(shapes, itertools.cycle(dtypes))]
    params += [Parameter(randn((7,), dtype, generator)) for dtype in reversed(dtypes)]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = AdadeltaKeras(groups, 1.0, decay=0.3, **clip, **path.options)
    expected = oracle_of_all(params, decay=0.3, **clip)
    for step in range(3):
        grads: list[Tensor | None] = [*give_gradients(params, step)]
        if step == 1:
            grads[1] = params[1].grad = None
        optimizer.step()
        expected.step(numpy_or_none(grads))
        assert_like_oracles(optimizer, expected, f"at step {step}")


def test_a_gradient_is_rounded_to_its_T_before_its_norm_is_taken_in_the_widest(path: Path) -> None:
    """float64 gradients of float32 parameters, and a clipvalue that float32 does not hold, beside a float64 parameter."""
    params = [Parameter(torch.zeros(50)), Parameter(torch.zeros(3, dtype=torch.float64)), Parameter(torch.zeros(40))]
    params.append(Parameter(torch.zeros(6, 2)))
    clip = {"clipvalue": 0.1, "global_clipnorm": 0.3}
    optimizer = AdadeltaKeras(params, 1.0, **clip, **path.options)  # type: ignore[arg-type]
    expected = oracle_of_all(params, **clip)
    for step in range(20):
        grads = [gradients(p.shape, torch.float64, 1, seed=10 * step + i)[0] for i, p in enumerate(params[:3])]
        grads.append(coo_gradient((6, 2), torch.float64, 9, seed=step))
        optimizer.apply_gradients(zip(grads, params, strict=True))
        expected.step(to_oracle(grads))
        assert_like_oracles(optimizer, expected, f"at step {step}")


@pytest.mark.parametrize("clip", [{"clipnorm": 0.7}, {"clipvalue": 0.5, "global_clipnorm": 0.9}], ids=clip_id)
def test_layouts(path: Path, clip: dict[str, Any]) -> None:
    """A parameter for every pair of its layout and that of its gradient: squares are added as they lie in memory."""
    shape = (3, 17, 1, 90)
    generator = torch.Generator().manual_seed(3)
    pairs = list(itertools.product(LAYOUTS, repeat=2))
    params = [LAYOUTS[layout](randn(shape, torch.float32, generator)).requires_grad_() for layout, _ in pairs]
    optimizer = AdadeltaKeras(params, 1.0, **clip, **path.options)
    expected = oracle_of_all(params, **clip)
    for step in range(2):
        for index, (param, (_, layout)) in enumerate(zip(params, pairs, strict=True)):
            param.grad = LAYOUTS[layout](gradients(shape, torch.float32, 1, seed=100 * step + index)[0])
        optimizer.step()
        expected.step(numpy_or_none(param.grad for param in params))
        assert_like_oracles(optimizer, expected, f"at step {step}")


# One each of what clipping can meet; a norm that overflows float32 in its square among them.
SPECIAL = (
    [1.0, math.inf, -2.0],
    [1.0, -math.inf, -2.0],
    [1.0, math.nan, -2.0],
    [1e20, 1.0, -2.0],
    [0.0, -0.0, 0.0],
    [1e-30, -1e-38, 1e-45],
    [3e38, -3e38, 3e38],
)


@pytest.mark.parametrize("option", ["clipvalue", "clipnorm", "global_clipnorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_special_values(path: Path, dtype: torch.dtype, option: str) -> None:
    for values, c in itertools.product(SPECIAL, [0.0, 1e-30, 0.5, 1e30]):
        params = [Parameter(torch.zeros(3, dtype=dtype)), Parameter(torch.zeros(2, dtype=dtype))]
        options: Any = {option: c, **path.options}
        optimizer = AdadeltaKeras(params, 1.0, **options)
        expected = oracle_of_all(params, **{option: c})
        params[0].grad, params[1].grad = torch.tensor(values, dtype=dtype), torch.tensor([0.25, -4.0], dtype=dtype)
        for _ in range(2):
            optimizer.step()
            expected.step(numpy_or_none(param.grad for param in params))
        assert_like_oracles(optimizer, expected, f"{values} {c}")


def test_the_rules_of_the_edges() -> None:
    """What the page of semantics says in words, on the oracle's own functions."""
    g = np.array([1e20, 1.0], np.float32)
    assert (oracle.clip_by_norm(g, 0.5, oracle.square_sum(g)) == 0).all()  # the norm overflows
    g = np.array([np.inf, 1.0], np.float32)
    np.testing.assert_array_equal(oracle.clip_by_norm(g, 0.5, oracle.square_sum(g)), [np.nan, 0])
    g = np.zeros(2, np.float32)
    assert np.isnan(oracle.clip_by_norm(g, 0.0, oracle.square_sum(g))).all()
    assert np.isnan(oracle.global_factor(0.5, np.float64(np.inf), np.float32))
    # Below the threshold the gradient is still multiplied and divided.
    g = np.float32([0.1, 0.2, 0.3])
    np.testing.assert_array_equal(
        oracle.clip_by_norm(g, 7.3, oracle.square_sum(g)), g * np.float32(7.3) / np.float32(7.3)
    )


@settings(max_examples=50, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("path", PATHS[:2] + PATHS[-1:], ids=lambda path: path.name)
def test_drawn_options(path: Path, data: st.DataObject) -> None:
    """Options, dtypes and shapes in any combination, over several steps with some gradients missing."""
    clip = dict(data.draw(st.sampled_from([{}, *CLIPS]), "clip"))
    for key in clip:
        clip[key] = data.draw(st.floats(0, 100, width=32), key)
    dtypes = REAL_DTYPES if "clipvalue" in clip else DTYPES
    shapes = st.lists(st.integers(0, 150), max_size=2).map(tuple)
    layout = st.lists(st.tuples(shapes, st.sampled_from(dtypes)), min_size=1, max_size=5)
    kinds = data.draw(layout, "shapes and dtypes")
    options: dict[str, Any] = {
        "learning_rate": data.draw(st.floats(0, 10), "learning_rate"),
        "rho": data.draw(st.floats(0, 1), "rho"),
        "epsilon": data.draw(st.floats(1e-10, 1), "epsilon"),
        "decay": data.draw(st.sampled_from([0.0, 0.01, 3.0]), "decay"),
        "maximize": data.draw(st.booleans(), "maximize"),
        **clip,
    }
    seed = data.draw(st.integers(0, 2**16), "seed")
    generator = torch.Generator().manual_seed(seed)
    params = [Parameter(randn(shape, dtype, generator)) for shape, dtype in kinds]
    groups = [{"params": params[: len(params) // 2]}, {"params": params[len(params) // 2 :]}]
    optimizer = AdadeltaKeras([group for group in groups if group["params"]], **options, **path.options)
    expected = oracle_of_all(params, **options)
    for step in range(3):
        grads: list[Tensor | None] = [
            gradients(shape, dtype, 1, seed=seed + 10 * step + i)[0] if data.draw(st.integers(0, 4)) else None
            for i, (shape, dtype) in enumerate(kinds)
        ]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        expected.step(numpy_or_none(grads))
        assert_like_oracles(optimizer, expected, f"at step {step}")


# ---- Sums of squares -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 127, 128, 129, 255, 4095, 4096, 4097, 8192, 65537, 200_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=dtype_name)
def test_square_sums_over_the_fixed_tree(size: int, dtype: torch.dtype) -> None:
    (grad,) = gradients((size,), dtype, 1, seed=size)
    param = torch.empty_like(grad)
    expected = oracle.square_sum(to_numpy(grad))
    assert square_sums([param], [grad]).tolist() == [expected]
    if kernels.is_loaded:
        assert direct.square_sums([param], [grad]).tolist() == [expected]


@pytest.mark.parametrize("T", [torch.float32, torch.float64], ids=dtype_name)
def test_global_factor_by_numbers_and_by_tensors(T: torch.dtype) -> None:
    """The CPU computes with Python numbers; devices, and autograd, with tensors: the same bits."""
    totals = (0.0, 1e-90, 1e-40, 0.3, 1.0, 1e30, 1e77, math.inf, math.nan)
    for c, total in itertools.product((0.0, 1e-30, 0.7, 1.0, 3e38), totals):
        sums = torch.tensor([total], dtype=torch.float64)
        expected = float(oracle.global_factor(c, np.float64(total), np.float64 if T is torch.float64 else np.float32))
        by_number = global_factor(c, sums, T)
        by_tensor = global_factor(c, sums.clone().requires_grad_(), T)
        assert isinstance(by_number, float)
        assert isinstance(by_tensor, Tensor)
        np.testing.assert_array_equal([by_number, by_tensor.item()], [expected, expected], str((c, total)))


def test_the_common_norm_is_added_in_the_order_of_the_gradients(path: Path) -> None:
    """Whatever batches they are in, and in whatever order they are given: 1 is lost beside 2^26, but not with others."""
    params = [Parameter(torch.zeros(2, dtype=dtype)) for dtype in [torch.float64, *[torch.float32] * 9, torch.bfloat16]]
    groups = [{"params": params[8:]}, {"params": params[:8]}]
    pairs = [(torch.ones_like(param), param) for param in params]
    pairs[0][0][0] = 2.0**26
    orders = [list(range(11)), list(reversed(range(11))), [5, 3, 0, 1, 2, 4, 6, 7, 10, 9, 8]]
    for order in orders:
        expected = oracle_of_all([params[i] for i in order], global_clipnorm=0.7)
        optimizer = AdadeltaKeras(groups, 1.0, global_clipnorm=0.7, **path.options)
        for _ in range(2):
            optimizer.apply_gradients([pairs[i] for i in order])
            expected.step([to_numpy(pairs[i][0]) for i in order])
        for i, one in zip(order, expected.oracles, strict=True):
            assert_same_bits(optimizer.state[params[i]]["square_avg"], one.square_avg, f"{order} {i}")


@pytest.mark.parametrize(
    ("numbers", "runs"), [([], []), ([7], [(0, 1)]), ([0, 1, 3, 5, 6, 2], [(0, 2), (2, 3), (3, 5), (5, 6)])]
)
def test_runs_of_numbers(numbers: list[int], runs: list[tuple[int, int]]) -> None:
    assert clipping._runs(numbers) == runs


def batch_of(backend: Backend, dtypes: Sequence[torch.dtype], *last: float) -> Batch:
    """Parameters whose gradients have norm 5; the last one may have another gradient."""
    grads = [torch.tensor([3.0, 4.0], dtype=dtype) for dtype in dtypes]
    params, *state = ([torch.zeros_like(grad) for grad in grads] for _ in range(3))
    if last:
        grads[-1] = torch.tensor(last)
    return direct.batch_of(backend, params, grads, *state)


@pytest.mark.parametrize("backend", [Backend.SINGLE_TENSOR, *([Backend.FUSED] if kernels.is_loaded else [])])
def test_others_may_have_a_part_of_a_norm(backend: Backend) -> None:
    """The rest of a variable or of a gradient, or other gradients: the sums are four times those that are here."""

    def quadrupled(sums: list[Tensor]) -> list[Tensor]:
        return [4 * one for one in sums]

    def over_parts(params: list[list[Tensor]], sums: list[Tensor]) -> list[Tensor]:
        assert params == [[], owners]
        return quadrupled(sums)

    owners = [torch.zeros(4), torch.zeros(4)]
    for options, expected in (
        (Clipping(clipnorm=1.0), [25.0, 25.0]),
        (Clipping(clipnorm=1.0, over_variables=quadrupled), [100.0, 100.0]),
        (Clipping(clipnorm=1.0, over_parts=over_parts), [100.0, 100.0]),
        (Clipping(global_clipnorm=1.0), 0.1),
        (Clipping(global_clipnorm=1.0, over_parts=over_parts), 0.05),
        (Clipping(global_clipnorm=1.0, over_processes=lambda total: 4 * total), 0.05),
        (Clipping(global_clipnorm=1.0, loss_scale_factor=2.0), 0.2),
    ):
        batches = [batch_of(backend, [torch.float32] * 2) for _ in range(2)]
        batches[1].wholes = (owners,)
        assert set_gradient_options(batches, options) is None
        for own in (batch.gradient_options for batch in batches):
            assert own.clipnorm == options.clipnorm
            if own.square_sums is None:
                assert own.factor == float(np.float32(expected))
            else:
                assert own.square_sums.tolist() == expected
        in_double = options._replace(in_double=True)
        if options.clipnorm is None:
            assert set_gradient_options(batches, in_double) is None
            assert [batch.gradient_options.factor for batch in batches] == [expected] * 2


@pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")
@pytest.mark.parametrize("option", ["clipnorm", "global_clipnorm"])
def test_a_gradient_that_an_op_refuses_is_known_by_its_place_in_the_batch(option: str) -> None:
    """Also where norms of one T are taken at a time."""
    good = batch_of(Backend.FUSED, [torch.float32])
    bad = batch_of(Backend.FUSED, [torch.float64, torch.float32, torch.float64, torch.float32], 1.0, 2.0, 3.0)
    refused = set_gradient_options([good, bad], Clipping(**{option: 1.0}))
    assert refused is not None
    assert refused[0] is bad
    assert refused[1].param == 3


def test_threads_do_not_change_the_bits(path: Path) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            param = Parameter(torch.zeros(300_001))
            optimizer = AdadeltaKeras([param], 1.0, global_clipnorm=0.1, **path.options)
            (param.grad,) = gradients((300_001,), torch.float32, 1)
            optimizer.step()
            results.append(param.detach())
    finally:
        torch.set_num_threads(before)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


# ---- GradScaler, schedules, autograd ---------------------------------------------------------------------------------


@pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")
@pytest.mark.parametrize("clip", [{}, *CLIPS], ids=clip_id)
@pytest.mark.parametrize("dtypes", [[torch.float32, torch.bfloat16], [torch.float32, torch.float64]], ids=str)
def test_gradients_are_divided_by_the_scale_before_they_are_clipped(
    clip: dict[str, Any], dtypes: list[torch.dtype]
) -> None:
    """And nothing is written where one of them is not finite."""
    scaled, plain = (
        AdadeltaKeras([Parameter(torch.zeros(5, dtype=d)) for d in dtypes], 1.0, fused=True, **clip) for _ in range(2)
    )
    for step in range(4):
        for optimizer in (scaled, plain):
            params = optimizer.param_groups[0]["params"]
            for param, grad in zip(params, give_gradients(params, step), strict=True):
                param.grad = grad * 1024 if optimizer is scaled else grad
        scaled.grad_scale, scaled.found_inf = torch.tensor([1024.0]), torch.tensor([float(step == 1)])
        scaled.step()
        if step != 1:
            plain.step()
        assert_same_training(scaled, plain, step)


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
def test_what_only_the_fused_update_can_do_is_refused_elsewhere(name: str) -> None:
    optimizer = AdadeltaKeras([Parameter(torch.ones(3))], foreach=False)
    give_gradients(optimizer.param_groups[0]["params"], 0)
    setattr(optimizer, name, torch.tensor([1.0]))
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=f"{name} need the fused update; pass fused=True"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_clipping_keeps_a_scheduled_step_on_one_device(path: Path) -> None:
    """A schedule, decay and clipping together, and a group of two opmath dtypes."""
    schedule = schedules.ExponentialDecay(1.0, 2, 0.5)
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(3, dtype=torch.float64))]
    optimizer = AdadeltaKeras(params, schedule, decay=0.1, clipvalue=0.5, clipnorm=0.7, **path.options)
    expected = oracle_of_all(
        params, learning_rate=lambda t: np.float32(schedule(float(t))), decay=0.1, clipvalue=0.5, clipnorm=0.7
    )
    for step in range(4):
        grads = give_gradients(params, step)
        optimizer.step()
        expected.step(numpy_or_none(grads))
        assert_like_oracles(optimizer, expected, f"at step {step}")


@pytest.mark.parametrize("clip", [*CLIPS, {"transform": 1.0}], ids=clip_id)
def test_a_clipped_step_is_differentiable(clip: dict[str, float]) -> None:
    options: dict[str, Any] = dict(clip)
    if options.pop("transform", None):
        options["gradient_transformers"] = [lambda pairs: [(g.sin(), p) for g, p in pairs]]

    def stepped(start: Tensor, grad: Tensor) -> Tensor:
        param = start.clone()
        param.grad = grad
        optimizer = AdadeltaKeras([param], 1.0, epsilon=0.1, differentiable=True, decay=0.5, **options)
        optimizer.step()
        optimizer.step()
        return param

    start = torch.tensor([1.0, -2.0, 0.3], dtype=torch.float64, requires_grad=True)
    grad = torch.tensor([0.3, -2.0, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(stepped, (start, grad))
    plain = AdadeltaKeras([other := start.detach().clone()], 1.0, epsilon=0.1, decay=0.5, **options)
    other.grad = grad.detach()
    plain.step()
    plain.step()
    assert_same_bits(stepped(start, grad), other)


@pytest.mark.parametrize("option", ["clipnorm", "global_clipnorm"])
def test_the_derivative_at_a_gradient_of_zero_is_finite(option: str) -> None:
    param = torch.ones(3, dtype=torch.float64, requires_grad=True).clone()
    grad = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    param.grad = grad
    optimizer = AdadeltaKeras([param], 1.0, differentiable=True, **{option: 0.5})  # type: ignore[arg-type]
    optimizer.step()
    param.sum().backward()
    assert grad.grad is not None
    assert grad.grad.isfinite().all()


# ---- DTensors and processes ------------------------------------------------------------------------------------------


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.parametrize("clip", [{}, *CLIPS], ids=clip_id)
@pytest.mark.parametrize("differentiable", [False, True])
def test_distributed_tensors_beside_plain_ones(mesh: Any, clip: dict[str, Any], differentiable: bool) -> None:
    """They get the bits of plain tensors; but a parameter and its gradient are of one kind."""
    values = [torch.linspace(-1, 1, 4), torch.linspace(1, 2, 3), torch.ones(6, 4)]
    plain = [value.clone() for value in values]
    mixed = [distribute_tensor(values[0].clone(), mesh, [Shard(0)]), values[1].clone()]
    mixed.append(distribute_tensor(values[2].clone(), mesh, [Shard(0)]))
    ours, theirs = (AdadeltaKeras(params, 1.0, differentiable=differentiable, **clip) for params in (mixed, plain))
    for step in range(2):
        for param, grad in zip(mixed, give_gradients(plain, step), strict=True):
            param.grad = distribute_tensor(grad, mesh, [Shard(0)]) if hasattr(param, "to_local") else grad
        ours.step()
        theirs.step()
    for one, other in zip(plain, mixed, strict=True):
        assert_same_bits(whole(other), one)
        for key in ("square_avg", "acc_delta"):
            assert_same_bits(whole(ours.state[other][key]), theirs.state[one][key], key)
    assert ours.iterations == theirs.iterations == 2
    if not differentiable:
        before = whole(mixed[0]).clone()
        with pytest.raises(RuntimeError, match="parameter 0 of group 0 is a DTensor, but its gradient is a Tensor"):
            ours.apply_gradients([(param.grad, other) for param, other in zip(plain, mixed, strict=True)])
        assert_same_bits(whole(mixed[0]), before)
        assert ours.iterations == 2


# Whose square is a little more than half a unit of 2^16 in float32, and is lost in float64 only where it is rounded.
_LARGE, _SMALL = 2.0**8, 2.0**-4 * (1 + 2.0**-9)


def _norm_of_two_types() -> list[tuple[float, float]]:
    """One process has float32 parameters, the other float64: what came of them."""
    rank = dist.get_rank()
    dtype = torch.float32 if rank == 0 else torch.float64
    param = Parameter(torch.zeros(2, dtype=dtype))
    optimizer = AdadeltaKeras([param], 1.0, global_clipnorm=0.5, norm_group="world")
    param.grad = torch.tensor([_LARGE, _SMALL], dtype=dtype)
    optimizer.step()
    state = optimizer.state[param]
    return [(state["square_avg"][0].item(), state["square_avg"][1].item())]


def test_the_norm_over_processes_of_two_dtypes_is_taken_in_one(two: Processes) -> None:
    """In float64, where one process has such parameters: as one process with both has it."""
    params = [Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    optimizer = AdadeltaKeras(params, 1.0, global_clipnorm=0.5)
    for param in params:
        param.grad = torch.tensor([_LARGE, _SMALL], dtype=param.dtype)
    optimizer.step()
    expected = [tuple(optimizer.state[param]["square_avg"].tolist()) for param in params]
    assert [results[0] for results in two.run(_norm_of_two_types)] == expected
