"""How long a whole `step()` on dense CPU parameters takes, beside its peers, and whether it meets its bars.

    python benchmarks/dense_step.py [--workload NAME]... [--rounds N] [--threads N] [--compile]
                                    [--json PATH] [--markdown PATH]

Every optimizer has parameters and state of its own, equal to those of the others, and the same gradients, which stay as
they are. The state is the fixed point that Adadelta reaches under a constant gradient, so no step makes the numbers
easier or harder: square_avg = acc_delta = grad^2, and every step moves the parameters by lr * grad. The gradients keep
a distance from 0, so that nothing becomes subnormal, not even in float16. What fits into the caches is measured there.

The exit status does not depend on the figures.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from measure import (
    Spread,
    Step,
    Table,
    Timings,
    bytes_text,
    count_abnormal,
    extra_memory,
    interleave,
    machine,
    seconds_text,
    show,
    write_json,
    write_markdown,
)
from rich.console import Console
from torch import Tensor
from torch.optim.optimizer import Optimizer

from torch_adadelta import AdadeltaKeras, ops

LR: Final = 1e-3

# ---- Workloads ------------------------------------------------------------------------------------------------------


class Workload(NamedTuple):
    """Parameters of one shape, and how they are measured."""

    name: str
    tensors: int
    numel: int
    dtype: torch.dtype
    budget: float  # seconds of measuring
    turn: float  # the least number of seconds that are timed together
    fits_cache: bool

    @property
    def title(self) -> str:
        """Its shapes and dtype in words."""
        return (
            f"{self.tensors:,} tensor{'s' if self.tensors > 1 else ''} of shape ({self.numel},), "
            f"{str(self.dtype).removeprefix('torch.')}"
        )

    def grads(self) -> list[Tensor]:
        """Gradients between 0.1 and 1 in size, of random sign; the same ones at every call."""
        generator = torch.Generator().manual_seed(0)
        grads = torch.empty(self.tensors, self.numel).uniform_(-0.9, 0.9, generator=generator)
        grads += grads.sign().mul_(0.1)
        return [grad.to(self.dtype, copy=True) for grad in grads]


WORKLOADS: Final = (
    Workload("1x16M", 1, 16_777_216, torch.float32, budget=30, turn=0.03, fits_cache=False),
    Workload("200x4096", 200, 4096, torch.float32, budget=12, turn=5e-3, fits_cache=True),
    Workload("1000x16", 1000, 16, torch.float32, budget=12, turn=5e-3, fits_cache=True),
    Workload("1x16", 1, 16, torch.float32, budget=5, turn=5e-4, fits_cache=True),
    Workload("1x16M-bfloat16", 1, 16_777_216, torch.bfloat16, budget=18, turn=0.03, fits_cache=False),
    Workload("1x16M-float16", 1, 16_777_216, torch.float16, budget=18, turn=0.03, fits_cache=False),
)

# The share of the processors in other hands above which figures are not to be trusted.
MOST_DISTURBANCE: Final = 0.05

# torch.compile takes minutes for more.
MOST_COMPILED_TENSORS: Final = 200


# ---- Contenders -----------------------------------------------------------------------------------------------------

FUSED: Final = "AdadeltaKeras, fused"
FUSED_FLOAT32: Final = "AdadeltaKeras, fused, float32"
FOREACH: Final = "AdadeltaKeras, foreach"
FOR_LOOP: Final = "AdadeltaKeras, for-loop"
# Never reached, so that the state keeps its fixed point; the work is the same as if it were.
CLIPPED: Final[dict[str, Any]] = {
    f"AdadeltaKeras, fused, {option}": {option: 1e6} for option in ("clipvalue", "clipnorm", "global_clipnorm")
}
TORCH_FOREACH: Final = "torch.optim.Adadelta, foreach"
TORCH_FOR_LOOP: Final = "torch.optim.Adadelta, for-loop"
TORCH_COMPILED: Final = "torch.optim.Adadelta, torch.compile"
ADAM: Final = "torch.optim.Adam, fused"
EMPTY: Final = "an empty Optimizer.step()"
ADD: Final = "a.add_(b, alpha=c)"

# Tensors that must be moved: a step reads the gradient, and reads and writes the parameter and two states; add_ reads
# both of its tensors and writes one.
STEP_TENSORS: Final = 7
ADD_TENSORS: Final = 3


class EmptyStep(Optimizer):
    """An optimizer that does nothing: what remains are the hooks that PyTorch puts around every step."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> Any:
        """Does nothing."""


