"""How long a whole `step()` takes on a CUDA device, beside its peers, and whether it meets its bars.

    python benchmarks/cuda_step.py [--workload NAME]... [--quick] [--rounds N] [--compile] [--json PATH]
                                   [--markdown PATH]

Contenders take turns in one run; each turn is a number of steps between two CUDA events, so that a step lasts as long
as the slower of host and device. "host" is the time until `step()` returns, with the device still at work. The
gradients stay as they are, and the state of Adadelta is its fixed point under them (square_avg = acc_delta = grad^2),
so that no step makes the numbers easier or harder. The variants of Adadelta share parameters and state, as far as they
have the same dtype. A device copy beside them says what memory can do.

It needs nothing beyond torch and torch_adadelta. The exit status does not depend on the figures.
"""

import argparse
import gc
import itertools
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

import shapes
import torch
from measure import Spread, Step, Timings, interleave, write_json
from shapes import Shape
from torch import Tensor
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras
from torch_adadelta.backends import kernels

LR: Final = 1e-3

# ---- Workloads ------------------------------------------------------------------------------------------------------


class Workload(NamedTuple):
    """Parameters of some shapes; `is_large` where memory bandwidth decides, not the host."""

    name: str
    shapes: list[Shape]
    dtype: torch.dtype
    is_large: bool
    is_quick: bool = True
    touched: int = 0  # rows that occur in the sparse gradient of each step, of the one table; 0: dense gradients

    @property
    def numel(self) -> int:
        """The number of elements of all parameters."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)


def workloads() -> list[Workload]:
    """All of them, each in float32 and bfloat16."""
    result = []
    for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, "-bfloat16")):
        result += [
            Workload(f"1x64M{suffix}", [(2**26,)], dtype, True),
            Workload(f"1x1G{suffix}", [(2**30,)], dtype, True, is_quick=False),
            Workload(f"resnet50{suffix}", shapes.resnet50(), dtype, False),
            Workload(f"1000x16{suffix}", [(16,)] * 1000, dtype, False),
        ]
    result += [
        Workload(f"{height}x64, 1000 rows", [(height, 64)], torch.float32, False, height <= HIGHEST_DENSE, 1000)
        for height in (10**4, 10**5, HIGHEST_DENSE, 10**7)
    ]
    return result


# The largest table that also has a step by a dense gradient.
HIGHEST_DENSE: Final = 10**6


# Bytes an element at the peak, as a multiple of the dtype's: the gradient; three tensors of Adadelta and of Adam; the
# copy; three or four temporaries of the multi-tensor path.
PEAK_TENSORS: Final = 12

# ---- Contenders -----------------------------------------------------------------------------------------------------

FUSED: Final = "AdadeltaKeras, fused"
FUSED_FLOAT32: Final = "AdadeltaKeras, fused, float32"
REPLAY: Final = "AdadeltaKeras, fused, graph replay"
CLIPNORM: Final = "AdadeltaKeras, fused, clipnorm"
GLOBAL_CLIPNORM: Final = "AdadeltaKeras, fused, global_clipnorm"
TORCH_FOREACH: Final = "torch.optim.Adadelta, foreach"
TORCH_COMPILED: Final = "torch.optim.Adadelta, torch.compile"
ADAM: Final = "torch.optim.Adam, fused"
COPY: Final = "device copy"
SPARSE_ADAM: Final = "torch.optim.SparseAdam"
DENSE: Final = "AdadeltaKeras, fused, dense gradient"

# Tensors that must be moved: a step reads the gradient, and reads and writes the parameter and two states.
STEP_TENSORS: Final = 7
COPY_TENSORS: Final = 2

# torch.compile takes minutes for more.
MOST_COMPILED_TENSORS: Final = 200


class Tensors(NamedTuple):
    """Parameters with gradients, and Adadelta's state at its fixed point."""

    params: list[Parameter]
    square_avgs: list[Tensor]
    acc_deltas: list[Tensor]

    @classmethod
    def of(cls, workload: Workload, dtype: torch.dtype) -> "Tensors":
        """Gradients between 0.1 and 1 in size, of random sign; parameters of the sign that keeps them away from 0."""
        generator = torch.Generator("cuda").manual_seed(0)
        params, squares = [], []
        for shape in workload.shapes:
            grad = torch.empty(shape, dtype=dtype, device="cuda").uniform_(-0.9, 0.9, generator=generator)
            grad.add_(grad.sign().mul_(0.1))
            params.append(Parameter(-grad))
            params[-1].grad = grad
            squares.append(grad.square())
        return cls(params, squares, [square.clone() for square in squares])


