"""Processes of one gloo group on this machine, for tests: each runs the functions it is sent, and none can hang a test."""

import contextlib
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

# Generous, for a busy machine; they are waited for only where something hangs.
_STARTUP_SECONDS: Final = 120
_RUN_SECONDS: Final = 60


def _serve(rank: int, world_size: int, store: str, connection: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)  # the processes share the processor with each other
    while True:
        try:
            function, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            break
        try:
            if not dist.is_initialized():
                method = f"file://{store}"
                timeout = timedelta(seconds=_STARTUP_SECONDS)
                dist.init_process_group("gloo", method, timeout, world_size, rank)
            reply = (True, function(*args))
        except Exception:
            reply = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(reply))
    if dist.is_initialized():
        dist.destroy_process_group()


class Processes:
    """`world_size` processes of one group. They start at the first `run` and serve until `close`."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._connections: list[Connection] = []
        self._processes: list[Any] = []

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        context = multiprocessing.get_context("spawn")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        self.run(os.getpid, seconds=_STARTUP_SECONDS)

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = _RUN_SECONDS) -> list[Any]:
        """What a function of a module's top level returns in each process, by rank.

        An exception, a process that ends or one that does not answer in time is an AssertionError; the processes are
        then killed, and the next call starts new ones.
        """
        if not self._processes:
            self._start()
        request = pickle.dumps((function, args))
        deadline = time.monotonic() + seconds
        results = []
        try:
            for connection in self._connections:
                connection.send_bytes(request)
            for rank, connection in enumerate(self._connections):
                assert connection.poll(max(0.0, deadline - time.monotonic())), f"process {rank} hangs"
                succeeded, result = pickle.loads(connection.recv_bytes())
                assert succeeded, f"process {rank}: {result}"
                results.append(result)
        except BaseException as error:
            self._kill()
            if isinstance(error, (EOFError, OSError)):
                raise AssertionError("a process ended") from error
            raise
        return results

    def close(self) -> list[int | None]:
        """Lets the processes end; their exit codes, None for one that had to be killed."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(_RUN_SECONDS)
        codes = [process.exitcode for process in self._processes]
        self._kill()
        return codes

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.close()
        if self._processes:
            self._folder.cleanup()
        self._processes, self._connections = [], []
