"""scripts/gpu_check.sh where there is no GPU: what it makes of stages that fail, with programs that only pretend to work."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_check.sh"

pytestmark = pytest.mark.skipif(not SCRIPT.exists() or shutil.which("bash") is None, reason="needs the source tree")

# Says what it was called for, and fails, or builds nothing, where it is told to.
PYTHON = """\
#!/usr/bin/env bash
case "$*" in
  *build_ext*) stage=build ;;
  "-m torch_adadelta") stage=diagnostics ;;
  *"-k test_short"*) stage=sanitizer ;;
  "-m pytest"*) stage=test ;;
  *--compile*) stage=compiled ;;
  *benchmarks*) stage=benchmark ;;
  *) stage=versions ;;
esac
echo "this is $stage with architectures ${TORCH_CUDA_ARCH_LIST:-all}"
if [[ $stage == build && $BREAKS != nothing_built ]]; then
  mkdir -p torch_adadelta && touch torch_adadelta/_C.so torch_adadelta/_C_cuda.so
fi
if [[ $stage == test || $stage == sanitizer ]]; then
  [[ $BREAKS == skipped ]] && echo "905 skipped in 1.38s" || echo "7 passed, 2 skipped in 1.38s"
fi
[[ $stage != "$BREAKS" ]]
"""

NVIDIA_SMI = """\
#!/usr/bin/env bash
[[ $1 == --query-gpu=compute_cap ]] && printf '9.0\\n9.0\\n8.6\\n' || echo "a GPU"
"""

SANITIZER = """\
#!/usr/bin/env bash
while [[ $1 != *python ]]; do shift; done
"$@"
"""

STAGES = ["versions", "build", "diagnostics", "test", "memcheck", "racecheck", "benchmark", "compiled"]


def check(tmp_path: Path, breaks: str, *, has_sanitizer: bool = True) -> tuple[int, list[str], Path]:
    """The exit status, the lines of the summary, and the folder with the logs."""
    tree, programs, out = (tmp_path / name for name in ("tree", "programs", "out"))
    for folder in (tree / "scripts", tree / "torch_adadelta", tree / "csrc", programs):
        folder.mkdir(parents=True)
    shutil.copy(SCRIPT, tree / "scripts")
    (tree / "setup.py").touch()
    contents = {"python": PYTHON, "nvidia-smi": NVIDIA_SMI, "nvcc": "#!/bin/sh\necho nvcc\n"}
    if has_sanitizer:
        contents["compute-sanitizer"] = SANITIZER
    for name, content in contents.items():
        (programs / name).write_text(content)
        (programs / name).chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("TORCH_", "CUDA_"))}
    environment |= {
        "PATH": f"{programs}:/usr/bin:/bin",
        "PYTHON": str(programs / "python"),
        "CUDA_HOME": "/nowhere",
        "BREAKS": breaks,
    }
    command = ["bash", str(tree / "scripts" / "gpu_check.sh"), str(out)]
    result = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)
    return result.returncode, (out / "summary.txt").read_text().splitlines(), out


def results(summary: list[str]) -> dict[str, str]:
    return {line.split()[0]: line.split(maxsplit=3)[3] for line in summary if " s  " in line}


def test_all_is_well(tmp_path: Path) -> None:
    status, summary, out = check(tmp_path, "nothing")
    assert status == 0, summary
    assert list(results(summary)) == STAGES
    assert results(summary)["test"] == "ok; 7 passed, 2 skipped in 1.38s"
    assert all(text.startswith("ok") for text in results(summary).values())
    assert summary[-1].startswith("0 failures in ")
    # The code is compiled for the GPUs that are there.
    assert "architectures 8.6;9.0" in (out / "build.log").read_text()
    assert not (out / "scratch").exists()


@pytest.mark.parametrize(
    ("breaks", "failed"),
    [
        ("versions", ["versions"]),
        ("build", ["build"]),
        ("nothing_built", ["build"]),
        ("diagnostics", ["diagnostics"]),
        ("test", ["test"]),
        ("sanitizer", ["memcheck", "racecheck"]),
        ("benchmark", ["benchmark"]),
        ("compiled", ["compiled"]),
    ],
)
def test_a_stage_that_fails_stops_no_other(tmp_path: Path, breaks: str, failed: list[str]) -> None:
    status, summary, _ = check(tmp_path, breaks)
    assert status == 1
    assert list(results(summary)) == STAGES
    assert [name for name, text in results(summary).items() if "FAILED: exit status 1" in text] == failed
    assert summary[-1].startswith(f"{len(failed)} failures in ")


def test_a_run_that_tested_nothing_fails(tmp_path: Path) -> None:
    status, summary, _ = check(tmp_path, "skipped")
    assert status == 1
    assert results(summary)["test"] == "FAILED: nothing passed; 905 skipped in 1.38s"


def test_without_the_sanitizer(tmp_path: Path) -> None:
    """A toolkit need not have it."""
    status, summary, _ = check(tmp_path, "nothing", has_sanitizer=False)
    assert status == 0
    assert sum(" skipped: there is no compute-sanitizer" in line for line in summary) == 2


def test_it_wants_to_know_where_to_write() -> None:
    result = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "usage:" in result.stderr
