"""The pictures of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from contenders import (
    ADAM,
    ADD,
    CLIPPED,
    DENSE,
    EMPTY,
    FAMILIES,
    FUSED,
    FUSED_FLOAT32,
    STEP_TENSORS,
)
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from report import seconds_text
from results import Record, Results
from workloads import TABLE_WIDTH

OURS: Final = "#D55E00"
OURS_PALE: Final = "#F0B489"
PEER: Final = "#8DA3B5"
FLOOR: Final = "#444444"
# Distinct to the colour-blind (Okabe and Ito), in the order of appearance.
COLOURS: Final = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
MARKERS: Final = ("s", "^", "v", "D", "P", "X", "*")

DPI: Final = 110


def duration_axis(axis: Any) -> None:
    """Labels a logarithmic axis "1 ms", "10 ms", ..."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axis.set_minor_formatter(NullFormatter())


def _short(seconds: float) -> str:
    scale, unit = next(((s, u) for s, u in ((1, "s"), (1e3, "ms"), (1e6, "µs")) if seconds * s >= 0.9999), (1e9, "ns"))
    return f"{seconds * scale:g} {unit}"


def caption(figure: Figure, results: Results) -> None:
    """Says below what was measured where."""
    machine = results.machine
    text = (
        f"{machine['processor']}, {machine['threads']} threads, {machine['instruction set']}; "
        f"torch {machine['torch']}; {machine['date']}; medians of interleaved runs"
    )
    figure.supxlabel(text, fontsize=7.5, color="#555555")


def draw_peers(results: Results, path: Path) -> None:
    """For each float32 workload, a bar a contender."""
    records = [record for record in results.steps if record.dtype == "float32" and record.default]
    aside = {ADD, EMPTY, FUSED_FLOAT32, *CLIPPED}
    columns = min(3, len(records))
    rows = -(-len(records) // columns)
    names = [name for name in FAMILIES if name not in aside and any(name in r.timings.seconds for r in records)]
    figure = Figure(figsize=(4.6 * columns + 1, (0.24 * len(names) + 0.9) * rows + 0.4), dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, record in zip(grid.flat, records, strict=False):
        medians = {n: record.timings.spread(n).median for n in names if n in record.timings.seconds}
        order = sorted(medians, key=lambda name: medians[name], reverse=True)
        colours = [OURS if name == FUSED else OURS_PALE if name.startswith("AdadeltaKeras") else PEER for name in order]
        axes.barh(order, [medians[name] for name in order], color=colours, height=0.72, log=True)
        least, most = min(medians.values()), max(medians.values())
        axes.set_xlim(least / 3, most * 6)
        for position, name in enumerate(order):
            label = " " + seconds_text(medians[name])
            axes.text(medians[name], position, label, va="center", ha="left", fontsize=7.5)
        axes.set_title(f"{record.name}: {record.title.rpartition(',')[0]}", fontsize=8.5, loc="right")
        axes.tick_params(axis="y", labelsize=7.5, length=0)
        axes.tick_params(axis="x", labelsize=7.5)
        duration_axis(axes.xaxis)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(records) :]:
        axes.set_visible(False)
    figure.suptitle("One whole step, float32 (logarithmic; shorter is faster)", fontsize=12)
    caption(figure, results)
    figure.savefig(path)


def _curves(axes: Any, records: Sequence[Record], x: Sequence[float]) -> None:
    """A line a contender, ours on top, through the medians, in a band between the quartiles."""
    names = [n for n in dict.fromkeys(n for r in records for n in r.timings.seconds) if n != ADD]
    others = [name for name in names if not name.startswith(FUSED)]
    for name in names:
        points = [(at, r.timings.spread(name)) for at, r in zip(x, records, strict=True) if name in r.timings.seconds]
        ours = name.startswith(FUSED)
        index = 0 if ours else others.index(name)
        colour = (OURS if name == FUSED else OURS_PALE) if ours else COLOURS[index % len(COLOURS)]
        at = [point for point, _ in points]
        axes.plot(
            at,
            [spread.median for _, spread in points],
            label=name,
            color=colour,
            marker="o" if ours else MARKERS[index % len(MARKERS)],
            markersize=5 if ours else 4,
            linewidth=2.2 if name == FUSED else 1.3,
            linestyle="--" if name.endswith(DENSE) else "-",
            zorder=3 if ours else 2,
        )
        lower, upper = [s.lower for _, s in points], [s.upper for _, s in points]
        axes.fill_between(at, lower, upper, color=colour, alpha=0.15, linewidth=0)


def _finish(figure: Figure, axes: Any, results: Results, path: Path) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(_binary))
    axes.set_yscale("log")
    duration_axis(axes.yaxis)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    caption(figure, results)
    figure.savefig(path)


