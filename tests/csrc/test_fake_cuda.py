"""The tests for a GPU on one that is pretended: CUDA tensors in the memory of the host, the kernels emulated.

What runs for real: the optimizer with tensors that PyTorch takes for CUDA's, csrc/cuda/device.h, the launches, and
what a step asks of the device. What does not: the GPU's arithmetic and memory, time, streams, the driver, and how
CUDA captures a graph. See tests/csrc/cuda_emulator.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

import torch_adadelta
from torch_adadelta.backends import kernels

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "tests" / "csrc" / "cuda_emulator"
COMPILER = shutil.which("g++")

pytestmark = [
    pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA, which needs no pretending"),
    pytest.mark.skipif(COMPILER is None, reason="no g++"),
    pytest.mark.skipif(not SOURCES.exists(), reason="needs the source tree"),
]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs Python with a fake GPU, and with the package without its CUDA library, wherever there may be one."""
    folder = tmp_path_factory.mktemp("fake")
    package = Path(torch_adadelta.__file__).parent
    shutil.copytree(package, folder / "torch_adadelta", ignore=shutil.ignore_patterns("_C_cuda.so", "__pycache__"))
    assert COMPILER is not None
    flags = [COMPILER, "-std=c++20", "-O1", "-fPIC", "-fno-math-errno", "-ffp-contract=off"]
    includes = [f"-I{path}" for path in include_paths()]
    stable = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA", f"-I{SOURCES / 'include'}"]
    builds = [
        subprocess.Popen(
            [*flags, *own, *includes, "-c", str(SOURCES / f"{name}.cpp"), "-o", str(folder / f"{name}.o")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, own in (("fake_cuda", []), ("fake_cuda_ops", [*stable, "-fvisibility=hidden"]))
    ]
    for build in builds:
        _, errors = build.communicate()
        assert build.returncode == 0, errors
    library = folder / "library.so"  # not a name that Python would take for a module
    paths = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    objects = [str(folder / "fake_cuda.o"), str(folder / "fake_cuda_ops.o")]
    link = [COMPILER, "-shared", *objects, *paths, "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(library)]
    subprocess.run(link, check=True)

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        own = {
            "FAKE_CUDA": str(library),
            "PYTHONPATH": os.pathsep.join((str(folder), str(SOURCES), str(ROOT / "tests" / "fuzz"))),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, **own, **environment},
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_the_tests_for_a_gpu(run: Run) -> None:
    tests = [str(ROOT / "tests" / "cuda"), str(SOURCES / "only_fake.py")]
    result = run("-m", "pytest", "-p", "fake_cuda", "-p", "no:cacheprovider", "-q", "--rootdir", str(ROOT), *tests)
    assert result.returncode == 0, result.stdout + result.stderr
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) > 150, result.stdout


def test_lives_that_move_between_devices(run: Run) -> None:
    lives = str(SOURCES / "moving_state_machine.py")
    result = run("-m", "pytest", "-p", "fake_cuda", "-p", "no:cacheprovider", "-q", "--rootdir", str(ROOT), lives)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 passed" in result.stdout


WITHOUT_LIBRARY = """
import fake_cuda
import warnings
import torch
from torch_adadelta import AdadeltaKeras
from torch_adadelta.backends import kernels

def params():
    params = [torch.nn.Parameter(torch.zeros(2, device=device)) for device in ("cuda", "cpu")]
    for param in params:
        param.grad = torch.ones_like(param)
    return params

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        both = params()
        optimizer = AdadeltaKeras(both, 1.0)
        optimizer.step()
        optimizer.step()
assert torch.equal(both[0].cpu(), both[1]) and both[0].is_cuda
for warning in caught:
    print(f"{warning.category.__name__}: {warning.message}")
try:
    AdadeltaKeras(params()[:1], fused=True)
except RuntimeError as error:
    print(error)
"""


def test_without_the_cuda_library_the_python_paths_run(run: Run) -> None:
    """A PyTorch with CUDA, but no nvcc when the package was installed: one warning, which says what to install."""
    result = run("-c", WITHOUT_LIBRARY, WITHOUT_CUDA_LIBRARY="1")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 2, result.stdout
    why = (
        r"/\S+/_C_cuda.so does not exist: torch_adadelta was installed where no CUDA compiler \(nvcc\) was found, or "
        r"with TORCH_ADADELTA_CUDA=0. Install the CUDA toolkit .+ and run `pip install --no-build-isolation .` again."
    )
    assert re.fullmatch(
        f"RuntimeWarning: torch_adadelta runs without its CUDA library, many times slower: {why}", lines[0]
    )
    assert re.fullmatch(f"`fused=True` cannot run on cuda parameters: {why}; leave `fused` None", lines[1])


@pytest.mark.parametrize("has_library", [True, False])
def test_diagnostics(run: Run, has_library: bool) -> None:
    program = "import fake_cuda, runpy; runpy.run_module('torch_adadelta', run_name='__main__')"
    result = run("-c", program, **({} if has_library else {"WITHOUT_CUDA_LIBRARY": "1"}))
    assert result.returncode == 0, result.stdout + result.stderr
    before, _, on_cuda = result.stdout.partition("One step of each path on cuda")
    assert "GPU 1          fake GPU (sm_00)" in before
    assert on_cuda.count("ok, same bits as single_tensor on the CPU") == (3 if has_library else 2), result.stdout
    if not has_library:
        assert re.search(r"CUDA library   not loaded: FileNotFoundError: .*Install the CUDA toolkit", before)
        assert "fused          cannot run: its library is not loaded" in on_cuda
