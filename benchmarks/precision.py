"""What each combination of AdadeltaKeras keeps, moves, loses and takes in 16 bits, beside what others do.

- losses: the distance from a float32 training after 1000 steps on the same gradients. They are recorded from float32
  trainings of the net of examples/train_bfloat16.py, with some seeds for each learning rate, and rounded to bfloat16.
  All start from the same bfloat16 weights. The distance is that of all parameters, as the training knows them (the
  masters, where there are some), as a share of the way that float32 went from there. Others: precision_baselines.py.
- digits: that example with several seeds; figures and a picture of all of them.
- times: a whole step of each combination; figures and a picture.

    python benchmarks/precision.py [--part losses] [--part digits] [--part times] [--quick] [--docs]

It writes pictures to output/precision, or, with `--docs`, pictures to docs/images and tables into docs/precision.md.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from pictures import duration_axis, save
from precision_baselines import BASELINES
from report import Table, busy_notes, facts_text, put_blocks, seconds_text
from results import Record
from timing import COLD, interleave, machine, timer
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from workloads import Workload, many, one

from torch_adadelta import AdadeltaKeras

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import common
from reference.oracle import coefficients
from train_bfloat16 import WAYS, Result, Way, build_model, train

ROOT: Final = Path(__file__).resolve().parents[1]
PAGE: Final = ROOT / "docs" / "precision.md"
PARTS: Final = ("losses", "digits", "times")

FLOAT32: Final = "float32"


# Each is a dtype of the parameters, and the options of the optimizer.
COMBINATIONS: Final = {
    FLOAT32: WAYS[FLOAT32],
    "float32, bfloat16 state": Way(torch.float32, {"state_dtype": torch.bfloat16}),
    "bfloat16": WAYS["bfloat16"],
    "bfloat16, float32 state": Way(torch.bfloat16, {"state_dtype": torch.float32}),
    "bfloat16, masters": WAYS["bfloat16, masters"],
    "bfloat16, masters, float32 state": WAYS["bfloat16, masters, float32 state"],
}


class Trained:
    """Parameters that a combination trains."""

    def __init__(self, combination: Way, starts: Sequence[Tensor], learning_rate: float) -> None:
        self.params = [nn.Parameter(start.to(combination.dtype, copy=True)) for start in starts]
        self.optimizer = AdadeltaKeras(self.params, learning_rate, **combination.options)

    def step(self, *grads: Tensor) -> None:
        """Moves on by a gradient for each parameter; without any, by those of the last step."""
        for param, grad in zip(self.params, grads, strict=bool(grads)):
            param.grad = grad.to(param.dtype, copy=True)
        self.optimizer.step()

    def masters(self) -> list[Tensor]:
        """The parameters as the training knows them, in float32."""
        return [master.detach().float() for _, master in self.optimizer.master_params()]

    def bytes_kept(self) -> int:
        """Of weights and state, an element, after a step."""
        first = self.params[0]
        return sum(x.element_size() for x in (first, *self.optimizer.state[first].values()) if x.shape == first.shape)

    def bytes_moved(self) -> int:
        """By a step, an element: it reads the gradient, and reads and writes all else."""
        return self.params[0].element_size() + 2 * self.bytes_kept()


# ---- What is lost ---------------------------------------------------------------------------------------------------


class Recording(NamedTuple):
    """A float32 training: where it starts, and its gradients, each a vector of bfloat16 values of all parameters."""

    start: Tensor
    grads: list[Tensor]


def record(learning_rate: float, steps: int, seed: int) -> Recording:
    """Trains in float32 by gradients that are rounded to bfloat16, as a bfloat16 model gives them."""
    digits = common.load()
    images, labels = torch.from_numpy(digits.train_images), torch.from_numpy(digits.train_labels)
    torch.manual_seed(seed)
    model = build_model()
    params = list(model.parameters())
    start = parameters_to_vector(params).detach().bfloat16().float()
    training = Trained(COMBINATIONS[FLOAT32], [start], learning_rate)
    vector_to_parameters(training.params[0].data, params)  # which are views of it from now on

    def batches() -> Iterator[Tensor]:
        while True:
            yield from torch.randperm(len(labels)).split(32)

    grads = []
    for indices, _ in zip(batches(), range(steps), strict=False):
        loss = nn.functional.cross_entropy(model(images[indices]), labels[indices])
        grads.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, params)]).bfloat16().float())
        training.step(grads[-1])
    return Recording(start, grads)


class Loss(NamedTuple):
    """What a way of training keeps and moves, an element, and how far from float32 each recording ends."""

    bytes_kept: float
    bytes_moved: float
    # By learning rate, for each seed: as a share of the way that float32 went.
    distances: dict[float, list[float]]


def measure_losses(learning_rates: Sequence[float], seeds: int, steps: int) -> dict[str, Loss]:
    """For each combination, and for what others do."""
    losses: dict[str, Loss] = {}
    for rate in learning_rates:
        by = coefficients(rate, 0.95, 1e-7, np.float32)
        for seed in range(seeds):
            recording = record(rate, steps, seed)
            ends = {}
            for name, combination in COMBINATIONS.items():
                trained = Trained(combination, [recording.start], rate)
                for grad in recording.grads:
                    trained.step(grad)
                ends[name] = trained.masters()[0].numpy()
                losses.setdefault(name, Loss(trained.bytes_kept(), trained.bytes_moved(), {}))
            for make in BASELINES:
                baseline = make(recording.start.numpy())
                for grad in recording.grads:
                    baseline.step(grad.numpy(), by)
                ends[baseline.name] = baseline.master
                losses.setdefault(baseline.name, Loss(baseline.bytes_kept, baseline.bytes_moved, {}))
            way = np.linalg.norm(ends[FLOAT32].astype(np.float64) - recording.start.numpy())
            for name, end in ends.items():
                distance = np.linalg.norm(end.astype(np.float64) - ends[FLOAT32])
                losses[name].distances.setdefault(rate, []).append(float(distance / way))
    return losses


def shares_text(shares: Sequence[float]) -> str:
    """The range of some shares: "0", "0.69 %", "14 to 15 %"."""
    percent = [100 * share for share in (min(shares), max(shares))]
    texts = [f"{x:#.2g}".rstrip(".") if x < 99.5 else f"{x:.0f}" for x in percent]
    return " to ".join(dict.fromkeys(texts)) + " %" if max(shares) else "0"


def losses_table(losses: dict[str, Loss]) -> Table:
    """One row a way of training."""
    rows = [
        (name, f"{loss.bytes_kept:g}", f"{loss.bytes_moved:g}", *map(shares_text, loss.distances.values()))
        for name, loss in losses.items()
    ]
    rates = (f"learning rate {rate:g}" for rate in losses[FLOAT32].distances)
    return Table("What is lost", ("", "bytes kept", "bytes moved", *rates), rows)


# ---- Digits ---------------------------------------------------------------------------------------------------------

# By way, and by seed.
Runs = dict[str, list[Result]]


def measure_digits(learning_rates: Sequence[float], seeds: int, epochs: int) -> dict[float, Runs]:
    """The trainings of the example for each learning rate."""
    measured: dict[float, Runs] = {}
    for rate in learning_rates:
        print(f"training on digits with learning rate {rate:g} ...", file=sys.stderr)
        measured[rate] = {
            name: [train(way, epochs, learning_rate=rate, seed=seed) for seed in range(seeds)]
            for name, way in WAYS.items()
        }
    return measured


def digits_table(measured: dict[float, Runs]) -> Table:
    """The last losses of all seeds."""
    rows = []
    for rate, runs in measured.items():
        reference = [result.losses[-1] for result in runs[FLOAT32]]
        for name, results in runs.items():
            last = [result.losses[-1] for result in results]
            apart = max(abs(loss - other) for loss, other in zip(last, reference, strict=True))
            accuracy = statistics.fmean(result.accuracy for result in results)
            rows.append(
                (
                    f"{rate:g}",
                    name,
                    f"{statistics.fmean(last):.4f} ± {statistics.stdev(last):.4f}",
                    f"{min(last):.4f} to {max(last):.4f}",
                    "-" if name == FLOAT32 else f"{apart:.4f}",
                    f"{accuracy:.1%}",
                )
            )
    header = ("learning rate", "", "mean ± deviation", "range", "most apart from float32, same seed", "test accuracy")
    return Table("The loss on digits at the end", header, rows)


_COLOURS: Final = {
    FLOAT32: common.GREY,
    "bfloat16": common.RED,
    "bfloat16, masters": common.BLUE,
    "bfloat16, masters, float32 state": common.GREEN,
}


def draw_digits(measured: dict[float, Runs], path: Path) -> None:
    """Every run, pale, and the means over the seeds; for float32 the range of all seeds as a band."""
    figure = Figure(figsize=(5.2 * len(measured), 4.6), dpi=110, layout="constrained")
    for axes, (rate, runs) in zip(figure.subplots(1, len(measured), squeeze=False).flat, measured.items(), strict=True):
        for name, results in runs.items():
            losses = np.array([result.losses for result in results])
            epochs = np.arange(losses.shape[1])
            mean, is_float32 = losses.mean(axis=0), name == FLOAT32
            if is_float32:
                axes.fill_between(
                    epochs, losses.min(axis=0), losses.max(axis=0), color=_COLOURS[name], alpha=0.35, lw=0
                )
            else:
                axes.plot(epochs, losses.T, color=_COLOURS[name], linewidth=0.5, alpha=0.3)
            label = f"{name} (band: all seeds)" if is_float32 else name
            style, width = ("--", 1.2) if "state" in name else ("-", 5 if is_float32 else 2)
            axes.plot(epochs, mean, style, color=_COLOURS[name], linewidth=width, label=label)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        common.count_epochs(axes, losses.shape[1] - 1)
        axes.set_title(f"learning rate {rate:g}", fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    seeds = len(runs[FLOAT32])
    figure.axes[0].set_ylabel("loss over all training images")
    figure.axes[0].legend(fontsize=8, frameon=False, loc="lower left")
    figure.suptitle(f"Handwritten digits, a net of 4810 parameters, the means of {seeds} seeds", fontsize=11)
    figure.savefig(path)


# ---- Time -----------------------------------------------------------------------------------------------------------

WORKLOADS: Final = (
    Workload("1x16M", one(2**24), budget=20, turn=0.03, fits_cache=False),
    Workload("200x4096", many(200, 4096), budget=6, turn=5e-3),
)
QUICK: Final = (Workload("1x256K", one(2**18), budget=0.3), Workload("100x16", many(100, 16), budget=0.3, turn=2e-3))


class Timed(NamedTuple):
    """The steps of all combinations on one workload."""

    record: Record
    bytes_moved: dict[str, int]  # an element


def time_steps(workload: Workload) -> Timed:
    """Combinations take turns, each with parameters of its own."""
    # A period is enough: numbers of one size take one time.
    numbers = torch.empty(2**20).uniform_(0.1, 1, generator=torch.Generator().manual_seed(0))
    starts = [numbers.repeat(-(-numel // len(numbers)))[:numel] for (numel,) in workload.shapes]
    implementations, moved = {}, {}
    for name, combination in COMBINATIONS.items():
        trained = Trained(combination, starts, 1e-3)
        trained.step(*starts)
        moved[name] = trained.bytes_moved()
        implementations[name] = partial(timer, trained.step)
    run = interleave(implementations, budget=workload.budget, turn=workload.turn, fits_cache=workload.fits_cache)
    return Timed(Record.of("times", workload, run), moved)


def times_table(measured: Sequence[Timed]) -> Table:
    """One row a combination of each workload."""
    rows = []
    for record, moved in measured:
        for name in record.names:
            ratio = "{:.2f} ({:.2f}-{:.2f})".format(*record.ratio(name, FLOAT32))
            share = f"{moved[name] / moved[FLOAT32]:.2f}"
            cold = seconds_text(record.spread(name, COLD).median) if record.has(name, COLD) else "-"
            rows.append((record.name, name, seconds_text(record.spread(name).median), cold, ratio, share))
    header = ("parameters", "", "time", "cold caches", "time / float32's", "bytes / float32's")
    return Table("A whole step", header, rows, busy_notes(record for record, _ in measured))


def draw_times(measured: Sequence[Timed], facts: dict[str, str], path: Path) -> None:
    """A bar a combination, and what the bytes that it moves would take at the rate of float32."""
    figure = Figure(figsize=(5.2 * len(measured), 3.6), dpi=110, layout="constrained")
    grid = figure.subplots(1, len(measured), squeeze=False)
    for axes, (record, moved) in zip(grid.flat, measured, strict=True):
        names = record.names[::-1]
        medians = [record.spread(name).median for name in names]
        axes.barh(names, medians, color=[_COLOURS.get(name, common.PINK) for name in names], height=0.7)
        floors = [record.spread(FLOAT32).median * moved[name] / moved[FLOAT32] for name in names]
        (mark,) = axes.plot(floors, names, "|", color="black", markersize=16, markeredgewidth=1.5)
        for name, seconds, floor in zip(names, medians, floors, strict=True):
            axes.text(max(seconds, floor), name, f"  {seconds_text(seconds)}", va="center", ha="left", fontsize=8)
        axes.set_xlim(0, 1.25 * max(medians))
        duration_axis(axes.xaxis)
        axes.set_title(record.title.rpartition(",")[0], fontsize=9)
        axes.tick_params(labelsize=8)
    for axes in figure.axes[1:]:
        axes.set_yticklabels([])
    meaning = "its bytes, at the rate of float32's step"
    figure.legend([mark], [meaning], fontsize=8, frameon=False, loc="outside upper right")
    save(figure, facts, path)


# ---- The command line -----------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> dict[str, Table]:
    """Measures, prints and draws what the command line asks for; returns the tables by the names that the page has."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; repeatable")
    parser.add_argument("--quick", action="store_true", help="seconds, with little of everything")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "precision", help="default: %(default)s")
    parser.add_argument("--docs", action="store_true", help="put tables and pictures into docs/")
    options = parser.parse_args(arguments)
    parts = options.part or PARTS
    folder = ROOT / "docs" / "images" if options.docs else options.output
    folder.mkdir(parents=True, exist_ok=True)

    facts = machine()
    tables: dict[str, Table] = {}
    if "losses" in parts:
        seeds, steps = (1, 20) if options.quick else (5, 1000)
        with common.one_thread():
            tables["losses"] = losses_table(measure_losses((1.0, 0.1, 0.001), seeds, steps))
    if "digits" in parts:
        seeds, epochs = (2, 1) if options.quick else (10, 60)
        runs = measure_digits((0.1, 1.0), seeds, epochs)
        tables["digits"] = digits_table(runs)
        draw_digits(runs, folder / "precision_digits.png")
    if "times" in parts:
        measured = [time_steps(workload) for workload in (QUICK if options.quick else WORKLOADS)]
        tables["times"] = times_table(measured)
        draw_times(measured, facts, folder / "precision_times.png")
    for table in tables.values():
        print(table.section())
    print(facts_text(facts))
    if options.docs:
        blocks = {name: table.markdown() for name, table in tables.items()}
        put_blocks(PAGE, {**blocks, **({"machine": facts_text(facts)} if "times" in parts else {})})
    return tables


if __name__ == "__main__":
    main()
