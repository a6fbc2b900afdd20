"""The compiled ops: loading them, typed wrappers, and their fake implementations for tracing.

The library is plain C++ behind LibTorch's stable ABI, without a Python symbol. It is loaded once, on import; where that
fails, `load_error` says why and the Python paths of `update.py` do the work.
"""

import os
import warnings
from collections.abc import Callable
from math import inf
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

LIBRARY_PATH: Final = Path(__file__).with_name("_C.so")

_increment_version: Final = torch._C._increment_version  # behind torch.autograd.graph.increment_version

CPU_CAPABILITIES: Final = ("default", "AVX2", "AVX512")


def _load() -> Exception | None:
    if not LIBRARY_PATH.exists():
        return FileNotFoundError(
            f"{LIBRARY_PATH} does not exist: torch_adadelta was installed where no C++ compiler was found, or with "
            "TORCH_ADADELTA_NO_EXT=1. Install a C++ compiler and run `pip install --no-build-isolation .` again."
        )
    try:
        torch.ops.load_library(str(LIBRARY_PATH))
    except Exception as error:  # whatever dlopen or a registration throws: the Python paths need none of it
        return error.__cause__ if isinstance(error.__cause__, Exception) else error  # torch wraps what dlopen said
    return None


load_error: Final[Exception | None] = _load()
is_loaded: Final[bool] = load_error is None

# Whether the fused update can run on the device of a tensor.
has_kernel_for: Final[Callable[[Tensor], bool]] = attrgetter("is_cpu") if is_loaded else lambda tensor: False

# The defaults are recognised by their identity: to compare numbers would take longer.
_NO_FACTOR: Final = 1.0

_warned = False


def warn_not_loaded() -> None:
    """Warns, once in a process, that the Python paths run because the library could not be loaded."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"torch_adadelta runs without its compiled library, many times slower: {load_error}",
            RuntimeWarning,
            stacklevel=2,
        )


def adadelta_(
    params: list[Tensor],
    grads: list[Tensor],
    square_avgs: list[Tensor],
    acc_deltas: list[Tensor],
    lr: float | Tensor,
    rho: float | Tensor,
    epsilon: float | Tensor,
    maximize: bool = False,
    *,
    clipvalue: float = inf,
    clipnorm: float | None = None,
    square_sums: Tensor | None = None,
    factor: float | Tensor = _NO_FACTOR,
) -> None:
    """Updates every parameter and its state in place, in one pass over memory.

    Entry i of each list belongs to parameter i; the four tensors of a parameter have one shape and one device, its
    state has its dtype, and the gradient may have another. Hyperparameters are cast to the arithmetic type (float64 for
    float64 parameters, else float32); a Tensor has one element, on the parameters' device.

    Gradients are clipped in the arithmetic type, before `maximize` negates them: clamped to [-clipvalue, clipvalue],
    which complex ones cannot be; then, with `clipnorm`, (g * clipnorm) / max(norm, clipnorm), where norm is the root of
    the gradient's element of `square_sums` (see `grad_square_sums`); or else g * factor.

    Raises RuntimeError, before anything is written, if the tensors or the clip options do not fit together.
    """
    if not params:  # the dispatcher finds no kernel without a tensor
        return
    is_clipped = clipvalue is not inf or factor is not _NO_FACTOR or clipnorm is not None or square_sums is not None
    if not is_clipped and type(lr) is float and type(rho) is float and type(epsilon) is float:
        _adadelta_unclipped(params, grads, square_avgs, acc_deltas, lr, rho, epsilon, maximize)
    else:
        values = (lr, rho, epsilon, factor)
        *numbers, factor_number = [0.0 if isinstance(value, Tensor) else value for value in values]
        *tensors, factor_tensor = [value if isinstance(value, Tensor) else None for value in values]
        clip = (clipvalue, clipnorm, square_sums, factor_number, factor_tensor)
        _adadelta(params, grads, square_avgs, acc_deltas, *numbers, maximize, *tensors, *clip)
    # By its version autograd notices that a tensor it saved has changed. An op behind the stable ABI cannot raise it.
    _increment_version(params)


def check_lists(params: list[Tensor], grads: list[Tensor], square_avgs: list[Tensor], acc_deltas: list[Tensor]) -> None:
    """Raises what `adadelta_` would raise for these lists, and writes nothing."""
    if params:
        torch.ops.torch_adadelta.check_lists.default(params, grads, square_avgs, acc_deltas)


def grad_square_sums(
    params: list[Tensor], grads: list[Tensor], clipvalue: float = inf, in_double: bool = False
) -> Tensor:
    """The sum of the squares of each gradient, as a float64 tensor [number of parameters] on the parameters' device.

    A gradient is cast to the arithmetic type T of its parameter (float64 for float64 and complex128 parameters, else
    float32; float64 for all if `in_double`), clamped to [-clipvalue, clipvalue], and squared. The squares are rounded
    to T and summed in float64 over the tree of csrc/square_sums.h, in the order of the parameter's memory.

    Raises RuntimeError if the lists do not fit together, or for a finite clipvalue and complex parameters.
    """
    if not params:  # the dispatcher finds no kernel without a tensor
        return torch.empty(0, dtype=torch.float64)
    result: Tensor = torch.ops.torch_adadelta.grad_square_sums.default(params, grads, clipvalue, in_double)
    return result


def cpu_capability() -> str:
    """The instruction set that the CPU kernels use: "default", "AVX2" or "AVX512"."""
    return CPU_CAPABILITIES[torch.ops.torch_adadelta.cpu_capability.default()]


def set_cpu_capability(name: str) -> str:
    """Chooses another instruction set, for tests and benchmarks, and returns the one before. All give the same bits.

    Raises RuntimeError if the processor does not have it.
    """
    index = torch.ops.torch_adadelta.set_cpu_capability.default(CPU_CAPABILITIES.index(name))
    return CPU_CAPABILITIES[index]


if is_loaded:
    _adadelta: Final[Any] = torch.ops.torch_adadelta.adadelta_.default
    _adadelta_unclipped: Final[Any] = torch.ops.torch_adadelta.adadelta_.unclipped

    def _fake(*args: Any, **kwargs: Any) -> None:
        # PyTorch calls a fake implementation, to trace, with fake tensors of the device they stand for; but also when
        # some real tensor is on the meta device, and then to return would be to skip the update without a word.
        for arg in (*args, *kwargs.values()):
            for tensor in arg if isinstance(arg, list | tuple) else (arg,):
                if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                    raise RuntimeError("a tensor on the meta device has no elements to update")

    torch.library.register_fake("torch_adadelta::adadelta_", _fake)
    torch.library.register_fake("torch_adadelta::adadelta_.unclipped", _fake)
    torch.library.register_fake("torch_adadelta::check_lists", _fake)

    def _fake_grad_square_sums(params: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        _fake(params, *args, **kwargs)
        return params[0].new_empty(len(params), dtype=torch.float64)

    torch.library.register_fake("torch_adadelta::grad_square_sums", _fake_grad_square_sums)

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
