"""A training job that is killed while it writes a checkpoint goes on from the one before."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_same_bits

from torch_adadelta import AdadeltaKeras, schedules

STEPS = 60


class Killing:
    """A file that kills its process, as kill -9 does, once so many bytes were written; none, if negative."""

    def __init__(self, path: Path, bytes_left: int) -> None:
        self.file = path.open("wb", buffering=0)
        self.bytes_left = bytes_left

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if 0 <= self.bytes_left < len(view):
            self.file.write(view[: self.bytes_left])
            os.kill(os.getpid(), signal.SIGKILL)
        self.bytes_left -= len(view) if self.bytes_left >= 0 else 0
        return self.file.write(view)

    def flush(self) -> None:
        os.fsync(self.file.fileno())


def train(folder: str, kill_at_step: int, kill_at_byte: int) -> None:
    """A loop as in the examples, which begins where its last checkpoint ends. A new one replaces it once it is whole."""
    torch.set_num_threads(1)
    checkpoint = Path(folder) / "checkpoint.pt"
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer = AdadeltaKeras(model.parameters(), schedules.ExponentialDecay(1.0, 20, 0.9), clipnorm=1.0, decay=0.01)
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
        first = saved["step"]
    for step in range(first, STEPS):
        optimizer.zero_grad()
        inputs = torch.randn(16, 5)
        (model(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        saved = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "step": step + 1,
        }
        new = checkpoint.with_suffix(".new")
        file = Killing(new, kill_at_byte if step == kill_at_step else -1)
        torch.save(saved, file)
        file.flush()
        file.file.close()
        new.replace(checkpoint)


@pytest.mark.slow
def test_killed_twenty_times_while_it_writes_a_checkpoint(tmp_path: Path) -> None:
    """It ends with the same bits as if nobody had killed it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch_adadelta"])

    def run(folder: Path, step: int = -1, byte: int = -1) -> int | None:
        folder.mkdir(exist_ok=True)
        process = context.Process(target=train, args=(str(folder), step, byte))
        process.start()
        process.join()
        return process.exitcode

    assert run(tmp_path / "whole") == 0
    size = (tmp_path / "whole" / "checkpoint.pt").stat().st_size
    kills = torch.Generator().manual_seed(0)
    for number in range(20):
        byte = int(torch.randint(size - 100, (), generator=kills)) if number else 0
        assert run(tmp_path / "killed", step=3 * number, byte=byte) == -signal.SIGKILL
        assert (tmp_path / "killed" / "checkpoint.new").stat().st_size == byte
    assert run(tmp_path / "killed") == 0
    whole, killed = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "killed"))
    assert whole["step"] == killed["step"] == STEPS
    assert killed["optimizer"]["param_groups"] == whole["optimizer"]["param_groups"]
    for name, weight in whole["model"].items():
        assert_same_bits(killed["model"][name], weight, name)
    for index, state in whole["optimizer"]["state"].items():
        for key, tensor in state.items():
            assert_same_bits(killed["optimizer"]["state"][index][key], tensor, key)
