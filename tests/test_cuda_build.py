"""What the CUDA compiler says of the kernels: registers, stack and spills, which no emulation shows."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc")

pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree"),
    pytest.mark.skipif(NVCC is None, reason="no nvcc, the compiler of the CUDA toolkit"),
]

# With more, an SM would hold fewer than two blocks of 512 threads.
MOST_REGISTERS = 64


class Kernel(NamedTuple):
    name: str
    stack: int
    spills: int
    registers: int


def compiled(source: Path, architecture: str, output: Path) -> list[Kernel]:
    """What ptxas reports of every kernel in a file, compiled with the flags of setup.py."""
    flags = re.search(r"CUDA_FLAGS = \[(.*?)\n\]", (ROOT / "setup.py").read_text(), re.DOTALL)
    assert flags is not None
    options = [flag for flag in re.findall(r'"(-[^"{]+)"', flags[1]) if "compress" not in flag]
    assert NVCC is not None
    command = [
        NVCC, "-std=c++20", "-cubin", f"-arch={architecture}", "-Xptxas=-v", *options,
        "-DTORCH_TARGET_VERSION=0x020a000000000000", *(f"-I{path}" for path in include_paths()),
        str(source), "-o", str(output),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    pattern = (
        r"Compiling entry function '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    return [
        Kernel(name, int(stack), int(stores) + int(loads), int(registers))
        for name, stack, stores, loads, registers in re.findall(pattern, result.stderr, re.DOTALL)
    ]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda path: path.stem)
def test_kernels_stay_in_their_registers(source: Path, architecture: str, tmp_path: Path) -> None:
    kernels = compiled(source, architecture, tmp_path / "kernels.cubin")
    in_float = [kernel for kernel in kernels if "kernelId" not in kernel.name]  # mangled: of double
    assert len(kernels) >= 4
    assert in_float
    for kernel in kernels:
        assert kernel.stack == 0, kernel
        assert kernel.spills == 0, kernel
    for kernel in in_float:
        assert kernel.registers <= MOST_REGISTERS, kernel


def test_nothing_is_fused_or_approximated(tmp_path: Path) -> None:
    """The PTX of the update: each product and sum is rounded by itself, roots and quotients are those of IEEE 754."""
    assert NVCC is not None
    ptx = tmp_path / "update.ptx"
    flags = ["--fmad=false", "--prec-div=true", "--prec-sqrt=true", "--ftz=false"]
    assert all(flag in (ROOT / "setup.py").read_text() for flag in flags)
    includes = [f"-I{path}" for path in include_paths()]
    source = str(ROOT / "csrc" / "cuda" / "adadelta.cu")
    command = [NVCC, "-std=c++20", "-ptx", "-arch=compute_90", "-O3", "-DUSE_CUDA", *flags, *includes]
    subprocess.run([*command, "-DTORCH_TARGET_VERSION=0x020a000000000000", source, "-o", str(ptx)], check=True)
    text = ptx.read_text()
    for instruction in ("sqrt.rn.f32", "sqrt.rn.f64", "div.rn.f32", "div.rn.f64"):
        assert instruction in text, instruction
    assert not re.findall(r"\b(?:fma|sqrt\.approx|rsqrt|rcp\.approx|div\.approx|div\.full)[.\w]*\.f(?:32|64)", text)
    assert ".ftz" not in text
