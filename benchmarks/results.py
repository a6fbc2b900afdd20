"""What a run has measured: records that go to JSON and come back, and the bars that they are held to."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from contenders import (
    ADAM,
    ADD,
    ADD_TENSORS,
    CLIPNORM,
    DENSE,
    EMPTY,
    FOR_LOOP,
    FUSED,
    FUSED_FLOAT32,
    GLOBAL_CLIPNORM,
    STEP_TENSORS,
    TORCH_COMPILED,
    TORCH_FOR_LOOP,
    TORCH_FOREACH,
)
from measure import Spread, Timings, write_json
from workloads import Workload

# The share of the processors in other hands above which figures are not to be trusted.
MOST_DISTURBANCE: Final = 0.05


class Record(NamedTuple):
    """A workload and the timings of its contenders."""

    name: str
    title: str
    tensors: int
    elements: int
    dtype: str
    item_size: int
    limit: str
    timings: Timings
    left_out: dict[str, str]
    abnormal: int = 0  # infinite, nan or subnormal numbers after the run

    @classmethod
    def of(
        cls, workload: Workload, timings: Timings, left_out: Mapping[str, str] | None = None, abnormal: int = 0
    ) -> "Record":
        """What is known of a workload, with its timings."""
        return cls(
            workload.name,
            workload.title,
            len(workload.shapes),
            workload.numel,
            workload.dtype_name,
            workload.dtype.itemsize,
            workload.limit,
            timings,
            dict(left_out or {}),
            abnormal,
        )

    @property
    def default(self) -> str | None:
        """What AdadeltaKeras does when it is told nothing, if it was measured."""
        return next((name for name in (FUSED, FOR_LOOP) if name in self.timings.seconds), None)

    @property
    def is_disturbed(self) -> bool:
        """Whether others used the machine meanwhile."""
        return (self.timings.disturbance or 0) > MOST_DISTURBANCE

    def bytes_of(self, tensors: int) -> int:
        """What must be moved where each element has this many tensors read or written."""
        return tensors * self.elements * self.item_size


PIECES: Final = "put together from several runs"

Memory = dict[str, dict[str, int | str]]  # workload → contender → bytes, or why there is no figure


class Results(NamedTuple):
    """All of a run. Durations are seconds."""

    machine: dict[str, str]
    options: str
    seconds: float
    steps: list[Record]
    by_elements: list[Record]
    by_tensors: list[Record]
    by_threads: list[Record]
    by_rows: list[Record]
    operations: list[Record]
    training: list[Record]
    memory: Memory
    imports: dict[str, list[float]]
    build: float | str  # or why it was not measured

    @classmethod
    def empty(cls, machine: dict[str, str], options: str) -> "Results":
        """Before anything is measured."""
        return cls(machine, options, 0.0, [], [], [], [], [], [], [], {}, {}, "left out")

    def updated(self, newer: "Results") -> "Results":
        """These results, where newer ones of the same machine and versions do not replace them.

        Raises:
            ValueError: the newer ones are of another machine, or of other versions.
        """
        changed = [key for key, value in self.machine.items() if key != "date" and newer.machine.get(key) != value]
        if changed:
            raise ValueError(f"what is to be updated was measured with another {', '.join(changed)}")
        parts: dict[str, Any] = {
            "machine": newer.machine,
            "options": PIECES if self.seconds else newer.options,
            "seconds": self.seconds + newer.seconds,
            "memory": self.memory | newer.memory,
            "imports": self.imports | newer.imports,
        }
        for name in self._fields:
            records = getattr(self, name)
            if isinstance(records, list):
                by_name = {record.name: record for record in (*records, *getattr(newer, name))}
                parts[name] = list(by_name.values())
        if not isinstance(newer.build, str):
            parts["build"] = newer.build
        return self._replace(**parts)

    def step(self, name: str) -> Record | None:
        """The record of a workload."""
        return next((record for record in (*self.steps, *self.by_rows) if record.name == name), None)

    def memory_rate(self) -> float | None:
        """Bytes a second that `a.add_(b, alpha=c)` moved, out of cache."""
        for record in self.steps:
            if ADD in record.timings.seconds and record.item_size == 4:
                return record.bytes_of(ADD_TENSORS) / record.timings.spread(ADD).median
        return None

    def write(self, path: Path) -> None:
        """Writes everything as JSON, each turn of each contender included, and the summaries and bars besides."""
        data = _plain(self)
        for part in data.values():
            for record in part if isinstance(part, list) else ():
                timings = Timings(**record["timings"])
                record["summary"] = {name: timings.spread(name)._asdict() for name in timings.seconds}
        data["bars"] = [verdict._asdict() for verdict in verdicts(self)]
        write_json(path, data)

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Reads what `write` wrote."""
        data = json.loads(path.read_text(encoding="utf-8"))
        del data["bars"]
        for part in data.values():
            for position, record in enumerate(part) if isinstance(part, list) else ():
                del record["summary"]
                part[position] = Record(**{**record, "timings": Timings(**record["timings"])})
        return cls(**data)


