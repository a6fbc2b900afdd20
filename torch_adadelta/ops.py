"""The compiled ops: loading them, typed wrappers, and their fake implementations for tracing.

The libraries are plain C++ behind LibTorch's stable ABI, without a Python symbol: `_C` holds the schemas and the CPU
kernels, `_C_cuda` the CUDA kernels. They are loaded once, on import, the second where PyTorch has CUDA. Where that
fails, `load_error` and `cuda_load_error` say why, and the Python paths of `update.py` do the work.
"""

import os
import warnings
import weakref
from collections.abc import Callable, Collection
from math import inf
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from torch_adadelta.hyperparameters import Value

LIBRARY_PATH: Final = Path(__file__).with_name("_C.so")
CUDA_LIBRARY_PATH: Final = Path(__file__).with_name("_C_cuda.so")

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
    """Why `has_kernel_for` is false for tensors of this type of device."""
    errors = {"cpu": load_error, "cuda": cuda_load_error}
    return str(errors.get(device_type) or f"there are kernels for cpu and cuda parameters, not for {device_type}")


_warned: Final[set[str]] = set()


def warn_not_loaded(device_type: str) -> None:
    """Warns, once in a process for each type of device, that the Python paths run for want of a library."""
    if device_type not in _warned:
        _warned.add(device_type)
        library = {"cpu": "compiled library", "cuda": "CUDA library"}[device_type]
        warnings.warn(
            f"torch_adadelta runs without its {library}, many times slower: {why_no_kernel(device_type)}",
            RuntimeWarning,
            stacklevel=2,
        )


def adadelta_(
    params: list[Tensor],
    grads: list[Tensor],
    square_avgs: list[Tensor],
    acc_deltas: list[Tensor],
    lr: Value,
    rho: Value,
    epsilon: Value,
    maximize: bool = False,
    **clip: Any,
) -> None:
    """Updates every parameter and its state in place, in one pass over memory.

    Entry i of each list belongs to parameter i; the four tensors of a parameter have one shape and one device, its
    state has its dtype, and the gradient may have another. Hyperparameters are cast to the arithmetic type (float64 for
    float64 parameters, else float32); a Tensor has one element, on the parameters' device.

    `clip`: `clipvalue`, `clipnorm` with `square_sums`, `factor` (a float or Tensor), `grad_scale`, `found_inf`.
    Gradients are divided by `grad_scale` and clipped in the arithmetic type, before `maximize` negates them: clamped to
    [-clipvalue, clipvalue], which complex ones cannot be; then, with `clipnorm`, (g * clipnorm) / max(norm, clipnorm),
    where norm is the root of the gradient's element of `square_sums` (see `grad_square_sums`); or else g * factor.
    Nothing is written if `found_inf` is not zero; it and `grad_scale` are float32 Tensors of one element on the
    parameters' device.

    Raises RuntimeError, before anything is written, if the tensors or the clip options do not fit together.
    """
    if not params:  # the dispatcher finds no kernel without a tensor
        return
    options = _option_arguments(len(params), lr, rho, epsilon, maximize, **clip)
    _adadelta(params, grads, square_avgs, acc_deltas, *options)
    # By its version autograd notices that a tensor it saved has changed. An op behind the stable ABI cannot raise it.
    _increment_version(params)


def _option_arguments(
    count: int,
    lr: Value,
    rho: Value,
    epsilon: Value,
    maximize: bool,
    **clip: Any,
) -> tuple[Any, ...]:
    """The arguments of an update op that follow its lists, for one segment of `count` parameters."""
    values = (lr, rho, epsilon, 1.0 if maximize else 0.0)
    numbers: Any = values
    tensors: list[Tensor | None] = []
    if not (type(lr) is float and type(rho) is float and type(epsilon) is float):
        numbers = [0.0 if isinstance(value, Tensor) else value for value in values]
        tensors = [value if isinstance(value, Tensor) else None for value in values]
    if not clip:  # an argument that is left out costs half of what one costs that is given
        return ((count,), numbers, tensors)
    return ((count,), numbers, tensors, *_clip_arguments(**clip))


