"""What PyTorch does around every `step()`: it runs the hooks, and announces the step to profilers, at a third of the
price.

`Optimizer.profile_hook_step` takes some 7 microseconds, as long as all the rest of a step of one small parameter. Most
of them go to `record_function`, whose two ops cross PyTorch's dispatcher; behind torch.autograd there are two functions
that announce the same range to the same profilers and observers without it. (A TorchDispatchMode, which sees those ops,
sees nothing of these.)
"""

import sys
from collections.abc import Callable
from functools import wraps
from itertools import chain
from typing import Any, Final, ParamSpec, TypeVar

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

P = ParamSpec("P")
R = TypeVar("R")

_global_pre_hooks: Final = torch_optimizer._global_optimizer_pre_hooks
_global_post_hooks: Final = torch_optimizer._global_optimizer_post_hooks

_is_compiling: Final = torch.compiler.is_compiling
_is_profiling: Final = torch._C._autograd._profiler_enabled
_begin_range: Final = torch._C._autograd._record_function_with_args_enter
_end_range: Final = torch._C._autograd._record_function_with_args_exit


def _cupti_monitor_runs() -> bool:
    # An experiment of PyTorch 2.13, which record_function tells of each range besides.
    monitor = sys.modules.get("torch.profiler._cupti_monitor")
    return monitor is not None and getattr(monitor, "_monitor_singleton", None) is not None


def profile_hook_step(func: Callable[P, R]) -> Callable[P, R]:
    """`func`, the `step` of an optimizer, with the hooks and the announcement that `Optimizer.profile_hook_step` adds.

    PyTorch's own wrapper does it while a profiler runs in this thread, while there are hooks before the step, which may
    replace its arguments, and while torch.compile traces.
    """
    as_pytorch_does = Optimizer.profile_hook_step(func)

    @wraps(func)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        optimizer: Any = args[0]
        if (
            _is_compiling()
            or _is_profiling()
            or optimizer._optimizer_step_pre_hooks
            or _global_pre_hooks
            or _cupti_monitor_runs()
        ):
            return as_pytorch_does(*args, **kwargs)
        record = _begin_range(f"Optimizer.step#{type(optimizer).__name__}.step")
        try:
            result = func(*args, **kwargs)
            optimizer._optimizer_step_code()  # a frame that PyTorch's profiler knows a step by
            if optimizer._optimizer_step_post_hooks or _global_post_hooks:
                for hook in chain(optimizer._optimizer_step_post_hooks.values(), _global_post_hooks.values()):
                    hook(optimizer, args, kwargs)
            return result
        finally:
            _end_range(record)

    return wrapper
