"""The tables of a run: for the terminal, as Markdown, and in the pages of the documentation."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import implementations as impl
from results import MOST_DISTURBANCE, Outcome, Record, Results, judged
from timing import COLD, HOST, STEP, Spread


class Table(NamedTuple):
    """A table of a report; its cells are text, its notes stand under it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """Without its title; numbers to the right, names and words to the left."""
        from tabulate import tabulate  # which measuring does not need

        columns = enumerate(zip(*self.rows, strict=True))
        sides = ["right" if i > 0 and any(cell[:1].isdigit() for cell in cells) else "left" for i, cells in columns]
        text = tabulate(self.rows, self.header, "pipe", disable_numparse=True, colalign=sides)
        return "\n".join([text, *([""] if self.notes else []), *(f"- {note}" for note in self.notes)])

    def section(self) -> str:
        """With its title."""
        return f"### {self.title}\n\n{self.markdown()}\n"


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


def facts_text(machine: Mapping[str, str]) -> str:
    """When, where and with what was measured, in a line."""
    return ", ".join(f"{key}: {value}" for key, value in machine.items())


# ---- Tables ---------------------------------------------------------------------------------------------------------


def busy_notes(records: Iterable[Record]) -> list[str]:
    """Which figures are not to be trusted, if any."""
    disturbed = [record.name for record in records if (record.disturbance or 0) > MOST_DISTURBANCE]
    return [f"the machine was busy with other work during {', '.join(disturbed)}: measure again"] if disturbed else []


def rows_of(record: Record) -> list[dict[str, str]]:
    """All that is known of each implementation of a workload, by column."""
    base = impl.OURS if record.part == "training" else impl.FUSED
    rows = []
    for name in record.names:
        spread, rate = record.spread(name), record.rate(name)
        row = {
            "implementation": name,
            "median": seconds_text(spread.median),
            "quartiles": seconds_text(spread.lower, spread.upper),
            "cold caches": seconds_text(record.spread(name, COLD).median) if record.has(name, COLD) else "",
            "host": seconds_text(record.spread(name, HOST).median) if record.has(name, HOST) else "",
            f"time / {base}'s": factor_text(record.ratio(name, base).median) if record.has(base) else "",
            "bytes it must move": f"{rate / 1e9:.1f} GB/s" if rate else "",
            "first call": seconds_text(record.first(name)) if record.part != "setup" else "",
            "rounds": " + ".join(str(len(run.seconds[name][STEP])) for run in record.runs if name in run.seconds),
        }
        rows.append(row)
    return rows


def notes_of(record: Record) -> list[str]:
    """What must be known to read a record's figures."""
    notes = [f"absent: {name}: {reason}" for name, reason in record.absent.items()]
    if record.disturbance is not None:
        notes.append(f"meanwhile other processes used {record.disturbance:.0%} of the machine's processors")
    if abnormal := sum(run.abnormal for run in record.runs):
        notes.append(f"not comparable: {abnormal} numbers became subnormal or infinite")
    return notes


def record_table(record: Record) -> Table:
    """One row an implementation, one column for whatever one of them has."""
    rows = rows_of(record)
    header = [column for column in rows[0] if any(row[column] for row in rows)] if rows else ["implementation"]
    cells = [[row[column] for column in header] for row in rows]
    return Table(f"{record.name}: {record.title}", header, cells or [["nobody"]], notes_of(record))


# What is measured beside the optimizers, or has a table of its own.
ASIDE: Final = {impl.ADD, impl.COPY, impl.EMPTY, impl.FUSED_FLOAT32, *impl.CLIPPED}


def matrix(title: str, records: Sequence[Record], names: Iterable[str]) -> Table | None:
    """One row an implementation, one column a workload, two where it was measured with cold caches, too."""
    columns = [(r, kind) for r in records for kind in (STEP, COLD) if any(r.has(name, kind) for name in r.names)]
    rows = [
        [name, *(spread_text(r.spread(name, kind)) if r.has(name, kind) else "-" for r, kind in columns)]
        for name in names
        if any(record.has(name) for record in records)
    ]
    reasons: dict[str, list[str]] = {}
    for record in records:
        for name in record.absent.keys() & set(names):
            reason = record.absent[name]
            reasons.setdefault(f"{name}: {reason}", []).append(record.name)
    notes = busy_notes(records) + [f"{reason} ({', '.join(where)})" for reason, where in reasons.items()]
    header = ["one step", *(f"{record.name}, cold" if kind == COLD else record.name for record, kind in columns)]
    return Table(title, header, rows, notes) if rows else None


