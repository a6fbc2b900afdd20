"""Times implementations side by side, measures the memory that a step takes, and says on what machine."""

import ctypes
import gc
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import cache, partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final, NamedTuple, Protocol

import torch

from torch_adadelta import __version__
from torch_adadelta.backends import kernels

Step = Callable[[], object]

# The seconds of one call, by how they are measured.
STEP: Final = "step"  # the mean of calls back to back; on a CUDA device, by its events
COLD: Final = "cold"  # a single call after 64 MB of other work
HOST: Final = "host"  # until the call returns, with the CUDA device still at work


class Timer(Protocol):
    """Makes some calls, and returns the seconds of one."""

    def __call__(self, calls: int, warm_up: int = 0, *, cold: bool = False) -> dict[str, float]:
        """`warm_up` calls precede those that are timed. With `cold` there is one more, with cold caches."""


class Spread(NamedTuple):
    """The median of some values and their quartiles."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of one value or more."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        lower, _, upper = quantiles(values, n=4, method="inclusive")
        return cls(median(values), lower, upper)


class Run(NamedTuple):
    """What one run measured of a workload.

    A slow implementation takes part in the first rounds only. The very first call may compile something.
    `disturbance` is the share (0 to 1) of the machine's processors that other processes used meanwhile. It falsifies
    most what runs on all processors: the threads wait for the one that was held up.
    """

    seconds: dict[str, dict[str, list[float]]]  # of one call: implementation → STEP, COLD or HOST → a value a round
    first: dict[str, float]  # the seconds of the very first call
    absent: dict[str, str]  # who was not measured, and why
    memory: dict[str, int]  # extra bytes during a step
    disturbance: float | None = None
    abnormal: int = 0  # infinite, nan or subnormal numbers after the run


# ---- Time -----------------------------------------------------------------------------------------------------------

LEAST_ROUNDS: Final = 5  # whatever the budget
MOST_ROUNDS: Final = 100

# Where a call takes more than this share of the budget, the implementation has these rounds only.
SLOW_SHARE: Final = 1 / 40
SLOW_ROUNDS: Final = 3

# A call of more turns than this needs no other before it: what the caches lost costs it next to nothing.
SLOW_CALL_IN_TURNS: Final = 4

# Launches that the CUDA driver takes before it makes the host wait are some hundred: not to be reached.
MOST_CUDA_CALLS: Final = 100


def timer(step: Step, device: str = "cpu") -> Timer:
    """Times a callable of this process. The garbage collector is off meanwhile, as in timeit."""

    def timed(calls: int, warm_up: int = 0, *, cold: bool = False) -> dict[str, float]:
        collects = gc.isenabled()
        gc.disable()
        try:
            for _ in range(warm_up):
                step()
            if device == "cuda":
                return _by_events(step, calls)
            seconds = {STEP: _by_clock(step, calls)}
            if cold:
                _other_work().add_(1e-9)
                seconds[COLD] = _by_clock(step, 1)
            return seconds
        finally:
            if collects:
                gc.enable()

    return timed


def _by_clock(step: Step, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def _by_events(step: Step, calls: int) -> dict[str, float]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    host = _by_clock(step, calls)
    end.record()
    end.synchronize()
    return {STEP: begin.elapsed_time(end) / 1e3 / calls, HOST: host}


@cache
def _other_work() -> torch.Tensor:
    """Uses the caches, as a forward and a backward pass do between two steps: 64 MB, read and written."""
    return torch.ones(2**24)


def interleave(
    implementations: Mapping[str, Callable[[], Timer]],
    *,
    budget: float,
    turn: float,
    fits_cache: bool,
    rounds: int | None = None,
    most_calls: int = sys.maxsize,
    busy: Callable[[], float] = time.process_time,
) -> Run:
    """Times implementations round-robin, so that all of them see the machine's good and bad moments.

    In every round each has one turn: as many calls as take some `turn` seconds, at least one, timed together. Every
    other round goes backwards, which cancels a drift inside the rounds.

    Args:
        implementations: for each name, what makes its timer. One that raises a RuntimeError, there or in a call, is
            absent.
        budget: the seconds after which no new round begins, once there are five.
        turn: the least duration of a turn.
        fits_cache: whether the caches can hold the data. Calls that are not timed then precede each turn, and bring
            back what the others displaced, unless one takes some turns; and each turn ends with a call after other
            work, with cold caches.
        rounds: the number of rounds, whatever the budget.
        most_calls: the most calls of a turn, however short they are.
        busy: the processor seconds that the implementations have used so far.
    """
    turns: dict[str, tuple[Callable[[], dict[str, float]], int]] = {}
    first: dict[str, float] = {}
    absent: dict[str, str] = {}
    for name, build in implementations.items():
        try:
            timed = build()
            first[name] = timed(1)[STEP]
            calls = 1
            while (seconds := calls * timed(calls)[STEP]) < turn and calls < most_calls:
                calls = min(max(calls + 1, round(calls * min(1.2 * turn / seconds, 10))), most_calls)
        except RuntimeError as error:
            first.pop(name, None)
            absent[name] = str(error).strip().partition("\n")[0] or type(error).__name__
            continue
        warm_up = calls if fits_cache and seconds < SLOW_CALL_IN_TURNS * turn else 0
        most = SLOW_ROUNDS if seconds / calls > SLOW_SHARE * budget else MOST_ROUNDS
        turns[name] = partial(timed, calls, warm_up, cold=fits_cache), rounds or most

    values: dict[str, dict[str, list[float]]] = {name: {} for name in turns}
    order = list(turns)
    others_before = _seconds_of_others(busy)
    start = time.perf_counter()
    for done in range(rounds or MOST_ROUNDS):
        if not rounds and done >= LEAST_ROUNDS and time.perf_counter() - start > budget:
            break
        for name in order:
            take_turn, most = turns[name]
            for kind, each in take_turn().items() if done < most else ():
                values[name].setdefault(kind, []).append(each)
        order.reverse()

    disturbance = None
    others = _seconds_of_others(busy)
    if others is not None and others_before is not None:
        available = (time.perf_counter() - start) * (os.cpu_count() or 1)
        disturbance = max(0.0, others - others_before) / available
    return Run(values, first, absent, {}, disturbance)


def _seconds_of_others(busy: Callable[[], float]) -> float | None:
    """Processor seconds since the start of the machine that were used by others than us, or None if unknown."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _wait_for_disk, interrupts, soft_interrupts, stolen, *_guests = map(int, fields)
    ticks = user + nice + system + interrupts + soft_interrupts + stolen
    return ticks / os.sysconf("SC_CLK_TCK") - busy()


