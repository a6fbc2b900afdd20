"""What many tests share: the paths, dtypes and layouts, gradients of many scales, and the comparison of bits."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import direct
import numpy as np
import torch
from reference.oracle import Oracle, OracleOptimizer, SparseGradient
from torch import Tensor
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras
from torch_adadelta.backends import kernels
from torch_adadelta.backends.batch import Segment

REAL_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
COMPLEX_DTYPES = (torch.complex64, torch.complex128, torch.complex32)
DTYPES = REAL_DTYPES + COMPLEX_DTYPES


class Path(NamedTuple):
    """A way to compute a step, by itself and as the optimizer's options have it."""

    name: str
    update: direct.Update
    options: dict[str, bool]
    capability: str | None = None


PATHS = (
    Path("single_tensor", direct.single_tensor, {"foreach": False}),
    Path("multi_tensor", direct.multi_tensor, {"foreach": True}),
    *(
        Path(f"fused-{name}", direct.fused, {"fused": True}, capability=name)
        for name in (kernels.CPU_CAPABILITIES if kernels.is_loaded else ("default",))
    ),
)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The values as the oracle keeps them: 16-bit ones widened to float32, which is exact."""
    tensor = tensor.detach()
    if tensor.is_complex():
        if tensor.dtype is torch.complex32:
            tensor = torch.view_as_complex(torch.view_as_real(tensor).float())
        return tensor.resolve_conj().numpy()
    return (tensor.double() if tensor.dtype is torch.float64 else tensor.float()).numpy()


def bits(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The bits of float32, float64 or complex numbers, all nans alike."""
    reals = np.ascontiguousarray(values).reshape(-1).view(values.real.dtype)
    return np.where(np.isnan(reals), np.nan, reals).view(f"u{reals.dtype.itemsize}")


def assert_same_bits(actual: Tensor, expected: np.ndarray[Any, Any] | Tensor, what: str = "") -> None:
    if isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype, what
        expected = to_numpy(expected)
    values = to_numpy(actual)
    assert values.shape == expected.shape, what
    np.testing.assert_array_equal(bits(values), bits(expected), err_msg=what)


