"""Every path against the NumPy oracle, bit by bit: parameter and both accumulators."""

import functools
import itertools
from collections.abc import Callable
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
    coo,
    coo_gradient,
    dtype_name,
    gradients,
    optimizer_oracle_of,
    oracle_of,
    randn,
    to_numpy,
    to_oracle,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference.oracle import Oracle
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from torch_adadelta import AdadeltaKeras
from torch_adadelta.backends import functional, kernels, opmath
from torch_adadelta.backends.batch import Backend, Batch, GradientOptions, Segment

# 0-dim, empty, around the vector widths (4 to 32), the kernel's block (512) and its grain (32768), and some more.
SHAPES = (
    (), (0,), (1,), (3,), (4,), (5,), (7,), (8,), (9,), (15,), (16,), (17,), (31,), (32,), (33,), (63,), (65,),
    (511,), (512,), (513,), (32767,), (32768,), (32769,), (2, 0, 3), (2, 3), (1, 1), (2, 3, 4, 5),
)  # fmt: skip


@functools.cache
def _shapes_by_oracle(dtype: torch.dtype) -> list[tuple[Tensor, list[Tensor], Oracle]]:
    """Parameters of all shapes, empty ones first, amid and last, their gradients, and what becomes of them."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for i, shape in enumerate(((0,), *SHAPES, (0,))):
        param, grads = randn(shape, dtype, generator), gradients(shape, dtype, steps=3, seed=i)
        oracle = oracle_of(param, learning_rate=1.0)
        for grad in grads:
            oracle.step(to_numpy(grad))
        result.append((param, grads, oracle))
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_shapes(path: Path, dtype: torch.dtype) -> None:
    """All as parameters of one optimizer."""
    expected = _shapes_by_oracle(dtype)
    params = [Parameter(param.clone()) for param, _, _ in expected]
    optimizer = AdadeltaKeras(params, 1.0, **path.options)
    for step in range(3):
        for param, (_, grads, _) in zip(params, expected, strict=True):
            param.grad = grads[step]
        optimizer.step()
    for param, (_, _, oracle) in zip(params, expected, strict=True):
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
    options: Any = {
        0.9: {"maximize": True, "weight_decay": 0.25},
        0.0: {"maximize": True, "weight_decay": 0.25, "decoupled_weight_decay": False},
    }.get(rho, {})
    optimizer = AdadeltaKeras([param], learning_rate, rho, epsilon, **options, **path.options)
    oracle = oracle_of(param, learning_rate=learning_rate, rho=rho, epsilon=epsilon, **options)
    for grad in gradients((100,), dtype, steps=10):
        param.grad = grad
        oracle.step(to_numpy(grad))
        optimizer.step()
    assert_like_oracle(param, optimizer.state[param], oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
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
def test_layouts(path: Path, dtype: torch.dtype) -> None:
    """Every layout of a parameter with every layout of a gradient."""
    shape = (5, 3, 1, 37)
    lay_outs: list[Callable[[Tensor], Tensor]] = [*LAYOUTS.values(), lambda grad: grad[:, :1, :, :1].expand(shape)]
    generator = torch.Generator().manual_seed(2)
    start = [layout(randn(shape, dtype, generator)) for layout in LAYOUTS.values() for _ in lay_outs]
    params = list(map(Parameter, start))
    optimizer = AdadeltaKeras(params, 1.0, **path.options)
    oracles = [oracle_of(param, learning_rate=1.0) for param in params]
    for grad in gradients(shape, dtype, steps=3):
        for i, (param, oracle) in enumerate(zip(params, oracles, strict=True)):
            param.grad = lay_outs[i % len(lay_outs)](grad)
            oracle.step(to_numpy(param.grad))
        optimizer.step()
    for i, (param, oracle) in enumerate(zip(params, oracles, strict=True)):
        assert param.stride() == start[i].stride()
        assert_like_oracle(param, optimizer.state[param], oracle, str(i))


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


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_gradients_of_another_dtype(path: Path, dtype: torch.dtype) -> None:
    shape = (3, 700)
    alike = COMPLEX_DTYPES if dtype.is_complex else REAL_DTYPES
    kinds = [(grad_dtype, is_transposed) for grad_dtype in alike for is_transposed in (False, True)]
    params = [randn(shape, dtype, torch.Generator().manual_seed(i)) for i in range(len(kinds))]
    state = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    oracles = [oracle_of(p, learning_rate=1.0) for p in params]
    for step in range(3):
        grads = [gradients(shape, grad_dtype, 1, seed=step)[0] for grad_dtype, _ in kinds]
        grads = [g.t().contiguous().t() if kind[1] else g for g, kind in zip(grads, kinds, strict=True)]
        path.update(params, grads, *state, 1.0, float(np.float32(0.95)), 1e-7, False)
        for oracle, grad in zip(oracles, grads, strict=True):
            oracle.step(to_numpy(grad))
    for param, square_avg, acc_delta, oracle, kind in zip(params, *state, oracles, kinds, strict=True):
        assert_like_oracle(param, {"square_avg": square_avg, "acc_delta": acc_delta}, oracle, str(kind))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_same_bits_for_any_number_of_threads(path: Path, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    sizes = (100_003, 5, 70_000, 32_768, 1)
    results: list[list[Tensor]] = []
    try:
        for threads in (1, 3):
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


# ---- What is written, and when --------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Which of these tensors each operation writes to, and whether the batch said before that it has begun."""

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self.batch = batch
        self.names = {
            x.untyped_storage().data_ptr(): name
            for name, tensors in zip(("param", "grad", "square_avg", "acc_delta"), batch.lists, strict=False)
            for x in tensors
            if not x.is_sparse
        }
        self.events: list[tuple[set[str], bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        written: set[str] = set()
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                tensors = value if isinstance(value, list | tuple) else [value]
                found = [self.names.get(x.untyped_storage().data_ptr()) for x in tensors]
                written |= {name for name in found if name is not None}
        self.events.append((written, self.batch.has_begun))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=dtype_name)
@pytest.mark.parametrize(
    "options", [{}, {"clipnorm": 0.5, "square_sums": torch.ones(3).double()}, {"factor": 0.5}], ids=str
)
@pytest.mark.parametrize("update", [functional.single_tensor, functional.multi_tensor, functional.sparse_single_tensor])
def test_a_batch_has_begun_with_its_first_write(
    update: Callable[[Batch], None], options: dict[str, Any], dtype: torch.dtype
) -> None:
    """What raises before leaves everything as it was; what raises later, a partial step. Gradients are never written to."""
    is_sparse = update is functional.sparse_single_tensor
    made = [[torch.ones(4, 3, dtype=dtype) for _ in range(3)] for _ in range(4)]
    if is_sparse:
        made[1] = [coo([0, 2, 0], g[:3], (4, 3)) for g in made[1]]
    kept = [g.clone() for g in made[1]]
    segments = [Segment(1, 1.0, 0.9, 1e-3, True), Segment(0, 1.0, 0.9, 1e-3, True), Segment(2, 0.5, 0.8, 1e-3, False)]
    batch = Batch(Backend.SINGLE_TENSOR, is_sparse, False, *made, segments, GradientOptions(**options))
    with torch.no_grad(), Watch(batch) as seen:
        update(batch)
    first = next(i for i, (written, _) in enumerate(seen.events) if written)
    assert all(has_begun for _, has_begun in seen.events[first:])
    assert not any(has_begun for _, has_begun in seen.events[:first])
    assert set().union(*(written for written, _ in seen.events)) == {"param", "square_avg", "acc_delta"}
    assert all(torch.equal(*(x.to_dense() for x in pair)) for pair in zip(made[1], kept, strict=True))


def test_nothing_to_update() -> None:
    empty = Batch(Backend.MULTI_TENSOR, False, False, [], [], [], [], [Segment(0, 1.0, 0.9, 1e-3, False)])
    for update in (functional.single_tensor, functional.multi_tensor, functional.sparse_single_tensor):
        update(empty)
    assert not empty.has_begun


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("update", [functional.single_tensor, functional.multi_tensor])
def test_updates_on_a_device_without_values(update: Callable[[Batch], None], dtype: torch.dtype) -> None:
    """Nothing is read on the host."""
    made = [[torch.ones(4, 3, dtype=dtype, device="meta") for _ in range(2)] for _ in range(4)]
    sums = torch.ones(2, dtype=torch.float64, device="meta")
    for options in ({}, {"clipvalue": 0.5, "clipnorm": 0.5, "square_sums": sums}, {"factor": sums[0]}):
        segments = [Segment(2, torch.ones(1, device="meta"), 0.9, 1e-3, True)]
        batch = Batch(Backend.SINGLE_TENSOR, False, False, *made, segments, GradientOptions(**options))
        with torch.no_grad():
            update(batch)
        assert batch.has_begun
    assert functional.square_sums(made[0], made[1], 0.5).is_meta
    factor = functional.global_factor(0.5, sums, torch.float32)
    assert isinstance(factor, Tensor)
    assert factor.is_meta


# ---- Sums of gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [None, 0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_gradients_are_added_to_their_sum(dtype: torch.dtype, dims: int | None) -> None:
    """Dense and sparse ones, divided by the factor of the loss; those of complex numbers lazily conjugated."""
    param = torch.zeros(4, 3, dtype=dtype)
    for factor in (None, 3.0):
        expected = optimizer_oracle_of([param], loss_scale_factor=factor, gradient_accumulation_steps=9)
        total = torch.zeros(4, 3, dtype=opmath.wide_dtype(param))
        for step, count in enumerate((7, 0, 5)):
            if dims is None:
                (values,) = gradients((4, 3), dtype, 1, seed=step)
                grad, resolved = values.conj(), values.conj_physical()
            else:
                made = coo_gradient((4, 3), dtype, count, dims, seed=step)
                both = (made._values().conj(), made._values().conj_physical())
                grad, resolved = (coo(made._indices(), values, (4, 3)) for values in both)
            expected.step(to_oracle([resolved]))
            before = total.clone()
            own = functional.unscaled_in(total, grad, factor)
            result = functional.added(total, own)
            assert_same_bits(total, before)
            functional.add_to_sum(total, own)
            assert expected.accumulators is not None
            for actual in (result, total):
                assert_same_bits(actual, expected.accumulators[0], f"at step {step}")


# ---- Tensors that overlap themselves --------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=4))
def test_a_tensor_that_overlaps_itself_is_known(dims: list[tuple[int, int]]) -> None:
    sizes, strides = [size for size, _ in dims], [stride for _, stride in dims]
    tensor = torch.zeros(100).as_strided(sizes, strides)
    offsets = [
        sum(i * s for i, s in zip(index, strides, strict=True)) for index in itertools.product(*map(range, sizes))
    ]
    if len(set(offsets)) < len(offsets):
        assert functional.overlaps_itself(tensor)
    if not offsets:
        assert not functional.overlaps_itself(tensor)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=4), st.randoms(use_true_random=False))
def test_views_of_dense_memory_do_not_overlap_themselves(sizes: list[int], random: Any) -> None:
    order = random.sample(range(len(sizes)), len(sizes))
    dense = torch.zeros(sizes).permute(order)
    steps = tuple(slice(random.randint(0, 1), None, random.randint(1, 2)) for _ in sizes)
    assert not functional.overlaps_itself(dense)
    assert not functional.overlaps_itself(dense[steps])
    if dense.numel() > 0:
        assert functional.overlaps_itself(dense[..., None].expand(*dense.shape, 2))
    odd = dense[..., None]
    assert not functional.overlaps_itself(odd.as_strided(odd.shape, (*dense.stride(), 7)))