def build_keras(tensors: Tensors, **options: Any) -> Step:
    """Our optimizer; what is clipped keeps its size, for the limit is never reached."""
    optimizer = AdadeltaKeras(tensors.params, lr=LR, fused=True, **options)
    for param, square_avg, acc_delta in zip(*tensors, strict=True):
        optimizer.state[param] = {"square_avg": square_avg, "acc_delta": acc_delta}
    return optimizer.step


def build_replay(tensors: Tensors) -> Step:
    """Our step in a CUDA graph."""
    step = build_keras(tensors, capturable=True)
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def build_torch(tensors: Tensors, *, compiled: bool = False) -> Step:
    """PyTorch's optimizer with our rho and epsilon."""
    optimizer = torch.optim.Adadelta(tensors.params, lr=LR, rho=0.95, eps=1e-7, foreach=True)
    for param, square_avg, acc_delta in zip(*tensors, strict=True):
        optimizer.state[param] = {"step": torch.tensor(0.0), "square_avg": square_avg, "acc_delta": acc_delta}

    def step() -> None:
        optimizer.step()

    return torch.compile(step, fullgraph=False) if compiled else step


def build_adam(tensors: Tensors) -> Step:
    """PyTorch's fused Adam, which moves as many bytes as Adadelta; with parameters and state of its own."""
    params = []
    for param in tensors.params:
        params.append(Parameter(param.detach().clone()))
        params[-1].grad = param.grad
    return torch.optim.Adam(params, lr=LR, fused=True).step


def build_copy(tensors: Tensors) -> Step:
    """Copies the gradients: two tensors are moved where a step moves seven."""
    sources = [param.grad for param in tensors.params if param.grad is not None]
    targets = [torch.empty_like(source) for source in sources]

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    return copy


def table_contenders(workload: Workload) -> dict[str, Step]:
    """The steps by sparse gradients, and by a dense one; each by other rows than the last, as in training."""
    (shape,) = workload.shapes
    table, *state = (torch.full(shape, value, device="cuda") for value in (0.5, 0.25, 0.25))
    param = Parameter(table)
    generator = torch.Generator("cuda").manual_seed(0)
    values = torch.empty(workload.touched, shape[1], device="cuda").uniform_(0.1, 1.0, generator=generator)
    grads = [
        torch.sparse_coo_tensor(
            torch.randint(shape[0], (1, workload.touched), device="cuda", generator=generator),
            values,
            shape,
            check_invariants=False,
        )
        for _ in range(100)
    ]

    def stepping(optimizer: Any, names: tuple[str, str], grads: list[Tensor], **more: Any) -> Step:
        optimizer.state[param] = {**dict(zip(names, state, strict=True)), **more}
        in_turn = itertools.cycle(grads)

        def step() -> None:
            param.grad = next(in_turn)
            optimizer.step()

        return step

    def keras_like(grads: list[Tensor], **options: Any) -> Step:
        optimizer = AdadeltaKeras([param], lr=LR, fused=True, **options)
        return stepping(optimizer, ("square_avg", "acc_delta"), grads)

    adam = torch.optim.SparseAdam([param], lr=LR)
    steps = {
        FUSED: keras_like(grads),
        CLIPNORM: keras_like(grads, clipnorm=1e9),
        SPARSE_ADAM: stepping(adam, ("exp_avg", "exp_avg_sq"), grads, step=0),
    }
    if shape[0] <= HIGHEST_DENSE:
        steps[DENSE] = keras_like([torch.full(shape, 0.5, device="cuda")])
    return steps


def contenders(workload: Workload, *, with_compile: bool) -> dict[str, Step]:
    """The steps by name; those whose ratio matters most stand side by side."""
    if workload.touched:
        return table_contenders(workload)
    tensors = Tensors.of(workload, workload.dtype)
    steps: dict[str, Step] = {}
    if workload.is_large:
        steps[COPY] = build_copy(tensors)
    steps[FUSED] = build_keras(tensors)
    steps[CLIPNORM] = build_keras(tensors, clipnorm=1e9)
    steps[GLOBAL_CLIPNORM] = build_keras(tensors, global_clipnorm=1e9)
    if workload.dtype is not torch.float32:
        steps[FUSED_FLOAT32] = build_keras(Tensors.of(workload, torch.float32))
    steps[REPLAY] = build_replay(tensors)
    steps[ADAM] = build_adam(tensors)
    steps[TORCH_FOREACH] = build_torch(tensors)
    if with_compile and len(workload.shapes) <= MOST_COMPILED_TENSORS:
        steps[TORCH_COMPILED] = build_torch(tensors, compiled=True)
    return steps


# ---- Time -----------------------------------------------------------------------------------------------------------


class HostTimings(NamedTuple):
    """What `interleave` says; and the seconds of the host in one step, for each contender a value a round."""

    timings: Timings
    host: dict[str, list[float]]