def _plain(value: Any) -> Any:
    """NamedTuples as dictionaries, which JSON would make lists of."""
    if hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


# ---- Bars -----------------------------------------------------------------------------------------------------------


def better_torch(timings: Timings) -> str:
    """The faster path of torch.optim.Adadelta."""
    return min(TORCH_FOREACH, TORCH_FOR_LOOP, key=lambda name: timings.spread(name).median)


def against_torch(timings: Timings) -> Spread:
    """By what factor the step is faster than the better path of torch.optim.Adadelta."""
    return timings.ratio(better_torch(timings), FUSED)


def against_probe(timings: Timings) -> Spread:
    """The step as a multiple of the time that its bytes would take at the rate of the bandwidth probe."""
    bytes_ratio = STEP_TENSORS / ADD_TENSORS
    return Spread(*(value / bytes_ratio for value in timings.ratio(FUSED, ADD)))


def ratio(name: str, other: str, timings: Timings) -> Spread:
    """How many times as long one takes as the other."""
    return timings.ratio(name, other)


class Bar(NamedTuple):
    """What the time of a workload's step must reach: a factor, or seconds."""

    workload: str
    what: str
    bar: float
    at_least: bool
    measured: Callable[[Timings], Spread]
    is_factor: bool = True


BARS: Final = (
    Bar("1x16M", "speed against torch.optim.Adadelta's better path", 9, True, against_torch),
    Bar("1x16M", "time against 28 bytes an element at the rate of add_", 1.15, False, against_probe),
    Bar("1x16M", "time with clipnorm against the unclipped step", 1.25, False, partial(ratio, CLIPNORM, FUSED)),
    Bar(
        "1x16M",
        "time with global_clipnorm against the unclipped step",
        1.25,
        False,
        partial(ratio, GLOBAL_CLIPNORM, FUSED),
    ),
    Bar("200x4096", "speed against torch.optim.Adadelta's better path", 20, True, against_torch),
    Bar("1000x16", "speed against torch.optim.Adadelta's better path", 14, True, against_torch),
    Bar("1000x16", "speed against torch's fused Adam", 4, True, partial(ratio, ADAM, FUSED)),
    Bar(
        "1x16",
        "time beyond an empty step",
        10e-6,
        False,
        lambda timings: timings.difference(FUSED, EMPTY),
        is_factor=False,
    ),
    Bar("1x32K, 1 thread", "speed against torch.compile's kernel", 0.9, True, partial(ratio, TORCH_COMPILED, FUSED)),
    Bar(
        "1000000x64",
        "speed with a sparse gradient of 1,000 rows against a dense one",
        100,
        True,
        partial(ratio, FUSED + DENSE, FUSED),
    ),
    Bar("1x16M-bfloat16", "speed against float32", 1.6, True, partial(ratio, FUSED_FLOAT32, FUSED)),
)


class Verdict(NamedTuple):
    """A bar and what was measured: a spread, bytes, or why there is no figure."""

    workload: str
    what: str
    bar: float
    at_least: bool
    unit: str  # "x", "s" or "B"
    measured: Spread | int | str
    is_met: bool | None


def verdicts(results: Results) -> list[Verdict]:
    """What became of the bars of the workloads that were run."""
    return verdicts_on_time(results) + verdicts_on_memory(results)


def verdicts_by_handover(record: Record, results: Results) -> list[tuple[Timings, list[Verdict]]]:
    """The rounds of a workload with short handovers, and those with long ones, each with what became of its bars.

    Nothing, unless it had both.
    """
    return [
        (part, verdicts_on_time(results._replace(steps=[record._replace(timings=part)], by_rows=[])))
        for part in record.timings.by_handover()
    ]


def verdicts_on_time(results: Results) -> list[Verdict]:
    """What became of the bars on time."""
    judged = []
    for bar in BARS:
        record = results.step(bar.workload)
        if record is None:
            continue
        unit = "x" if bar.is_factor else "s"
        try:
            spread: Spread | str = bar.measured(record.timings)
        except KeyError as missing:
            judged.append(
                Verdict(bar.workload, bar.what, bar.bar, bar.at_least, unit, f"{missing.args[0]}: absent", None)
            )
            continue
        assert isinstance(spread, Spread)
        is_met = spread.median >= bar.bar if bar.at_least else spread.median <= bar.bar
        judged.append(Verdict(bar.workload, bar.what, bar.bar, bar.at_least, unit, spread, is_met))
    return judged


def verdicts_on_memory(results: Results) -> list[Verdict]:
    """What became of the bars on memory."""
    judged = []
    for name, by_contender in results.memory.items():
        record = results.step(name)
        extra = by_contender.get(FUSED, "not measured")
        most = 10**6 + 64 * (record.tensors if record else 0)
        met = extra < most if isinstance(extra, int) else None
        judged.append(Verdict(name, "extra memory during a fused step", most, False, "B", extra, met))
    return judged
