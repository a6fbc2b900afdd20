"""Clipping on CUDA against the CPU, bit by bit: the sums of squares by themselves, and whole steps."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import direct
import pytest
import torch
from cases import COMPLEX_DTYPES, DTYPES, LAYOUTS, REAL_DTYPES, assert_same_bits, dtype_name, gradients, randn
from torch import Tensor

from torch_adadelta.backends.functional import square_sums

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Every option, and every pair of options that may be combined.
CLIPS: tuple[dict[str, float], ...] = (
    {"clipvalue": 0.5},
    {"clipnorm": 0.7},
    {"global_clipnorm": 0.9},
    {"clipvalue": 0.5, "clipnorm": 0.7},
    {"clipvalue": 0.5, "global_clipnorm": 0.9},
)

CHUNK, UNIT = 4096, 65536  # elements that a warp and a block sum
SIZES = (0, 1, 3, 4, 5, 127, 128, 129, CHUNK - 1, CHUNK, CHUNK + 1, UNIT - 1, UNIT, UNIT + 1, 17 * UNIT + 130, 0)


def clip_id(clip: Any) -> str:
    return "+".join(clip) if isinstance(clip, dict) else dtype_name(clip)


def assert_same_sums(grads: list[Tensor], placed: Callable[..., Tensor], **options: Any) -> None:
    """`grads` stand for their parameters, too: only the layout and dtype of those count."""
    expected = square_sums(grads, grads, **options)
    there = [placed(grad) for grad in grads]
    assert_same_bits(direct.square_sums(there, there, **options).cpu(), expected)
    assert_same_bits(square_sums(there, there, **options).cpu(), expected)


@pytest.mark.parametrize("in_double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_square_sums(dtype: torch.dtype, in_double: bool, placed: Callable[..., Tensor]) -> None:
    grads = [gradients((n,), dtype, 1, seed=n)[0] for n in SIZES]
    assert_same_sums(grads, placed, in_double=in_double)
    if not dtype.is_complex:
        assert_same_sums(grads, placed, in_double=in_double, clipvalue=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=dtype_name)
def test_short_square_sums(dtype: torch.dtype, placed: Callable[..., Tensor]) -> None:
    """Small enough for compute-sanitizer; see scripts/gpu_check.sh."""
    grads = [gradients((n,), dtype, 1, seed=n)[0] for n in (0, 1, 130, CHUNK + 1, 3 * UNIT + 7)]
    grads.append(LAYOUTS["sliced"](gradients((3, 17, 1, 9), dtype, 1)[0]))
    assert_same_sums(grads, placed)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 599, 600, 601, 1201])
@pytest.mark.parametrize("large", [False, True])
def test_square_sums_around_tables(count: int, large: bool, placed: Callable[..., Tensor]) -> None:
    """Gradients of one unit only, or with some of several units among them."""
    sizes = [UNIT + 1 + i if large and i % 41 == 0 else 3 * i % 200 for i in range(count)]
    assert_same_sums([gradients((n,), torch.float32, 1, seed=i)[0] for i, n in enumerate(sizes)], placed)


@pytest.mark.parametrize("count", [64, 65, 600, 601, 700])
def test_many_gradients_of_several_units(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    flat = torch.randn(count * (UNIT + 3), generator=generator)
    here, there = (list(x.split(UNIT + 3)) for x in (flat, flat.cuda()))
    assert_same_bits(direct.square_sums(there, there).cpu(), direct.square_sums(here, here))


@pytest.mark.parametrize("clip", CLIPS, ids=clip_id)
@pytest.mark.parametrize(("layout", "grad_layout"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_layouts(clip: dict[str, float], layout: str, grad_layout: str, twins: Callable[..., Any]) -> None:
    shape = (3, 17, 1, 90)
    pair = twins([LAYOUTS[layout](randn(shape, torch.float32, torch.Generator().manual_seed(3)))], **clip)
    for step in range(2):
        pair.step([LAYOUTS[grad_layout](gradients(shape, torch.float32, 1, seed=step)[0])])
        pair.assert_same(f"at step {step}")


@pytest.mark.parametrize(
    ("clip", "dtype"),
    # clipvalue is for real numbers.
    [(clip, dtype) for clip in CLIPS for dtype in (REAL_DTYPES if "clipvalue" in clip else DTYPES)],
    ids=clip_id,
)
@pytest.mark.parametrize("path", ["fused", "foreach", "single_tensor"])
def test_steps(clip: dict[str, float], dtype: torch.dtype, path: str, twins: Callable[..., Any]) -> None:
    options = {"fused": {"fused": True}, "foreach": {"foreach": True}, "single_tensor": {"foreach": False}}[path]
    generator = torch.Generator().manual_seed(1)
    shapes = [(0, 2), (5, 3), (), (4099,), (2, 3, 4), (UNIT + 5,), (0,)]
    pair = twins([randn(shape, dtype, generator) for shape in shapes], groups=2, cuda=options, **clip)
    for step in range(3):
        grads: list[Tensor | None] = [gradients(s, dtype, 1, seed=10 * step + i)[0] for i, s in enumerate(shapes)]
        if step == 1:
            grads[1] = None
        pair.step(grads)
        pair.assert_same(f"at step {step}")


@pytest.mark.parametrize("clip", CLIPS, ids=clip_id)
@pytest.mark.parametrize("path", ["fused", "foreach", "single_tensor"])
def test_mixed_dtypes(clip: dict[str, float], path: str, twins: Callable[..., Any]) -> None:
    """global_clipnorm works in the widest T, the others in the T of each parameter."""
    options = {"fused": {"fused": True}, "foreach": {"foreach": True}, "single_tensor": {"foreach": False}}[path]
    generator = torch.Generator().manual_seed(2)
    dtypes = REAL_DTYPES if "clipvalue" in clip else (*REAL_DTYPES, *COMPLEX_DTYPES)
    params = [randn((7, 5), dtype, generator) for dtype in (*dtypes, *reversed(dtypes))]
    pair = twins(params, cuda=options, decay=0.3, **clip)
    for step in range(3):
        pair.step([gradients((7, 5), p.dtype, 1, seed=10 * step + i)[0] for i, p in enumerate(params)])
        pair.assert_same(f"at step {step}")


@pytest.mark.parametrize("clip", CLIPS, ids=clip_id)
def test_float64_gradients_of_float32_parameters(clip: dict[str, float], twins: Callable[..., Any]) -> None:
    params = [torch.zeros(50), torch.zeros(3, dtype=torch.float64), torch.zeros(40, dtype=torch.bfloat16)]
    pair = twins(params, **clip)
    for step in range(4):
        grads = [gradients(p.shape, torch.float64, 1, seed=10 * step + i)[0] for i, p in enumerate(params)]
        for optimizer, own, device in ((pair.cpu, pair.params, "cpu"), (pair.cuda, pair.cuda_params, "cuda")):
            optimizer.apply_gradients([(grad.to(device), p) for grad, p in zip(grads, own, strict=True)])
        pair.assert_same(f"at step {step}")


@pytest.mark.parametrize("clip", CLIPS, ids=clip_id)
@pytest.mark.parametrize("value", [math.inf, math.nan, 1e20, 0.0, 1e-30], ids=str)
def test_special_values(clip: dict[str, float], value: float, twins: Callable[..., Any]) -> None:
    pair = twins([torch.zeros(300), torch.zeros(5)], **clip)
    for step in range(2):
        grads = [gradients((n,), torch.float32, 1, seed=step)[0] for n in (300, 5)]
        grads[0][7] = value
        grads[1].fill_(value)
        pair.step(grads)
        pair.assert_same(f"at step {step}")


@pytest.mark.parametrize("clip", CLIPS, ids=clip_id)
@pytest.mark.parametrize("count", [65, 641])
def test_many_parameters(clip: dict[str, float], count: int, twins: Callable[..., Any]) -> None:
    sizes = [UNIT + i if i % 101 == 0 else i % 37 for i in range(count)]
    pair = twins([torch.zeros(n) for n in sizes], groups=3, maximize=True, **clip)
    for step in range(2):
        pair.step([gradients((n,), torch.float32, 1, seed=1000 * step + i)[0] for i, n in enumerate(sizes)])
        pair.assert_same(f"at step {step}")