class DeviceTimer:
    """Times calls by CUDA events, and keeps how long the host took for each of them."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.host: list[float] = []

    def __call__(self, calls: int) -> float:
        """The seconds of some calls."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        start = time.perf_counter()
        for _ in range(calls):
            self.step()
        self.host.append((time.perf_counter() - start) / calls)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


# Launches that the driver takes before it makes the host wait are some hundred: not to be reached.
MOST_CALLS: Final = 100


def measure(steps: Mapping[str, Step], *, budget: float, turn: float, rounds: int | None) -> HostTimings:
    """Times contenders round-robin."""
    timers = {name: DeviceTimer(step) for name, step in steps.items()}
    timings = interleave(
        {name: partial(lambda timer: timer, timer) for name, timer in timers.items()},
        budget=budget,
        turn=turn,
        fits_cache=False,
        rounds=rounds,
        most_calls=MOST_CALLS,
    )
    # The calls before the first round are not of one.
    host = {name: timers[name].host[-len(values) :] for name, values in timings.seconds.items()}
    return HostTimings(timings, host)


def extra_memory(step: Step) -> int:
    """By how many bytes a step raises what is allocated on the device."""
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# ---- Bars -----------------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """A bar and what was measured; `met` is None where there is no figure."""

    workload: str
    what: str
    bar: str
    text: str
    measured: float | None
    met: bool | None


def verdicts(workload: Workload, timings: Timings, memory: Mapping[str, int]) -> list[Verdict]:
    """The bars of a workload."""
    result: list[Verdict] = []

    def judge(what: str, name: str, other: str, bar: float, *, at_least: bool, scale: float = 1.0) -> None:
        sign = "≥" if at_least else "≤"
        if missing := [one for one in (name, other) if one not in timings.seconds]:
            result.append(Verdict(workload.name, what, f"{sign} {bar:g} x", f"{missing[0]}: absent", None, None))
            return
        middle, lower, upper = (scale * value for value in timings.ratio(name, other))
        met = middle >= bar if at_least else middle <= bar
        text = f"{middle:.3g} x ({lower:.3g}-{upper:.3g})"
        result.append(Verdict(workload.name, what, f"{sign} {bar:g} x", text, middle, met))

    if workload.is_large:
        rate = STEP_TENSORS / COPY_TENSORS
        judge("bandwidth against a device copy", COPY, FUSED, 0.9, at_least=True, scale=rate)
        judge("speed against torch foreach", TORCH_FOREACH, FUSED, 3.4, at_least=True)
        judge("speed against torch.compile", TORCH_COMPILED, FUSED, 1.0, at_least=True)
        judge("time with clipnorm against the unclipped step", CLIPNORM, FUSED, 1.25, at_least=False)
        judge("time with global_clipnorm against the unclipped step", GLOBAL_CLIPNORM, FUSED, 1.25, at_least=False)
        if workload.dtype is not torch.float32:
            judge("speed against float32", FUSED_FLOAT32, FUSED, 1.6, at_least=True)
    if workload.name.startswith("1000x16"):
        judge("speed against torch foreach", TORCH_FOREACH, FUSED, 5, at_least=True)
        judge("speed against torch's fused Adam", ADAM, FUSED, 2, at_least=True)
        what, bar = "a graph replay", "≤ 10 µs"
        if REPLAY in timings.seconds:
            spread = Spread.of(timings.seconds[REPLAY])
            result.append(
                Verdict(workload.name, what, bar, duration_text(spread), spread.median, spread.median <= 1e-5)
            )
        else:
            result.append(Verdict(workload.name, what, bar, f"{REPLAY}: absent", None, None))
    if workload.touched and workload.shapes[0][0] == HIGHEST_DENSE:
        judge("speed against a step by a dense gradient", DENSE, FUSED, 100, at_least=True)
    for name, extra in memory.items():
        met = extra < 10**6 + 64 * len(workload.shapes)
        result.append(
            Verdict(workload.name, f"extra memory: {name}", "< 1 MB + 64 B a tensor", f"{extra:,} B", extra, met)
        )
    return result


# ---- The report -----------------------------------------------------------------------------------------------------


