"""The tables of a run: for the terminal, as Markdown, and in the pages of the documentation."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from contenders import (
    ADAM,
    ADD,
    ADD_TENSORS,
    CLIPPED,
    EMPTY,
    FAMILIES,
    FUSED,
    FUSED_FLOAT32,
    OPERATIONS,
    OURS,
    RESTORING,
    STEP_TENSORS,
    THEIRS,
    TORCH_FOR_LOOP,
    TORCH_FOREACH,
)
from measure import Spread
from results import Record, Results, Verdict, verdicts, verdicts_by_handover

if TYPE_CHECKING:
    from rich.console import Console


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

    def markdown(self) -> str:
        """Without its title."""
        rule = [":--" if side == "left" else "--:" for side in self.alignment]
        lines = ["| " + " | ".join(cells) + " |" for cells in (self.header, rule, *self.rows)]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines)


# ---- Text -----------------------------------------------------------------------------------------------------------


def seconds_text(*values: float) -> str:
    """A duration, or a range of them, in the unit that fits: "11.8 ms", "980-1430 ms"."""
    units = ((1, "s"), (1e3, "ms"), (1e6, "µs"), (1e9, "ns"))
    scale, unit = next((s, u) for s, u in units if s == 1e9 or abs(values[-1]) * s >= 0.9995)
    return f"{'-'.join(f'{scale * value:#.3g}'.rstrip('.') for value in values)} {unit}"


def bytes_text(count: float) -> str:
    """A number of bytes: "134.12 MB", "20 kB"."""
    return f"{count / 1e6:.2f} MB" if count >= 10**6 else f"{count / 1e3:.0f} kB"


def factor_text(factor: float) -> str:
    """A factor: "0.712", "1060"."""
    return f"{factor:.3g}" if factor < 1000 else f"{factor:.0f}"


def spread_text(spread: Spread) -> str:
    """A duration, and half the distance of its quartiles as a share of it: "11.8 ms ± 2 %"."""
    share = (spread.upper - spread.lower) / 2 / abs(spread.median) if spread.median else 0.0
    return f"{seconds_text(spread.median)} ± {100 * share:.0f} %"


def verdict_text(verdict: Verdict) -> tuple[str, str]:
    """The bar, and what was measured with its quartiles."""
    texts: dict[str, Callable[..., str]] = {"x": "{:.3g} x".format, "s": seconds_text, "B": bytes_text}
    text = texts[verdict.unit]
    bar = f"{'≥' if verdict.at_least else '≤'} {text(verdict.bar)}"
    if isinstance(verdict.measured, str):
        return bar, verdict.measured
    if isinstance(verdict.measured, int):
        return bar, text(verdict.measured)
    middle, lower, upper = verdict.measured
    between = f"{lower:.3g}-{upper:.3g}" if verdict.unit == "x" else seconds_text(lower, upper)
    return bar, f"{text(middle)} ({between})"


# ---- Tables ---------------------------------------------------------------------------------------------------------


def notes_of(record: Record) -> list[str]:
    """What must be known to read a record's figures."""
    timings = record.timings
    notes = []
    if timings.disturbance is not None:
        notes.append(f"meanwhile other processes used {timings.disturbance:.0%} of the machine's processors")
    if ADD in timings.seconds and record.default:
        rates = (
            f"{what} {record.bytes_of(tensors) / timings.spread(name).median / 1e9:.1f} GB/s"
            for what, tensors, name in (
                ("a.add_", ADD_TENSORS, ADD),
                ("the default", STEP_TENSORS, record.default),
            )
        )
        notes.append(f"what must be moved, over the time: {', '.join(rates)}")
    notes += [f"absent: {name}: {reason}" for name, reason in timings.absent.items()]
    notes += [f"left out: {name}: {reason}" for name, reason in record.left_out.items()]
    if record.abnormal:
        notes.append(f"not comparable: {record.abnormal} numbers became subnormal or infinite")
    return notes


def record_table(record: Record, default: str | None = None) -> Table:
    """One row a contender."""
    timings = record.timings
    default = default or record.default
    rows = []
    for name in timings.seconds:
        spread = timings.spread(name)
        rows.append(
            (
                f"{name} (the default)" if name == record.default else name,
                seconds_text(spread.median),
                seconds_text(spread.lower, spread.upper),
                factor_text(timings.ratio(name, default).median) if default in timings.seconds else "",
                seconds_text(timings.first[name]),
                str(len(timings.seconds[name])),
            )
        )
    header = (
        "contender",
        "median",
        "quartiles",
        f"time / {'default' if default == record.default else default}'s",
        "first call",
        "rounds",
    )
    return Table(f"{record.name}: {record.title}", header, rows or [("nobody", "", "", "", "", "")], notes_of(record))


