"""The pictures of a run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import implementations as impl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from report import ASIDE, seconds_text
from results import Record, Results
from timing import COLD, STEP
from workloads import TABLE_WIDTH

OURS: Final = "#D55E00"
OURS_PALE: Final = "#F0B489"
BASELINE: Final = "#8DA3B5"
FLOOR: Final = "#444444"
# Distinct to the colour-blind (Okabe and Ito), in the order of appearance.
COLOURS: Final = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
MARKERS: Final = ("s", "^", "v", "D", "P", "X", "*")


def duration_axis(axis: Any) -> None:
    """Labels a logarithmic axis "1 ms", "10 ms", ..."""

    def text(seconds: float, _: object) -> str:
        units = ((1, "s"), (1e3, "ms"), (1e6, "µs"))
        scale, unit = next(((s, u) for s, u in units if seconds * s >= 0.9999), (1e9, "ns"))
        return f"{seconds * scale:g} {unit}"

    axis.set_major_formatter(FuncFormatter(text))
    axis.set_minor_formatter(NullFormatter())


def save(figure: Figure, facts: dict[str, str], path: Path) -> None:
    """Says below what was measured where, and writes the file."""
    where = facts.get("GPU") or f"{facts['processor']}, {facts['threads']} threads, {facts['instruction set']}"
    text = f"{where}; torch {facts['torch']}; {facts['date']}; medians of interleaved runs"
    figure.supxlabel(text, fontsize=7.5, color="#555555")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def draw_steps(records: Sequence[Record], results: Results, path: Path) -> None:
    """For each workload, a bar an implementation."""
    columns = min(3, len(records))
    rows = -(-len(records) // columns)
    names = [name for name in impl.ORDER if name not in ASIDE and any(record.has(name) for record in records)]
    size = (4.6 * columns + 1, (0.24 * len(names) + 0.9) * rows + 0.4)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, record in zip(grid, records, strict=False):
        medians = {name: record.spread(name).median for name in names if record.has(name)}
        order = sorted(medians, key=lambda name: medians[name], reverse=True)
        colours = [OURS if n == impl.FUSED else OURS_PALE if n.startswith("AdadeltaKeras") else BASELINE for n in order]
        axes.barh(order, [medians[name] for name in order], color=colours, height=0.72, log=True)
        axes.set_xlim(min(medians.values()) / 3, max(medians.values()) * 6)
        for name, seconds in medians.items():
            axes.text(seconds, name, f" {seconds_text(seconds)}", va="center", ha="left", fontsize=7.5)
        axes.set_title(f"{record.name}: {record.title.rpartition(',')[0]}", fontsize=8.5, loc="right")
        axes.tick_params(labelsize=7.5)
        duration_axis(axes.xaxis)
    for axes in grid[len(records) :]:
        axes.set_visible(False)
    figure.suptitle("One whole step, float32 (logarithmic; shorter is faster)", fontsize=12)
    save(figure, results.machine, path)


def draw_curves(
    records: Sequence[Record], results: Results, path: Path, x: Callable[[Record], float], label: str, title: str
) -> None:
    """A line an implementation through the medians, in a band between the quartiles; ours with cold caches, too."""
    figure = Figure(figsize=(9, 6), dpi=110, layout="constrained")
    axes = figure.subplots()
    names = [name for name in dict.fromkeys(name for record in records for name in record.names) if name != impl.ADD]
    others = [name for name in names if not name.startswith(impl.FUSED)]
    for name in names:
        ours, index = name.startswith(impl.FUSED), others.index(name) if name in others else 0
        colour = (OURS if name == impl.FUSED else OURS_PALE) if ours else COLOURS[index % len(COLOURS)]
        for kind in (STEP, COLD) if name == impl.FUSED else (STEP,):
            known = [record for record in records if record.has(name, kind)]
            spreads = [record.spread(name, kind) for record in known]
            style: dict[str, Any] = {"marker": "o" if ours else MARKERS[index % len(MARKERS)], "markersize": 4}
            style["linestyle"] = "--" if name.endswith(impl.DENSE) else ":" if kind == COLD else "-"
            style |= {"linewidth": 2.2 if name == impl.FUSED else 1.3, "zorder": 3 if ours else 2, "color": colour}
            text = f"{name}, cold caches" if kind == COLD else name
            axes.plot([x(record) for record in known], [s.median for s in spreads], label=text, **style)
            band = [s.lower for s in spreads], [s.upper for s in spreads]
            axes.fill_between([x(record) for record in known], *band, color=colour, alpha=0.15, linewidth=0)
    rate = results.memory_rate()
    if rate and path.stem == "elements":
        floor = [impl.STEP_TENSORS * record.elements * record.item_size / rate for record in records]
        text = f"memory floor: 28 bytes an element at {rate / 1e9:.1f} GB/s, the rate of {impl.ADD} out of cache"
        axes.set_ylim(bottom=min(record.spread(name).median for record in records for name in names) / 3)
        axes.plot([x(record) for record in records], floor, color=FLOOR, linestyle="--", linewidth=1.2, label=text)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(_binary))
    axes.set_yscale("log")
    duration_axis(axes.yaxis)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    axes.set_xlabel(label)
    axes.set_ylabel("one whole step")
    axes.set_title(title)
    save(figure, results.machine, path)


def _binary(value: float, _: object) -> str:
    scale, unit = next(((s, u) for s, u in ((2**20, " Mi"), (2**10, " Ki")) if value >= s), (1, ""))
    return f"{value / scale:g}{unit}"


def draw_options(records: Sequence[Record], results: Results, path: Path) -> None:
    """What clipping and 16-bit numbers cost, as shares of the plain float32 step."""
    figure = Figure(figsize=(2.9 * len(records) + 0.6, 4.8), dpi=110, layout="constrained")
    grid = figure.subplots(1, len(records), squeeze=False)
    for axes, record in zip(grid.flat, records, strict=True):
        names = [name for name in (impl.FUSED, *impl.CLIPPED, impl.FUSED_FLOAT32, impl.ADAM) if record.has(name)]
        ratios = [record.ratio(name, impl.FUSED) for name in names]
        errors = [[r.median - r.lower for r in ratios], [r.upper - r.median for r in ratios]]
        labels = [name.removeprefix("AdadeltaKeras, ").replace("fused, ", "") for name in names]
        colours = [OURS if name == impl.FUSED else OURS_PALE if name in impl.CLIPPED else BASELINE for name in names]
        error_style = {"elinewidth": 1, "ecolor": "#333333"}
        axes.bar(labels, [ratio.median for ratio in ratios], color=colours, yerr=errors, error_kw=error_style)
        for position, ratio in enumerate(ratios):
            axes.text(position, ratio.median, f" {ratio.median:.2f}", ha="left", va="bottom", fontsize=7.5)
        axes.set_title(record.name, fontsize=9)
        axes.tick_params(labelsize=7.5)
        axes.tick_params(axis="x", rotation=60)
        axes.axhline(1, color=FLOOR, linewidth=0.8, linestyle="--")
    grid[0, 0].set_ylabel("time / that of the plain fused step", fontsize=9)
    save(figure, results.machine, path)


CURVES: Final[dict[str, tuple[str, Callable[[Record], float], str, str]]] = {
    "elements": (
        "elements",
        lambda record: record.elements,
        "elements of one float32 tensor",
        "How a step's time grows with its elements",
    ),
    "tensors": (
        "tensors",
        lambda record: record.tensors,
        "tensors of 16 float32 elements",
        "How a step's time grows with the number of tensors: what the host costs",
    ),
    "rows": (
        "sparse",
        lambda record: record.elements // TABLE_WIDTH,
        f"rows of a float32 table of width {TABLE_WIDTH}, of which 1,000 occur in each gradient",
        "Sparse gradients: a step's time grows with the table only as far as caches do not hold it",
    ),
}


def draw_all(results: Results, folder: Path) -> None:
    """Draws what the run has figures for."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = [record for record in results.of("steps") if record.has(impl.FUSED)]
    if in_float32 := [record for record in steps if record.dtype == "float32"]:
        draw_steps(in_float32, results, folder / "implementations.png")
    if clipped := [record for record in steps if any(map(record.has, impl.CLIPPED))]:
        draw_options(clipped, results, folder / "options.png")
    for name, (part, x, label, title) in CURVES.items():
        if records := [record for record in results.of(part) if record.names]:
            draw_curves(records, results, folder / f"{name}.png", x, label, title)
