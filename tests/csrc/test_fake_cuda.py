"""The tests for a GPU in tests/cuda, on a fake one.

What runs for real: the optimizer with tensors that PyTorch takes for CUDA's, csrc/cuda/device.h, the launches, and
what a step asks of the device. What does not: the GPU's arithmetic and memory, time, streams, the driver, and how
CUDA captures a graph. See tests/csrc/cuda_emulator.
"""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import test_cuda_device
from emulated import ROOT, SOURCES

Run = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = test_cuda_device.pytestmark


def run_tests(run: Run, *tests: str, **environment: str) -> int:
    """Runs them with the fake GPU, and returns how many passed."""
    arguments = ["-m", "pytest", "-p", "fake_cuda", "-p", "no:cacheprovider", "-q", "--rootdir", str(ROOT)]
    result = run(*arguments, *tests, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None, result.stdout
    return int(passed[1])


def test_a_sample(run_with_fake_gpu: Run) -> None:
    """What only tests on a device can show of the optimizer: graphs, scales, hyperparameters and counts there."""
    tests = [str(ROOT / "tests" / "cuda" / f"test_gpu_{name}.py") for name in ("amp", "graphs", "optimizer")]
    assert run_tests(run_with_fake_gpu, *tests, FAKE_CUDA_SAMPLE="7") > 40


@pytest.mark.slow
def test_all(run_with_fake_gpu: Run) -> None:
    assert run_tests(run_with_fake_gpu, str(ROOT / "tests" / "cuda")) > 800


@pytest.mark.slow
def test_the_state_machine_with_moves_between_devices(run_with_fake_gpu: Run) -> None:
    assert run_tests(run_with_fake_gpu, str(SOURCES / "moving_state_machine.py")) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "arguments", "expected"),
    [
        ("train_cuda_graph", ["--epochs", "4", "--batch-size", "256"], "in a CUDA graph"),
        ("train_amp", ["--epochs", "1", "--batch-size", "256", "--dtype", "float16"], "float16"),
        ("train_digits", ["--epochs", "1"], "AdadeltaKeras"),
        ("train_bfloat16", ["--epochs", "1", "--batch-size", "256"], "bfloat16, masters"),
        ("meta_learning", ["--steps", "2", "--tasks", "2"], "learning rate"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_examples(run_with_fake_gpu: Run, tmp_path: Path, example: str, arguments: list[str], expected: str) -> None:
    """They take the GPU by themselves, and leave nothing on the CPU that the GPU needs.

    The fake GPU has no sparse tensors, as train_recommender.py needs them.
    """
    folder = str(ROOT / "examples")
    program = f"import sys; sys.path.insert(0, {folder!r}); import fake_cuda, {example}; {example}.main({arguments!r})"
    result = run_with_fake_gpu("-c", program)
    assert result.returncode == 0, result.stdout + result.stderr
    assert expected in result.stdout
