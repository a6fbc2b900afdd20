"""How long a whole `step()` on a table of embeddings takes, 1000 rows of which have a gradient, beside its peers.

    python benchmarks/sparse_step.py [--height N]... [--rounds N] [--threads N] [--json PATH] [--markdown PATH]

Every step has other rows, as in training: 200 gradients take turns, whose rows are drawn from the whole table. (The
part "sparse" of bench.py repeats one gradient, whose rows the caches then hold.) A table with its two accumulators
takes 7.7 GB at the largest height; the contenders of PyTorch share it, and TensorFlow has a process of its own, after
them. A height for which memory is short is left out. The exit status does not depend on the figures.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import torch
from contenders import FOR_LOOP, FUSED, GLOBAL_CLIPNORM, SPARSE_ADAM, TF_EAGER, TF_GRAPH
from measure import Spread, Step, Timer, Timings, interleave, machine, timer, write_json
from report import Table, facts_text, seconds_text, show
from rich.console import Console
from torch import Tensor
from workers import available_memory, environment

from torch_adadelta import AdadeltaKeras

HEIGHTS: Final = (10_000, 100_000, 1_000_000, 10_000_000)
WIDTH: Final = 64
TOUCHED: Final = 1000
GRADIENTS: Final = 200

DENSE: Final = "AdadeltaKeras, fused, dense gradient"
HIGHEST_DENSE: Final = 1_000_000

LR: Final = 1e-3
BUDGET: Final = 3.0  # seconds a height and process
TURN: Final = 0.02

# A table and two accumulators; a dense gradient; what TensorFlow copies the values from.
MOST_COPIES: Final = 5


class Data:
    """A table, its state, and gradients for it: numbers that no step makes subnormal."""

    def __init__(self, height: int) -> None:
        needed, free = 4 * MOST_COPIES * height * WIDTH, available_memory()
        if free is not None and needed > free:
            raise RuntimeError(f"might need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
        generator = torch.Generator().manual_seed(0)
        self.shape = (height, WIDTH)
        self.values = torch.empty(TOUCHED, WIDTH).uniform_(0.1, 1.0, generator=generator)
        self.rows = [torch.randint(height, (TOUCHED,), generator=generator) for _ in range(GRADIENTS)]

    def tables(self) -> list[Tensor]:
        """Table, square_avg and acc_delta."""
        return [torch.full(self.shape, value) for value in (0.5, 0.25, 0.25)]

    def gradient(self, number: int) -> Tensor:
        """One of the sparse gradients."""
        return torch.sparse_coo_tensor(self.rows[number][None], self.values, self.shape, check_invariants=False)


def taking_turns(step: Callable[[int], object]) -> Step:
    """Calls step(0), step(1), ... in turn."""
    numbers = iter(range(sys.maxsize))
    return lambda: step(next(numbers) % GRADIENTS)


def of_torch(data: Data) -> dict[str, Callable[[], Timer]]:
    """The contenders of PyTorch, on one table and one pair of accumulators."""
    table, *state = data.tables()
    param = torch.nn.Parameter(table)
    gradients = [data.gradient(number) for number in range(GRADIENTS)]

    def stepping(optimizer: Any, names: tuple[str, str], **more: Any) -> Timer:
        optimizer.state[param] = {**dict(zip(names, state, strict=True)), **more}

        def step(number: int) -> None:
            param.grad = gradients[number]
            optimizer.step()

        return timer(taking_turns(step))

    def keras_like(**options: Any) -> Timer:
        return stepping(AdadeltaKeras([param], LR, **options), ("square_avg", "acc_delta"))

    def dense() -> Timer:
        timed = keras_like(fused=True)
        grad = torch.full(data.shape, 0.5)
        gradients[:] = [grad] * GRADIENTS  # for this one comes last
        return timed

    builders: dict[str, Callable[[], Timer]] = {
        FUSED: lambda: keras_like(fused=True),
        GLOBAL_CLIPNORM: lambda: keras_like(fused=True, global_clipnorm=1e6),
        FOR_LOOP: lambda: keras_like(foreach=False),
        SPARSE_ADAM: lambda: stepping(torch.optim.SparseAdam([param], lr=LR), ("exp_avg", "exp_avg_sq"), step=0),
    }
    return {**builders, DENSE: dense} if data.shape[0] <= HIGHEST_DENSE else builders


def of_tensorflow(data: Data) -> dict[str, Callable[[], Timer]]:
    """TensorFlow's op, called by the class of TensorFlow 2.4, at once and in a graph."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf
    import tf_keras

    variable = tf.Variable(tf.fill(data.shape, 0.5))
    optimizer = tf_keras.optimizers.legacy.Adadelta(LR)
    optimizer._create_all_weights([variable])
    for slot in ("accum_grad", "accum_var"):
        optimizer.get_slot(variable, slot).assign(tf.fill(data.shape, 0.25))
    values = tf.constant(data.values.numpy())
    rows = [tf.constant(rows.numpy()) for rows in data.rows]

    def apply(rows: Any) -> None:
        optimizer.apply_gradients([(tf.IndexedSlices(values, rows, data.shape), variable)])

    in_graph = tf.function(apply)
    return {
        TF_EAGER: lambda: timer(taking_turns(lambda number: apply(rows[number]))),
        TF_GRAPH: lambda: timer(taking_turns(lambda number: in_graph(rows[number]))),
    }


