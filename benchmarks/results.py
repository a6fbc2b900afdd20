"""What has been measured: records that go to JSON and come back, and the targets that they are held to."""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

import implementations as impl
from timing import COLD, STEP, Run, Spread
from workloads import Workload

# The share of the processors in other hands above which figures are not to be trusted.
MOST_DISTURBANCE: Final = 0.05


class Record(NamedTuple):
    """A workload in a part of the benchmark, and what each run measured. A figure is the median of the runs'."""

    part: str
    name: str
    title: str
    tensors: int
    elements: int
    dtype: str
    item_size: int
    limit: str
    runs: list[Run]

    @classmethod
    def of(cls, part: str, workload: Workload, run: Run) -> "Record":
        """What is known of a workload, with its first run."""
        size = workload.dtype.itemsize
        facts = len(workload.shapes), workload.numel, workload.dtype_name, size, workload.limit
        return cls(part, workload.name, workload.title, *facts, [run])

    @property
    def names(self) -> list[str]:
        """Who was measured."""
        return list(dict.fromkeys(name for run in self.runs for name in run.seconds))

    @property
    def absent(self) -> dict[str, str]:
        """Who was not, in one run at least, and why."""
        return {name: reason for run in self.runs for name, reason in run.absent.items()}

    @property
    def disturbance(self) -> float | None:
        """The largest of the runs."""
        return max((run.disturbance for run in self.runs if run.disturbance is not None), default=None)

    def has(self, name: str, kind: str = STEP) -> bool:
        """Whether there is a figure."""
        return any(kind in run.seconds.get(name, {}) for run in self.runs)

    def spread(self, name: str, kind: str = STEP) -> Spread:
        """The seconds of one call."""
        return self._median(lambda run: run.seconds[name][kind])

    def ratio(self, name: str, other: str, kind: str = STEP) -> Spread:
        """How many times as long `name` takes as `other`, over the rounds that both took part in."""
        return self._median(lambda run: [a / b for a, b in _pairs(run, name, other, kind)])

    def difference(self, name: str, other: str, kind: str = STEP) -> Spread:
        """How many seconds longer `name` takes than `other`, over the rounds that both took part in."""
        return self._median(lambda run: [a - b for a, b in _pairs(run, name, other, kind)])

    def first(self, name: str) -> float:
        """The seconds of the very first call."""
        return median(run.first[name] for run in self.runs if name in run.first)

    @property
    def memory(self) -> dict[str, int]:
        """The extra bytes during a step."""
        names = dict.fromkeys(name for run in self.runs for name in run.memory)
        return {name: round(median(run.memory[name] for run in self.runs if name in run.memory)) for name in names}

    def rate(self, name: str) -> float | None:
        """Bytes a second that must have been moved, or None if that is unknown, or the caches hold them."""
        is_known = name in impl.TENSORS_MOVED and self.part == "steps" and self.has(name)
        if not is_known or self.elements < FEWEST_ELEMENTS_IN_MEMORY:
            return None
        return impl.TENSORS_MOVED[name] * self.elements * self.item_size / self.spread(name).median

    def _median(self, values: Callable[[Run], list[float]]) -> Spread:
        spreads = []
        for run in self.runs:
            with suppress(KeyError):  # absent in this run
                spreads.append(Spread.of(values(run)))
        if not spreads:
            raise KeyError(f"{self.name} has no such figure")
        return Spread(*map(median, zip(*spreads, strict=True)))


def _pairs(run: Run, name: str, other: str, kind: str) -> zip:
    return zip(run.seconds[name][kind], run.seconds[other][kind], strict=False)


# With fewer, the caches hold much of what a step moves.
FEWEST_ELEMENTS_IN_MEMORY: Final = 2**23


class Results(NamedTuple):
    """All that was measured. Durations are seconds."""

    machine: dict[str, str]
    options: str
    runs: int
    seconds: float
    records: list[Record]

    def add(self, record: Record) -> None:
        """Adds a run of a workload."""
        for known in self.of(record.part):
            if known.name == record.name:
                known.runs.extend(record.runs)
                return
        self.records.append(record)

    def of(self, *parts: str) -> list[Record]:
        """The records of some parts."""
        return [record for record in self.records if record.part in parts]

    def memory_rate(self) -> float | None:
        """Bytes a second that `a.add_(b, alpha=c)` or a device copy moved, out of cache."""
        return next((rate for r in self.of("steps") for name in (impl.ADD, impl.COPY) if (rate := r.rate(name))), None)

    def write(self, path: Path) -> None:
        """Writes everything as JSON, every turn included, and what became of the targets besides."""
        data = {**_plain(self), "targets": [outcome._asdict() for outcome in judged(self)]}
        path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Reads what `write` wrote."""
        data = json.loads(path.read_text(encoding="utf-8"))
        del data["targets"]
        records = [Record(**{**r, "runs": [Run(**run) for run in r["runs"]]}) for r in data.pop("records")]
        return cls(**data, records=records)


def _plain(value: Any) -> Any:
    """NamedTuples as dictionaries, which JSON would make lists of."""
    if hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


# ---- Targets --------------------------------------------------------------------------------------------------------


# Of a record, and of STEP or COLD. A KeyError says that there is no such figure.
Measured = Callable[[Record, str], Spread]


class Target(NamedTuple):
    """What the steps of some workloads must reach: a factor, or seconds."""

    workload: str  # a regular expression
    what: str
    limit: float
    at_least: bool
    measured: Measured
    unit: str = "x"
    # What depends on where the host of a virtual machine has put its processors is a figure, and neither pass nor fail.
    is_judged: bool = True


def _to_fused(name: str, scale: float = 1.0) -> Measured:
    """How many times as long one takes as the fused step."""
    return lambda record, kind: Spread(*(scale * value for value in record.ratio(name, impl.FUSED, kind)))


def _share_of(probe: str) -> Measured:
    """The bytes a second of the fused step, as a share of a probe's."""
    return _to_fused(probe, impl.STEP_TENSORS / impl.TENSORS_MOVED[probe])