def seconds_text(seconds: float) -> str:
    """A duration in the unit that fits."""
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def duration_text(spread: Spread) -> str:
    """A duration with its quartiles."""
    return f"{seconds_text(spread.median)} ({seconds_text(spread.lower)} to {seconds_text(spread.upper)})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, in columns of one width, so that a terminal can show it, too."""
    cells = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def timings_lines(workload: Workload, measured: HostTimings) -> list[str]:
    """A section: one row a contender."""
    timings, host = measured
    rows = []
    for name, values in timings.seconds.items():
        spread = Spread.of(values)
        moved = (COPY_TENSORS if name == COPY else STEP_TENSORS) * workload.numel
        moved *= 4 if name == FUSED_FLOAT32 else workload.dtype.itemsize
        has_rate = workload.is_large and name not in (TORCH_FOREACH, CLIPNORM, GLOBAL_CLIPNORM)
        rate = f"{moved / spread.median / 1e9:.0f} GB/s" if has_rate else ""
        ratio = f"{timings.ratio(name, FUSED).median:.3g}" if FUSED in timings.seconds else ""
        rows.append((name, duration_text(spread), seconds_text(median(host[name])), ratio, rate))
    title = f"{workload.name}: {len(workload.shapes):,} tensors, {workload.numel:,} elements, {timings.rounds} rounds"
    lines = [f"### {title}", ""]
    if rows:
        lines += table(("contender", "one step (quartiles)", "host", "time / fused", "bytes it must move"), rows)
    return [*lines, "", *(f"- absent: {name}: {reason}" for name, reason in timings.absent.items()), ""]


def verdict_lines(judged: Sequence[Verdict]) -> list[str]:
    """A section: one row a bar."""
    words = {True: "met", False: "not met", None: "not measured"}
    rows = [(v.workload, v.what, v.bar, v.text, words[v.met]) for v in judged]
    return ["### Bars", "", *table(("workload", "what", "bar", "measured (quartiles)", "verdict"), rows), ""]


def machine() -> dict[str, str]:
    """What stands above the figures: when, where and with what they were measured."""
    properties = torch.cuda.get_device_properties(0)
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "GPU": f"{properties.name} (sm_{properties.major}{properties.minor}, {memory})",
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def main() -> int:
    """Measures, prints and writes what the command line asks for."""
    known = workloads()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workload", action="append", choices=[w.name for w in known], help="only this; repeatable")
    parser.add_argument(
        "--quick", action="store_true", help="a second of each workload, without those of 2^30 elements"
    )
    parser.add_argument("--rounds", type=int, help="rounds of each workload; by default as many as some seconds allow")
    parser.add_argument("--compile", action="store_true", help=f"{TORCH_COMPILED}, too")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures here, as JSON")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write the tables here, as Markdown")
    arguments = parser.parse_args()
    if arguments.rounds is not None and arguments.rounds < 2:
        parser.error("--rounds must be at least 2")
    if not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)
        return 1
    if not kernels.is_cuda_loaded:
        print(f"the CUDA library is missing: {kernels.cuda_load_error}", file=sys.stderr)
        return 1

    facts = machine()
    lines = [", ".join(f"{key}: {value}" for key, value in facts.items()), ""]
    print("\n".join(lines), flush=True)
    judged: list[Verdict] = []
    data: dict[str, Any] = {"machine": facts, "workloads": []}
    for workload in known:
        if arguments.workload and workload.name not in arguments.workload:
            continue
        if arguments.quick and not workload.is_quick:
            continue
        gc.collect()
        torch.cuda.empty_cache()
        needed = PEAK_TENSORS * workload.numel * workload.dtype.itemsize
        if workload.dtype is not torch.float32:
            needed += 4 * workload.numel * 4
        free = torch.cuda.mem_get_info()[0]
        if needed > free:
            section = [f"### {workload.name}", "", f"- left out: {needed:,} B are needed, {free:,} B are free", ""]
            data["workloads"].append({"name": workload.name, "left out": section[2][2:]})
        else:
            steps = contenders(workload, with_compile=arguments.compile)
            measured = measure(steps, budget=1 if arguments.quick else 5, turn=0.02, rounds=arguments.rounds)
            timings = measured.timings
            ours = [name for name in (FUSED, CLIPNORM, GLOBAL_CLIPNORM) if name in timings.seconds]
            memory: dict[str, int] = {name: extra_memory(steps[name]) for name in ours}
            del steps
            section = timings_lines(workload, measured)
            judged += verdicts(workload, timings, memory)
            data["workloads"].append(
                {
                    "name": workload.name,
                    "tensors": len(workload.shapes),
                    "elements": workload.numel,
                    "dtype": str(workload.dtype).removeprefix("torch."),
                    "seconds": {name: Spread.of(values)._asdict() for name, values in timings.seconds.items()},
                    "host seconds": {name: Spread.of(values)._asdict() for name, values in measured.host.items()},
                    "extra memory": memory,
                    "absent": timings.absent,
                }
            )
        print("\n".join(section), flush=True)
        lines += section
    if judged:
        section = verdict_lines(judged)
        print("\n".join(section), flush=True)
        lines += section
    data["bars"] = [verdict._asdict() for verdict in judged]
    if arguments.json:
        write_json(arguments.json, data)
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