def _clip_arguments(
    clipvalue: float = inf,
    clipnorm: float | None = None,
    square_sums: Tensor | None = None,
    factor: Value = 1.0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> tuple[Any, ...]:
    factor_tensor = factor if isinstance(factor, Tensor) else None
    return (
        None if clipvalue == inf else clipvalue,
        clipnorm,
        square_sums,
        1.0 if factor_tensor is not None else factor,
        factor_tensor,
        grad_scale,
        found_inf,
    )


class HeldState:
    """The accumulators of a list of CPU parameters, handed to the compiled library once instead of at every step.

    Whoever has it must see to it, with `holds`, that the accumulators are still those: nobody else would notice that
    others have taken their place. The memory, shape and dtype of each are looked at anew by every update. Not for what
    is traced: the schema of the op does not show that the accumulators are written to. As long as one is held,
    `torch.utils.swap_tensors` refuses it.

    Raises RuntimeError for complex numbers and for a negated view, whose pending operation the op would not see.
    """

    def __init__(self, square_avgs: list[Tensor], acc_deltas: list[Tensor]) -> None:
        if any(x.is_complex() or x.is_neg() for tensors in (square_avgs, acc_deltas) for x in tensors):
            raise RuntimeError("complex or negated accumulators cannot be held")
        self.square_avgs: Final = square_avgs
        self.acc_deltas: Final = acc_deltas
        self._number: int = torch.ops.torch_adadelta.cache_accumulators.default(square_avgs, acc_deltas)
        # At the end of the process they go anyway.
        weakref.finalize(self, torch.ops.torch_adadelta.drop_accumulators.default, self._number).atexit = False

    def holds(self, states: Collection[Any]) -> bool:
        """Whether `square_avg` and `acc_delta` of these states are the very tensors that it holds, in this order."""
        if len(states) != len(self.square_avgs):
            return False
        try:
            for state, square_avg, acc_delta in zip(states, self.square_avgs, self.acc_deltas, strict=True):
                if state["square_avg"] is not square_avg or state["acc_delta"] is not acc_delta:
                    return False
        except (KeyError, TypeError):  # a parameter without state, or with that of something else
            return False
        return True

    def adadelta_(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        square_avgs: list[Tensor],
        acc_deltas: list[Tensor],
        lr: Value,
        rho: Value,
        epsilon: Value,
        maximize: bool = False,
        **clip: Any,
    ) -> None:
        """What `adadelta_` does, with the accumulators that are held and these."""
        options = _option_arguments(len(params), lr, rho, epsilon, maximize, **clip)
        _adadelta_cached(params, grads, self._number, *options)
        _increment_version(params)


def check_lists(params: list[Tensor], grads: list[Tensor], square_avgs: list[Tensor], acc_deltas: list[Tensor]) -> None:
    """Raises what `adadelta_` would raise for these lists, and writes nothing."""
    if params:
        options = _option_arguments(len(params), 1.0, 0.0, 0.0, False)
        _adadelta(params, grads, square_avgs, acc_deltas, *options, check_only=True)


def grad_square_sums(
    params: list[Tensor],
    grads: list[Tensor],
    clipvalue: float = inf,
    in_double: bool = False,
    grad_scale: Tensor | None = None,
) -> Tensor:
    """The sum of the squares of each gradient, as a float64 tensor [number of parameters] on the parameters' device.

    A gradient is cast to the arithmetic type T of its parameter (float64 for float64 and complex128 parameters, else
    float32; float64 for all if `in_double`), divided by `grad_scale`, clamped to [-clipvalue, clipvalue], and squared.
    The squares are rounded to T and summed in float64 over the tree of csrc/square_sums.h, in the order of the
    parameter's memory.

    Raises RuntimeError if the lists do not fit together, or for a finite clipvalue and complex parameters.
    """
    if not params:  # the dispatcher finds no kernel without a tensor
        return torch.empty(0, dtype=torch.float64)
    result: Tensor = torch.ops.torch_adadelta.grad_square_sums.default(params, grads, clipvalue, in_double, grad_scale)
    return result


def sparse_adadelta_(
    params: list[Tensor],
    indices: list[Tensor],
    values: list[Tensor],
    square_avgs: list[Tensor],
    acc_deltas: list[Tensor],
    lr: Value,
    rho: Value,
    epsilon: Value,
    maximize: bool = False,
    **clip: Any,
) -> None:
    """`adadelta_` by sparse gradients: only the rows that occur are read or written.

    The gradient of parameter i consists of the dense parts of a COO tensor: `indices[i]`, [sparse dimensions,
    occurrences] of int64, and `values[i]`, [occurrences, the other dimensions of the parameter], contiguous. Each
    value is cast, divided by `grad_scale`, clipped and negated by itself, as an element of a dense gradient is; then
    those of one row are added to 0 in the order in which they occur. `square_sums` are those of `values`. On the CPU
    the same bits come out of any number of threads.

    Raises RuntimeError, before anything is written, if the tensors or the options do not fit together, and on the CPU
    for an index out of range. On other devices an occurrence with such an index is left out: `first_bad_indices` finds
    it.
    """
    if not params:
        return
    options = _option_arguments(len(params), lr, rho, epsilon, maximize, **clip)
    _sparse_adadelta(params, indices, values, square_avgs, acc_deltas, *options)
    _increment_version(params)


def first_bad_indices(
    params: list[Tensor],
    indices: list[Tensor],
    values: list[Tensor],
    square_avgs: list[Tensor],
    acc_deltas: list[Tensor],
) -> Tensor:
    """The first occurrence in each gradient whose index is out of range, or -1: int64 [number of parameters].

    Raises RuntimeError for lists, not empty ones, that `sparse_adadelta_` would refuse for another reason.
    """
    result: Tensor = torch.ops.torch_adadelta.first_invalid_indices.default(
        params, indices, values, square_avgs, acc_deltas
    )
    return result


def cpu_capability() -> str:
    """The instruction set that the CPU kernels use: one of `CPU_CAPABILITIES`."""
    return CPU_CAPABILITIES[torch.ops.torch_adadelta.cpu_capability.default()]


def set_cpu_capability(name: str) -> str:
    """Chooses another instruction set, for tests and benchmarks, and returns the one before. All give the same bits.

    Raises RuntimeError if the processor does not have it.
    """
    index = torch.ops.torch_adadelta.set_cpu_capability.default(CPU_CAPABILITIES.index(name))
    return CPU_CAPABILITIES[index]


if is_loaded:
    _adadelta: Final[Any] = torch.ops.torch_adadelta.adadelta_.default
    _sparse_adadelta: Final[Any] = torch.ops.torch_adadelta.sparse_adadelta_.default
    # What an OpOverload calls takes 0.4 microseconds less.
    _adadelta_cached: Final[Any] = getattr(
        torch.ops.torch_adadelta.adadelta_.cached, "_op", torch.ops.torch_adadelta.adadelta_.cached
    )

    def _fake(*args: Any, **kwargs: Any) -> None:
        # PyTorch calls a fake implementation, to trace, with fake tensors of the device they stand for; but also when
        # some real tensor is on the meta device, and then to return would be to skip the update without a word.
        for arg in (*args, *kwargs.values()):
            for tensor in arg if isinstance(arg, list | tuple) else (arg,):
                if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                    raise RuntimeError("a tensor on the meta device has no elements to update")

    # Nothing here is differentiable by itself. Without this, PyTorch would look at every tensor for whether it requires
    # a gradient, which takes a quarter of a step of many small tensors.
    _library: Final = torch.library.Library("torch_adadelta", "IMPL")
    for _name in (
        "adadelta_",
        "adadelta_.cached",
        "sparse_adadelta_",
        "first_invalid_indices",
        "grad_square_sums",
    ):
        _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")

    torch.library.register_fake("torch_adadelta::adadelta_", _fake)
    torch.library.register_fake("torch_adadelta::adadelta_.cached", _fake)
    torch.library.register_fake("torch_adadelta::sparse_adadelta_", _fake)

    def _fake_grad_square_sums(params: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        _fake(params, *args, **kwargs)
        return params[0].new_empty(len(params), dtype=torch.float64)

    torch.library.register_fake("torch_adadelta::grad_square_sums", _fake_grad_square_sums)

    def _fake_first_invalid_indices(params: list[Tensor], *args: Any) -> Tensor:
        _fake(params, *args)
        return params[0].new_empty(len(params), dtype=torch.int64)

    torch.library.register_fake("torch_adadelta::first_invalid_indices", _fake_first_invalid_indices)

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
