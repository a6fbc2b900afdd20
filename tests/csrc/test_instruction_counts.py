"""How many instructions the CPU kernels' inner loops take, counted by callgrind: a guard that no busy machine disturbs.

The counts belong to a compiler, so they are compared with those recorded for it in instructions/counts.json. After a
change that is meant to cost more, or for another compiler, record them anew, and commit the file:

    python tests/csrc/test_instruction_counts.py

valgrind knows no AVX-512, so the loops for AVX2 and for the baseline stand for it: all three have one source.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from compilers import CXX, ROOT, compile_flags

COUNTS = Path(__file__).with_name("instructions") / "counts.json"

# A long stretch; and a small tensor, where what stands before and after the vectorised loop counts.
LENGTHS = (4096, 19)

MOST_GROWTH = 0.05

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree"),
    pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed"),
    pytest.mark.skipif(shutil.which(CXX) is None, reason=f"there is no C++ compiler ({CXX})"),
]


def toolchain() -> str:
    """What the counts depend on: the processor's architecture, and the compiler's name and major version."""
    macros = subprocess.run([CXX, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=True)
    defined = dict(re.findall(r"#define (__clang_major__|__GNUC__) (\d+)", macros.stdout))
    clang = defined.get("__clang_major__")
    return f"{platform.machine()}, " + (f"clang {clang}" if clang else f"gcc {defined['__GNUC__']}")


def build(folder: Path, *more_flags: str) -> Path:
    """The driver, with the flags that setup.py compiles the kernels with."""
    driver = folder / "driver"
    sources = ("tests/csrc/instructions/driver.cpp", "csrc/cpu/kernels/default.cpp", "csrc/cpu/kernels/avx2.cpp")
    command = [
        CXX, *compile_flags(), *more_flags, *(str(ROOT / source) for source in sources), "-o", str(driver),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return driver


def count(driver: Path, loop: str, length: int) -> int:
    """The instructions of one call, for a number of elements."""
    output = driver.with_name(f"{loop} {length}.callgrind")
    command = ["valgrind", "-q", "--tool=callgrind", "--toggle-collect=measured", f"--callgrind-out-file={output}"]
    subprocess.run([*command, str(driver), *loop.split(), str(length)], check=True)
    total = re.search(r"^totals: (\d+)$", output.read_text(), re.MULTILINE)
    assert total is not None
    return int(total[1])


def counts(driver: Path, lengths: tuple[int, ...] = LENGTHS) -> dict[str, int]:
    """The instructions of each instruction set and loop, for each length."""
    loops = subprocess.run([str(driver)], capture_output=True, text=True, check=True).stdout.splitlines()
    calls = [(loop, length) for loop in loops for length in lengths]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        totals = threads.map(lambda call: count(driver, *call), calls)
        return {f"{loop} {length}": total for (loop, length), total in zip(calls, totals, strict=True)}


def grown(now: Mapping[str, int], recorded: Mapping[str, int]) -> list[str]:
    """What takes more than 5 % more instructions than recorded, in words."""
    return [
        f"{name}: {total} instructions, recorded are {recorded[name]} ({total / recorded[name] - 1:+.1%})"
        for name, total in now.items()
        if total > (1 + MOST_GROWTH) * recorded[name]
    ]


@pytest.fixture(scope="module")
def recorded() -> dict[str, int]:
    """The counts of the compiler in use."""
    known: dict[str, dict[str, int]] = json.loads(COUNTS.read_text())
    if toolchain() not in known:
        pytest.skip(f"no instruction counts are recorded for {toolchain()}, only for {'; '.join(known)}")
    return known[toolchain()]


def test_inner_loops_take_no_more_instructions_than_recorded(recorded: dict[str, int], tmp_path: Path) -> None:
    now = counts(build(tmp_path))
    assert now.keys() == recorded.keys(), f"run `python {Path(__file__).relative_to(ROOT)}` to record them anew"
    assert not grown(now, recorded)


def test_a_loop_that_is_no_longer_vectorised_is_noticed(recorded: dict[str, int], tmp_path: Path) -> None:
    now = counts(build(tmp_path, "-O1", "-fno-tree-vectorize"), lengths=(4096,))
    noticed = grown(now, recorded)
    assert any(line.startswith("AVX2 update_float 4096") for line in noticed), noticed
    assert any(line.startswith("default add_squares_double 4096") for line in noticed), noticed


def record() -> None:
    """Writes the counts of the compiler in use to instructions/counts.json, beside those of others."""
    known = json.loads(COUNTS.read_text()) if COUNTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        known[toolchain()] = counts(build(Path(folder)))
    COUNTS.write_text(json.dumps(known, indent=2) + "\n")
    print(f"recorded {len(known[toolchain()])} counts of {toolchain()} in {COUNTS}")


if __name__ == "__main__":
    record()