def busy_notes(records: Iterable[Record]) -> list[str]:
    """Which figures are not to be trusted, if any."""
    disturbed = [record.name for record in records if record.is_disturbed]
    return [f"the machine was busy with other work during {', '.join(disturbed)}: measure again"] if disturbed else []


def matrix(title: str, records: Sequence[Record], names: Iterable[str]) -> Table:
    """One row a contender, one column a workload."""
    rows = []
    for name in names:
        cells = [
            spread_text(record.timings.spread(name)) if name in record.timings.seconds else "-" for record in records
        ]
        if any(cell != "-" for cell in cells):
            rows.append((name, *cells))
    notes = busy_notes(records)
    reasons: dict[str, list[str]] = {}
    for record in records:
        for name, reason in (record.timings.absent | record.left_out).items():
            reasons.setdefault(f"{name}: {reason}", []).append(record.name)
    notes += [f"{reason} ({', '.join(where)})" for reason, where in reasons.items()]
    return Table(title, ("one step", *(record.name for record in records)), rows, notes)


# What is measured beside the optimizers, or has a table of its own.
_ASIDE: Final = {ADD, EMPTY, FUSED_FLOAT32, *CLIPPED}


def step_tables(results: Results) -> dict[str, Table]:
    """Whole steps, by dtype: the peers; and ours with its clip options."""
    tables = {}
    peers = [name for name in FAMILIES if name not in _ASIDE]
    for dtype in dict.fromkeys(record.dtype for record in results.steps):
        records = [record for record in results.steps if record.dtype == dtype]
        tables[f"steps-{dtype}"] = matrix(f"A whole step, {dtype}", records, peers)
    clipped = [record for record in results.steps if CLIPPED.keys() & record.timings.seconds.keys()]
    if clipped:
        tables["clipping"] = matrix("A step that clips", clipped, (FUSED, *CLIPPED))
    return tables


# With fewer, the caches hold all that a step moves, and the floor means nothing.
FEWEST_ELEMENTS_IN_MEMORY: Final = 2**23


def limits_table(results: Results) -> Table | None:
    """What bounds each step of ours."""
    rate = results.memory_rate()
    rows = []
    for record in results.steps:
        if FUSED not in record.timings.seconds:
            continue
        seconds = record.timings.spread(FUSED).median
        moved = record.bytes_of(STEP_TENSORS)
        floor = f"{seconds * rate / moved:.3g}" if rate and record.elements > FEWEST_ELEMENTS_IN_MEMORY else "-"
        rows.append(
            (
                record.name,
                seconds_text(seconds),
                seconds_text(seconds / record.elements),
                seconds_text(seconds / record.tensors),
                f"{moved / seconds / 1e9:.1f} GB/s",
                floor,
                record.limit,
            )
        )
    header = ("step", "time", "an element", "a tensor", "memory moved", "time / floor", "what limits it")
    notes = [f"the floor: 7 numbers an element, at the {rate / 1e9:.1f} GB/s of `{ADD}`"] if rate else []
    return Table("What limits a fused step", header, rows, notes) if rows else None


def first_call_table(results: Results) -> Table | None:
    """Who compiles or traces, and how long."""
    records = [record for record in results.steps if record.dtype == "float32"]
    rows = []
    for name in FAMILIES:
        cells = []
        for record in records:
            first = record.timings.first.get(name)
            is_slow = first is not None and first > 0.5 and first > 5 * record.timings.spread(name).median
            cells.append(seconds_text(first) if first is not None and is_slow else "-")
        if any(cell != "-" for cell in cells):
            rows.append((name, *cells))
    header = ("the first call, which compiles", *(record.name for record in records))
    return Table("Compiling", header, rows) if rows else None