def limits_table(results: Results) -> Table | None:
    """What bounds each step of ours."""
    floor = results.memory_rate()
    rows = []
    for record in results.of("steps"):
        if not record.has(impl.FUSED):
            continue
        seconds, rate = record.spread(impl.FUSED).median, record.rate(impl.FUSED)
        moved = impl.STEP_TENSORS * record.elements * record.item_size / seconds
        each = (seconds_text(seconds / count) for count in (1, record.elements, record.tensors))
        share = f"{floor / rate:.3g}" if floor and rate else "-"
        rows.append([record.name, *each, f"{moved / 1e9:.1f} GB/s", share, record.limit])
    header = ("step", "time", "an element", "a tensor", "memory moved", "time / floor", "what limits it")
    notes = [f"the floor: 7 numbers an element, at the {floor / 1e9:.1f} GB/s of `{impl.ADD}`"] if floor else []
    return Table("What limits a fused step", header, rows, notes) if rows else None


def first_call_table(results: Results) -> Table | None:
    """Who compiles or traces, and how long."""
    records = [record for record in results.of("steps") if record.dtype == "float32"]

    def compiles(record: Record, name: str) -> bool:
        return record.has(name) and record.first(name) > max(0.5, 5 * record.spread(name).median)

    rows = [
        [name, *(seconds_text(record.first(name)) if compiles(record, name) else "-" for record in records)]
        for name in impl.ORDER
        if any(compiles(record, name) for record in records)
    ]
    header = ["the first call, which compiles", *(record.name for record in records)]
    return Table("Compiling", header, rows) if rows else None


def threads_table(records: Sequence[Record]) -> Table | None:
    """The same step with one thread and with more."""
    names = list(dict.fromkeys(name for record in records for name in record.names))
    rows = []
    for record in records:
        for kind in (STEP, COLD):
            known = [name for name in names if record.has(name, kind)]
            if len(known) > 1:
                cells = [spread_text(record.spread(name, kind)) if name in known else "-" for name in names]
                faster = "{:.2f} x ({:.2f}-{:.2f})".format(*record.ratio(known[0], known[-1], kind))
                rows.append([record.title + (", cold" if kind == COLD else ""), *cells, faster])
    return Table("Threads", ["a fused step", *names, "faster by"], rows, busy_notes(records)) if rows else None


def operations_table(record: Record) -> Table:
    """Everything but the step, beside torch.optim.Adadelta; what giving gradients back takes is subtracted."""
    rows = []
    for what in impl.OPERATIONS:
        names = [f"{what}: {whose}" for whose in (impl.OURS, impl.THEIRS)]
        spreads = [record.difference(n, impl.RESTORING) if what == "zero_grad" else record.spread(n) for n in names]
        rows.append([what, *map(spread_text, spreads)])
    title = f"Everything but the step: {record.name}, {record.title}"
    return Table(title, ("", impl.OURS, impl.THEIRS), rows, busy_notes([record]))


def memory_table(records: Sequence[Record]) -> Table | None:
    """One row an implementation, one column a workload."""
    names = dict.fromkeys(name for record in records for name in record.memory)
    rows = [[name, *(bytes_text(r.memory[name]) if name in r.memory else "-" for r in records)] for name in names]
    notes = [
        "by how much one step raised the peak of the process's resident memory (VmHWM of Linux, reset before the step)",
        "before it: parameters, gradients and state are there, free memory is given back; the worst of 3 steps",
        *dict.fromkeys(f"absent: {name}: {reason}" for record in records for name, reason in record.absent.items()),
    ]
    header = ["implementation", *(record.name for record in records)]
    return Table("Extra memory during a step", header, rows, notes) if rows else None


def setup_table(records: Sequence[Record]) -> Table | None:
    """Importing and building."""
    rows = [[name, spread_text(record.spread(name))] for record in records for name in record.names]
    rows += [[name, reason] for record in records for name, reason in record.absent.items()]
    return Table("Importing and building", ("what", "time"), rows) if rows else None


