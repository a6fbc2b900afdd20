"""Memory does not grow from step to step: scripts/long_run.py, which takes a million, with some thousands of them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from torch_adadelta.backends import kernels

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "long_run.py"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not SCRIPT.exists(), reason="needs the source tree")]


@pytest.mark.parametrize(
    ("path", "steps", "renew"),
    [("fused", 20_000, 0), ("fused", 10_000, 1), ("foreach", 10_000, 0), ("single_tensor", 10_000, 0)],
)
def test_memory_does_not_grow(path: str, steps: int, renew: int) -> None:
    """By 2 MB at most: 105 bytes a step of 20,000, and 210 of 10,000, less than a tensor takes."""
    if path == "fused" and not kernels.is_loaded:
        pytest.skip("the compiled library is not installed")
    command = [sys.executable, str(SCRIPT), "--steps", str(steps), "--path", path, "--renew", str(renew)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"^{steps} steps in \d+ s; memory grew by -?\d+\.\d\d MB; finite: True$", done.stdout, re.M)
