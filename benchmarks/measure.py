"""Times callables side by side, measures the memory that one of them takes, and reports as text, Markdown and JSON."""

import ctypes
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import torch

from torch_adadelta import ops

if TYPE_CHECKING:
    from rich.console import Console

Step = Callable[[], object]


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

    `disturbance` is the share (0 to 1) of the machine's processors that other processes used meanwhile, None if
    unknown. It falsifies most what runs on all processors: the threads wait for the one that was held up.
    """

    seconds: dict[str, list[float]]
    absent: dict[str, str]
    disturbance: float | None

    @property
    def rounds(self) -> int:
        """How many rounds there were."""
        return len(next(iter(self.seconds.values())))

    def spread(self, name: str) -> Spread:
        """The seconds of one call."""
        return Spread.of(self.seconds[name])

    def ratio(self, name: str, other: str) -> Spread:
        """How many times as long `name` takes as `other`, over the rounds."""
        return Spread.of([a / b for a, b in zip(self.seconds[name], self.seconds[other], strict=True)])

    def difference(self, name: str, other: str) -> Spread:
        """How many seconds longer `name` takes than `other`, over the rounds."""
        return Spread.of([a - b for a, b in zip(self.seconds[name], self.seconds[other], strict=True)])


LEAST_ROUNDS: Final = 5  # whatever the budget

# A call of more turns than this needs no other before it: what the caches lost costs it next to nothing.
SLOW_CALL_IN_TURNS: Final = 4


def interleave(
    contenders: Mapping[str, Callable[[], Step]],
    *,
    budget: float,
    turn: float,
    fits_cache: bool,
    rounds: int | None = None,
) -> Timings:
    """Times contenders round-robin, so that all of them see the machine's good and bad moments.

    In every round each contender has one turn: as many calls as take some `turn` seconds, at least one, timed together.
    Every other round goes backwards, which cancels a drift inside the rounds.

    Args:
        contenders: for each name, what makes the callable. One that raises a RuntimeError, there or in its first call,
            is absent.
        budget: the seconds after which no new round begins, once there are five.
        turn: the least duration of a turn.
        fits_cache: whether the caches can hold a contender's data. A turn that is not timed then precedes each that is,
            and brings back what the others displaced; it takes some calls.
        rounds: the number of rounds, whatever the budget.
    """
    steps: dict[str, tuple[Step, int, bool]] = {}
    absent: dict[str, str] = {}
    for name, build in contenders.items():
        try:
            step = build()
            step()
        except RuntimeError as error:
            absent[name] = str(error).strip().partition("\n")[0] or type(error).__name__
            continue
        calls = 1
        while (seconds := _seconds(step, calls)) < turn:
            calls = max(calls + 1, round(calls * min(1.2 * turn / seconds, 10)))
        steps[name] = step, calls, fits_cache and seconds < SLOW_CALL_IN_TURNS * turn

    values: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    others_before = _seconds_of_others()
    start = time.perf_counter()
    for done in range(rounds or sys.maxsize):
        if not rounds and done >= LEAST_ROUNDS and time.perf_counter() - start > budget:
            break
        for name in order:
            step, calls, warms_up = steps[name]
            if warms_up:
                _seconds(step, calls)
            values[name].append(_seconds(step, calls) / calls)
        order.reverse()

    disturbance = None
    others = _seconds_of_others()
    if others is not None and others_before is not None:
        available = (time.perf_counter() - start) * (os.cpu_count() or 1)
        disturbance = max(0.0, others - others_before) / available
    return Timings(values, absent, disturbance)


def _seconds(step: Step, calls: int) -> float:
    collects = gc.isenabled()
    gc.disable()  # as timeit does
    try:
        start = time.perf_counter()
        for _ in range(calls):
            step()
        return time.perf_counter() - start
    finally:
        if collects:
            gc.enable()


def _seconds_of_others() -> float | None:
    """Processor seconds since the start of the machine that this process did not use, or None if unknown."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _wait_for_disk, interrupts, soft_interrupts, stolen, *_guests = map(int, fields)
    ticks = user + nice + system + interrupts + soft_interrupts + stolen
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


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
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no VmHWM")


# ---- Numerical hygiene ----------------------------------------------------------------------------------------------


def count_abnormal(tensor: torch.Tensor) -> int:
    """How many elements are infinite, nan or subnormal, with all of which a processor may take another time."""
    sizes = tensor.detach().abs()
    is_normal = (sizes >= torch.finfo(tensor.dtype).tiny) & (sizes <= torch.finfo(tensor.dtype).max)
    return int(torch.count_nonzero(~(is_normal | (sizes == 0))))


# ---- The report -----------------------------------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """What the figures depend on: when, where and with what they were measured."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "processor": _processor(),
        "instruction set": ops.cpu_capability() if ops.is_loaded else "none (no compiled library)",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


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


class Table(NamedTuple):
    """A table of a report; its rows are text, one at least, its notes stand under it."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: Sequence[str] = ()

    @property
    def alignment(self) -> list[Literal["left", "right"]]:
        """Numbers to the right, names and words to the left."""
        columns = list(zip(*self.rows, strict=True))
        return [
            "right" if column > 0 and any(cell[:1].isdigit() for cell in cells) else "left"
            for column, cells in enumerate(columns)
        ]


def seconds_text(*values: float) -> str:
    """A duration, or a range of them, in the unit that fits: "11.8 ms", "980-1430 ms"."""
    scale, unit = next((s, u) for s, u in ((1, "s"), (1e3, "ms"), (1e6, "µs")) if s == 1e6 or values[-1] * s >= 1)
    return f"{'-'.join(f'{scale * value:#.3g}'.rstrip('.') for value in values)} {unit}"


def bytes_text(count: int) -> str:
    """A number of bytes: "134.12 MB", "20 kB"."""
    return f"{count / 1e6:.2f} MB" if count >= 10**6 else f"{count / 1e3:.0f} kB"


_GOOD_AND_BAD: Final = {"met": "green", "not met": "red"}


def show(console: "Console", table: Table) -> None:
    """Prints a table to the terminal."""
    from rich.table import Table as RichTable  # which nothing else here needs

    console.print(table.title, style="bold", markup=False, highlight=False)
    drawn = RichTable()
    for name, side in zip(table.header, table.alignment, strict=True):
        drawn.add_column(name, justify=side)
    for row in table.rows:
        drawn.add_row(*row, style=_GOOD_AND_BAD.get(row[-1]))
    console.print(drawn)
    for note in table.notes:
        console.print(f"  {note}", markup=False, highlight=False)
    console.print()


def write_markdown(path: Path, tables: Sequence[Table], facts: Mapping[str, str]) -> None:
    """Writes a report as Markdown."""
    lines = [", ".join(f"{key}: {value}" for key, value in facts.items()), ""]
    for table in tables:
        lines += [f"### {table.title}", ""]
        rule = [":--" if side == "left" else "--:" for side in table.alignment]
        lines += ["| " + " | ".join(cells) + " |" for cells in (table.header, rule, *table.rows)] + [""]
        for note in table.notes:
            lines += [f"- {note}"]
        lines += [""] if table.notes else []
    path.write_text("\n".join(lines), encoding="utf-8")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a report as JSON."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
