"""How fast everything is, beside its baselines: `make bench`, or

    python benchmarks/bench.py [--device cuda] [--quick] [--runs N] [--part NAME]... [--workload NAME]... [--rounds N]
                               [--threads N] [--compile] [--output FOLDER] [--docs]
    python benchmarks/bench.py --from output/bench/bench.json [--docs]

Implementations take turns, so that all of them see the machine's good and bad moments; each framework has a process of
its own. What a step works on stays as it is: see `workloads.Tensors`. What fits into the caches is measured there, and
after other work has used them, as a forward and a backward pass do. Baselines that are not installed are named.

With `--device cuda` each turn is a number of steps between two CUDA events, so that a step lasts as long as the slower
of host and device. That needs nothing beyond torch and torch_adadelta; tables need tabulate, pictures matplotlib.

It prints every figure as it is measured, and writes all of them (bench.json), tables (report.md) and pictures to the
folder. `--runs` measures all of it several times, one after the other; each figure of a table is the median of the
runs. `--from` makes tables and pictures from such figures and measures nothing. `--docs` measures three times, and puts
tables and pictures into the README, docs/performance.md and docs/sparse.md. The exit status does not depend on the
figures.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from unittest.mock import patch

import implementations as impl
import torch
import workloads
from report import facts_text, fill_in, rows_of, tables_of, target_cells, write_markdown
from results import LITTLE_MEMORY, Record, Results, judged
from timing import MOST_CUDA_CALLS, STEP, Run, interleave, machine
from workers import Worker, Workers
from workloads import Workload

from torch_adadelta.backends import kernels

ROOT: Final = Path(__file__).resolve().parent.parent

# Whose tables `--docs` fills in.
PAGES: Final = ("README.md", "docs/performance.md", "docs/sparse.md")

PARTS: Final = {
    "cpu": ("steps", "elements", "tensors", "threads", "sparse", "operations", "training", "memory", "setup"),
    "cuda": ("steps", "sparse"),
}
# What the figures are of.
FULL, PART, QUICK = "a full run", "a part of a run", "a quick run, whose figures mean little"
RUNS_FOR_DOCS: Final = 3

# Whose memory is measured on the CPU, and on what.
MEMORY: Final = (impl.FUSED, impl.TORCH_FOREACH, impl.TORCH_FOR_LOOP, impl.ADAM)
MEMORY_WORKLOADS: Final = ("1x16M", "1000x16", "1x256K")

# What to call it here, the implementation, and its threads.
Entry = tuple[str, str, int | None]


@dataclass
class Bench:
    """What was asked for, and the workers that it is done by."""

    device: str
    workers: Workers
    rounds: int | None
    quick: bool
    with_compile: bool

    def measure(self, part: str, workload: Workload, entries: Sequence[Entry], left_out: Mapping[str, str]) -> Record:
        """Times implementations, and measures the memory that ours take on a CUDA device."""
        print(f"measuring {part}, {workload.name} ...", file=sys.stderr)
        used: dict[str, Worker] = {}
        builders = {}
        for shown, name, threads in entries:
            family = impl.CUDA if self.device == "cuda" else impl.FAMILIES.get(name, "torch")
            used[shown] = self.workers.of("torch" if part in impl.OTHER else family, threads or workload.threads)
            builders[shown] = used[shown].builder(part, workload, name)
        run = interleave(
            builders,
            budget=workload.budget,
            turn=workload.turn,
            fits_cache=workload.fits_cache,
            rounds=self.rounds,
            most_calls=MOST_CUDA_CALLS if self.device == "cuda" else sys.maxsize,
            busy=self.workers.seconds,
        )
        try:
            ours = [name for name in LITTLE_MEMORY if name in run.seconds and self.device == "cuda"]
            run = run._replace(memory={name: used[name].call("extra_memory", name) for name in ours})
            counts = [worker.call("abnormal") for worker in dict.fromkeys(used.values()) if worker.process.is_alive()]
            run = run._replace(abnormal=sum(counts))
        except RuntimeError as error:
            run.absent["memory, or abnormal numbers"] = str(error)
        self.workers.clear()
        return Record.of(part, workload, run._replace(absent={**left_out, **run.absent}))

    def entries(self, part: str, workload: Workload) -> tuple[list[Entry], dict[str, str]]:
        """Who is measured on a workload, and who is left out, and why."""
        left_out: dict[str, str] = {}
        most = self.workers.threads
        if part == "threads":  # one, and twice as many each time, up to all
            counts = sorted({most, *(2**k for k in range(most.bit_length()) if 2**k <= most)})
            return [(f"{n} thread{'s' if n > 1 else ''}", impl.FUSED, n) for n in counts], left_out
        if part in ("steps", "sparse"):
            names, left_out = impl.field_of(workload, self.device, with_compile=self.with_compile)
        else:
            names = list(impl.CURVES.get(part) or impl.OTHER[part])
        entries: list[Entry] = [(name, name, None) for name in names]
        if part in impl.CURVES and most > 1:
            entries.insert(1, (f"{impl.FUSED}, 1 thread", impl.FUSED, 1))
        return entries, left_out

    def part(self, part: str, selected: Sequence[Workload]) -> Iterator[Record]:
        """The records of a part of the benchmark."""
        if part == "setup":
            yield Record.of(part, Workload("setup", ()), setup(quick=self.quick))
        elif part == "memory":
            self.workers.close()  # each takes memory
            for workload in selected:
                if workload.name in MEMORY_WORKLOADS:
                    yield Record.of(part, workload, self.memory(workload))
        else:
            for workload in selected if part == "steps" else workloads.OF_PART[part](quick=self.quick):
                yield self.measure(part, workload, *self.entries(part, workload))

    def memory(self, workload: Workload) -> Run:
        """What steps take beyond what they have before, each in a process of its own."""
        print(f"measuring memory, {workload.name} ...", file=sys.stderr)
        run = Run({}, {}, {}, {})
        for name in MEMORY[: 2 if self.quick else None]:
            worker = Worker("torch", self.workers.threads)
            try:
                # The first is for threads, and whatever else is set up once in a process.
                for each in (Workload("", workloads.many(1, 2**18), workload.dtype), workload):
                    worker.call("clear")
                    worker.call("build", "steps", each, name)
                    worker.call("time", name, 1)
                run.memory[name] = worker.call("extra_memory", name)
            except RuntimeError as error:
                run.absent[name] = str(error)
            finally:
                worker.close()
        return run


def setup(*, quick: bool) -> Run:
    """What importing and building take."""
    print("measuring imports and the build ...", file=sys.stderr)
    repeats = 1 if quick else 5
    seconds = {
        "import torch_adadelta, beyond torch": {STEP: import_seconds("torch_adadelta", "torch", repeats)},
        "import torch": {STEP: import_seconds("torch", "sys", repeats)},
    }
    built = "left out" if quick else build_seconds()
    name = "building the compiled library"
    if isinstance(built, str):
        return Run(seconds, {}, {name: built}, {})
    return Run({**seconds, name: {STEP: [built]}}, {}, {}, {})


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
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "setup.py", "build_ext", "--force", "--build-temp", f"{folder}/temp"]
        command += ["--build-lib", f"{folder}/lib"]
        start = time.perf_counter()
        result = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
        seconds = time.perf_counter() - start
        return seconds if result.returncode == 0 and list(Path(folder).rglob("*.so")) else "the build failed"


def run(options: argparse.Namespace) -> Results:
    """Measures what the command line asks for, and writes after each record what there is so far."""
    start = time.perf_counter()
    facts = {**machine(options.device), "threads": str(options.threads)}
    print(facts_text(facts), end="\n\n", flush=True)
    known = all_workloads(options.device, quick=options.quick)
    selected = [workload for workload in known if not options.workload or workload.name in options.workload]
    parts = options.part or [p for p in PARTS[options.device] if not options.workload or p in ("steps", "memory")]
    kind = QUICK if options.quick else PART if options.part or options.workload else FULL
    results = Results(facts, kind, 0, 0.0, [])
    for number in range(1, options.runs + 1):
        # What a compiler kept from an earlier run would hide how long it takes.
        with (
            tempfile.TemporaryDirectory() as cache,
            patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache),
            Workers(options.threads) as workers,
        ):
            bench = Bench(options.device, workers, options.rounds, options.quick, options.compile)
            for record in (record for part in parts for record in bench.part(part, selected)):
                print_lines(record)
                results.add(record)
                results = results._replace(runs=number - 1, seconds=time.perf_counter() - start)
                results.write(options.output / "bench.json")  # so that nothing is lost if the run is
        results = results._replace(runs=number)
    return results


def print_lines(record: Record) -> None:
    """Prints what a run measured of a workload, without the help of any package."""
    print(f"{record.part}, {record.name}: {record.title}")
    for row in rows_of(record):
        facts = (f"{column} {text}" for column, text in row.items() if text and column != "implementation")
        print(f"  {row['implementation']}: {', '.join(facts)}")
    for name, count in record.memory.items():
        print(f"  {name}: extra memory {count:,} B")
    for name, reason in record.absent.items():
        print(f"  {name}: absent: {reason}")
    print(flush=True)


def all_workloads(device: str, *, quick: bool) -> Sequence[Workload]:
    """What steps are measured on."""
    if device == "cuda":
        return workloads.of_cuda(quick=quick)
    return workloads.QUICK if quick else workloads.WORKLOADS


def write_report(results: Results, folder: Path) -> None:
    """Prints and writes tables, and draws pictures, if that can be done here."""
    try:
        import tabulate  # noqa: F401
        from pictures import draw_all
    except ModuleNotFoundError as error:
        for outcome in judged(results):
            print(" · ".join(target_cells(outcome)))
        print(f"{error.name} is not installed: `--from {folder / 'bench.json'}` makes tables and pictures where it is")
        return
    for table in tables_of(results).values():
        print(table.section())
    write_markdown(folder / "report.md", results)
    draw_all(results, folder)


def write_docs(results: Results, root: Path) -> None:
    """Puts tables and pictures into the pages of a source tree."""
    from pictures import draw_all

    draw_all(results, root / "docs" / "images")
    for page in PAGES:
        fill_in(root / page, results)


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=PARTS, default="cpu", help="what to measure on (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a minute, with little of everything")
    parser.add_argument("--runs", type=int, help="measure everything so many times (default: 1, with --docs 3)")
    parser.add_argument("--workload", action="append", metavar="NAME", help="only steps on this one; repeatable")
    parser.add_argument("--part", action="append", choices=PARTS["cpu"], help="only this part; repeatable")
    parser.add_argument("--rounds", type=int, help="rounds of each workload; by default as many as some seconds allow")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: %(default)s")
    compiles = f"{impl.TORCH_COMPILED}, too: minutes (default: on the CPU, unless --quick)"
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help=compiles)
    output = "where to write (default: output/bench; if it is not all that is measured, output/bench-part)"
    parser.add_argument("--output", type=Path, help=output)
    parser.add_argument("--from", dest="source", type=Path, metavar="JSON", help="figures to show instead of measuring")
    parser.add_argument("--docs", action="store_true", help="put tables and pictures into README.md and docs/")
    options = parser.parse_args(arguments)
    if min(options.threads, options.rounds or 1, 1 if options.runs is None else options.runs) < 1:
        parser.error("--threads, --rounds and --runs must be at least 1")
    is_part = bool(options.quick or options.workload or options.part)
    is_less = is_part or options.device != "cpu" or (options.runs or RUNS_FOR_DOCS) < RUNS_FOR_DOCS
    if options.docs and is_less and not options.source:
        parser.error("--docs needs three full runs on the CPU: leave out --quick, --workload, --part, --device, --runs")
    known = [workload.name for workload in all_workloads(options.device, quick=options.quick)]
    if unknown := set(options.workload or ()) - set(known):
        parser.error(f"--workload {min(unknown)}: choose from {', '.join(known)}")
    if unknown := set(options.part or ()) - set(PARTS[options.device]):
        parser.error(f"--part {min(unknown)}: --device {options.device} has {', '.join(PARTS[options.device])}")
    if options.compile is None:
        options.compile = options.device == "cpu" and not options.quick
    options.runs = options.runs or (RUNS_FOR_DOCS if options.docs else 1)
    name = "bench" if options.device == "cpu" else "bench-cuda"
    options.output = options.output or ROOT / "output" / (f"{name}-part" if is_part else name)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints and writes what the command line asks for."""
    options = read_options(arguments)
    if not options.source and options.device == "cuda":
        if not torch.cuda.is_available():
            sys.exit("--device cuda needs a CUDA device")
        if not kernels.is_cuda_loaded:
            sys.exit(f"the CUDA library is missing: {kernels.cuda_load_error}")
    options.output.mkdir(parents=True, exist_ok=True)
    results = Results.read(options.source) if options.source else run(options)
    results.write(options.output / "bench.json")
    write_report(results, options.output)
    if options.docs and (results.options != FULL or "GPU" in results.machine or results.runs < RUNS_FOR_DOCS):
        sys.exit(f"{options.source} has {results.runs} × {results.options}: --docs needs three full runs on the CPU")
    if options.docs:
        write_docs(results, ROOT)
    print(f"{results.options}, {results.seconds:.0f} s: {options.output}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # all work is done elsewhere
    main()
