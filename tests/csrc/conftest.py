"""The CUDA kernels on the CPU, and a fake GPU, compiled when a test first needs them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import emulated
import pytest
from torch.utils.cpp_extension import include_paths, library_paths

import torch_adadelta

ROOT, SOURCES, COMPILER = emulated.ROOT, emulated.SOURCES, emulated.COMPILER

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def emulator_library(tmp_path_factory: pytest.TempPathFactory) -> None:
    emulated.build(tmp_path_factory.mktemp("emulator"))


@pytest.fixture
def cuda_emulator(emulator_library: None) -> Iterator[None]:
    """Blocks and threads in their order, unless a test asks for another."""
    yield
    emulated.emulated.set_seed(0)
    emulated.emulated.set_edge_blocks(0)


@pytest.fixture(scope="session")
def run_with_fake_gpu(tmp_path_factory: pytest.TempPathFactory) -> Run:
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