def _better_torch(record: Record, kind: str) -> Spread:
    better = min(impl.TORCH_FOREACH, impl.TORCH_FOR_LOOP, key=lambda name: record.spread(name, kind).median)
    return record.ratio(better, impl.FUSED, kind)


def _beyond_empty(record: Record, kind: str) -> Spread:
    return record.difference(impl.FUSED, impl.EMPTY, kind)


_TORCH: Final = "speed against torch.optim.Adadelta's better path"
_FOREACH: Final = "speed against torch.optim.Adadelta, foreach"
_ADAM: Final = "speed against torch's fused Adam"
_CLIPNORM: Final = "time with clipnorm against the unclipped step"
_GLOBAL: Final = "time with global_clipnorm against the unclipped step"
_BFLOAT16: Final = "speed against float32"

ON_CPU: Final = (
    Target("1x16M", _TORCH, 9, True, _better_torch, is_judged=False),
    Target("1x16M", "bytes a second against those of add_", 0.87, True, _share_of(impl.ADD)),
    Target("1x16M", _CLIPNORM, 1.25, False, _to_fused(impl.CLIPNORM), is_judged=False),
    Target("1x16M", _GLOBAL, 1.25, False, _to_fused(impl.GLOBAL_CLIPNORM), is_judged=False),
    Target("1x16M-bfloat16", _BFLOAT16, 1.6, True, _to_fused(impl.FUSED_FLOAT32), is_judged=False),
    Target("200x4096", _TORCH, 20, True, _better_torch),
    Target("1000x16", _TORCH, 14, True, _better_torch),
    Target("1000x16", _ADAM, 4, True, _to_fused(impl.ADAM)),
    Target("1x16", "time beyond an empty step", 1e-5, False, _beyond_empty, "s"),
    Target("1x32K, 1 thread", "speed against torch.compile's kernel", 0.9, True, _to_fused(impl.TORCH_COMPILED)),
)
_LARGE: Final = "1x(64M|1G)(-bfloat16)?"
_SMALL: Final = "1000x16(-bfloat16)?"
ON_CUDA: Final = (
    Target(_LARGE, "bytes a second against those of a device copy", 0.92, True, _share_of(impl.COPY)),
    Target(_LARGE, _FOREACH, 3.4, True, _to_fused(impl.TORCH_FOREACH)),
    Target(_LARGE, "speed against torch.compile", 1, True, _to_fused(impl.TORCH_COMPILED)),
    Target(_LARGE, _CLIPNORM, 1.25, False, _to_fused(impl.CLIPNORM)),
    Target(_LARGE, _GLOBAL, 1.25, False, _to_fused(impl.GLOBAL_CLIPNORM)),
    Target("1x(64M|1G)-bfloat16", _BFLOAT16, 1.7, True, _to_fused(impl.FUSED_FLOAT32)),
    Target(_SMALL, _FOREACH, 5, True, _to_fused(impl.TORCH_FOREACH)),
    Target(_SMALL, _ADAM, 2, True, _to_fused(impl.ADAM)),
    Target(_SMALL, "a graph replay", 1e-5, False, lambda record, kind: record.spread(impl.REPLAY, kind), "s"),
)
ON_BOTH: Final = (
    Target("1000000x64", "speed against a step by a dense gradient", 100, True, _to_fused(impl.FUSED + impl.DENSE)),
)


# Whose steps must take less than 1 MB, and 64 bytes a tensor.
LITTLE_MEMORY: Final = (impl.FUSED, impl.CLIPNORM, impl.GLOBAL_CLIPNORM)


class Outcome(NamedTuple):
    """A target, and what was measured."""

    workload: str
    what: str
    limit: float
    at_least: bool
    unit: str  # "x", "s" or "B"
    measured: Spread | None
    cold: Spread | None  # with cold caches: a figure, and neither pass nor fail
    result: str  # "pass", "fail", "a figure" or "not measured"


def judged(results: Results) -> list[Outcome]:
    """What became of the targets of the workloads that were run."""
    outcomes = []
    for target in (*(ON_CUDA if "GPU" in results.machine else ON_CPU), *ON_BOTH):
        for record in results.of("steps", "sparse"):
            if not re.fullmatch(target.workload, record.name):
                continue
            head = record.name, target.what, target.limit, target.at_least, target.unit
            found: dict[str, Spread | None] = {STEP: None, COLD: None}
            for kind in found:
                with suppress(KeyError):
                    found[kind] = target.measured(record, kind)
            result = _result(found[STEP], target.limit, target.at_least, is_judged=target.is_judged)
            outcomes.append(Outcome(*head, found[STEP], found[COLD], result))
    for record in results.records:
        for name in LITTLE_MEMORY:
            if name in record.memory:
                limit, extra = 10**6 + 64 * record.tensors, Spread.of([record.memory[name]])
                head = record.name, f"extra memory: {name}", limit, False, "B"
                outcomes.append(Outcome(*head, extra, None, _result(extra, limit, False)))
    return outcomes


def _result(measured: Spread | None, limit: float, at_least: bool, *, is_judged: bool = True) -> str:
    if measured is None:
        return "not measured"
    is_met = measured.median >= limit if at_least else measured.median <= limit
    return "a figure" if not is_judged else "pass" if is_met else "fail"