def randn(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal numbers; drawn in a dtype that every format can be rounded from, as complex32 cannot be drawn."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(tuple(shape), dtype=wide, generator=generator).to(dtype)


def gradients(shape: Sequence[int], dtype: torch.dtype, steps: int, seed: int = 0) -> list[Tensor]:
    """Gradients whose elements differ in scale, from 1e-8 to 1e4 (1e-3 to 1e2 in float16), some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (-3, 2) if dtype in (torch.float16, torch.complex32) else (-8, 4)
    result = []
    for _ in range(steps):
        scale = 10.0 ** (torch.rand(tuple(shape), dtype=torch.float64, generator=generator) * (high - low) + low)
        scale *= torch.rand(tuple(shape), dtype=torch.float64, generator=generator) > 0.05
        wide = torch.complex128 if dtype.is_complex else torch.float64
        result.append((torch.randn(tuple(shape), dtype=wide, generator=generator) * scale).to(dtype))
    return result


def order_sensitive(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers whose sum of squares shows in which order they were added, as that of most numbers does not.

    The square of one of them is so large that each of the others is half a unit in its last place, or a little more.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    values = 2.0**-19 * (1 + torch.rand(math.prod(shape), dtype=torch.float64, generator=generator)).to(wide)
    if len(values):
        values[int(torch.randint(0, len(values), (), generator=generator))] = 2.0**8
    return values.view(tuple(shape)).to(dtype)


def coo(indices: Any, values: Tensor, shape: Sequence[int]) -> Tensor:
    """A gradient that is not coalesced. `indices` of one dimension are rows."""
    indices = torch.as_tensor(indices, dtype=torch.int64)
    if indices.dim() == 1:
        indices = indices[None]
    return torch.sparse_coo_tensor(indices, values, tuple(shape), is_coalesced=False, check_invariants=False)


def coo_gradient(
    shape: Sequence[int], dtype: torch.dtype, count: int, sparse_dims: int = 1, seed: int = 0, hot: int = 3
) -> Tensor:
    """A gradient of `count` COO entries; half of them are of the first `hot` indices of a dimension, or its last."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for size in shape[:sparse_dims]:
        anywhere = torch.randint(size, (count,), generator=generator)
        few = torch.randint(-1, min(hot, size - 1), (count,), generator=generator) % size
        rows.append(torch.where(torch.rand(count, generator=generator) < 0.5, anywhere, few))
    indices = torch.stack(rows) if rows else torch.zeros(0, count, dtype=torch.int64)
    values = gradients((count, *shape[sparse_dims:]), dtype, 1, seed)[0]
    return coo(indices, values, shape)


Segments = tuple[list[int], list[float], list[Tensor | None]]


def segment(
    count: int, lr: Any, rho: Any, epsilon: Any, maximize: bool = False, *values: Any, **named: Any
) -> Segments:
    """What the ops take of a segment of so many parameters, with the fields of `Segment`. A Tensor replaces a number."""
    return kernels.hyperparameter_arguments([Segment(count, lr, rho, epsilon, maximize, *values, **named)])


def segments(*parts: Segments) -> Segments:
    """Several segments in one call."""
    has_tensors = any(tensors for _, _, tensors in parts)
    sizes, numbers, all_tensors = [], [], []
    for own_sizes, own_numbers, tensors in parts:
        sizes += own_sizes
        numbers += own_numbers
        all_tensors += (tensors or [None] * len(own_numbers)) if has_tensors else []
    return sizes, numbers, all_tensors


def oracle_of(param: Tensor, **hyperparameters: Any) -> Oracle:
    return Oracle(to_numpy(param), dtype=dtype_name(param.dtype), **hyperparameters)


def assert_like_oracle(param: Tensor, state: dict[str, Tensor], oracle: Oracle, what: str = "") -> None:
    assert state.keys() >= {"square_avg", "acc_delta"}
    for name, actual, expected in (
        ("square_avg", state["square_avg"], oracle.square_avg),
        ("acc_delta", state["acc_delta"], oracle.acc_delta),
        ("param", param, oracle.p),
    ):
        assert_same_bits(actual, expected, f"{name} {what}")
    if oracle.remainder is not None and "remainder" in state:
        np.testing.assert_array_equal(state["remainder"].cpu().numpy(), oracle.remainder, err_msg=f"remainder {what}")


def optimizer_oracle_of(params: Sequence[Tensor], **options: Any) -> OracleOptimizer:
    return OracleOptimizer([to_numpy(p) for p in params], dtypes=[dtype_name(p.dtype) for p in params], **options)


def to_oracle(grads: Sequence[Tensor | None]) -> list[np.ndarray[Any, Any] | SparseGradient | None]:
    """Gradients, dense and sparse, as the oracle takes them."""
    return [
        None
        if grad is None
        else SparseGradient(grad._indices().numpy(), to_numpy(grad._values()))
        if grad.is_sparse
        else to_numpy(grad)
        for grad in grads
    ]


def assert_optimizer_like_oracle(optimizer: AdadeltaKeras, expected: OracleOptimizer, what: str = "") -> None:
    """Compares all parameters, their state (zeros where there is none yet) and the count of steps."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    beside = {"average": expected.averages, "gradient_accumulator": expected.accumulators}
    for index, (param, one) in enumerate(zip(params, expected.oracles, strict=True)):
        state = {
            **{key: torch.zeros_like(param) for key in ("square_avg", "acc_delta")},
            "remainder": torch.zeros_like(param, dtype=torch.int16),
            **optimizer.state.get(param, {}),
        }
        assert_like_oracle(param, state, one, f"of parameter {index} {what}")
        for key, values in beside.items():
            if values is None or (key == "gradient_accumulator" and key not in state):
                assert key not in state
                assert values is None or not values[index].any()
            else:
                assert_same_bits(state[key], values[index], f"{key} of parameter {index} {what}")
    assert int(optimizer.param_groups[0]["iterations"]) == expected.iterations


def snapshot(optimizer: torch.optim.Optimizer) -> Any:
    """Everything a step may change, copied: to prove that a failed one changed nothing."""
    groups = [
        {key: value for key, value in group.items() if key != "params"} | {"ids": [id(p) for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    params = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    state = {
        id(p): {key: (id(value), _copied(value)) for key, value in entry.items()}
        for p, entry in optimizer.state.items()
    }
    return groups, params, state


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and not value.is_meta else value


def assert_unchanged(optimizer: torch.optim.Optimizer, before: Any) -> None:
    groups, params, state = snapshot(optimizer)
    assert groups == before[0]
    for now, was in zip(params, before[1], strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True)
    assert state.keys() == before[2].keys()
    for key, entry in state.items():
        assert entry.keys() == before[2][key].keys()
        for name, (identity, value) in entry.items():
            assert identity == before[2][key][name][0]
            if isinstance(value, Tensor) and not value.is_meta:
                torch.testing.assert_close(value, before[2][key][name][1], rtol=0, atol=0, equal_nan=True)


def _misaligned(x: Tensor) -> Tensor:
    """The same values in memory that begins one element after an allocation does."""
    base = torch.empty(x.numel() + 1, dtype=x.dtype)
    return base[1:].view(x.shape).copy_(x)


def _size_one_strides(x: Tensor) -> Tensor:
    """The same memory, but with strides in the dimensions of size one that no allocation would give."""
    strides = [7 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return x.as_strided(x.shape, strides)


def _sliced(x: Tensor) -> Tensor:
    """The same values with gaps in memory."""
    base = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    return base[..., ::2].copy_(x)


# How a tensor of four dimensions may lie in memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "size_one_strides": _size_one_strides,
    "misaligned": _misaligned,
    "sliced": _sliced,
}


# What a step may do besides the update, for tests that go through all of it. Some add more.
STEP_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipvalue": {"clipvalue": 0.5},
    "clipnorm": {"clipnorm": 0.7},
    "global_clipnorm": {"global_clipnorm": 0.9},
    "both": {"clipvalue": 0.5, "clipnorm": 0.7},
    "decay": {"decay": 0.5},
    "maximize": {"maximize": True},
    "weight_decay": {"weight_decay": 0.25},
    "averages": {"use_ema": True, "ema_momentum": 0.75, "loss_scale_factor": 3.0, "clipnorm": 0.7},
}


def optimizer_with(params: Sequence[Tensor], path: Path, **options: Any) -> AdadeltaKeras:
    return AdadeltaKeras([Parameter(p) for p in params], **options, **path.options)