def build_params(grads: list[Tensor]) -> list[Tensor]:
    """Parameters with these gradients, of the sign that keeps them away from 0 in descent."""
    params: list[Tensor] = [torch.nn.Parameter(-grad) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


def build_keras(grads: list[Tensor], *, foreach: bool | None = None, **options: Any) -> AdadeltaKeras:
    """Our optimizer: the fused kernel by default, as a user gets it, or one of the Python paths."""
    if foreach is None and not ops.is_loaded:
        raise RuntimeError(f"the compiled library is missing: {ops.load_error}")
    optimizer = AdadeltaKeras(build_params(grads), lr=LR, foreach=foreach, **options)
    for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        optimizer.state[param] = {"square_avg": grad.square(), "acc_delta": grad.square()}
    return optimizer


def build_torch(grads: list[Tensor], *, foreach: bool) -> torch.optim.Adadelta:
    """PyTorch's optimizer with our rho and epsilon."""
    optimizer = torch.optim.Adadelta(build_params(grads), lr=LR, rho=0.95, eps=1e-7, foreach=foreach)
    for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        optimizer.state[param] = {
            "step": torch.tensor(0.0),
            "square_avg": grad.square(),
            "acc_delta": grad.square(),
        }
    return optimizer


def build_adam(grads: list[Tensor]) -> torch.optim.Adam:
    """PyTorch's fused Adam, which moves as many bytes as Adadelta."""
    optimizer = torch.optim.Adam(build_params(grads), lr=LR, fused=True)
    for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        optimizer.state[param] = {"step": torch.tensor(0.0), "exp_avg": grad.clone(), "exp_avg_sq": grad.square()}
    return optimizer


def build_compiled(grads: list[Tensor]) -> Step:
    """PyTorch's optimizer under torch.compile; it compiles in its first call."""
    optimizer = build_torch(grads, foreach=True)

    @torch.compile(fullgraph=False)
    def step() -> None:
        optimizer.step()

    return step


def build_add(grads: list[Tensor]) -> Step:
    """The bandwidth probe."""
    (b,) = grads
    a = b.clone()
    return lambda: a.add_(b, alpha=LR)


class Contenders:
    """The contenders of a workload by name, and the optimizers that were built so far."""

    def __init__(self, workload: Workload, *, with_compile: bool = False) -> None:
        grads = workload.grads()
        self.optimizers: dict[str, Optimizer] = {}
        self.builders: dict[str, Callable[[], Step]] = {}

        def add(name: str, build: Callable[[], Optimizer]) -> None:
            def build_step() -> Step:
                optimizer = self.optimizers[name] = build()
                return optimizer.step

            self.builders[name] = build_step

        # Those whose ratio matters most stand side by side.
        if workload.tensors == 1 and not workload.fits_cache:
            self.builders[ADD] = lambda: build_add(grads)
        add(FUSED, lambda: build_keras(grads))
        for name, options in CLIPPED.items():
            add(name, partial(build_keras, grads, **options))
        if workload.dtype is not torch.float32:
            add(FUSED_FLOAT32, lambda: build_keras([grad.float() for grad in grads]))
        add(EMPTY, lambda: EmptyStep(build_params(grads)))
        add(ADAM, lambda: build_adam(grads))
        if with_compile and workload.tensors <= MOST_COMPILED_TENSORS:
            self.builders[TORCH_COMPILED] = lambda: build_compiled(grads)
        add(TORCH_FOREACH, lambda: build_torch(grads, foreach=True))
        add(TORCH_FOR_LOOP, lambda: build_torch(grads, foreach=False))
        add(FOREACH, lambda: build_keras(grads, foreach=True))
        add(FOR_LOOP, lambda: build_keras(grads, foreach=False))

    def abnormal(self) -> dict[str, int]:
        """How many infinite, nan or subnormal numbers the parameters and state hold, for optimizers that have any."""
        counts = {}
        for name, optimizer in self.optimizers.items():
            tensors = [tensor for state in optimizer.state.values() for tensor in state.values()]
            count = sum(map(count_abnormal, tensors + optimizer.param_groups[0]["params"]))
            if count:
                counts[name] = count
        return counts


def default_of(timings: Timings) -> str:
    """What AdadeltaKeras does when it is told nothing."""
    return FUSED if FUSED in timings.seconds else FOR_LOOP


def better_torch(timings: Timings) -> str:
    """The faster path of torch.optim.Adadelta."""
    return min(TORCH_FOREACH, TORCH_FOR_LOOP, key=lambda name: timings.spread(name).median)


# ---- Extra memory ---------------------------------------------------------------------------------------------------

MEMORY_WORKLOADS: Final = ("1x16M", "1000x16")
MEMORY_CONTENDERS: Final = (FUSED, ADAM, TORCH_FOREACH, TORCH_FOR_LOOP)

Memory = dict[str, dict[str, int | str]]  # workload → contender → bytes, or why there is no figure


def extra_memory_of(workload: Workload, name: str, threads: int) -> int | str:
    """Bytes that a contender's step takes beyond what it has before; to be called in a process of its own."""
    torch.set_num_threads(threads)
    try:
        # Threads and whatever else is set up once in a process.
        Contenders(workload._replace(tensors=1, numel=2**18)).builders[name]()()
        return extra_memory(Contenders(workload).builders[name]())
    except (OSError, RuntimeError) as error:
        return str(error)


def measure_memory(workloads: list[Workload], threads: int) -> Memory:
    """The extra memory of the contenders that are compared by it."""
    memory: Memory = {}
    for workload in workloads:
        memory[workload.name] = {}
        for name in MEMORY_CONTENDERS:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh_process:
                memory[workload.name][name] = fresh_process.submit(extra_memory_of, workload, name, threads).result()
    return memory


# ---- Bars -----------------------------------------------------------------------------------------------------------


def factor_text(spread: Spread) -> str:
    """A factor with its quartiles."""
    return f"{spread.median:.3g} x ({spread.lower:.3g}-{spread.upper:.3g})"


def duration_text(spread: Spread) -> str:
    """A duration with its quartiles."""
    return f"{seconds_text(spread.median)} ({seconds_text(spread.lower, spread.upper)})"


def against_torch(timings: Timings) -> Spread:
    """By what factor the step is faster than the better path of torch.optim.Adadelta."""
    return timings.ratio(better_torch(timings), default_of(timings))


def against_probe(timings: Timings) -> Spread:
    """The step as a multiple of the time that its bytes would take at the rate of the bandwidth probe."""
    bytes_ratio = STEP_TENSORS / ADD_TENSORS
    return Spread(*(value / bytes_ratio for value in timings.ratio(default_of(timings), ADD)))


def against_default(name: str, timings: Timings) -> Spread:
    """The time of a contender over that of the default."""
    return timings.ratio(name, default_of(timings))


class Bar(NamedTuple):
    """What the time of a workload's step must reach."""

    workload: str
    what: str
    bar: str
    measured: Callable[[Timings], Spread]
    is_met: Callable[[float], bool]
    text: Callable[[Spread], str] = factor_text


BARS: Final = (
    Bar("1x16M", "speed against torch.optim.Adadelta's better path", "≥ 9 x", against_torch, lambda x: x >= 9),
    Bar(
        "1x16M", "time against 28 bytes an element at the rate of add_", "≤ 1.15 x", against_probe, lambda x: x <= 1.15
    ),
    *(
        Bar(
            "1x16M",
            f"time with {name.split()[-1]} against the unclipped step",
            "≤ 1.25 x",
            partial(against_default, name),
            lambda x: x <= 1.25,
        )
        for name in CLIPPED
        if "norm" in name
    ),
    Bar("200x4096", "speed against torch.optim.Adadelta's better path", "≥ 20 x", against_torch, lambda x: x >= 20),
    Bar("1000x16", "speed against torch.optim.Adadelta's better path", "≥ 14 x", against_torch, lambda x: x >= 14),
    Bar(
        "1000x16",
        "speed against torch's fused Adam",
        "≥ 4 x",
        lambda timings: timings.ratio(ADAM, default_of(timings)),
        lambda x: x >= 4,
    ),
    Bar(
        "1x16",
        "time beyond an empty step",
        "≤ 10 µs",
        lambda timings: timings.difference(default_of(timings), EMPTY),
        lambda x: x <= 10e-6,
        duration_text,
    ),
    Bar(
        "1x16M-bfloat16",
        "speed against float32",
        "≥ 1.6 x",
        lambda timings: timings.ratio(FUSED_FLOAT32, FUSED),
        lambda x: x >= 1.6,
    ),
)


class Verdict(NamedTuple):
    """A bar and what was measured: a spread, bytes, or None where there is no figure."""

    workload: str
    what: str
    bar: str
    text: str
    measured: dict[str, float] | int | None
    met: bool | None


def judge(bar: Bar, timings: Timings) -> Verdict:
    """Compares a bar with the timings of its workload."""
    try:
        spread = bar.measured(timings)
    except KeyError as missing:
        return Verdict(bar.workload, bar.what, bar.bar, f"{missing.args[0]}: absent", None, None)
    met = bar.is_met(spread.median)
    return Verdict(bar.workload, bar.what, bar.bar, bar.text(spread), spread._asdict(), met)


def judge_memory(workload: Workload, extra: int | str) -> Verdict:
    """Compares the extra memory of a fused step with the bar."""
    what, bar = "extra memory during a fused step", "< 1 MB + 64 B a tensor"
    if isinstance(extra, str):
        return Verdict(workload.name, what, bar, f"{FUSED}: absent", None, None)
    return Verdict(workload.name, what, bar, bytes_text(extra), extra, extra < 10**6 + 64 * workload.tensors)


# ---- The report -----------------------------------------------------------------------------------------------------


def timings_table(workload: Workload, timings: Timings, abnormal: Mapping[str, int]) -> Table:
    """One row a contender."""
    default = default_of(timings)
    rows = []
    for name in timings.seconds:
        spread = timings.spread(name)
        shown = f"{name} (the default)" if name == default else name
        quartiles = seconds_text(spread.lower, spread.upper)
        rows.append((shown, seconds_text(spread.median), quartiles, f"{timings.ratio(name, default).median:.3g}"))
    notes = [f"{timings.rounds} rounds; the time over the default's is the median of the rounds' ratios"]
    if timings.disturbance is not None:
        notes.append(f"meanwhile other processes used {timings.disturbance:.0%} of the machine's processors")
    if ADD in timings.seconds:
        rates = (
            f"{what} {tensors * workload.numel * workload.dtype.itemsize / timings.spread(name).median / 1e9:.1f} GB/s"
            for what, tensors, name in (("a.add_", ADD_TENSORS, ADD), ("the default", STEP_TENSORS, default))
        )
        notes.append(f"what must be moved, over the time: {', '.join(rates)}")
    notes += [f"absent: {name}: {reason}" for name, reason in timings.absent.items()]
    notes += [
        f"not comparable: {name} reached {count} subnormal or infinite numbers" for name, count in abnormal.items()
    ]
    header = ("contender", "median of one step", "quartiles", "time / default's")
    return Table(f"{workload.name}: {workload.title}", header, rows, notes)


def memory_table(memory: Memory) -> Table:
    """One row a contender, one column a workload."""
    rows = []
    notes = [
        "by how much one step raised the peak of the process's resident memory (VmHWM of Linux, reset before the step)",
        "before it: parameters, gradients and state are there, free memory is given back; the worst of 3 steps",
    ]
    for name in MEMORY_CONTENDERS:
        extras = [by_name[name] for by_name in memory.values()]
        rows.append((name, *("absent" if isinstance(extra, str) else bytes_text(extra) for extra in extras)))
        notes += [f"absent: {name}: {extra}" for extra in dict.fromkeys(extras) if isinstance(extra, str)]
    return Table("Extra memory during a step", ("contender", *memory), rows, notes)


def verdicts_table(verdicts: list[Verdict], disturbed: list[str]) -> Table:
    """One row a bar."""
    words = {True: "met", False: "not met", None: "not measured"}
    rows = [(v.workload, v.what, v.bar, v.text, words[v.met]) for v in verdicts]
    notes = [f"the machine was busy with other work during {', '.join(disturbed)}: measure again"] if disturbed else []
    return Table("Bars", ("workload", "what", "bar", "measured (quartiles)", "verdict"), rows, notes)


def timings_data(workload: Workload, timings: Timings, abnormal: Mapping[str, int]) -> dict[str, Any]:
    """What `timings_table` shows, as data; seconds."""
    default = default_of(timings)
    return {
        "name": workload.name,
        "tensors": workload.tensors,
        "shape": [workload.numel],
        "dtype": str(workload.dtype).removeprefix("torch."),
        "rounds": timings.rounds,
        "disturbance": timings.disturbance,
        "default": default,
        "seconds": {name: timings.spread(name)._asdict() for name in timings.seconds},
        "time over default's": {name: timings.ratio(name, default)._asdict() for name in timings.seconds},
        "absent": timings.absent,
        "abnormal": dict(abnormal),
    }


def main() -> None:
    """Measures, prints and writes what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [workload.name for workload in WORKLOADS]
    parser.add_argument("--workload", action="append", choices=names, help="only this one; may be repeated")
    parser.add_argument("--rounds", type=int, help="rounds of each workload; by default as many as some seconds allow")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help=f"{TORCH_COMPILED}, too: minutes")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures here, as JSON")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write the tables here, as Markdown")
    arguments = parser.parse_args()
    if arguments.threads < 1 or (arguments.rounds is not None and arguments.rounds < 1):
        parser.error("--threads and --rounds must be at least 1")

    torch.set_num_threads(arguments.threads)
    console = Console(width=None if sys.stdout.isatty() else 140)
    facts = machine()
    for key, value in facts.items():
        console.print(f"{key:16}{value}", markup=False, highlight=False)
    console.print()

    selected = [workload for workload in WORKLOADS if not arguments.workload or workload.name in arguments.workload]
    tables: list[Table] = []
    verdicts: list[Verdict] = []
    disturbed: list[str] = []
    data: dict[str, Any] = {"machine": facts, "workloads": []}
    for workload in selected:
        print(f"measuring {workload.name} ...", file=sys.stderr)
        contenders = Contenders(workload, with_compile=arguments.compile)
        timings = interleave(
            contenders.builders,
            budget=workload.budget,
            turn=workload.turn,
            fits_cache=workload.fits_cache,
            rounds=arguments.rounds,
        )
        abnormal = contenders.abnormal()
        del contenders
        tables.append(timings_table(workload, timings, abnormal))
        show(console, tables[-1])
        data["workloads"].append(timings_data(workload, timings, abnormal))
        if (timings.disturbance or 0) > MOST_DISTURBANCE:
            disturbed.append(workload.name)
        verdicts += [judge(bar, timings) for bar in BARS if bar.workload == workload.name]

    in_memory = [workload for workload in selected if workload.name in MEMORY_WORKLOADS]
    if in_memory:
        print("measuring extra memory ...", file=sys.stderr)
        memory = measure_memory(in_memory, arguments.threads)
        tables.append(memory_table(memory))
        show(console, tables[-1])
        data["extra memory"] = memory
        verdicts += [judge_memory(workload, memory[workload.name][FUSED]) for workload in in_memory]

    if verdicts:
        tables.append(verdicts_table(verdicts, disturbed))
        show(console, tables[-1])
    data["bars"] = [verdict._asdict() for verdict in verdicts]
    if arguments.json:
        write_json(arguments.json, data)
    if arguments.markdown:
        write_markdown(arguments.markdown, tables, facts)


if __name__ == "__main__":
    main()