def measure(framework: str, height: int, threads: int, rounds: int | None) -> Timings:
    """Times the contenders of a framework; to be called in a process of its own."""
    torch.set_num_threads(threads)
    try:
        contenders = {"torch": of_torch, "tensorflow": of_tensorflow}[framework](Data(height))
    except ModuleNotFoundError as error:
        return Timings({}, {}, {framework: f"{error.name} is not installed"}, None)
    except RuntimeError as error:
        return Timings({}, {}, {framework: str(error)}, None)
    dense = {DENSE: contenders.pop(DENSE)} if DENSE in contenders else {}
    timings = interleave(contenders, budget=BUDGET, turn=TURN, fits_cache=False, rounds=rounds)
    if dense:  # whose gradient takes the place of the others
        alone = interleave(dense, budget=BUDGET / 3, turn=TURN, fits_cache=False, rounds=rounds)
        timings.seconds.update(alone.seconds)
        timings.absent.update(alone.absent)
    return timings


Measured = dict[int, Timings]


def run(heights: list[int], threads: int, rounds: int | None) -> Measured:
    """All heights, each framework in a process of its own."""
    measured: Measured = {}
    for height in heights:
        for framework in ("torch", "tensorflow"):
            print(f"measuring {height:,} rows, {framework} ...", file=sys.stderr)
            # Where OpenMP binds its threads, it binds those of other frameworks to one core.
            with (
                environment(OMP_PROC_BIND="true" if framework == "torch" and threads > 1 else "false"),
                ProcessPoolExecutor(1, get_context("spawn")) as process,
            ):
                timings = process.submit(measure, framework, height, threads, rounds).result()
            if height in measured:
                measured[height].seconds.update(timings.seconds)
                measured[height].absent.update(timings.absent)
            else:
                measured[height] = timings
    return measured


# ---- The report -----------------------------------------------------------------------------------------------------


def medians(measured: Mapping[int, Timings], name: str) -> dict[int, float]:
    """The median of a step by height."""
    return {h: Spread.of(t.seconds[name]).median for h, t in measured.items() if name in t.seconds}


def timings_table(measured: Measured) -> Table:
    """One row a contender, one column a height."""
    rows = []
    for name in dict.fromkeys(name for timings in measured.values() for name in timings.seconds):
        cells = [
            seconds_text(timings.spread(name).median) if name in timings.seconds else ""
            for timings in measured.values()
        ]
        by_height = medians(measured, name)
        grows = (
            f"{by_height[max(measured)] / by_height[min(measured)]:.3g} x"
            if by_height.keys() == measured.keys()
            else ""
        )
        rows.append((name, *cells, grows))
    notes = [
        f"{height:,} rows: absent: {name}: {reason}"
        for height, timings in measured.items()
        for name, reason in timings.absent.items()
    ]
    for height, timings in measured.items():
        if timings.disturbance is not None and timings.disturbance > 0.05:
            notes.append(f"{height:,} rows: meanwhile others used {timings.disturbance:.0%} of the processors")
    header = ("contender", *(f"{height:,} rows" for height in measured), "highest / lowest")
    return Table(f"One step, {TOUCHED} rows of a table x {WIDTH}, float32, other rows each time", header, rows, notes)


def verdicts_table(measured: Measured) -> Table:
    """What the step is held to."""
    rows = []
    ours, theirs = medians(measured, FUSED), medians(measured, DENSE)
    for height in sorted(ours.keys() & theirs.keys()):
        if height == HIGHEST_DENSE:
            ratio = theirs[height] / ours[height]
            rows.append(
                (
                    f"{height:,} rows: speed against a dense step",
                    "≥ 100 x",
                    f"{ratio:.4g} x",
                    "met" if ratio >= 100 else "not met",
                )
            )
    if len(ours) > 1:
        low, high = min(ours), max(ours)
        rows.append(
            (
                f"time of {high:,} rows over that of {low:,}",
                "no growth with the height, but for caches",
                f"{ours[high] / ours[low]:.3g} x for {high // low:,} x the rows",
                "",
            )
        )
    for peer in (SPARSE_ADAM, TF_EAGER, TF_GRAPH, FOR_LOOP):
        others = medians(measured, peer)
        if both := sorted(ours.keys() & others.keys()):
            ratios = [others[height] / ours[height] for height in both]
            rows.append((f"speed against {peer}", "", f"{min(ratios):.3g} to {max(ratios):.3g} x", ""))
    return Table("In sum", ("what", "bar", "measured", "verdict"), rows)


def main() -> None:
    """Measures, prints and writes what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--height", type=int, action="append", help="only this one; may be repeated")
    parser.add_argument("--rounds", type=int, help="rounds of each height; by default as many as some seconds allow")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures here, as JSON")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write the tables here, as Markdown")
    arguments = parser.parse_args()
    heights = sorted(arguments.height or HEIGHTS)
    if arguments.threads < 1 or heights[0] < TOUCHED or (arguments.rounds is not None and arguments.rounds < 1):
        parser.error(f"--threads and --rounds must be at least 1, --height at least {TOUCHED}")

    facts = {**machine(), "threads": str(arguments.threads)}
    console = Console(width=None if sys.stdout.isatty() else 160)
    for key, value in facts.items():
        console.print(f"{key:18}{value}", markup=False, highlight=False)
    console.print()
    measured = run(heights, arguments.threads, arguments.rounds)
    tables = [timings_table(measured), verdicts_table(measured)]
    tables = [table for table in tables if table.rows]
    for table in tables:
        show(console, table)
    if arguments.json:
        data = {
            str(height): {
                "seconds": {name: Spread.of(values)._asdict() for name, values in timings.seconds.items()},
                "absent": timings.absent,
                "disturbance": timings.disturbance,
            }
            for height, timings in measured.items()
        }
        write_json(arguments.json, {"machine": facts, "touched": TOUCHED, "width": WIDTH, "heights": data})
    if arguments.markdown:
        sections = [facts_text(facts), *(f"### {table.title}\n\n{table.markdown()}" for table in tables)]
        arguments.markdown.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
