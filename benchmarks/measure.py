"""Times callables side by side, measures the memory that one of them takes, and says on what machine."""

import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final, NamedTuple

import torch

from torch_adadelta.backends import kernels

Step = Callable[[], object]

# Makes some calls, and returns how many seconds they took together.
Timer = Callable[[int], float]


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


# ---- Time -----------------------------------------------------------------------------------------------------------


class Timings(NamedTuple):
    """Seconds of one call, for each contender a value a round; and the reason for each that could not run.

    `first` is the very first call, which may compile something. A slow contender takes part in the first rounds only.
    `disturbance` is the share (0 to 1) of the machine's processors that other processes used meanwhile, None if
    unknown. It falsifies most what runs on all processors: the threads wait for the one that was held up.
    `handovers`: what `handover` said before each round and after the last, None if unknown.
    """

    seconds: dict[str, list[float]]
    first: dict[str, float]
    absent: dict[str, str]
    disturbance: float | None
    handovers: list[float] | None = None

    @property
    def rounds(self) -> int:
        """How many rounds there were."""
        return max(map(len, self.seconds.values()), default=0)

    def spread(self, name: str) -> Spread:
        """The seconds of one call."""
        return Spread.of(self.seconds[name])

    def ratio(self, name: str, other: str) -> Spread:
        """How many times as long `name` takes as `other`, over the rounds that both took part in."""
        return Spread.of([a / b for a, b in zip(self.seconds[name], self.seconds[other], strict=False)])

    def difference(self, name: str, other: str) -> Spread:
        """How many seconds longer `name` takes than `other`, over the rounds that both took part in."""
        return Spread.of([a - b for a, b in zip(self.seconds[name], self.seconds[other], strict=False)])

    def by_handover(self) -> list["Timings"]:
        """The rounds between short handovers and those between long ones; nothing, unless there were both.

        Long ones take twice as long as any short one, at least; a single one is taken for an accident. A round that
        began with one kind and ended with the other belongs to neither.
        """
        handovers = self.handovers or []
        ordered = sorted(handovers)
        gaps = [(above / below, below) for below, above in pairwise(ordered[1:-1])]
        widest, limit = max(gaps, default=(1.0, 0.0))
        if widest < 2:
            return []
        parts = []
        for is_long in (False, True):
            ends = [(seconds > limit) == is_long for seconds in handovers]
            chosen = [i for i, (before, after) in enumerate(pairwise(ends)) if before and after]
            seconds = {name: [v[i] for i in chosen if i < len(v)] for name, v in self.seconds.items()}
            kept = {name: values for name, values in seconds.items() if values}
            parts.append(self._replace(seconds=kept, handovers=[handovers[i] for i in chosen]))
        return parts if all(part.seconds for part in parts) else []


LEAST_ROUNDS: Final = 5  # whatever the budget
MOST_ROUNDS: Final = 100

# Where a call takes more than this share of the budget, the contender has these rounds only.
SLOW_SHARE: Final = 1 / 40
SLOW_ROUNDS: Final = 3

# A call of more turns than this needs no other before it: what the caches lost costs it next to nothing.
SLOW_CALL_IN_TURNS: Final = 4


def timer(step: Step) -> Timer:
    """Times a callable of this process. The garbage collector is off meanwhile, as in timeit."""
    return partial(_seconds, step)


def interleave(
    contenders: Mapping[str, Callable[[], Timer]],
    *,
    budget: float,
    turn: float,
    fits_cache: bool,
    rounds: int | None = None,
    most_calls: int = sys.maxsize,
    busy: Callable[[], float] = time.process_time,
    handover: Callable[[], float | None] = lambda: None,
) -> Timings:
    """Times contenders round-robin, so that all of them see the machine's good and bad moments.

    In every round each contender has one turn: as many calls as take some `turn` seconds, at least one, timed together.
    Every other round goes backwards, which cancels a drift inside the rounds.

    Args:
        contenders: for each name, what makes its timer. One that raises a RuntimeError, there or in a call, is absent.
        budget: the seconds after which no new round begins, once there are five.
        turn: the least duration of a turn.
        fits_cache: whether the caches can hold a contender's data. A turn that is not timed then precedes each that is,
            and brings back what the others displaced; it takes some calls.
        rounds: the number of rounds, whatever the budget.
        most_calls: the most calls of a turn, however short they are.
        busy: the processor seconds that the contenders have used so far.
        handover: what to note before each round and after the last.
    """
    turns: dict[str, tuple[Timer, int, bool, int]] = {}
    first: dict[str, float] = {}
    absent: dict[str, str] = {}
    for name, build in contenders.items():
        try:
            timed = build()
            first[name] = timed(1)
            calls = 1
            while (seconds := timed(calls)) < turn and calls < most_calls:
                calls = min(max(calls + 1, round(calls * min(1.2 * turn / seconds, 10))), most_calls)
        except RuntimeError as error:
            first.pop(name, None)
            absent[name] = str(error).strip().partition("\n")[0] or type(error).__name__
            continue
        most = SLOW_ROUNDS if seconds / calls > SLOW_SHARE * budget else MOST_ROUNDS
        turns[name] = timed, calls, fits_cache and seconds < SLOW_CALL_IN_TURNS * turn, rounds or most

    values: dict[str, list[float]] = {name: [] for name in turns}
    handovers: list[float | None] = []
    order = list(turns)
    others_before = _seconds_of_others(busy)
    start = time.perf_counter()
    for done in range(rounds or MOST_ROUNDS):
        if not rounds and done >= LEAST_ROUNDS and time.perf_counter() - start > budget:
            break
        handovers.append(handover())
        for name in order:
            timed, calls, warms_up, most = turns[name]
            if done >= most:
                continue
            if warms_up:
                timed(calls)
            values[name].append(timed(calls) / calls)
        order.reverse()
    handovers.append(handover())

    disturbance = None
    others = _seconds_of_others(busy)
    if others is not None and others_before is not None:
        available = (time.perf_counter() - start) * (os.cpu_count() or 1)
        disturbance = max(0.0, others - others_before) / available
    known = [seconds for seconds in handovers if seconds is not None]
    return Timings(values, first, absent, disturbance, known if len(known) == len(handovers) else None)