def target_cells(outcome: Outcome) -> list[str]:
    """A row of the table of targets."""
    texts: dict[str, Callable[..., str]] = {"x": "{:.3g} x".format, "s": seconds_text, "B": bytes_text}
    text = texts[outcome.unit]

    def measured(spread: Spread | None) -> str:
        if spread is None or outcome.unit == "B":
            return text(spread.median) if spread else "-"
        ends = seconds_text(*spread[1:]) if outcome.unit == "s" else "{:.3g}-{:.3g}".format(*spread[1:])
        return f"{text(spread.median)} ({ends})"

    target = f"{'≥' if outcome.at_least else '≤'} {text(outcome.limit)}"
    return [outcome.workload, outcome.what, target, measured(outcome.measured), measured(outcome.cold), outcome.result]


def targets_table(results: Results) -> Table | None:
    """One row a target and workload."""
    rows = [target_cells(outcome) for outcome in judged(results)]
    header = ("workload", "what", "target", "measured (quartiles)", "cold caches", "result")
    return Table("Targets", header, rows, busy_notes(results.of("steps", "sparse"))) if rows else None


# The steps that the README shows; a quick run has none of them, and shows all that it has.
README: Final = ("1x16M", "1x16M-bfloat16", "200x4096", "1000x16", "1x16", "resnet50", "gpt2_small")


def readme_table(results: Results) -> Table | None:
    """The steps that the README shows, those of small tensors with warm and with cold caches."""
    rows = []
    columns = impl.FUSED, impl.TORCH_FOR_LOOP, impl.TORCH_FOREACH, impl.ADAM
    steps = [record for record in results.of("steps") if all(map(record.has, columns))]
    records = [record for name in README for record in steps if record.name == name] or steps
    for record in records:
        for kind in (STEP, COLD):
            if record.has(impl.FUSED, kind):
                ours, for_loop, foreach, adam = (seconds_text(record.spread(n, kind).median) for n in columns)
                title = record.title + (", cold caches" if kind == COLD else "")
                rows.append([title, ours, f"{for_loop} · {foreach}", adam])
    header = ("parameters", f"`{impl.OURS}`", f"`{impl.THEIRS}` for-loop · foreach", "PyTorch's fused Adam")
    return Table("Speed", header, rows, busy_notes(records)) if rows else None


# Workloads that grow.
CURVES: Final = {
    "elements": "One tensor of more and more elements",
    "tensors": "More and more tensors of 16 elements",
    "sparse": "1,000 rows of a table, float32, other rows each time",
}


def tables_of(results: Results) -> dict[str, Table]:
    """All tables that sum up a run, by name."""
    steps = results.of("steps")
    optimizers = [name for name in impl.ORDER if name not in ASIDE]
    tables: dict[str, Table | None] = {}
    for dtype in dict.fromkeys(record.dtype for record in steps):
        of_dtype = [record for record in steps if record.dtype == dtype]
        tables[f"steps-{dtype}"] = matrix(f"A whole step, {dtype}", of_dtype, optimizers)
    clipped = [record for record in steps if any(map(record.has, impl.CLIPPED))]
    tables["clipping"] = matrix("A step that clips", clipped, (impl.FUSED, *impl.CLIPPED))
    tables["limits"] = limits_table(results)
    tables["compiling"] = first_call_table(results)
    for part, title in CURVES.items():
        names = dict.fromkeys(name for record in results.of(part) for name in record.names)
        tables[part] = matrix(title, results.of(part), names)
    tables["threads"] = threads_table(results.of("threads"))
    tables["training"] = next(map(record_table, results.of("training")), None)
    tables |= {f"operations-{record.name}": operations_table(record) for record in results.of("operations")}
    tables["setup"] = setup_table(results.of("setup"))
    tables["memory"] = memory_table(results.of("memory"))
    tables["targets"] = targets_table(results)
    return {name: table for name, table in tables.items() if table}


# ---- Where they go --------------------------------------------------------------------------------------------------


def write_markdown(path: Path, results: Results) -> None:
    """Writes a report as Markdown: what sums the run up, then every workload."""
    tables = [*tables_of(results).values(), *map(record_table, results.of("steps", "sparse"))]
    path.write_text("\n".join([facts_text(results.machine), "", *(table.section() for table in tables)]), "utf-8")


def fill_in(page: Path, results: Results) -> None:
    """Puts the tables of a run into a page, between `<!-- bench: NAME -->` and `<!-- end -->`.

    Raises:
        ValueError: the page asks for a table that the run has not.
    """
    blocks = {name: table.markdown() for name, table in tables_of(results).items()}
    many = f"the median of {results.runs} runs" if results.runs > 1 else "one run"
    facts = facts_text(results.machine)
    blocks["machine"] = f"{facts}; {results.options}, {many}, {results.seconds / 60:.0f} minutes in all."
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
