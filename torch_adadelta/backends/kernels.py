"""The compiled ops: loading, typed wrappers, and fake implementations for tracing.

The libraries are plain C++ behind LibTorch's stable ABI, without a Python symbol. `_C` holds the schemas and the CPU
kernels, `_C_cuda` the CUDA kernels. Both are loaded once, on import; `_C_cuda` only if PyTorch has CUDA. If loading
fails, `load_error` or `cuda_load_error` holds the reason, and functional.py computes the updates.
"""

import os
import re
import warnings
import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from torch_adadelta.backends.batch import NO_OPTIONS, Batch, GradientOptions, Refusal, Segment
from torch_adadelta.backends.functional import coo_components

LIBRARY_PATH: Final = Path(__file__).parents[1] / "_C.so"
CUDA_LIBRARY_PATH: Final = Path(__file__).parents[1] / "_C_cuda.so"

_count_dispatch_modes: Final = torch._C._len_torch_dispatch_stack

_increment_version: Final = torch._C._increment_version  # behind torch.autograd.graph.increment_version

CPU_CAPABILITIES: Final = ("default", "AVX2", "AVX512", "AVX512_BF16")


def _load(path: Path, remedy: str) -> Exception | None:
    if not path.exists():
        return FileNotFoundError(f"{path} does not exist: {remedy} and run `pip install --no-build-isolation .` again.")
    try:
        torch.ops.load_library(str(path))
    except Exception as error:  # whatever dlopen or a registration throws: the Python paths need none of it
        return error.__cause__ if isinstance(error.__cause__, Exception) else error  # torch wraps what dlopen said
    return None


def _load_cuda() -> Exception | None:
    if torch.version.cuda is None:
        return RuntimeError("this PyTorch was built without CUDA")
    if load_error is not None:
        return load_error
    return _load(
        CUDA_LIBRARY_PATH,
        "torch_adadelta was installed where no CUDA compiler (nvcc) was found, or with TORCH_ADADELTA_CUDA=0. Install "
        f"the CUDA toolkit {torch.version.cuda}",
    )


load_error: Final[Exception | None] = _load(
    LIBRARY_PATH,
    "torch_adadelta was installed where no C++ compiler was found, or with TORCH_ADADELTA_NO_EXT=1. Install a C++ "
    "compiler",
)
is_loaded: Final[bool] = load_error is None
cuda_load_error: Final[Exception | None] = _load_cuda()
is_cuda_loaded: Final[bool] = cuda_load_error is None


def _has_kernel(tensor: Tensor) -> bool:
    return tensor.is_cpu or tensor.is_cuda


# Whether the fused update can run on the device of a tensor.
has_kernel_for: Final[Callable[[Tensor], bool]] = (
    _has_kernel if is_cuda_loaded else attrgetter("is_cpu") if is_loaded else lambda tensor: False
)


def why_no_kernel(device_type: str) -> str:
    """Returns why `has_kernel_for` is false for tensors of this device type."""
    errors = {"cpu": load_error, "cuda": cuda_load_error}
    return str(errors.get(device_type) or f"there are kernels for cpu and cuda parameters, not for {device_type}")


_warned: Final[set[str]] = set()


def warn_not_loaded(device_type: str) -> None:
    """Warns, once in a process for each device type, that the Python paths run because a library is not loaded."""
    if device_type not in _warned:
        _warned.add(device_type)
        library = {"cpu": "compiled library", "cuda": "CUDA library"}[device_type]
        warnings.warn(
            f"torch_adadelta runs without its {library}, many times slower: {why_no_kernel(device_type)}",
            RuntimeWarning,
            stacklevel=2,
        )


# ---- Ops ------------------------------------------------------------------------------------------------------------

# How the ops begin what they say of their arguments. They check all of them before they write anything.
_REFUSAL: Final = re.compile(r"torch_adadelta refuses (?:parameter (\d+)|the call): (.*)", re.DOTALL)

# What PyTorch says of tensors that it does not hand to an op: of a layout or device without a kernel, or lazy views.
_NOT_RUN: Final = re.compile(r"Could not run 'torch_adadelta::|fallback doesn't currently support mutable TensorLists")


def _refusal(error: RuntimeError) -> Refusal:
    """What an op said of its arguments as a value. Raises anything else again."""
    text = str(error)
    if _NOT_RUN.search(text):
        return Refusal(text.partition("\n")[0], None)
    found = _REFUSAL.search(text)
    if found is None:
        raise error
    return Refusal(found[2], None if found[1] is None else int(found[1]))