def _seconds(step: Step, calls: int) -> float:
    collects = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for _ in range(calls):
            step()
        return time.perf_counter() - start
    finally:
        if collects:
            gc.enable()


def _seconds_of_others(busy: Callable[[], float]) -> float | None:
    """Processor seconds since the start of the machine that were used by others than us, or None if unknown."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _wait_for_disk, interrupts, soft_interrupts, stolen, *_guests = map(int, fields)
    ticks = user + nice + system + interrupts + soft_interrupts + stolen
    return ticks / os.sysconf("SC_CLK_TCK") - busy()


# ---- Where the processors are ---------------------------------------------------------------------------------------


def handover() -> float | None:
    """Seconds that a line of memory takes from the first processor of this process to its second.

    It is short where the two share a cache, and perhaps their way to memory. A host may move the processors of a
    virtual machine at any time. None if there is one processor, no C compiler, or another system than Linux.
    """
    processors = sorted(os.sched_getaffinity(0))[:2] if sys.platform == "linux" else []
    if len(processors) < 2 or (library := _handover_library()) is None:
        return None
    # The least of some, for whoever takes a processor meanwhile prolongs one.
    values = [library.handover(*processors) for _ in range(3)]
    return min((seconds for seconds in values if seconds > 0), default=None)


@cache
def _handover_library() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "handover.so"
        source = Path(__file__).with_name("handover.c")
        command = [*shlex.split(os.environ.get("CC", "cc")), "-O2", "-shared", "-fPIC", "-pthread", str(source)]
        try:
            subprocess.run([*command, "-o", str(library)], check=True, capture_output=True)
            loaded = ctypes.CDLL(str(library))
        except (OSError, subprocess.CalledProcessError):
            return None
    loaded.handover.restype = ctypes.c_double
    return loaded


# ---- Memory ---------------------------------------------------------------------------------------------------------


def extra_memory(step: Step, *, repeats: int = 3) -> int:
    """The most by which a call raises the resident memory of this process at any moment, in bytes: the worst call.

    All memory counts, whoever allocates it, in whole pages. Before each call the allocator returns its free pages to
    the system, so that taking them again counts too.

    Raises:
        OSError: the system is not Linux, or does not let a process reset its high-water mark.
    """
    libc: Any = ctypes.CDLL(None)
    worst = 0
    for _ in range(repeats):
        gc.collect()
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes the memory that is resident now
        before = _high_water_mark()
        step()
        worst = max(worst, _high_water_mark() - before)
    return worst


def _high_water_mark() -> int:
    mark = memory_field("/proc/self/status", "VmHWM")
    if mark is None:
        raise OSError("/proc/self/status has no VmHWM")
    return mark


def memory_field(file: str, field: str) -> int | None:
    """The bytes that a line "field: N kB" of one of Linux's files says, or None if there is none."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    return None


# ---- Numerical hygiene ----------------------------------------------------------------------------------------------


def count_abnormal(tensor: torch.Tensor) -> int:
    """How many elements are infinite, nan or subnormal, with all of which a processor may take another time."""
    sizes = (tensor.detach()._values() if tensor.is_sparse else tensor.detach()).abs()
    is_normal = (sizes >= torch.finfo(tensor.dtype).tiny) & (sizes <= torch.finfo(tensor.dtype).max)
    return int(torch.count_nonzero(~(is_normal | (sizes == 0))))


# ---- The report -----------------------------------------------------------------------------------------------------


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a report as JSON."""
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- The machine ----------------------------------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """What the figures depend on: when, where and with what they were measured."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "processor": _processor(),
        "instruction set": kernels.cpu_capability() if kernels.is_loaded else "none (no compiled library)",
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


# Ours, and those that peers come from.
PACKAGES: Final = ("torch_adadelta", "torch", "tensorflow", "tf-keras", "keras", "jax", "optax", "pytorch_optimizer")


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