def threads_table(results: Results) -> Table | None:
    """The same step with one thread and with more."""
    rows = []
    names = list(dict.fromkeys(name for record in results.by_threads for name in record.timings.seconds))
    for record in results.by_threads:
        timings = record.timings
        known = [name for name in names if name in timings.seconds]
        if len(known) < 2:
            continue
        speedup = timings.ratio(known[0], known[-1])
        cells = [spread_text(timings.spread(name)) if name in known else "-" for name in names]
        rows.append((record.title, *cells, f"{speedup.median:.2f} x ({speedup.lower:.2f}-{speedup.upper:.2f})"))
    header = ("a fused step", *names, "faster by")
    return Table("Threads", header, rows, busy_notes(results.by_threads)) if rows else None


def operations_tables(results: Results) -> list[Table]:
    """Everything but the step, beside torch.optim.Adadelta; what giving gradients back takes is subtracted."""
    tables = []
    for record in results.operations:
        rows = []
        for operation in OPERATIONS:
            cells = []
            for optimizer in (OURS, THEIRS):
                name = f"{operation}: {optimizer}"
                spread = record.timings.spread(name)
                if operation == "zero_grad":
                    spread = record.timings.difference(name, RESTORING)
                cells.append(spread_text(spread))
            rows.append((operation, *cells))
        tables.append(
            Table(
                f"Everything but the step: {record.name}, {record.title}",
                ("", OURS, THEIRS),
                rows,
                busy_notes([record]),
            )
        )
    return tables


def setup_table(results: Results) -> Table | None:
    """Importing and building."""
    rows = [(f"import {name}", spread_text(Spread.of(values))) for name, values in results.imports.items()]
    if rows or not isinstance(results.build, str):
        build = results.build if isinstance(results.build, str) else seconds_text(results.build)
        rows.append(("building the compiled library", build))
    return Table("Importing and building", ("what", "time"), rows) if rows else None


def memory_table(results: Results) -> Table | None:
    """One row a contender, one column a workload."""
    memory = results.memory
    if not memory:
        return None
    names = list(dict.fromkeys(name for by_name in memory.values() for name in by_name))
    rows = []
    notes = [
        "by how much one step raised the peak of the process's resident memory (VmHWM of Linux, reset before the step)",
        "before it: parameters, gradients and state are there, free memory is given back; the worst of 3 steps",
    ]
    for name in names:
        extras = [by_name[name] for by_name in memory.values()]
        rows.append((name, *("absent" if isinstance(extra, str) else bytes_text(extra) for extra in extras)))
        notes += [f"absent: {name}: {extra}" for extra in dict.fromkeys(extras) if isinstance(extra, str)]
    return Table("Extra memory during a step", ("contender", *memory), rows, notes)


def curve_table(title: str, records: Sequence[Record], what: str) -> Table | None:
    """The points of a picture: one row a workload, one column a contender."""
    names = list(dict.fromkeys(name for record in records for name in record.timings.seconds))
    rows = [
        (
            f"{getattr(record, what):,}",
            *(
                seconds_text(record.timings.spread(name).median) if name in record.timings.seconds else "-"
                for name in names
            ),
        )
        for record in records
    ]
    return Table(title, (what, *names), rows, busy_notes(records)) if rows else None


def bars_table(results: Results) -> Table | None:
    """One row a bar."""
    words = {True: "met", False: "not met", None: "not measured"}
    rows = [(v.workload, v.what, *verdict_text(v), words[v.is_met]) for v in verdicts(results)]
    notes = busy_notes((*results.steps, *results.by_rows))
    header = ("workload", "what", "bar", "measured (quartiles)", "verdict")
    return Table("Bars", header, rows, notes) if rows else None


def _rounds(count: int) -> str:
    return f"{count} round{'s' if count > 1 else ''}"


def handovers_table(results: Results) -> Table | None:
    """The bars in the rounds with short handovers, and in those with long ones; nothing, if none were measured."""
    if not any(record.timings.handovers for record in (*results.steps, *results.by_rows)):
        return None
    rows, notes = [], []
    for record in (*results.steps, *results.by_rows):
        parts = verdicts_by_handover(record, results)
        pairs = list(zip(*(judged for _, judged in parts), strict=True))
        for short, long in pairs:
            bar, measured = verdict_text(short)
            rows.append((record.name, short.what, bar, measured, verdict_text(long)[1]))
        if pairs:
            values = [timings.handovers or [] for timings, _ in parts]
            texts = (f"{seconds_text(Spread.of(part).median)} in {_rounds(len(part))}" for part in values)
            notes.append(f"{record.name}: a handover took {' and '.join(texts)}")
    header = ("workload", "what", "bar", "short handovers", "long handovers")
    return Table(
        "Bars, by how long a line of memory takes from processor to processor",
        header,
        rows or [("none", "had rounds of both kinds", "", "", "")],
        notes,
    )