def hyperparameter_arguments(segments: Sequence[Segment]) -> tuple[list[int], list[float], list[Tensor | None]]:
    """The sizes of segments, a row of numbers for each, and Tensors that replace them, as the ops take them."""
    values = [value for segment in segments for value in segment[1:]]
    sizes = [segment.size for segment in segments]
    if [value for value in values if isinstance(value, Tensor)]:
        numbers = [0.0 if isinstance(value, Tensor) else float(value) for value in values]
        return sizes, numbers, [value if isinstance(value, Tensor) else None for value in values]
    return sizes, list(map(float, values)), []


def option_arguments(options: GradientOptions) -> tuple[Any, ...]:
    """The arguments of an update op that follow those of `hyperparameter_arguments`."""
    factor = options.factor
    numbers = (options.clipvalue, options.clipnorm, options.square_sums)
    factors = (0.0, factor) if isinstance(factor, Tensor) else (factor, None)
    return (*numbers, *factors, options.grad_scale, options.loss_scale_factor, options.found_inf)


def update(batch: Batch, *, check_only: bool = False) -> Refusal | None:
    """Updates a batch in place, in one pass over memory. Returns a Refusal, before anything is written, if it cannot.

    Hyperparameters are cast to the opmath dtype. A Tensor has one element, on the parameters' device. Gradients are
    divided by `grad_scale` and `loss_scale_factor`, clipped in the opmath dtype, and negated for `maximize`, in this
    order. If `found_inf` is not zero, nothing is written. For sparse gradients, only the rows that occur are read or
    written; `functional.average` updates the averages.

    Args:
        batch (Batch): what to update.
        check_only (bool, optional): only looks for a refusal, and writes nothing. For dense gradients. (default: False)
    """
    if not batch.params:  # the dispatcher finds no kernel without a tensor
        return None
    arguments: Any = hyperparameter_arguments(batch.segments)
    if batch.gradient_options is not NO_OPTIONS or check_only:
        arguments += option_arguments(batch.gradient_options)
    if check_only:
        arguments += (True,)
    batch.has_begun = not check_only
    try:
        if batch.is_sparse:
            indices, values = map(list, zip(*map(coo_components, batch.grads), strict=True))
            states = batch.square_avgs, batch.acc_deltas, batch.remainders
            _sparse_adadelta(batch.params, indices, values, *states, *arguments)
        elif batch.accumulators is not None and not (batch.averages or batch.remainders or _count_dispatch_modes()):
            _adadelta_cached(batch.params, batch.grads, batch.accumulators, *arguments)
        else:
            optional = batch.averages, batch.remainders
            adadelta_(batch.params, batch.grads, batch.square_avgs, batch.acc_deltas, *optional, *arguments)
    except RuntimeError as error:
        refusal = _refusal(error)
        batch.has_begun = False
        return refusal
    if not check_only:
        # By its version autograd notices that a saved tensor has changed. An op behind the stable ABI cannot raise it.
        _increment_version(batch.params)
    return None


def square_sums(
    params: list[Tensor],
    grads: list[Tensor],
    clipvalue: float | None = None,
    in_double: bool = False,
    grad_scale: Tensor | None = None,
    loss_scale_factor: float = 1.0,
) -> Tensor | Refusal:
    """Returns the sum of squares of each gradient: float64, of shape [number of parameters], on the parameters' device.

    A gradient is cast to the opmath dtype T of its parameter (float64 for all if `in_double`), divided by `grad_scale`
    and `loss_scale_factor`, clamped to [-clipvalue, clipvalue], and squared. The squares are rounded to T and summed in
    float64 over the tree of csrc/square_sums.h, in the order of the parameter's memory.
    """
    if not params:  # the dispatcher finds no kernel without a tensor
        return torch.empty(0, dtype=torch.float64)
    try:
        result: Tensor = grad_square_sums(params, grads, clipvalue, in_double, grad_scale, loss_scale_factor)
    except RuntimeError as error:
        return _refusal(error)
    return result


def first_invalid_indices(batch: Batch) -> Tensor | Refusal:
    """Returns the first entry of each sparse gradient whose index is out of range, or -1: int64, [number of
    parameters].

    Returns a Refusal if `update` would refuse the lists for another reason.
    """
    indices = [grad._indices() for grad in batch.grads]
    values = [grad._values() for grad in batch.grads]
    try:
        states = batch.square_avgs, batch.acc_deltas, batch.remainders
        found: Tensor = _first_invalid_indices(batch.params, indices, values, *states)
    except RuntimeError as error:
        return _refusal(error)
    return found


