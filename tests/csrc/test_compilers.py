"""Every compiler and processor gives the kernels the same bits: GCC and clang, x86-64 and aarch64.

After a change that is meant to change them, or for new cases of portable/driver.cpp, record the checksums anew:

    python tests/csrc/test_compilers.py
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from compilers import CXX, ROOT, compile_flags

TESTS = Path(__file__).parent
CHECKSUMS = TESTS / "portable" / "checksums.json"

# aarch64 programs run in an emulator, without a library of that system.
RUNNERS = {"g++": [], "clang++": [], "aarch64-linux-gnu-g++": ["qemu-aarch64"]}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree"),
]


def run(*command: object, **options: Any) -> str:
    """What a command prints; its exit status is 0."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


def build(compiler: str, sources: list[Path], output: Path, *flags: object) -> None:
    """Compiles without a warning, several files at a time."""
    objects = [output.parent / f"{i}.o" for i in range(len(sources))]
    warn = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]

    def compile_one(source: Path, result: Path) -> None:
        run(compiler, *compile_flags(), *warn, "-fPIC", "-c", source, "-o", result)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(compile_one, sources, objects))
    run(compiler, *objects, "-o", output, *flags)


def build_driver(compiler: str, folder: str, output: Path) -> list[str]:
    """A driver of the kernels alone; returns the command that runs it."""
    runner = RUNNERS.get(compiler, [])
    sources = [*sorted((ROOT / "csrc" / "cpu" / "kernels").glob("*.cpp")), TESTS / folder / "driver.cpp"]
    build(compiler, sources, output, *(["-static"] if runner else []))
    return [*runner, str(output)]


def checksums(driver: list[str], instruction_set: str) -> dict[str, str]:
    """Of each case."""
    return dict(line.rsplit(": ", 1) for line in run(*driver, instruction_set).splitlines())


@pytest.mark.parametrize("compiler", RUNNERS)
def test_kernels_compute_the_recorded_bits(compiler: str, tmp_path: Path) -> None:
    for tool in (compiler, *RUNNERS[compiler]):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool}")
    recorded = json.loads(CHECKSUMS.read_text())
    driver = build_driver(compiler, "portable", tmp_path / "portable")
    instruction_sets = run(*driver).split()
    assert instruction_sets[0] == "default"
    for instruction_set in instruction_sets:
        found = checksums(driver, instruction_set)
        assert found.keys() == recorded.keys(), f"run `python {Path(__file__).relative_to(ROOT)}` to record them anew"
        different = [case for case in recorded if found[case] != recorded[case]]
        assert not different, f"{compiler}, {instruction_set}: other bits; `driver {instruction_set} CASE` prints them"

    # What counts instructions elsewhere, run as it is.
    driver = build_driver(compiler, "instructions", tmp_path / "instructions")
    for case in run(*driver).splitlines():
        run(*driver, *case.split(), 100)


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_the_library_of_another_compiler_passes_the_tests_of_the_ops(compiler: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    if os.path.realpath(shutil.which(compiler) or "") == os.path.realpath(shutil.which(CXX) or ""):
        pytest.skip(f"{compiler} is the compiler in use")
    from torch.utils.cpp_extension import library_paths

    shutil.copytree(ROOT / "torch_adadelta", tmp_path / "torch_adadelta", ignore=shutil.ignore_patterns("*.so"))
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10", "-ldl", *(f"-L{path}" for path in library_paths())]
    library = tmp_path / "torch_adadelta" / "_C.so"
    build(compiler, sorted((ROOT / "csrc").rglob("*.cpp")), library, "-shared", *libraries)
    # Python looks first where it is started, so not in the source tree.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    where = "import torch_adadelta.backends.kernels as k; print(k.is_loaded, k.LIBRARY_PATH)"
    assert run(sys.executable, "-c", where, cwd=tmp_path, env=environment).split() == ["True", str(library)]
    tests = [TESTS / "test_ops.py", *sorted(TESTS.glob("test_cpu_*.py"))]
    deselected = ("-p", "no:cacheprovider", "-m", "not slow", "-k", "not int32")  # more than 2^31 elements
    run(sys.executable, "-m", "pytest", "-q", *deselected, *tests, cwd=tmp_path, env=environment)


def record() -> None:
    """Writes the checksums of the baseline, by the compiler in use, to portable/checksums.json."""
    with tempfile.TemporaryDirectory() as folder:
        found = checksums(build_driver(CXX, "portable", Path(folder) / "driver"), "default")
    CHECKSUMS.write_text(json.dumps(found, indent=2) + "\n")
    print(f"recorded {len(found)} checksums in {CHECKSUMS}")


if __name__ == "__main__":
    record()
