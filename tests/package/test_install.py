"""Building and installing, as users do it, and what the package says of itself where the library is missing."""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import expecttest
import numpy as np
import pytest
from compilers import compile_flags
from reference.oracle import Oracle

from torch_adadelta.backends import kernels

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree"),
]

STEP = """
import warnings, torch
from torch_adadelta import AdadeltaKeras
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        optimizer = AdadeltaKeras([torch.nn.Parameter(torch.zeros(2))], 1.0)
        optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
        optimizer.step()
print(optimizer.param_groups[0]["params"][0].tolist())
print([f"{w.category.__name__}: {w.message}" for w in caught])
try:
    AdadeltaKeras([torch.nn.Parameter(torch.zeros(2))], fused=True)
except RuntimeError as error:
    print(error)
"""


def run(*command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        command, env={**os.environ, **environment}, cwd="/", capture_output=True, text=True, check=False
    )
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def copy_tree(folder: Path) -> Path:
    """A copy of what a checkout holds, so that building leaves nothing in it."""
    copy = folder / "tree"
    ignored = shutil.ignore_patterns(".*", "*.so", "build", "dist", "*.egg-info", "__pycache__", "output")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return copy_tree(tmp_path)


def build_wheel(tree: Path, **environment: str) -> tuple[Path, str]:
    pip = (sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--no-index")
    result = run(*pip, "--wheel-dir", str(tree / "wheels"), str(tree), **environment)
    (wheel,) = (tree / "wheels").iterdir()
    return wheel, result.stdout + result.stderr


def unpack(wheel: Path) -> dict[str, str]:
    """Where a package was unpacked, for the environment of a Python that is to import it."""
    target = wheel.parent.parent / "installed"
    zipfile.ZipFile(wheel).extractall(target)
    return {"PYTHONPATH": str(target)}


def without_numbers(text: str) -> str:
    text = re.sub(r"(Python +|PyTorch +|torch_adadelta )[0-9][^ \n]*", r"\1<version>", text)
    text = re.sub(r"\(Linux \w+\)|\((?:without CUDA|CUDA [\d.]+)\)", "(<build>)", text)
    text = re.sub(r"\d+ threads", "<n> threads", text)
    text = re.sub(r"/\S*/installed/", "<path>/", text)
    return re.sub(r"(CPU kernels +)\w+", r"\1<instruction set>", text)


NVCC = shutil.which("nvcc")


class Built(NamedTuple):
    """What scripts/build_wheel.sh has built, and the environment of a Python that is to import it."""

    sdist: Path
    wheel: Path
    environment: dict[str, str]


# Compiled once, by the worker that runs all that looks at it.
of_the_build = pytest.mark.xdist_group("build_wheel")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc, the compiler of the CUDA toolkit")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    if importlib.util.find_spec("auditwheel") is None or sys.platform != "linux":
        pytest.skip('needs Linux and the extra "wheel"')
    tree = copy_tree(tmp_path_factory.mktemp("built"))
    cuda = "0" if NVCC is None else "1"
    environment = {"PYTHON": sys.executable, "TORCH_ADADELTA_CUDA": cuda, "TORCH_CUDA_ARCH_LIST": ""}
    run(str(tree / "scripts" / "build_wheel.sh"), **environment)
    (sdist,), (wheel,) = (tree / "dist").glob("*.tar.gz"), (tree / "dist").glob("*.whl")
    return Built(sdist, wheel, unpack(wheel))


def libraries(built: Built) -> list[Path]:
    return sorted(Path(built.environment["PYTHONPATH"]).rglob("*.so"))


@of_the_build
def test_wheel_fits_any_python_and_holds_the_library(built: Built) -> None:
    """Built from an sdist, which must hold all that it takes."""
    with tarfile.open(built.sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")} <= held
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py", "torch_adadelta/py.typed"} <= held
    assert re.fullmatch(r"torch_adadelta-[\d.]+-py3-none-manylinux_2_28_\w+\.whl", built.wheel.name)
    names = set(zipfile.ZipFile(built.wheel).namelist())
    assert {"torch_adadelta/_C.so", "torch_adadelta/py.typed", "torch_adadelta/__main__.py"} <= names
    assert ("torch_adadelta/_C_cuda.so" in names) == (NVCC is not None)
    assert not any(name.startswith(("tests", "csrc", "examples", "benchmarks", "scripts")) for name in names)

    class TestDiagnostics(expecttest.TestCase):
        def runTest(self) -> None:
            page = run(sys.executable, "-m", "torch_adadelta", **built.environment).stdout
            self.assertExpectedInline(
                without_numbers(page),
                """\
torch_adadelta <version>
Python         <version> (<build>)
PyTorch        <version> (<build>), <n> threads
CPU library    <path>/torch_adadelta/_C.so
CPU kernels    <instruction set>
CUDA library   not loaded: RuntimeError: this PyTorch was built without CUDA

One step of each path on cpu, of every real dtype, with masters and state of others:
  single_tensor  ok, same bits as single_tensor on the CPU
  multi_tensor   ok, same bits as single_tensor on the CPU
  fused          ok, same bits as single_tensor on the CPU
""",
            )

    TestDiagnostics().runTest()
    printed = run(sys.executable, "-c", STEP, **built.environment).stdout.splitlines()
    assert printed[1] == "[]"
    assert len(printed) == 2


@of_the_build
def test_the_wheel_asks_for_no_newer_system_than_pytorch_does(built: Built) -> None:
    """And takes from the system what must be there once only: what throws and catches exceptions."""
    for library in libraries(built):
        symbols = run("readelf", "--wide", "--dyn-syms", str(library)).stdout
        asked: dict[str, set[tuple[int, ...]]] = {}
        for of, number in re.findall(r" UND \S+@([A-Z]+)_([\d.]+)", symbols):
            asked.setdefault(of, set()).add(tuple(map(int, number.split("."))))
        assert max(asked["GLIBC"]) <= (2, 28), library
        assert max(asked["GLIBCXX"]) <= (3, 4, 24), library
        assert max(asked["CXXABI"]) <= (1, 3, 11), library
        for name in ("__cxa_throw", "__cxa_begin_catch", "_Unwind_Resume"):
            assert f" UND {name}@" in symbols, library
        # What was linked in stays inside.
        assert not re.search(
            r"(?:GLOBAL|WEAK|UNIQUE) +DEFAULT +\d+ (?:_ZNSt7__cxx1118basic_stringstream|cuda)", symbols
        )
        assert ".debug_" not in run("readelf", "--wide", "--sections", str(library)).stdout


@of_the_build
def test_the_wheel_finds_the_processor_and_its_errors_arrive(built: Built) -> None:
    """What libgcc knows of the processor, and exceptions, go through what the wheel is linked with."""
    code = """
import ctypes, torch, torch_adadelta
from torch_adadelta.backends import kernels
print(kernels.cpu_capability())
for _ in range(3):
    try:
        torch.ops.torch_adadelta.set_cpu_capability(99)
    except RuntimeError as error:
        print(error)
print(ctypes.CDLL("libstdc++.so.6")._ZSt19uncaught_exceptionsv())
"""
    capability, *errors, uncaught = run(sys.executable, "-c", code, **built.environment).stdout.splitlines()
    if kernels.is_loaded:
        assert capability == kernels.cpu_capability()
    assert len(errors) == 3
    for error in errors:
        assert re.match(r"torch_adadelta refuses the call: this processor has .+, got 99$", error)
    assert uncaught == "0"


@of_the_build
@needs_nvcc
def test_the_cuda_library_is_built_for_every_architecture(built: Built) -> None:
    """Compiled and linked, which needs neither a GPU nor a PyTorch that knows CUDA. It is loaded only by one that does."""
    (library,) = (path for path in libraries(built) if path.name == "_C_cuda.so")
    dynamic = run("readelf", "--wide", "--dynamic", str(library)).stdout
    needed = set(re.findall(r"NEEDED.*\[(\w+)", dynamic))
    # By libtorch the loader finds the libraries of CUDA that came with PyTorch; it does not find others.
    assert "libtorch" in needed
    assert not {name for name in needed if "cuda" in name or "python" in name}
    undefined = re.findall(r" UND (\S+)", run("readelf", "--wide", "--symbols", str(library)).stdout)
    assert not [symbol for symbol in undefined if symbol.startswith(("Py", "_Py"))]

    # The library can name the architectures that it was compiled for: it tells whoever has another GPU.
    assert NVCC is not None
    listed = run(NVCC, "--list-gpu-code").stdout
    known = sorted(int(number) for number in re.findall(r"sm_(\d+)$", listed, re.MULTILINE) if int(number) >= 75)
    firsts = [number for i, number in enumerate(known) if i == 0 or known[i - 1] // 10 != number // 10]
    assert ",".join(str(10 * number) for number in firsts).encode() in library.read_bytes()


@pytest.mark.parametrize(
    ("tag", "change", "refusal"),
    [
        ("v0.0.1", False, "and the tags of this commit are: v0.0.1; check out v"),
        (None, False, "and the tags of this commit are: none; check out v"),
        ("v{version}", True, "the tree is not that of the commit: commit, stash or remove\n?? new.txt"),
    ],
    ids=["another tag", "no tag", "a change"],
)
def test_no_release_of_another_state(tree: Path, tag: str | None, change: bool, refusal: str) -> None:
    """scripts/release.sh compiles nothing then, and leaves dist/ alone."""
    version = runpy.run_path(str(ROOT / "torch_adadelta" / "version.py"))["__version__"]
    git = ("git", "-C", str(tree), "-c", "user.name=Ada", "-c", "user.email=ada@example.org")
    run(*git, "init", "--quiet")
    run(*git, "add", "--all")
    run(*git, "commit", "--quiet", "--message", "All")
    if tag is not None:
        run(*git, "tag", tag.format(version=version))
    if change:
        (tree / "new.txt").touch()
    result = run(str(tree / "scripts" / "release.sh"), check=False)
    assert result.returncode == 1
    assert "no release: " in result.stderr
    assert refusal in result.stderr
    assert not (tree / "dist").exists()


def test_a_cuda_build_without_a_compiler_says_what_is_missing(tree: Path) -> None:
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index")
    command = (*pip, "--wheel-dir", str(tree / "wheels"), str(tree))
    result = run(*command, check=False, TORCH_ADADELTA_CUDA="1", CUDA_HOME="/nowhere")
    assert result.returncode != 0
    assert "TORCH_ADADELTA_CUDA=1, but there is no nvcc in /nowhere/bin" in result.stdout + result.stderr
    result = run(*command, check=False, TORCH_ADADELTA_CUDA="yes")
    assert "TORCH_ADADELTA_CUDA must be 0, 1 or auto, not 'yes'" in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("environment", "warning"),
    [
        ({"TORCH_ADADELTA_NO_EXT": "1"}, ""),
        ({"CXX": "/nowhere/c++"}, "without its compiled library, for there is no C++ compiler (/nowhere/c++)"),
    ],
    ids=["no_ext", "no_compiler"],
)
def test_without_the_library_the_python_paths_run(tree: Path, environment: dict[str, str], warning: str) -> None:
    wheel, log = build_wheel(tree, **environment)
    assert warning in log
    assert wheel.name.endswith("-py3-none-any.whl")
    installed = unpack(wheel)

    class TestDiagnostics(expecttest.TestCase):
        def runTest(self) -> None:
            page = run(sys.executable, "-m", "torch_adadelta", **installed).stdout
            self.assertExpectedInline(
                without_numbers(page),
                """\
torch_adadelta <version>
Python         <version> (<build>)
PyTorch        <version> (<build>), <n> threads
CPU library    not loaded: FileNotFoundError: <path>/torch_adadelta/_C.so does not exist: torch_adadelta was installed where no C++ compiler was found, or with TORCH_ADADELTA_NO_EXT=1. Install a C++ compiler and run `pip install --no-build-isolation .` again.
CUDA library   not loaded: RuntimeError: this PyTorch was built without CUDA

One step of each path on cpu, of every real dtype, with masters and state of others:
  single_tensor  ok, same bits as single_tensor on the CPU
  multi_tensor   ok, same bits as single_tensor on the CPU
  fused          cannot run: its library is not loaded
""",
            )

    TestDiagnostics().runTest()
    param, warnings, fused = run(sys.executable, "-c", STEP, **installed).stdout.splitlines()
    oracle = Oracle(np.zeros(2, np.float32), learning_rate=1.0)
    oracle.step(np.ones(2, np.float32))
    assert param == str(oracle.p.tolist())
    assert warnings.count("RuntimeWarning: torch_adadelta runs without its compiled library, many times slower:") == 1
    assert "_C.so does not exist" in warnings
    assert fused.startswith("`fused=True` needs the compiled library: ")


def test_a_library_that_does_not_load(tree: Path) -> None:
    wheel, _ = build_wheel(tree, TORCH_ADADELTA_NO_EXT="1")
    installed = unpack(wheel)
    (Path(installed["PYTHONPATH"]) / "torch_adadelta" / "_C.so").write_bytes(b"\x7fELF nothing more")
    page = run(sys.executable, "-m", "torch_adadelta", **installed).stdout
    assert re.search(r"CPU library +not loaded: OSError: .*_C\.so: file too short", page)
    _, warnings, fused = run(sys.executable, "-c", STEP, **installed).stdout.splitlines()
    assert "file too short" in warnings
    assert "file too short" in fused


def test_a_build_that_cannot_see_torch_says_what_to_do(tree: Path) -> None:
    """As in pip's isolated build environment, which holds setuptools alone."""
    hidden = tree / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ImportError('not here')")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index")
    result = run(*pip, "--wheel-dir", str(tree / "wheels"), str(tree), check=False, PYTHONPATH=str(hidden))
    assert result.returncode != 0
    assert "install torch first, then run `pip install --no-build-isolation .`" in " ".join(
        (result.stdout + result.stderr).split()
    )


def old_torch(folder: Path) -> dict[str, str]:
    """The environment of a Python that finds a PyTorch of which nothing more is known than that it is too old."""
    (folder / "torch" / "utils").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text("__version__ = '2.9.1'")
    (folder / "torch" / "utils" / "__init__.py").touch()
    (folder / "torch" / "utils" / "cpp_extension.py").write_text("BuildExtension = CppExtension = None")
    return {"PYTHONPATH": str(folder)}


def test_too_old_a_torch_is_refused_at_build_and_at_import(tree: Path) -> None:
    sentence = (
        "torch_adadelta needs PyTorch 2.10 or later, and this is PyTorch 2.9.1: run `pip install --upgrade torch`"
    )
    old = old_torch(tree / "old")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index")
    result = run(*pip, "--wheel-dir", str(tree / "wheels"), str(tree), check=False, **old)
    assert result.returncode != 0
    assert sentence in " ".join((result.stdout + result.stderr).split())
    result = run(sys.executable, "-c", "import torch_adadelta", check=False, PYTHONPATH=f"{old['PYTHONPATH']}:{tree}")
    assert result.stderr.splitlines()[-1] == f"ImportError: {sentence}"


def older_pythons() -> list[str]:
    """Pythons on PATH that are too old, and run."""
    found = [path for minor in (8, 9) if (path := shutil.which(f"python3.{minor}"))]
    return [
        path for path in found if subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0
    ]


def test_too_old_a_python_is_refused(tree: Path) -> None:
    """At install by pip, which reads it in the metadata; at import by the first file of the package."""
    assert 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text()
    code = "import runpy, sys; sys.version_info = (3, 9, 18, 'final', 0); runpy.run_path(sys.argv[1])"
    for python, program in [(sys.executable, code), *((path, "import torch_adadelta") for path in older_pythons())]:
        argument = str(ROOT / "torch_adadelta" / "compatibility.py")
        result = run(python, "-c", program, argument, check=False, PYTHONPATH=str(tree))
        assert result.stderr.splitlines()[-1].startswith(
            "ImportError: torch_adadelta needs Python 3.10 or later, and this is Python 3."
        )


def test_a_compile_error_is_not_passed_over(tree: Path) -> None:
    (tree / "csrc" / "broken.cpp").write_text("this is not C++")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index")
    assert run(*pip, "--wheel-dir", str(tree / "wheels"), str(tree), check=False).returncode != 0


CROSS_COMPILER = shutil.which("aarch64-linux-gnu-g++")


@pytest.mark.skipif(CROSS_COMPILER is None, reason="no aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)")
def test_cross_compiles_for_aarch64(tmp_path: Path) -> None:
    objects = []
    for source in sorted((ROOT / "csrc").rglob("*.cpp")):
        objects.append(str(tmp_path / f"{source.stem}.o"))
        run(str(CROSS_COMPILER), "-fPIC", *compile_flags(), "-c", str(source), "-o", objects[-1])
    run(str(CROSS_COMPILER), "-shared", *objects, "-o", str(tmp_path / "_C.so"))
    assembly = run(CROSS_COMPILER.replace("g++", "objdump"), "-d", str(tmp_path / "default.o")).stdout
    assert re.search(r"fsqrt\s+v\d+\.4s", assembly), "the loops are not vectorised"
    assert not re.search(r"\bfmla\b|\bfmadd\b", assembly), "a multiply-add was fused"


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file with objdump")
def test_loops_are_vectorised_and_never_fused() -> None:
    """Read from the installed library: square roots of whole registers in each instruction set, and no FMA elsewhere.

    The inverses by multiplication, which are exact, take one estimate and four FMAs each, one of which rounds up. A decay
    of denormal numbers, which are converted from whole ones, takes one.
    """
    from torch_adadelta.backends import kernels

    if not kernels.is_loaded or os.uname().machine != "x86_64":
        pytest.skip("needs the compiled library on x86-64")
    assembly = run("objdump", "-d", "--no-show-raw-insn", str(kernels.LIBRARY_PATH)).stdout
    for pattern in (
        r"\bsqrtps\s.*%xmm",
        r"vsqrtps\s.*%ymm",
        r"vsqrtps\s.*%zmm",
        r"vsqrtpd\s.*%ymm",
        r"vsqrtpd\s.*%zmm",
    ):
        assert re.search(pattern, assembly), pattern
    fused = re.findall(r"vfn?m(?:add|sub)\d+(\w\w)\s.*%([xyz])mm", assembly)
    assert set(fused) == {("ps", "z")}
    estimates, rounded_up = len(re.findall(r"vrcp14ps\s", assembly)), len(re.findall(r"\{ru-sae\}", assembly))
    assert 0 < rounded_up == estimates
    decays = len(re.findall(r"vcvtdq2ps\s.*%zmm", assembly))
    assert decays > 0
    assert len(fused) == 4 * estimates + decays
    # Without its effect on the result, a compiler may take a request for memory ahead for none. The loops in stages clear
    # what the processor notes of denormal numbers.
    functions = assembly.split("\n\n")
    read_ahead = [
        function for function in functions if "vldmxcsr" in function or re.search(r"add_\w*squares\w*>:", function)
    ]
    assert len(read_ahead) > 0
    assert all("prefetcht0" in function for function in read_ahead)