def _binary(value: float, _: object = None) -> str:
    for unit, scale in (("Mi", 2**20), ("Ki", 2**10)):
        if value >= scale:
            return f"{value / scale:g} {unit}"
    return f"{value:g}"


def draw_elements(results: Results, path: Path) -> None:
    """Time against the number of elements, with the floor that memory sets."""
    records = results.by_elements
    figure = Figure(figsize=(9, 6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    elements = [record.elements for record in records]
    _curves(axes, records, elements)
    rate = results.memory_rate()
    if rate:
        floor = [record.bytes_of(STEP_TENSORS) / rate for record in records]
        label = f"memory floor: 28 bytes an element at {rate / 1e9:.1f} GB/s, the rate of {ADD} out of cache"
        axes.plot(elements, floor, color=FLOOR, linestyle="--", linewidth=1.2, label=label)
    axes.set_ylim(bottom=min(r.timings.spread(n).median for r in records for n in r.timings.seconds if n != ADD) / 3)
    axes.set_xlabel("elements of one float32 tensor")
    axes.set_ylabel("one whole step")
    axes.set_title("How a step's time grows with its elements")
    _finish(figure, axes, results, path)


def draw_tensors(results: Results, path: Path) -> None:
    """Time against the number of tensors."""
    records = results.by_tensors
    figure = Figure(figsize=(9, 6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    tensors = [record.tensors for record in records]
    _curves(axes, records, tensors)
    axes.set_xlabel("tensors of 16 float32 elements")
    axes.set_ylabel("one whole step")
    axes.set_title("How a step's time grows with the number of tensors: what the host costs")
    _finish(figure, axes, results, path)


def draw_rows(results: Results, path: Path) -> None:
    """Time of a step with a sparse gradient against the rows of the table."""
    records = results.by_rows
    figure = Figure(figsize=(9, 6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    _curves(axes, records, [record.elements // TABLE_WIDTH for record in records])
    axes.set_xlabel(f"rows of a float32 table of width {TABLE_WIDTH}, of which 1,000 occur in each gradient")
    axes.set_ylabel("one whole step")
    axes.set_title("Sparse gradients: a step's time grows with the table only as far as caches do not hold it")
    _finish(figure, axes, results, path)


def draw_options(results: Results, path: Path) -> None:
    """What clipping and 16-bit numbers cost, as shares of the plain float32 step."""
    records = [r for r in results.steps if CLIPPED.keys() & r.timings.seconds.keys() and FUSED in r.timings.seconds]
    figure = Figure(figsize=(2.9 * len(records) + 0.6, 4.8), dpi=DPI, layout="constrained")
    grid = figure.subplots(1, len(records), squeeze=False)
    for axes, record in zip(grid.flat, records, strict=True):
        names = [n for n in (FUSED, *CLIPPED, FUSED_FLOAT32, ADAM) if n in record.timings.seconds]
        ratios = [record.timings.ratio(name, FUSED) for name in names]
        middle = [ratio.median for ratio in ratios]
        errors = [[r.median - r.lower for r in ratios], [r.upper - r.median for r in ratios]]
        labels = [name.removeprefix("AdadeltaKeras, ").replace("fused, ", "") for name in names]
        colours = [OURS if name == FUSED else OURS_PALE if name in CLIPPED else PEER for name in names]
        axes.bar(labels, middle, color=colours, yerr=errors, error_kw={"elinewidth": 1, "ecolor": "#333333"})
        for position, value in enumerate(middle):
            axes.text(position, value, f" {value:.2f}", ha="left", va="bottom", fontsize=7.5)
        axes.set_title(record.name, fontsize=9)
        axes.tick_params(axis="x", labelsize=7.5, rotation=60)
        axes.tick_params(axis="y", labelsize=7.5)
        axes.axhline(1, color=FLOOR, linewidth=0.8, linestyle="--")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].set_ylabel("time / that of the plain fused step", fontsize=9)
    caption(figure, results)
    figure.savefig(path)


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Draws what the run has figures for, and returns the files."""
    pictures = (
        ("peers.png", draw_peers, bool(results.steps)),
        ("elements.png", draw_elements, bool(results.by_elements)),
        ("tensors.png", draw_tensors, bool(results.by_tensors)),
        ("rows.png", draw_rows, bool(results.by_rows)),
        ("options.png", draw_options, any(CLIPPED.keys() & r.timings.seconds.keys() for r in results.steps)),
    )
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, draw, has_figures in pictures:
        if has_figures:
            draw(results, folder / name)
            drawn.append(folder / name)
    return drawn
