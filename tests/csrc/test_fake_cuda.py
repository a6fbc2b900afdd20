"""The tests for a GPU in tests/cuda, on a fake one.

What runs for real: the optimizer with tensors that PyTorch takes for CUDA's, csrc/cuda/device.h, the launches, and
what a step asks of the device. What does not: the GPU's arithmetic and memory, time, streams, the driver, and how
CUDA captures a graph. See tests/csrc/cuda_emulator.
"""

import re
import subprocess
from collections.abc import Callable

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
