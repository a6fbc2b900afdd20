"""Op fuzzing: whatever the ops are called with, an exception with a message, or the work; never a crash."""

import subprocess
import sys
from pathlib import Path

from op_cases import needs_library

pytestmark = needs_library

CALLS = 2500


def test_drawn_calls(tmp_path: Path) -> None:
    """In a process of its own, which must not die."""
    log = tmp_path / "calls"
    driver = Path(__file__).with_name("op_fuzzing.py")
    done = subprocess.run([sys.executable, str(driver), str(CALLS), str(log)], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\nat the last of these calls:\n{log.read_text()[-2000:]}"
    refused, worked = map(int, done.stdout.split())
    assert refused + worked >= CALLS // 2
    assert min(refused, worked) > CALLS // 20
