"""Every path against the NumPy oracle, bit by bit: parameter and both accumulators."""

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    COMPLEX_DTYPES,
    DTYPES,
    LAYOUTS,
    PATHS,
    REAL_DTYPES,
    Path,
    assert_like_oracle,
    assert_same_bits,
    dtype_name,
    gradients,
    oracle_of,
    randn,
    to_numpy,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras
from torch_adadelta.backends import kernels, opmath

# 0-dim, empty, around the vector widths (4 to 32), the kernel's block (512) and its grain (32768), and some more.
SHAPES = (
    (), (0,), (1,), (3,), (4,), (5,), (7,), (8,), (9,), (15,), (16,), (17,), (31,), (32,), (33,), (63,), (65,),
    (511,), (512,), (513,), (32767,), (32768,), (32769,), (2, 0, 3), (2, 3), (1, 1), (2, 3, 4, 5),
)  # fmt: skip


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_shapes(path: Path, dtype: torch.dtype, maximize: bool) -> None:
    """All shapes as parameters of one optimizer, empty ones first, amid and last."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((0,), *SHAPES, (0,))
    params = [Parameter(randn(shape, dtype, generator)) for shape in shapes]
    optimizer = AdadeltaKeras(params, 1.0, maximize=maximize, **path.options)
    oracles = [oracle_of(p, learning_rate=1.0, maximize=maximize) for p in params]
    grads = [gradients(shape, dtype, steps=3, seed=i) for i, shape in enumerate(shapes)]
    for step in range(3):
        for param, oracle, grad in zip(params, oracles, grads, strict=True):
            param.grad = grad[step]
            oracle.step(to_numpy(grad[step]))
        optimizer.step()
    for param, oracle in zip(params, oracles, strict=True):
        assert_like_oracle(param, optimizer.state[param], oracle, str(tuple(param.shape)))


@pytest.mark.parametrize(
    ("learning_rate", "rho", "epsilon"),
    [(0.001, 0.95, 1e-7), (1.0, 0.9, 1e-6), (0.5, 0.0, 1e-3), (1.0, 1.0, 1.0), (0.0, 0.5, None), (2.0, 0.999, 0)],
)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_hyperparameters(
    path: Path, dtype: torch.dtype, learning_rate: float, rho: float, epsilon: float | None
) -> None:
    param = Parameter(torch.zeros(100, dtype=dtype))
    optimizer = AdadeltaKeras([param], learning_rate, rho, epsilon, **path.options)
    oracle = oracle_of(param, learning_rate=learning_rate, rho=rho, epsilon=epsilon)
    for grad in gradients((100,), dtype, steps=10):
        param.grad = grad
        oracle.step(to_numpy(grad))
        optimizer.step()
    assert_like_oracle(param, optimizer.state[param], oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_name)
def test_thousand_steps(path: Path, dtype: torch.dtype) -> None:
    param = Parameter(torch.zeros(67, dtype=dtype))
    optimizer = AdadeltaKeras([param], 1.0, **path.options)
    oracle = oracle_of(param, learning_rate=1.0)
    for step, grad in enumerate(gradients((67,), dtype, steps=1000), start=1):
        param.grad = grad
        oracle.step(to_numpy(grad))
        optimizer.step()
        if step in (1, 10, 100, 1000):
            assert_like_oracle(param, optimizer.state[param], oracle, f"after {step} steps")
    assert optimizer.iterations == 1000


def test_groups_keep_their_own_hyperparameters(path: Path) -> None:
    settings_of_groups = (
        {"lr": 1.0, "rho": 0.9, "epsilon": 1e-6},
        {"learning_rate": 0.1, "maximize": True},
        {"rho": 0.5},
    )
    params = [[Parameter(torch.ones(n, dtype=dtype)) for n in (3, 40) for dtype in DTYPES[:4]] for _ in range(3)]
    optimizer = AdadeltaKeras(
        [{"params": p, **options} for p, options in zip(params, settings_of_groups, strict=True)], **path.options
    )
    oracles = {}
    for group, options in zip(params, settings_of_groups, strict=True):
        options = {("learning_rate" if key == "lr" else key): value for key, value in options.items()}
        oracles |= {p: oracle_of(p, **options) for p in group}
    for step in range(5):
        for i, (param, oracle) in enumerate(oracles.items()):
            param.grad = gradients(param.shape, param.dtype, steps=5, seed=i)[step]
            oracle.step(to_numpy(param.grad))
        optimizer.step()
    for param, oracle in oracles.items():
        assert_like_oracle(param, optimizer.state[param], oracle)
    assert [group["iterations"] for group in optimizer.param_groups] == [5, 5, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=dtype_name)
@pytest.mark.parametrize("grad_layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(path: Path, layout: str, grad_layout: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    shape = (5, 3, 1, 37)
    param = LAYOUTS[layout](randn(shape, dtype, generator))
    strides = param.stride()
    param = Parameter(param)
    optimizer = AdadeltaKeras([param], 1.0, **path.options)
    oracle = oracle_of(param, learning_rate=1.0)
    for grad in gradients(shape, dtype, steps=3):
        grad = grad[:, :1, :, :1].expand(shape) if grad_layout == "expanded" else LAYOUTS[grad_layout](grad)
        param.grad = grad
        oracle.step(to_numpy(grad))
        optimizer.step()
    assert param.stride() == strides
    assert_like_oracle(param, optimizer.state[param], oracle)


def test_state_of_another_layout(path: Path) -> None:
    """As a checkpoint brings it that was saved before the model became channels_last."""
    param = Parameter(torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
    optimizer = AdadeltaKeras([param], 1.0, **path.options)
    optimizer.state[param] = {
        "square_avg": torch.zeros(2, 3, 4, 5),
        "acc_delta": LAYOUTS["transposed"](torch.zeros(2, 3, 4, 5)),
    }
    oracle = oracle_of(param, learning_rate=1.0)
    for grad in gradients(param.shape, torch.float32, steps=3):
        param.grad = grad
        oracle.step(to_numpy(grad))
        optimizer.step()
    assert_like_oracle(param, optimizer.state[param], oracle)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [*itertools.permutations(REAL_DTYPES, 2), *itertools.permutations(COMPLEX_DTYPES, 2)],
    ids=dtype_name,
)
def test_gradient_of_another_dtype(path: Path, dtype: torch.dtype, grad_dtype: torch.dtype, contiguous: bool) -> None:
    shape = (3, 700)
    param = randn(shape, dtype, torch.Generator().manual_seed(3))
    square_avg, acc_delta = torch.zeros_like(param), torch.zeros_like(param)
    oracle = oracle_of(param, learning_rate=1.0)
    for grad in gradients(shape, grad_dtype, steps=3):
        grad = grad if contiguous else LAYOUTS["transposed"](grad[None, None])[0, 0]
        path.update([param], [grad], [square_avg], [acc_delta], 1.0, float(np.float32(0.95)), 1e-7, False)
        oracle.step(to_numpy(grad))
    assert_like_oracle(param, {"square_avg": square_avg, "acc_delta": acc_delta}, oracle)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=dtype_name)
def test_lazily_conjugated_gradient(path: Path, dtype: torch.dtype) -> None:
    param = Parameter(randn((37,), dtype, torch.Generator().manual_seed(4)))
    optimizer = AdadeltaKeras([param], 1.0, **path.options)
    oracle = oracle_of(param, learning_rate=1.0)
    for grad in gradients((37,), dtype, steps=3):
        param.grad = grad.conj()
        assert param.grad.is_conj()
        oracle.step(to_numpy(grad).conj())
        optimizer.step()
    assert_like_oracle(param, optimizer.state[param], oracle)


@pytest.mark.parametrize("numel", [37, 100_000])
def test_lazy_gradients(path: Path, numel: int) -> None:
    """Of negated and zero tensors whose elements are not in memory, PyTorch hands over copies that nobody else keeps."""
    param = Parameter(torch.ones(numel))
    optimizer = AdadeltaKeras([param], 1.0, **path.options)
    oracle = oracle_of(param, learning_rate=1.0)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        negated = torch.randn(numel, dtype=torch.complex64, generator=generator).conj().imag
        assert negated.is_neg()
        zero = torch._efficientzerotensor(numel)
        assert zero._is_zerotensor()
        for grad in (negated, zero):
            param.grad = grad
            optimizer.step()
            oracle.step(grad.resolve_neg().clone(memory_format=torch.contiguous_format).numpy())
            assert_like_oracle(param, optimizer.state[param], oracle)


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_special_values(path: Path, dtype: torch.dtype) -> None:
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e20, -1e20, 0.0, -0.0, 1e-30, 1e-45, 1.0] * 4).to(dtype)
    param = Parameter(torch.tensor([-0.0, 1.0, -1.0, 0.0] * 10).to(dtype))
    optimizer = AdadeltaKeras([param], 1.0, **path.options)
    oracle = oracle_of(param, learning_rate=1.0)
    for grad in (special, torch.ones_like(special), special.flip(0)):
        param.grad = grad
        oracle.step(to_numpy(grad))
        optimizer.step()
        assert_like_oracle(param, optimizer.state[param], oracle)


def test_special_values_mean_what_keras_makes_of_them(path: Path) -> None:
    """Spelled out, so that the oracle does not vouch for itself."""
    inf, nan = torch.inf, torch.nan
    param = Parameter(torch.tensor([1.0, 1.0, 1.0, 1.0, -0.0, -0.0]))
    param.grad = torch.tensor([inf, -inf, nan, 1e20, 0.0, -0.0])
    optimizer = AdadeltaKeras([param], 1.0, **path.options)
    optimizer.step()
    state = optimizer.state[param]
    assert_same_bits(state["square_avg"], torch.tensor([inf, inf, nan, inf, 0.0, 0.0]))
    assert_same_bits(state["acc_delta"], torch.tensor([nan, nan, nan, 0.0, 0.0, 0.0]))
    assert_same_bits(param, torch.tensor([nan, nan, nan, 1.0, -0.0, 0.0]))  # -0 - (-0 * lr) is +0, in TensorFlow too


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
def test_every_16_bit_number(path: Path, dtype: torch.dtype) -> None:
    """Each of the 65,536 as gradient, and each as parameter and state, at every place in a vector register."""
    numbers = torch.arange(65536).to(torch.uint16).view(dtype)
    for shift in (0, 1):
        everything = numbers.roll(shift)
        for grad, state in ((everything, everything.abs().nan_to_num(1.0)), (torch.ones_like(numbers), everything)):
            lists = [[everything.clone()], [grad], [state.clone()], [state.clone()]]
            oracle = oracle_of(everything, learning_rate=1.0)
            oracle.square_avg = oracle.acc_delta = to_numpy(state)
            path.update(*lists, 1.0, float(np.float32(0.95)), 1e-7, False)
            oracle.step(to_numpy(grad))
            assert_like_oracle(lists[0][0], {"square_avg": lists[2][0], "acc_delta": lists[3][0]}, oracle)


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_same_bits_for_any_number_of_threads(path: Path, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    sizes = (100_003, 5, 70_000, 32_768, 1)
    results: list[list[Tensor]] = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            generator = torch.Generator().manual_seed(6)
            params = [Parameter(randn((n,), dtype, generator)) for n in sizes]
            optimizer = AdadeltaKeras(params, 1.0, **path.options)
            for step in range(2):
                for i, param in enumerate(params):
                    param.grad = gradients(param.shape, dtype, steps=2, seed=i)[step]
                optimizer.step()
            results.append([t for p in params for t in (p, *optimizer.state[p].values())])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert_same_bits(same, one)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_listed_twice_is_updated_twice(path: Path) -> None:
    param = Parameter(torch.ones(100_000))
    grad = gradients((100_000,), torch.float32, steps=1)[0]
    optimizer = AdadeltaKeras([param, Parameter(torch.ones(3)), param], 1.0, **path.options)
    param.grad = grad
    optimizer.step()
    oracle = oracle_of(torch.ones(100_000), learning_rate=1.0)
    oracle.step(grad.numpy())
    oracle.step(grad.numpy())
    assert_like_oracle(param, optimizer.state[param], oracle)
    assert optimizer.iterations == 1


@st.composite
def _problems(draw: st.DrawFn) -> tuple[list[tuple[tuple[int, ...], torch.dtype, str, str]], dict[str, float]]:
    tensors = draw(
        st.lists(
            st.tuples(
                st.tuples(*[st.integers(0, 6)] * 3, st.integers(0, 70)),
                st.sampled_from(DTYPES),
                st.sampled_from(sorted(LAYOUTS)),
                st.sampled_from(sorted(LAYOUTS)),
            ),
            min_size=1,
            max_size=5,
        )
    )
    hyperparameters = {
        "learning_rate": draw(st.floats(0, 10)),
        "rho": draw(st.floats(0, 1)),
        "epsilon": draw(st.floats(1e-12, 10)),
        "maximize": draw(st.booleans()),
    }
    return tensors, hyperparameters


@example(([((0, 0, 0, 2), torch.float32, "channels_last", "channels_last")], {}), 0)  # a stride of 0 in no memory
@settings(max_examples=60, deadline=None)
@given(_problems(), st.integers(0, 2**32))
def test_drawn_problems(
    problem: tuple[list[tuple[tuple[int, ...], torch.dtype, str, str]], dict[str, float]], seed: int
) -> None:
    tensors, hyperparameters = problem
    generator = torch.Generator().manual_seed(seed)
    start = [LAYOUTS[layout](randn(shape, dtype, generator)) for shape, dtype, layout, _ in tensors]
    steps = [
        [LAYOUTS[layout](g) for g in gradients(shape, dtype, steps=2, seed=seed + i)]
        for i, (shape, dtype, _, layout) in enumerate(tensors)
    ]
    oracles = [oracle_of(p, **hyperparameters) for p in start]
    for oracle, grads in zip(oracles, steps, strict=True):
        for grad in grads:
            oracle.step(to_numpy(grad))
    for path in (p for p in PATHS[:3] if p.capability is None or kernels.is_loaded):
        params = [Parameter(p.clone(memory_format=torch.preserve_format)) for p in start]
        optimizer = AdadeltaKeras(params, **hyperparameters, **path.options)
        for step in range(2):
            for param, grads in zip(params, steps, strict=True):
                param.grad = grads[step]
            optimizer.step()
        for param, oracle, (shape, dtype, *layouts) in zip(params, oracles, tensors, strict=True):
            assert_like_oracle(param, optimizer.state[param], oracle, f"{path.name} {shape} {dtype} {layouts}")


# ---- The exact root -------------------------------------------------------------------------------------------------


def _hard_numbers(dtype: torch.dtype) -> Tensor:
    """Random numbers of every magnitude; squares, and their neighbours, whose roots are close calls."""
    generator = np.random.default_rng(0)
    kind = np.float32 if dtype is torch.float32 else np.float64
    info = np.finfo(kind)
    exponents = generator.uniform(info.minexp - info.nmant, info.maxexp, 200_000)
    spread = np.exp2(exponents.astype(np.float64)).astype(kind)
    squares = np.square(generator.uniform(0.5, 2, 200_000).astype(kind))
    near = [squares, np.nextafter(squares, kind(0)), np.nextafter(squares, kind(9))]
    one = np.array(
        [0, -0.0, 1, np.nextafter(kind(1), kind(0)), info.smallest_subnormal, info.tiny, info.max, np.inf, np.nan], kind
    )
    return torch.from_numpy(np.concatenate([spread, *near, one]))


def _roots(x: Tensor) -> np.ndarray[Any, Any]:
    """By the C library, whose float64 root is exact, and rounds to the exact float32 root."""
    roots = [math.sqrt(value) if value >= 0 else math.nan for value in x.tolist()]
    return np.array(roots, np.float32 if x.dtype is torch.float32 else np.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("has_numpy", [True, False], ids=["NumPy", "without NumPy"])
def test_exact_sqrt_is_that_of_ieee_754(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, has_numpy: bool) -> None:
    x = _hard_numbers(dtype)
    expected = _roots(x)
    if not has_numpy:
        monkeypatch.setattr(opmath, "np", None)
    assert_same_bits(opmath.exact_sqrt(x), expected)
    assert_same_bits(opmath.exact_sqrt_(x.clone()), expected)
    assert_same_bits(opmath.exact_sqrt(x[::2]), expected[::2])
    assert_same_bits(opmath.exact_sqrt(x[0]), expected[0])
    assert opmath.exact_sqrt(-torch.ones(3, dtype=dtype)).isnan().all()


def test_the_root_by_numpy_is_a_root_within_half_an_ulp() -> None:
    """By exact fractions, for the C library might use what NumPy uses."""
    x = _hard_numbers(torch.float64)
    x = x[x.isfinite() & (x > 0)][::400]
    for value, root in zip(x.tolist(), opmath.exact_sqrt(x).tolist(), strict=True):
        below, above = ((Fraction(root) + Fraction(math.nextafter(root, to))) / 2 for to in (0.0, math.inf))
        assert below**2 <= Fraction(value) <= above**2


@pytest.mark.parametrize("kind", ["vmap", "jvp", "FakeTensor"])
def test_exact_sqrt_of_what_numpy_cannot_see(kind: str) -> None:
    x = torch.tensor([2.0, 3.0, 5.0])
    if kind == "vmap":
        root = torch.func.vmap(opmath.exact_sqrt)(x)
    elif kind == "jvp":
        root, _ = torch.func.jvp(opmath.exact_sqrt, (x,), (x,))
    else:
        with FakeTensorMode() as mode:
            assert opmath.exact_sqrt(mode.from_tensor(x)).shape == (3,)
        return
    assert_same_bits(root, _roots(x))


def test_exact_sqrt_is_differentiable_twice() -> None:
    x = torch.tensor([0.3, 1.0, 7.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(opmath.exact_sqrt, x)
    assert torch.autograd.gradgradcheck(opmath.exact_sqrt, x)
