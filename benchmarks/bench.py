"""How fast everything is, beside its peers: `make bench`, or

    python benchmarks/bench.py [--quick] [--part NAME]... [--workload NAME]... [--rounds N] [--threads N]
                               [--no-compile] [--update] [--output FOLDER] [--docs]
    python benchmarks/bench.py --from output/bench/bench.json [--docs]

Contenders take turns, so that all of them see the machine's good and bad moments; each framework has a process of its
own. What a step works on stays as it is: see `workloads.Tensors`. What fits into the caches is measured there. A peer
that is not installed is named as absent.

It writes tables (report.md), pictures, and every single figure (bench.json) to the folder. `--update` measures a part
again, where the machine was disturbed, and keeps the rest. `--from` makes tables and pictures from such figures and
measures nothing. `--docs` puts them into the README, docs/performance.md and docs/sparse.md. The exit status does not
depend on the figures.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import contenders
import shapes
import torch
from contenders import ADAM, ADD, FUSED, OPTAX, TF_GRAPH, TORCH_COMPILED, TORCH_FOR_LOOP, TORCH_FOREACH
from measure import handover, interleave, machine
from report import fill_in, record_table, show, tables_of, write_markdown
from results import Memory, Record, Results
from rich.console import Console
from workers import Worker, Workers, environment
from workloads import QUICK, WORKLOADS, Tensors, Workload, by_elements, by_rows, by_tensors, by_threads, many

ROOT: Final = Path(__file__).resolve().parent.parent

# Whose tables `--docs` fills in.
PAGES: Final = (ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "sparse.md")

PARTS: Final = ("steps", "elements", "tensors", "threads", "sparse", "operations", "training", "memory", "setup")


class Bench:
    """A run: what was asked for, and the workers that it is done by."""

    def __init__(self, workers: Workers, console: Console, *, rounds: int | None, quick: bool) -> None:
        self.workers = workers
        self.console = console
        self.rounds = rounds
        self.quick = quick
        handover()  # once, for the first compiles something

    def measure(
        self,
        workload: Workload,
        method: str,
        names: Sequence[str | tuple[str, str, int]],
        *arguments: Workload,
        left_out: dict[str, str] | None = None,
    ) -> Record:
        """Times contenders that a method of `workers.Stage` builds.

        `names`: contenders, or (what to call it here, contender, threads).
        """
        print(f"measuring {workload.name} ...", file=sys.stderr)
        builders = {}
        used: list[Worker] = []
        for entry in names:
            shown, name, threads = (entry, entry, workload.threads) if isinstance(entry, str) else entry
            worker = self.workers.of(contenders.FAMILIES.get(name, "torch"), threads)
            used.append(worker)
            builders[shown] = worker.builder(method, *arguments, name)
        timings = interleave(
            builders,
            budget=workload.budget,
            turn=workload.turn,
            fits_cache=workload.fits_cache,
            rounds=self.rounds,
            busy=self.workers.seconds,
            handover=handover,
        )
        abnormal = sum(worker.call("abnormal") for worker in dict.fromkeys(used) if worker.process.is_alive())
        self.workers.clear()
        return Record.of(workload, timings, left_out, abnormal)

    def steps(self, workloads: Sequence[Workload], *, with_compile: bool) -> Iterator[Record]:
        """Whole steps of all who can make them."""
        for workload in workloads:
            names, left_out = contenders.field_of(workload, with_compile=with_compile)
            record = self.measure(workload, "build_step", names, workload, left_out=left_out)
            show(self.console, record_table(record))
            yield record

    def curve(self, workloads: Sequence[Workload], names: Sequence[str]) -> Iterator[Record]:
        """The same contenders on workloads that grow, ours also with one thread."""
        entries: list[str | tuple[str, str, int]] = [*names]
        if self.workers.threads > 1:
            entries.insert(1, (f"{FUSED}, 1 thread", FUSED, 1))
        for workload in workloads:
            yield self.measure(workload, "build_step", entries, workload)

    def threads(self) -> Iterator[Record]:
        """Fused steps with one thread, and with twice as many each time, up to all."""
        most = self.workers.threads
        counts = sorted({most, *(2**k for k in range(most.bit_length()) if 2**k <= most)})
        entries = [(f"{n} thread{'s' if n > 1 else ''}", FUSED, n) for n in counts]
        for workload in by_threads(quick=self.quick):
            yield self.measure(workload, "build_step", entries, workload)

    def operations(self) -> Iterator[Record]:
        """Everything but the step."""
        workloads = (
            [Workload("100x16", many(100, 16), budget=0.5)]
            if self.quick
            else [
                Workload("1000x16", many(1000, 16), budget=6),
                Workload("resnet50", tuple(shapes.resnet50()), budget=8, fits_cache=False),
            ]
        )
        names = list(contenders.operations(Tensors([], [], [], [])))
        for workload in workloads:
            yield self.measure(workload, "build_operation", names, workload)

    def training(self) -> Iterator[Record]:
        """Epochs of the example on handwritten digits, with one thread, as it has."""
        workload = Workload(
            "digits",
            ((1, 32, 3, 3), (32,), (32, 64, 3, 3), (64,), (1024, 128), (128,), (128, 10), (10,)),
            budget=1 if self.quick else 12,
            turn=0.05,
            fits_cache=False,
            threads=1,
        )
        yield self.measure(workload, "build_training", list(contenders.training()))

    def memory(self, workloads: Sequence[Workload]) -> Memory:
        """What steps take beyond what they have before, each in a process of its own."""
        memory: Memory = {}
        for workload in workloads:
            print(f"measuring memory of {workload.name} ...", file=sys.stderr)
            memory[workload.name] = {}
            for name in (FUSED, TORCH_FOREACH) if self.quick else (FUSED, ADAM, TORCH_FOREACH, TORCH_FOR_LOOP):
                worker = Worker("torch", self.workers.threads)
                try:
                    # Threads and whatever else is set up once in a process.
                    small = Workload("", many(1, 2**18), workload.dtype)
                    worker.call("build_step", small, name)
                    worker.call("time", name, 1)
                    worker.call("clear")
                    worker.call("build_step", workload, name)
                    worker.call("time", name, 1)
                    memory[workload.name][name] = worker.call("extra_memory", name)
                except RuntimeError as error:
                    memory[workload.name][name] = str(error)
                finally:
                    worker.close()
        return memory


def import_seconds(package: str, after: str, repeats: int) -> list[float]:
    """What importing a package takes beyond another, once its bytecode is there, as after an installation."""
    # An editable one has it after the first import, unless that is forbidden, as it often is in containers.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    values = []
    for _ in range(1 + repeats):
        command = [sys.executable, "-X", "importtime", "-c", f"import {after}; import {package}"]
        result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found = re.search(rf"^import time: +\d+ \| +(\d+) \| +{package}$", result.stderr, re.MULTILINE)
        values.append(int(found[1]) / 1e6 if found else 0.0)
    return values[1:]


def build_seconds() -> float | str:
    """How long the compiled library takes to build from nothing, or why that is unknown."""
    if not (ROOT / "setup.py").exists():
        return "there is no setup.py"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "setup.py", "build_ext", "--force", "--build-temp", f"{folder}/temp"]
        start = time.perf_counter()
        result = subprocess.run(
            [*command, "--build-lib", f"{folder}/lib"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - start
        if result.returncode or not list(Path(folder).rglob("*.so")):
            return "the build failed"
        return seconds


def run(arguments: argparse.Namespace, console: Console) -> Iterator[Results]:
    """Measures what the command line asks for, and says after each record what there is so far."""
    quick: bool = arguments.quick
    start = time.perf_counter()
    facts = {**machine(), "threads": str(arguments.threads)}
    for key, value in facts.items():
        console.print(f"{key:18}{value}", markup=False, highlight=False)
    console.print()

    selected = [w for w in (QUICK if quick else WORKLOADS) if not arguments.workload or w.name in arguments.workload]
    parts: set[str] = set(arguments.part or (("steps", "memory") if arguments.workload else PARTS))
    results = Results.empty(facts, "a quick run, whose figures mean little" if quick else "a full run")

    def so_far() -> Results:
        return results._replace(seconds=time.perf_counter() - start)

    # What a compiler kept from an earlier run would hide how long it takes.
    with (
        tempfile.TemporaryDirectory() as cache,
        environment(TORCHINDUCTOR_CACHE_DIR=cache),
        Workers(arguments.threads) as workers,
    ):
        bench = Bench(workers, console, rounds=arguments.rounds, quick=quick)
        by_size = (FUSED, ADD, ADAM, TORCH_FOREACH, TF_GRAPH, OPTAX)
        by_number = (FUSED, ADAM, TORCH_FOREACH, TORCH_FOR_LOOP)
        for part, records, measured in (
            ("steps", results.steps, bench.steps(selected, with_compile=arguments.compile)),
            ("elements", results.by_elements, bench.curve(by_elements(quick=quick), by_size)),
            ("tensors", results.by_tensors, bench.curve(by_tensors(quick=quick), by_number)),
            ("threads", results.by_threads, bench.threads()),
            ("sparse", results.by_rows, bench.steps(by_rows(quick=quick), with_compile=False)),
            ("operations", results.operations, bench.operations()),
            ("training", results.training, bench.training()),
        ):
            for record in measured if part in parts else ():
                records.append(record)
                yield so_far()
    if "memory" in parts:
        # Without workers beside: each takes memory.
        results.memory.update(bench.memory([w for w in selected if w.name in ("1x16M", "1000x16", "1x256K")]))
        yield so_far()
    if "setup" in parts:
        print("measuring imports and the build ...", file=sys.stderr)
        repeats = 1 if quick else 5
        results.imports["torch_adadelta, beyond torch"] = import_seconds("torch_adadelta", "torch", repeats)
        results.imports["torch"] = import_seconds("torch", "sys", repeats)
        if not quick:
            results = results._replace(build=build_seconds())
        yield so_far()


def main(arguments: Sequence[str] | None = None) -> Results:
    """Measures, prints and writes what the command line asks for."""
    from pictures import draw_all  # matplotlib, which no worker needs

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [workload.name for workload in (*WORKLOADS, *QUICK)]
    parser.add_argument("--quick", action="store_true", help="a minute, with little of everything")
    parser.add_argument(
        "--workload",
        action="append",
        choices=names,
        metavar="NAME",
        help=f"only steps on this one, and their memory; repeatable: {', '.join(names)}",
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; repeatable")
    parser.add_argument("--rounds", type=int, help="rounds of each workload; by default as many as some seconds allow")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: %(default)s")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help=f"{TORCH_COMPILED}, too: minutes (default: unless --quick)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="where to write (default: output/bench; if it is not all that is measured, and not to --update that, "
        "output/bench-part)",
    )
    parser.add_argument("--from", dest="source", type=Path, metavar="JSON", help="figures to show instead of measuring")
    parser.add_argument("--update", action="store_true", help="keep what else the folder's bench.json has")
    parser.add_argument("--docs", action="store_true", help="put tables and pictures into README.md and docs/")
    options = parser.parse_args(arguments)
    if options.threads < 1 or (options.rounds is not None and options.rounds < 1):
        parser.error("--threads and --rounds must be at least 1")
    if options.compile is None:
        options.compile = not options.quick
    if options.output is None:
        is_part = (options.quick or options.workload or options.part) and not options.update
        options.output = ROOT / "output" / ("bench-part" if is_part else "bench")

    console = Console(width=None if sys.stdout.isatty() else 160)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.source:
        results = Results.read(options.source)
    else:
        before = Results.read(options.output / "bench.json") if options.update else None
        for measured in run(options, console):
            results = before.updated(measured) if before else measured
            results.write(options.output / "bench.json")  # so that nothing is lost if the run is
    for table in tables_of(results).values():
        show(console, table)
    results.write(options.output / "bench.json")
    write_markdown(options.output / "report.md", results)
    files = [options.output / "bench.json", options.output / "report.md", *draw_all(results, options.output)]
    if options.docs:
        draw_all(results, ROOT / "docs" / "images")
        for page in PAGES:
            fill_in(page, results)
    print(f"{results.options}, {results.seconds:.0f} s: {', '.join(map(str, files))}")
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)  # all work is done elsewhere
    main()
