"""A pytest plugin that lets the tests in tests/cuda run on the devices of fake_cuda.cpp, in a PyTorch without CUDA.

    FAKE_CUDA=library.so python -m pytest -p fake_cuda tests/cuda

Streams and events do nothing, for all happens at once. A graph keeps the operators that were called while it was
captured, and calls them again; what they wrote meanwhile is undone, for a capture runs nothing.
"""
# ruff: noqa: E402

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

# Before PyTorch asks for the first time whether there is CUDA, and remembers what it was told.
ctypes.CDLL(os.environ["FAKE_CUDA"], ctypes.RTLD_GLOBAL)

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

torch.version.cuda = torch.version.cuda or "of a fake GPU"
torch.cuda._lazy_init = lambda: None


from torch_adadelta.backends import kernels

assert kernels.is_loaded, kernels.load_error
gpu: Any = torch.ops.fake_cuda

if "WITHOUT_CUDA_LIBRARY" not in os.environ:  # as if it had not been installed
    kernels.cuda_load_error, kernels.is_cuda_loaded = None, True  # type: ignore[misc]
    kernels.has_kernel_for = kernels._has_kernel  # type: ignore[misc]


def nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for what takes time on a GPU."""


class Stream:
    """In the order of the host, as all streams here."""

    wait_stream = synchronize = wait_event = record_event = nothing

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


class Event(Stream):
    """Has happened once it is recorded."""

    record = wait = nothing

    def elapsed_time(self, other: "Event") -> float:
        """Milliseconds, none too few to divide by."""
        return 1.0


@contextlib.contextmanager
def device(where: Any) -> Iterator[None]:
    """Makes a device current."""
    before = gpu.exchange_device(torch.device(where).index if isinstance(where, str) else int(where))
    try:
        yield
    finally:
        gpu.exchange_device(before)


# ---- Graphs ---------------------------------------------------------------------------------------------------------

capturing: list["Capture"] = []


def storages(values: Any) -> list[Any]:
    return [x.untyped_storage() for x in tree_leaves(values) if isinstance(x, Tensor)]


class Capture(TorchDispatchMode):
    """Keeps the operators that are called, and what memory held before, which is that of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self.before: dict[int, bytes] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_host = [x for x in given if x.device.type == "cpu"]
        if on_host and len(on_host) == len(given):  # no graph knows of it
            return func(*args, **kwargs)
        if on_host:  # whose memory may hold something else, or nothing, when the graph reads it
            raise RuntimeError(f"operation not permitted when stream is capturing: {func} with host memory")
        for x in given:
            storage = x.untyped_storage()
            if storage.data_ptr() not in self.made and storage.data_ptr() not in self.before:
                self.before[storage.data_ptr()] = ctypes.string_at(storage.data_ptr(), storage.nbytes())
        result = func(*args, **kwargs)
        known = {x.data_ptr() for x in storages((args, kwargs))}
        self.made |= {x.data_ptr() for x in storages(result)} - known - self.before.keys()
        self.calls.append((func, args, kwargs, result))
        return result

    def undo(self) -> None:
        """Restores all memory that was there before."""
        for address, content in self.before.items():
            ctypes.memmove(address, content, len(content))


# Who would notice that a tensor has changed, which a replay hides.
above_devices = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
for key in ("AutogradCPU", "AutogradCUDA", "AutogradOther"):
    above_devices = above_devices.add(getattr(torch._C.DispatchKey, key))


class CUDAGraph:
    """What `graph` captured."""

    def __init__(self) -> None:
        self.calls: Any = None

    def replay(self) -> None:
        """Calls all operators again, on what their memory holds now."""
        with torch._C._ExcludeDispatchKeyGuard(above_devices):
            for func, args, kwargs, result in self.calls:
                again = func(*args, **kwargs)
                known = {x.data_ptr() for x in storages((args, kwargs))}
                for to, result_now in zip(storages(result), storages(again), strict=True):
                    if to.data_ptr() not in known:
                        ctypes.memmove(to.data_ptr(), result_now.data_ptr(), to.nbytes())


@contextlib.contextmanager
def graph(into: CUDAGraph, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Captures what is called inside."""
    capture = Capture()
    capturing.append(capture)
    forbidden = gpu.forbid_waiting(True)
    try:
        with capture:
            yield
    finally:
        capturing.pop()
        gpu.forbid_waiting(False)
        capture.undo()
    assert forbidden
    into.calls = capture.calls


@contextlib.contextmanager
def stream(which: Any) -> Iterator[None]:
    """All streams are one."""
    yield


properties = SimpleNamespace(name="fake GPU", total_memory=2**30, major=0, minor=0)

for name, value in {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 2,
    "current_device": lambda: gpu.exchange_device(-1),
    "device": device,
    "is_current_stream_capturing": lambda: bool(capturing),
    "Stream": Stream,
    "Event": Event,
    "stream": stream,
    "current_stream": lambda *args: Stream(),
    "synchronize": nothing,
    "_sleep": nothing,
    "empty_cache": nothing,
    "mem_get_info": lambda *args: (properties.total_memory, properties.total_memory),
    "memory_allocated": lambda *args: gpu.memory(False),
    "max_memory_allocated": lambda *args: gpu.memory(True),
    "reset_peak_memory_stats": lambda *args: gpu.reset_peak(),
    "get_device_name": lambda *args: properties.name,
    "get_device_capability": lambda *args: (properties.major, properties.minor),
    "get_device_properties": lambda *args: properties,
    "set_sync_debug_mode": lambda mode: gpu.forbid_waiting(mode == "error"),
    "CUDAGraph": CUDAGraph,
    "graph": graph,
}.items():
    setattr(torch.cuda, name, value)


# What takes storages apart or makes sparse tensors, which PyTorch can only do on devices that it was built for, and what
# starts a new process.
BEYOND_MODULES = ("test_gpu_sparse",)
BEYOND = ("test_checkpoints_move_between_devices", "test_deepcopy", "test_diagnostics", "test_train_recommender")

# One test in so many: a prime, so that every value of every parameter has its turn.
SAMPLE = int(os.environ.get("FAKE_CUDA_SAMPLE", "1"))
TOO_LONG = ("test_tens_of_thousands_of_tensors", "test_more_tensors_than_one_table_holds", "test_tables[")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leaves out what cannot run here, or takes long, and trains for less time: a wrong number shows soon."""
    kept, left_out = [], []
    for number, item in enumerate(items):
        module = item.module.__name__
        if module == "test_gpu_training":
            item.module.EPOCHS, item.module.REQUIRED_ACCURACY = 1, 0.5
        is_too_long = item.name.startswith(TOO_LONG) or "-10-1048577-" in item.name
        is_beyond = module in BEYOND_MODULES or item.name.startswith(BEYOND)
        (left_out if is_beyond or is_too_long or number % SAMPLE != 0 else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)
