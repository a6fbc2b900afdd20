"""examples/train_fsdp.py on gloo: in one, two and four processes, and the torchrun lines of the pages."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_same_bits
from processes import Processes
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = str(ROOT / "examples")

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]


def example() -> dict[str, Any]:
    sys.path.insert(0, EXAMPLES)
    try:
        return runpy.run_path(f"{EXAMPLES}/train_fsdp.py")
    finally:
        sys.path.remove(EXAMPLES)


def train(options: dict[str, Any]) -> list[float]:
    return example()["train"](torch.device("cpu"), **options)


def losses(processes: Processes, **options: Any) -> list[float]:
    """Those of a training, which all processes have."""
    first, *others = processes.run(train, options, seconds=300)
    assert all(other == first for other in others)
    return first


def main(*arguments: str) -> list[float]:
    """The losses of one process."""
    return example()["main"](["--device", "cpu", *arguments])


def test_any_number_of_processes_has_the_losses_of_one(two: Processes, four: Processes) -> None:
    """Their gradients are added in another order. Seen with three seeds: at most 3e-8 apart."""
    expected = main("--epochs", "3")
    assert expected[2] < expected[0] / 2
    for processes in (two, four):
        assert losses(processes, epochs=3) == pytest.approx(expected, rel=1e-6)


def test_mixed_precision_has_nearly_the_losses_of_float32(two: Processes) -> None:
    """Seen: at most 0.2 % apart."""
    ours, expected = losses(two, epochs=2, mixed_precision=True), losses(two, epochs=2)
    assert ours != expected
    assert ours == pytest.approx(expected, rel=0.01)


def tensors_in(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The whole tensors in a checkpoint, by the names in it."""
    dcp_to_torch_save(checkpoint, checkpoint / "whole.pt")
    found, rest = {}, [("", torch.load(checkpoint / "whole.pt"))]
    for name, value in rest:  # grows
        if isinstance(value, dict):
            rest += [(f"{name}/{key}", inner) for key, inner in value.items()]
        elif isinstance(value, torch.Tensor):
            found[name] = value
    return found


def test_it_resumes_in_any_number_of_processes(two: Processes, four: Processes, tmp_path: Path) -> None:
    """To the bit in as many as before, and with the losses of one training in others."""
    expected = losses(two, epochs=3, checkpoint=tmp_path / "whole")
    folder = tmp_path / "parts"
    resumed = [*losses(two, epochs=1, checkpoint=folder), *losses(two, epochs=2, checkpoint=folder)]
    assert resumed == expected[:2]
    ours, whole = (tensors_in(tmp_path / name / "epoch-2") for name in ("parts", "whole"))
    assert ours.keys() == whole.keys()
    assert {name.rpartition("/")[2] for name in ours} >= {"square_avg", "acc_delta", "head.weight"}
    for name, tensor in ours.items():
        assert_same_bits(tensor, whole[name], name)
    (folder / "epoch-3").mkdir()  # as after a run that was stopped while it saved
    assert losses(four, epochs=3, checkpoint=folder) == pytest.approx(expected[2:], rel=1e-6)
    assert main("--epochs", "3", "--checkpoint", str(folder)) == []
    (folder / "epoch-3" / ".metadata").unlink()
    assert main("--epochs", "3", "--checkpoint", str(folder)) == pytest.approx(expected[2:], rel=1e-6)


def torchrun(line: str, checkpoint: Path) -> dict[int, float]:
    """The losses that a line of a page prints, by epoch."""
    command = line.replace("output/fsdp", str(checkpoint)).split()
    command[0] = str(Path(sys.executable).with_name("torchrun"))
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return {int(epoch): float(loss) for epoch, loss in re.findall(r"^epoch (\d+): loss (\S+)$", result.stdout, re.M)}


@pytest.mark.parametrize("page", ["README.md", "docs/frameworks.md"])
def test_lines_of_torchrun_work_as_written(page: str, tmp_path: Path) -> None:
    lines = re.findall(r"^    (torchrun .*)$", (ROOT / page).read_text(), re.MULTILINE)
    assert lines
    printed = [torchrun(line, tmp_path) for line in lines]
    epochs = [epoch for losses in printed for epoch in losses]
    assert epochs == list(range(1, len(epochs) + 1))  # each goes on after the one before
    assert all(printed)
    assert printed[-1][epochs[-1]] < printed[0][1] / 2
