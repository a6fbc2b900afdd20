"""Processes that implementations run in, and the turns that they are given there.

A worker holds what was built for one workload. It answers calls of `Stage`'s methods; whatever goes wrong in one of
them becomes a RuntimeError with its text here.
"""

import gc
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import implementations
import torch
from timing import Timer, available_memory, count_abnormal, extra_memory, memory_field, timer
from workloads import Tensors, Workload

# Bytes that the implementations of one process take at most, as a multiple of what the parameters take: parameters,
# gradients and states, those of Adam and Adagrad, and the temporaries of multi-tensor operations.
MOST_COPIES: Final = 12
MOST_COPIES_OF_TABLE: Final = 6  # with sparse gradients: the implementations of PyTorch share Adadelta's state

# A worker that has forgotten everything and still holds more bytes makes way for a new one: the allocators of
# TensorFlow and JAX keep what they once had, until there is not enough left for others.
MOST_KEPT: Final = 2 << 30


class Stage:
    """What a worker has built: steps by name, on tensors that they share as far as they can."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.device = "cuda" if family == implementations.CUDA else "cpu"
        self.tensors: dict[Workload, Tensors] = {}
        self.steps: dict[str, Callable[[], object]] = {}

    def tensors_of(self, workload: Workload) -> Tensors:
        """The tensors of a workload, the same at every call."""
        if workload not in self.tensors:
            copies = MOST_COPIES_OF_TABLE if workload.occurring else MOST_COPIES
            needed = copies * workload.numel * workload.dtype.itemsize
            free = available_memory(self.device)
            if free is not None and needed > free and not self.tensors:
                raise RuntimeError(f"might need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
            self.tensors[workload] = Tensors.of(workload, self.device)
        return self.tensors[workload]

    def build(self, part: str, workload: Workload, name: str) -> None:
        """Builds one of `implementations`."""
        if name == implementations.FUSED_FLOAT32:
            workload = workload._replace(dtype=torch.float32)
        if name.endswith(implementations.DENSE):
            workload = workload._replace(occurring=0)
        self.steps[name] = implementations.builder(part, self.family, name)(self.tensors_of(workload))

    def time(self, name: str, calls: int, warm_up: int = 0, *, cold: bool = False) -> dict[str, float]:
        """See `timing.Timer`."""
        return timer(self.steps[name], self.device)(calls, warm_up, cold=cold)

    def extra_memory(self, name: str) -> int:
        """See `timing.extra_memory`."""
        return extra_memory(self.steps[name], self.device)

    def abnormal(self) -> int:
        """How many infinite, nan or subnormal numbers there are in parameters and states that steps write to."""
        if self.device == "cpu" and self.family != "torch":
            return 0  # they have copies
        lists = (list_ for tensors in self.tensors.values() for list_ in tensors)
        return sum(count_abnormal(tensor) for list_ in lists for tensor in list_)

    def clear(self) -> None:
        """Forgets everything."""
        if not self.steps and not self.tensors:
            return  # to collect what frameworks hold takes a while
        self.steps.clear()
        self.tensors.clear()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def serve(connection: Connection, family: str, threads: int) -> None:
    """What a worker does: it answers with a result, or with the text of an error."""
    torch.set_num_threads(threads)
    stage = Stage(family)
    while (request := connection.recv()) is not None:
        method, arguments, options = request
        answer: tuple[Any, str | None]
        try:
            answer = getattr(stage, method)(*arguments, **options), None
        except ModuleNotFoundError as error:
            answer = None, f"{error.name} is not installed"
        except Exception as error:  # of whatever kind: the run goes on without this implementation
            answer = None, str(error).strip() or type(error).__name__
        connection.send(answer)


class Worker:
    """A process for the implementations of one family."""

    def __init__(self, family: str, threads: int) -> None:
        spawn = get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, family, threads), daemon=True)
        # Some systems put two of OpenMP's threads on one core and leave them there. Where OpenMP binds its threads, it
        # binds the main one, and so those of other frameworks, to one core.
        binds = "true" if family in ("torch", "keras") and threads > 1 else "false"
        with patch.dict(os.environ, OMP_PROC_BIND=binds):
            self.process.start()
        theirs.close()

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Calls a method of the worker's stage."""
        try:
            self.connection.send((method, arguments, options))
            result, error = self.connection.recv()
        except (EOFError, OSError):
            raise RuntimeError("its process has ended") from None
        if error is not None:
            raise RuntimeError(error)
        return result

    def builder(self, part: str, workload: Workload, name: str) -> Callable[[], Timer]:
        """What builds an implementation, and makes its timer."""

        def build() -> Timer:
            self.call("build", part, workload, name)
            return partial(self.call, "time", name)

        return build

    def seconds(self) -> float:
        """The processor seconds that the process has used."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    def resident_memory(self) -> int | None:
        """The bytes that the process has in memory, or None if unknown."""
        return memory_field(f"/proc/{self.process.pid}/status", "VmRSS")

    def close(self) -> None:
        """Ends the process."""
        with suppress(OSError):  # it has ended
            self.connection.send(None)
            self.process.join(10)
        if self.process.is_alive():
            self.process.terminate()


class Workers:
    """The workers of a run, each started when it is first needed."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.by_kind: dict[tuple[str, int], Worker] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def of(self, family: str, threads: int | None = None) -> Worker:
        """The worker of a family, with a number of threads of its own or that of the run."""
        kind = family, threads or self.threads
        if kind not in self.by_kind:
            self.by_kind[kind] = Worker(*kind)
        return self.by_kind[kind]

    def seconds(self) -> float:
        """The processor seconds that all have used."""
        own = os.times()
        return own.user + own.system + sum(worker.seconds() for worker in self.by_kind.values())

    def clear(self) -> None:
        """Lets all forget what they built. A worker that has ended, or whose memory stays large, is not used again."""
        for kind, worker in list(self.by_kind.items()):
            try:
                worker.call("clear")
                if kind[0] == implementations.CUDA or (worker.resident_memory() or 0) <= MOST_KEPT:
                    continue
            except RuntimeError:
                pass
            worker.close()
            del self.by_kind[kind]

    def close(self) -> None:
        """Ends all."""
        for worker in self.by_kind.values():
            worker.close()
        self.by_kind.clear()
