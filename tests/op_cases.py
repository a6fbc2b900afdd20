"""What tests of the compiled ops share: lists of tensors, the ways to run an op, and the oracle of a clipped update."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import direct
import numpy as np
import pytest
import torch
from cases import (
    LAYOUTS,
    Segments,
    assert_like_oracle,
    assert_same_bits,
    dtype_name,
    gradients,
    oracle_of,
    randn,
    segment,
    segments,
    to_numpy,
)
from reference import oracle
from torch import Tensor

from torch_adadelta.backends import kernels

needs_library = pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")

adadelta: Any = torch.ops.torch_adadelta
inf, nan = torch.inf, torch.nan

# Of parameters, gradients, square_avgs and acc_deltas; or of parameters, indices, values, square_avgs and acc_deltas.
Lists = list[list[Tensor]]

# Each shows: a learning rate of 1 would hide where it is left out.
HYPERPARAMETERS = (float(np.float32(0.7)), float(np.float32(0.9)), 1e-6)
ORACLE_HYPERPARAMETERS = dict(zip(("learning_rate", "rho", "epsilon"), HYPERPARAMETERS, strict=True))


def capabilities() -> list[str]:
    """The instruction sets up to the one in use, the plainest first."""
    return list(kernels.CPU_CAPABILITIES[: kernels.CPU_CAPABILITIES.index(kernels.cpu_capability()) + 1])


def ways(threads: Sequence[int] = (1,)) -> Iterator[str]:
    """Goes through the instruction sets and numbers of threads."""
    before = kernels.cpu_capability(), torch.get_num_threads()
    try:
        for name in capabilities():
            kernels.set_cpu_capability(name)
            for count in threads:
                torch.set_num_threads(count)
                yield f"{name}, {count} threads"
    finally:
        kernels.set_cpu_capability(before[0])
        torch.set_num_threads(before[1])


# ---- How the state is kept -------------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """How the state of a parameter is kept, as its segment says it."""

    state_dtype: torch.dtype | None = None  # that of the parameter
    has_masters: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The fields of `Segment`."""
        codes = {None: 0, torch.float32: 1, torch.bfloat16: 2}
        return {"state_dtype": codes[self.state_dtype], "has_masters": self.has_masters}

    def oracle_of(self, param: Tensor, remainder: Tensor | None = None, **options: Any) -> oracle.Oracle:
        name = None if self.state_dtype is None else dtype_name(self.state_dtype)
        result = oracle_of(param, master_weights=self.has_masters, state_dtype=name, **options)
        if remainder is not None:
            result.remainder = remainder.numpy().copy()
        return result

    def remainders_of(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Any, where the parameters themselves have their elements, if they need some."""
        if not self.has_masters or any(param.dtype is not torch.bfloat16 for param in params):
            return []
        generator = torch.Generator().manual_seed(len(params))
        result = []
        for param in params:
            memory = torch.randint(-(2**15), 2**15, whole_memory(param).shape, dtype=torch.int16, generator=generator)
            result.append(memory.as_strided(param.shape, param.stride(), param.storage_offset()))
        return result


OWN_STATE = Kept()
# By the dtypes of parameters: all that there are besides.
KEPT = [
    (torch.float32, Kept(torch.float32)),
    (torch.float32, Kept(torch.bfloat16)),
    (torch.float32, Kept(torch.bfloat16, has_masters=True)),
    (torch.float16, Kept(torch.float32)),
    (torch.float16, Kept(torch.bfloat16)),
    (torch.bfloat16, Kept(torch.float32)),
    (torch.bfloat16, Kept(torch.bfloat16)),
    *((torch.bfloat16, Kept(dtype, has_masters=True)) for dtype in (None, torch.float32, torch.bfloat16)),
    (torch.float64, Kept(has_masters=True)),
]


def kept_name(value: Any) -> str:
    if not isinstance(value, Kept):
        return dtype_name(value)
    state = "own" if value.state_dtype is None else dtype_name(value.state_dtype)
    return f"master-{state}" if value.has_masters else state


with_kept = pytest.mark.parametrize(("dtype", "kept"), KEPT, ids=kept_name)


# ---- Lists ----------------------------------------------------------------------------------------------------------


def whole_memory(x: Tensor) -> Tensor:
    """All that a tensor's storage holds, so that a write beside the tensor shows."""
    count = x.untyped_storage().nbytes() // x.element_size()
    return x.detach().as_strided((count,), (1,), 0)


def lay_out(layout: str, x: Tensor) -> Tensor:
    """The same values in memory of one of LAYOUTS, whose gaps are zero."""
    result = LAYOUTS[layout](x)
    values = result.clone()
    whole_memory(result).zero_()
    return result.copy_(values)


def states_of(params: list[Tensor], dtype: torch.dtype | None = None) -> Lists:
    """Zeros beside each parameter, where the parameter itself has its elements, and 1 in the gaps of its memory."""

    def state(param: Tensor) -> Tensor:
        memory = torch.ones_like(whole_memory(param), dtype=dtype)
        return memory.as_strided(param.shape, param.stride(), param.storage_offset()).zero_()

    return [[state(param) for param in params] for _ in range(2)]


def dense_lists(
    shapes: Sequence[Any], dtype: torch.dtype = torch.float32, grad_dtypes: Sequence[torch.dtype] = ()
) -> Lists:
    """Parameters of these shapes, or numbers of elements, whose gradients have these dtypes in turn."""
    shapes = [(shape,) if isinstance(shape, int) else shape for shape in shapes]
    dtypes = grad_dtypes or (dtype,)
    params = [randn(shape, dtype, torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    grads = [gradients(shape, dtypes[i % len(dtypes)], steps=1, seed=i)[0] for i, shape in enumerate(shapes)]
    return [params, grads, *states_of(params)]


def kept_lists(
    shapes: Sequence[Any],
    dtype: torch.dtype,
    kept: Kept,
    grad_dtypes: Sequence[torch.dtype] = (),
    layout: str | None = None,
) -> Lists:
    """`dense_lists`, then no averages, and remainders if there are some. The layout is that of all but the gradients."""
    params, grads, *_ = dense_lists(shapes, dtype, grad_dtypes)
    if layout is not None:
        params = [lay_out(layout, x) for x in params]
    return [params, grads, *states_of(params, kept.state_dtype), [], kept.remainders_of(params)]


def sparse_lists(
    tables: Sequence[tuple[tuple[int, ...], int]],
    dtype: torch.dtype = torch.float32,
    value_dtypes: Sequence[torch.dtype] = (),
    count: int = 23,
) -> Lists:
    """Tables of these shapes and numbers of sparse dimensions; half of the COO entries are of the last row."""
    made: Lists = [[], [], []]
    dtypes = value_dtypes or (dtype,)
    for i, (shape, dims) in enumerate(tables):
        generator = torch.Generator().manual_seed(i)
        rows = [torch.randint(size, (count,), generator=generator) for size in shape[:dims]]
        indices = torch.stack(rows) if rows else torch.zeros(0, count, dtype=torch.int64)
        indices[:, ::2] = torch.tensor(shape[:dims], dtype=torch.int64)[:, None] - 1
        values = gradients((count, *shape[dims:]), dtypes[i % len(dtypes)], steps=1, seed=i)[0]
        for part, x in zip(made, (randn(shape, dtype, generator), indices, values), strict=True):
            part.append(x)
    return [*made, *states_of(made[0])]


def kept_sparse_lists(
    tables: Sequence[tuple[tuple[int, ...], int]],
    dtype: torch.dtype,
    kept: Kept,
    value_dtypes: Sequence[torch.dtype] = (),
    layout: str | None = None,
) -> Lists:
    """`sparse_lists`, and remainders if there are some. The layout is that of parameters and all their state."""
    params, indices, values, *_ = sparse_lists(tables, dtype, value_dtypes)
    if layout is not None:
        params = [lay_out(layout, x) for x in params]
    return [params, indices, values, *states_of(params, kept.state_dtype), kept.remainders_of(params)]


# Rows of one element, of no vector's and of many vectors' length; several pieces; several and no sparse dimensions.
TABLES = (
    ((9, 5), 1), ((7, 64), 1), ((40,), 1), ((3, 2, 6), 2), ((3, 4), 2), ((5, 8), 0), ((), 0), ((4, 132), 1),
    ((3, 1030), 1), ((2, 0), 1),
)  # fmt: skip


def several(sizes: Sequence[int], maximize: bool = False, **values: Any) -> Segments:
    """Segments that differ, some by a Tensor, but for these values."""
    rates = [torch.tensor(0.01 * i) if i % 3 == 2 else 0.75 - 0.01 * i for i in range(len(sizes))]
    return segments(
        *(
            segment(
                size,
                rates[i],
                0.9 - 0.001 * i,
                1e-6,
                maximize != (i % 2 == 1),
                ema_momentum=torch.tensor(0.9 - 0.01 * i) if i % 4 == 1 else 0.3 * (i % 3),
                overwrites=i % 5 == 2,
                **values,
            )
            for i, size in enumerate(sizes)
        )
    )


def dense(
    params: Any,
    grads: Any,
    square_avgs: Any,
    acc_deltas: Any,
    *rest: Any,
    averages: Any = (),
    remainders: Any = (),
    **options: Any,
) -> None:
    """adadelta_, mostly without averages and remainders."""
    states = (square_avgs, acc_deltas, list(averages), list(remainders))
    adadelta.adadelta_(params, grads, *states, *rest, **options)


def sparse(
    params: Any,
    indices: Any,
    values: Any,
    square_avgs: Any,
    acc_deltas: Any,
    *rest: Any,
    remainders: Any = (),
    **options: Any,
) -> None:
    """sparse_adadelta_, mostly without remainders."""
    adadelta.sparse_adadelta_(params, indices, values, square_avgs, acc_deltas, list(remainders), *rest, **options)


def with_cache(params: Any, grads: Any, square_avgs: Any, acc_deltas: Any, *rest: Any, **options: Any) -> None:
    """adadelta_, on accumulators that are cached for this call."""
    number = adadelta.cache_accumulators(square_avgs, acc_deltas)
    try:
        adadelta.adadelta_.cached(params, grads, number, *rest, **options)
    finally:
        adadelta.drop_accumulators(number)


# The ops that write, by name.
CALLS: dict[str, Callable[..., None]] = {"dense": dense, "cached": with_cache, "sparse": sparse}


def lists_for(call: str) -> Lists:
    """Three parameters."""
    if call == "sparse":
        return sparse_lists([((5, 2), 1), ((2, 2), 0), ((3, 4), 2)])
    return dense_lists([(5,), (2, 2), (3, 4)])


def assert_same_lists(actual: Lists, expected: Lists, what: str = "") -> None:
    """Bit by bit, with the memory around each tensor."""
    for part, (tensors, others) in enumerate(zip(actual, expected, strict=True)):
        for i, (x, y) in enumerate(zip(tensors, others, strict=True)):
            if x.dtype in (torch.int64, torch.int16):
                assert torch.equal(x, y), f"list {part}, tensor {i} {what}"
            else:
                assert_same_bits(whole_memory(x), whole_memory(y), f"list {part}, tensor {i} {what}")


def assert_refused(call: Callable[..., Any], lists: Lists, *rest: Any, error: str, **options: Any) -> None:
    """With the prefix by which a caller knows a refusal, and nothing is written."""
    before = [[x if x.is_meta or x.is_sparse else x.clone() for x in tensors] for tensors in lists]
    for check_only in (True, False):
        with pytest.raises(RuntimeError, match=f"^torch_adadelta refuses {error}"):
            call(*lists, *rest, **options, check_only=check_only)
    for tensors, copies in zip(lists, before, strict=True):
        for tensor, copied in zip(tensors, copies, strict=True):
            assert tensor is copied or torch.equal(tensor, copied)


def assert_repeated_in_order(call: str) -> None:
    """A parameter that is listed twice is updated twice, however many threads there are."""

    def own(size: int) -> Segments:
        return segment(size, 1.0, 0.9, 1e-6)

    def make() -> Lists:
        if call == "sparse":
            lists = sparse_lists([((300, 200), 1), ((5, 3), 1), ((300, 200), 1)], count=400)
        else:
            lists = dense_lists([40_000, 5, 40_000])
        for part in lists[:1] + lists[-2:]:
            part[2] = part[0]
        return lists

    expected = make()
    for i in range(3):
        CALLS[call](*(tensors[i : i + 1] for tensors in expected), *own(1))
    for way in ways((1, 2)):
        lists = make()
        CALLS[call](*lists, *own(3))
        assert_same_lists(lists, expected, way)


def storage_uses(tensors: Sequence[Tensor]) -> list[int]:
    """How many hold each tensor's memory."""
    return [torch._C._storage_Use_Count(x.untyped_storage()._cdata) for x in tensors]


# ---- The oracle -----------------------------------------------------------------------------------------------------


def opmath_of(param: Tensor, in_double: bool = False) -> Any:
    return np.float64 if in_double or param.dtype in (torch.float64, torch.complex128) else np.float32


def in_memory_order(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient with its dimensions in the order in which the memory of the parameter has them."""
    order = sorted(range(param.dim()), key=lambda d: 0 if param.shape[d] == 1 else -param.stride(d))
    return grad.permute(order)


def clipped(
    grad: Tensor, T: Any, clipvalue: float = inf, scale: float = 1.0, loss_scale: float = 1.0
) -> np.ndarray[Any, Any]:
    """The gradient in T, or in complex T, divided by the scales and clamped."""
    values = to_numpy(grad)
    with np.errstate(over="ignore", invalid="ignore"):
        if np.iscomplexobj(values):
            return oracle.as_complex(oracle.as_real(values).astype(T) / T(scale) / T(loss_scale))
        return oracle.clip_by_value(values.astype(T) / T(scale) / T(loss_scale), clipvalue)


def square_sum(
    param: Tensor, grad: Tensor, clipvalue: float = inf, in_double: bool = False, *scales: float, **scale: float
) -> float:
    values = clipped(in_memory_order(param, grad), opmath_of(param, in_double), clipvalue, *scales, **scale)
    return oracle.square_sum(values)


class Clip(NamedTuple):
    """The gradient options of a call, and what the oracle makes of them."""

    clipvalue: float = inf
    clipnorm: float | None = None
    factor: float = 1.0
    maximize: bool = False
    scale: float = 1.0
    loss_scale: float = 1.0

    def for_dtype(self, dtype: torch.dtype) -> "Clip":
        return self._replace(clipvalue=inf) if dtype.is_complex else self

    def options(self, params: list[Tensor], grads: list[Tensor]) -> dict[str, Any]:
        options: dict[str, Any] = {"maximize": self.maximize, "clipvalue": self.clipvalue}
        scaled: dict[str, Any] = {} if self.scale == 1.0 else {"grad_scale": torch.tensor(self.scale)}
        if self.loss_scale != 1.0:
            scaled["loss_scale_factor"] = self.loss_scale
        options |= scaled
        if self.clipnorm is None:
            return options | {"factor": self.factor}
        sums = direct.square_sums(params, grads, self.clipvalue, **scaled)
        return options | {"clipnorm": self.clipnorm, "square_sums": sums}

    def apply(self, param: Tensor, grad: Tensor) -> np.ndarray[Any, Any]:
        T = opmath_of(param)
        scales = (float(np.float32(self.scale)), self.loss_scale)
        g = clipped(grad, T, self.clipvalue, *scales)
        if self.clipnorm is not None:
            return oracle.clip_by_norm(g, self.clipnorm, square_sum(param, grad, self.clipvalue, False, *scales))
        reals = oracle.as_real(g) if np.iscomplexobj(g) else g
        with np.errstate(all="ignore"):
            reals = reals * T(self.factor)
        return oracle.as_complex(reals) if np.iscomplexobj(g) else reals


CLIPS = {
    "plain": Clip(),
    "clipvalue": Clip(clipvalue=0.3),
    "clipnorm": Clip(clipnorm=0.7),
    "clipnorm-not-reached": Clip(clipnorm=1e7),
    "factor": Clip(factor=0.37),
    "clipvalue-clipnorm": Clip(clipvalue=0.3, clipnorm=0.7, maximize=True),
    "clipvalue-factor": Clip(clipvalue=0.3, factor=0.37, maximize=True),
    "maximize": Clip(maximize=True),
    # No power of two: to multiply by the inverse would show.
    "scale": Clip(scale=3.0),
    "scale-clipvalue-factor": Clip(scale=0.3, clipvalue=0.3, factor=0.37),
    "scale-clipnorm": Clip(scale=3.0, clipnorm=0.7, maximize=True),
    # Nor one that float32 has: parameters of float64 take that of float64.
    "loss-scale": Clip(loss_scale=0.7),
    "both-scales-clipnorm": Clip(scale=3.0, loss_scale=0.7, clipvalue=0.3, clipnorm=0.7),
}


def assert_update(
    params: list[Tensor],
    grads: list[Tensor],
    clip: Clip = CLIPS["plain"],
    what: str = "",
    threads: Sequence[int] = (1,),
    kept: Kept = OWN_STATE,
    **decay: Any,
) -> None:
    """Two steps on every instruction set, the second with state that is not zero, as the oracle has them.

    `decay` is that of the weights, as a `Segment` has it.
    """
    remainders = kept.remainders_of(params)
    options = {**ORACLE_HYPERPARAMETERS, "maximize": clip.maximize}
    options["weight_decay"] = decay.get("weight_decay", 0.0)
    options["decoupled_weight_decay"] = decay.get("is_decoupled", True)
    oracles = [kept.oracle_of(p, r, **options) for p, r in zip(params, remainders or [None] * len(params), strict=True)]
    for param, grad, by_oracle in zip(params, grads, oracles, strict=True):
        clipped_grad = clip.apply(param, grad)
        by_oracle.step(clipped_grad)
        by_oracle.step(clipped_grad)
    initial = [x.clone() for x in (*params, *remainders)]
    own = {**kept.options, **decay, "remainders": remainders}
    for way in ways(threads):
        for x, values in zip((*params, *remainders), initial, strict=True):
            x.copy_(values)
        states = states_of(params, kept.state_dtype)
        written = [*params, *remainders, *states[0], *states[1]]
        gaps = [whole_memory(x).clone() for x in written]
        for _ in range(2):
            direct.fused(params, grads, *states, *HYPERPARAMETERS, **clip.options(params, grads), **own)
        for i, (remainder, by_oracle) in enumerate(zip(remainders, oracles, strict=bool(remainders))):
            np.testing.assert_array_equal(remainder.numpy(), by_oracle.remainder, f"remainder {what} {i} {way}")
        for i, (param, *state, by_oracle) in enumerate(zip(params, *states, oracles, strict=True)):
            named = dict(zip(("square_avg", "acc_delta"), state, strict=True))
            assert_like_oracle(param, named, by_oracle, f"{what} {i} {way}")
        for x, gap in zip(written, gaps, strict=True):
            if x.numel() < gap.numel():
                now = whole_memory(x).clone()
                for memory in (now, gap):
                    memory.as_strided(x.shape, x.stride(), x.storage_offset()).zero_()
                assert_same_bits(now, gap, f"what lies between the elements {way}")


def is_enough_memory(gigabytes: float) -> bool:
    with open("/proc/meminfo") as file:
        available = next((int(line.split()[1]) for line in file if line.startswith("MemAvailable")), math.inf)
    return available > gigabytes * 2**20