class AccumulatorCache:
    """The accumulators of a list of CPU parameters, handed to the compiled library once instead of at every step.

    Whoever has it must see to it that they are still those of the parameters: nobody else would notice that others have
    taken their place. The memory, shape and dtype of each are looked at anew by every update. Not for what is traced:
    the schema of the op does not show that the accumulators are written to. As long as one is cached,
    `torch.utils.swap_tensors` refuses it.
    """

    def __init__(self, square_avgs: list[Tensor], acc_deltas: list[Tensor]) -> None:
        self.number: Final[int] = _cache_accumulators(square_avgs, acc_deltas)
        # At the end of the process they go anyway.
        weakref.finalize(self, _drop_accumulators, self.number).atexit = False


def cached_accumulators(square_avgs: list[Tensor], acc_deltas: list[Tensor]) -> AccumulatorCache | None:
    """The accumulators of a batch as the library keeps them; None where they are on a device or traced.

    Nor does it take complex or lazily negated ones, whose pending operation the op would not see.
    """
    if _count_dispatch_modes() or torch.compiler.is_compiling():
        return None
    if not all(x.is_cpu and not x.is_complex() and not x.is_neg() for x in (*square_avgs, *acc_deltas)):
        return None
    try:
        return AccumulatorCache(square_avgs, acc_deltas)
    except RuntimeError as error:
        _refusal(error)
        return None  # if no update can be with them, that will say which they are


def cpu_capability() -> str:
    """Returns the instruction set that the CPU kernels use: "default", "AVX2", "AVX512" or "AVX512_BF16"."""
    return CPU_CAPABILITIES[torch.ops.torch_adadelta.cpu_capability.default()]


def set_cpu_capability(name: str) -> str:
    """Sets the instruction set that the CPU kernels use, for tests and benchmarks. All give the same bits.

    Args:
        name (str): one of the values of `cpu_capability`.

    Returns:
        The previous instruction set.

    Raises:
        ValueError: if there is no instruction set of this name.
        RuntimeError: if the processor does not have it.
    """
    index = torch.ops.torch_adadelta.set_cpu_capability.default(CPU_CAPABILITIES.index(name))
    return CPU_CAPABILITIES[index]


if is_loaded:
    _ops: Final[Any] = torch.ops.torch_adadelta
    adadelta_: Final[Any] = _ops.adadelta_.default
    # What an OpOverload calls takes 0.4 microseconds less.
    _adadelta_cached: Final[Any] = getattr(_ops.adadelta_.cached, "_op", _ops.adadelta_.cached)
    _sparse_adadelta: Final[Any] = _ops.sparse_adadelta_.default
    _first_invalid_indices: Final[Any] = _ops.first_invalid_indices.default
    grad_square_sums: Final[Any] = _ops.grad_square_sums.default
    _cache_accumulators: Final[Any] = _ops.cache_accumulators.default
    _drop_accumulators: Final[Any] = _ops.drop_accumulators.default

    def _check_not_meta(*args: Any, **kwargs: Any) -> None:
        # PyTorch calls a fake implementation, to trace, with fake tensors of the device they stand for; but also when
        # some real tensor is on the meta device, and then to return would be to skip the update without a word.
        for arg in (*args, *kwargs.values()):
            for tensor in arg if isinstance(arg, list | tuple) else (arg,):
                if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                    raise RuntimeError(
                        "torch_adadelta refuses the call: a tensor on the meta device has no elements to update"
                    )

    def _fake_vector(dtype: torch.dtype) -> Callable[..., Tensor]:
        def fake(params: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
            _check_not_meta(params, *args, **kwargs)
            return params[0].new_empty(len(params), dtype=dtype)

        return fake

    # Nothing here is differentiable by itself. Without the fallthrough, PyTorch would look at every tensor for whether
    # it requires a gradient, which takes a quarter of a step of many small tensors.
    _library: Final = torch.library.Library("torch_adadelta", "IMPL")
    for _name, _fake in {
        "adadelta_": _check_not_meta,
        "adadelta_.cached": _check_not_meta,
        "sparse_adadelta_": _check_not_meta,
        "first_invalid_indices": _fake_vector(torch.int64),
        "grad_square_sums": _fake_vector(torch.float64),
    }.items():
        _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"torch_adadelta::{_name}", _fake)

    # So that the sets can be compared on a whole program, as PyTorch's ATEN_CPU_CAPABILITY allows for its own kernels.
    if _wanted := os.environ.get("TORCH_ADADELTA_CPU_CAPABILITY"):
        try:
            set_cpu_capability({name.lower(): name for name in CPU_CAPABILITIES}[_wanted.lower()])
        except (KeyError, RuntimeError):
            warnings.warn(
                f"TORCH_ADADELTA_CPU_CAPABILITY={_wanted} is ignored: it is none of {', '.join(CPU_CAPABILITIES)}, or "
                "this processor does not have it",
                RuntimeWarning,
                stacklevel=2,
            )