# ---- Memory ---------------------------------------------------------------------------------------------------------


def extra_memory(step: Step, device: str = "cpu", *, repeats: int = 3) -> int:
    """The most by which a call raises the memory in use at any moment, in bytes: the worst call.

    On the CPU that is the resident memory of this process, whoever allocates it, in whole pages. Before each call the
    allocator returns its free pages to the system, so that taking them again counts too. On a CUDA device it is what
    PyTorch has allocated there.

    Raises:
        OSError: the system is not Linux, or does not let a process reset its high-water mark.
    """
    if device == "cuda":
        step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    libc: Any = ctypes.CDLL(None)
    worst = 0
    for _ in range(repeats):
        gc.collect()
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes the memory that is resident now
        before = memory_field("/proc/self/status", "VmHWM") or 0
        step()
        worst = max(worst, (memory_field("/proc/self/status", "VmHWM") or 0) - before)
    return worst


def memory_field(file: str, field: str) -> int | None:
    """The bytes that a line "field: N kB" of one of Linux's files says, or None if there is none."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)


def available_memory(device: str = "cpu") -> int | None:
    """The bytes that can be had without swapping, or None if unknown."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else memory_field("/proc/meminfo", "MemAvailable")


# ---- Numerical hygiene ----------------------------------------------------------------------------------------------


def count_abnormal(tensor: torch.Tensor) -> int:
    """How many elements are infinite, nan or subnormal, with all of which a processor may take another time."""
    values = tensor.detach()._values() if tensor.is_sparse else tensor.detach()
    count = 0
    for part in values.flatten().split(2**24):  # what is compared takes memory, too
        sizes = part.abs()
        is_normal = (sizes >= torch.finfo(tensor.dtype).tiny) & (sizes <= torch.finfo(tensor.dtype).max)
        count += int(torch.count_nonzero(~(is_normal | (sizes == 0))))
    return count


# ---- The machine ----------------------------------------------------------------------------------------------------

# Those that baselines come from.
PACKAGES: Final = ("tensorflow", "tf-keras", "keras", "jax", "optax", "pytorch_optimizer")


def machine(device: str = "cpu") -> dict[str, str]:
    """What the figures depend on: when, where and with what they were measured."""
    facts = {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d")}
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        facts["GPU"] = f"{gpu.name} (sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB)"
        facts["CUDA"] = str(torch.version.cuda)
    return {
        **facts,
        "processor": _processor(),
        "instruction set": kernels.cpu_capability() if kernels.is_loaded else "none (no compiled library)",
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "torch_adadelta": __version__,
        "torch": torch.__version__,
        **{package: _version(package) for package in PACKAGES if device != "cuda"},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _processor() -> str:
    """The name of the processor, with its family and model: a virtual machine often tells no more of the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name", platform.machine())
    if {"cpu family", "model"} <= fields.keys():
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name