def tables_of(results: Results) -> dict[str, Table]:
    """All tables that sum up a run, by name."""
    tables: dict[str, Table | None] = dict(step_tables(results))
    tables["limits"] = limits_table(results)
    tables["compiling"] = first_call_table(results)
    tables["elements"] = curve_table("One tensor of more and more elements", results.by_elements, "elements")
    tables["tensors"] = curve_table("More and more tensors of 16 elements", results.by_tensors, "tensors")
    if results.by_rows:
        names = list(dict.fromkeys(name for record in results.by_rows for name in record.timings.seconds))
        tables["sparse"] = matrix("1,000 rows of a table, float32, other rows each time", results.by_rows, names)
    tables["threads"] = threads_table(results)
    for record in results.training:
        tables["training"] = record_table(record, OURS)
    for record, table in zip(results.operations, operations_tables(results), strict=True):
        tables[f"operations-{record.name}"] = table
    tables["setup"] = setup_table(results)
    tables["memory"] = memory_table(results)
    tables["bars"] = bars_table(results)
    tables["handovers"] = handovers_table(results)
    return {name: table for name, table in tables.items() if table}


# ---- Where they go --------------------------------------------------------------------------------------------------

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


def facts_text(machine: Mapping[str, str]) -> str:
    """When, where and with what was measured, in a line."""
    return ", ".join(f"{key}: {value}" for key, value in machine.items())


def write_markdown(path: Path, results: Results) -> None:
    """Writes a report as Markdown: what sums the run up, then every workload."""
    tables = [*tables_of(results).values(), *map(record_table, results.steps)]
    sections = [facts_text(results.machine), *(f"### {table.title}\n\n{table.markdown()}" for table in tables)]
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def readme_table(results: Results) -> Table | None:
    """The steps that the README shows."""
    rows, used = [], []
    for name in ("1x16M", "1x16M-bfloat16", "200x4096", "1000x16", "1x16", "resnet50", "gpt2_small"):
        record = results.step(name)
        if record is None or FUSED not in record.timings.seconds:
            continue

        ours, for_loop, foreach, adam = (
            record.timings.spread(name).median for name in (FUSED, TORCH_FOR_LOOP, TORCH_FOREACH, ADAM)
        )
        theirs = seconds_text(for_loop, foreach).replace("-", " · ")
        rows.append((record.title, seconds_text(ours), theirs, seconds_text(adam)))
        used.append(record)
    header = ("parameters", f"`{OURS}`", f"`{THEIRS}` for-loop · foreach", "PyTorch's fused Adam")
    return Table("Speed", header, rows, busy_notes(used)) if rows else None


def fill_in(page: Path, results: Results) -> None:
    """Puts the tables of a run into a page, between `<!-- bench: NAME -->` and `<!-- end -->`.

    Raises:
        ValueError: the page asks for a table that the run has not.
    """
    blocks = {name: table.markdown() for name, table in tables_of(results).items()}
    blocks["machine"] = f"{facts_text(results.machine)}; {results.options}, {results.seconds / 60:.0f} minutes in all."
    if readme := readme_table(results):
        blocks["readme"] = readme.markdown()

    asked = re.findall(_BLOCK, page.read_text(encoding="utf-8"), re.DOTALL)
    if missing := [name for name in asked if name not in blocks]:
        raise ValueError(f"{page} asks for {missing[0]!r}, which this run has not; it has {', '.join(blocks)}")
    put_blocks(page, blocks)


_BLOCK: Final = r"<!-- bench: ([\w-]+) -->\n.*?<!-- end -->"


def put_blocks(page: Path, blocks: Mapping[str, str]) -> None:
    """Puts texts into a page by their names; what it has of other names stays."""

    def block(match: re.Match[str]) -> str:
        return f"<!-- bench: {match[1]} -->\n{blocks[match[1]]}\n<!-- end -->" if match[1] in blocks else match[0]

    page.write_text(re.sub(_BLOCK, block, page.read_text(encoding="utf-8"), flags=re.DOTALL), encoding="utf-8")
