"""What the CUDA compiler says of the kernels: registers, stack and spills, which no emulation shows."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree"),
    pytest.mark.skipif(NVCC is None, reason="no nvcc, the compiler of the CUDA toolkit"),
]

# With more, an SM would hold fewer than two blocks of 512 threads.
MOST_REGISTERS = 64


SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def nvcc(source: Path, output: Path, *arguments: str, flags: list[str] | None = None) -> str:
    """Compiles a file with the flags of setup.py, or others, and returns what the compiler said."""
    if flags is None:
        listed = re.search(r"CUDA_FLAGS = \[(.*?)\n\]", (ROOT / "setup.py").read_text(), re.DOTALL)
        assert listed is not None
        flags = re.findall(r'"(-[^"{]+)"', listed[1])
        assert {"--fmad=false", "--prec-div=true", "--prec-sqrt=true", "--ftz=false"} <= set(flags)
    assert NVCC is not None
    own = ["-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    includes = [f"-I{path}" for path in include_paths()]
    command = [NVCC, *own, *flags, *includes, *arguments, str(source), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stderr


def ptx_of(source: Path, architecture: str, output: Path, flags: list[str] | None = None) -> str:
    nvcc(source, output, "-ptx", f"-arch={architecture}", flags=flags)
    return output.read_text()


class Kernel(NamedTuple):
    name: str
    stack: int
    spills: int
    registers: int


def compiled(source: Path, architecture: str, output: Path) -> list[Kernel]:
    """What ptxas reports of every kernel in a file."""
    report = nvcc(source, output, "-cubin", f"-arch={architecture}", "-Xptxas=-v")
    pattern = (
        r"Compiling entry function '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    return [
        Kernel(name, int(stack), int(stores) + int(loads), int(registers))
        for name, stack, stores, loads, registers in re.findall(pattern, report, re.DOTALL)
    ]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
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


# Arithmetic in PTX, and the part of it that rounds as IEEE 754 has it, each operation by itself: what is not told how to
# round, ptxas may fuse.
ARITHMETIC = (
    r"\b(?:add|sub|mul|mad|fma|div|sqrt|rsqrt|rcp|ex2|lg2|sin|cos|tanh)(?:\.\w+)*\.(?:f16x2|bf16x2|f16|bf16|f32|f64)\b"
)
EXACT = {f"{name}.rn.{dtype}" for name in ("add", "sub", "mul", "div", "rcp", "sqrt") for dtype in ("f32", "f64")}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_nothing_is_fused_or_approximated(source: Path, tmp_path: Path) -> None:
    """The PTX of every kernel, which ptxas translates for each architecture as it stands."""
    text = ptx_of(source, "compute_80", tmp_path / "kernels.ptx")
    kernels = re.findall(r"\.entry (\w+)\((.*?)^}", text, re.MULTILINE | re.DOTALL)
    assert len(kernels) >= 4
    for name, body in kernels:
        # Whole numbers are multiplied and added, too.
        found = set(re.findall(ARITHMETIC, body))
        assert found <= EXACT, name
        if "update" in name:
            dtype = "f64" if re.search("kernelId", name) else "f32"
            assert {f"{operation}.rn.{dtype}" for operation in ("add", "sub", "mul", "rcp", "sqrt")} <= found, name
        assert not re.search(r"\.ftz\b|\.approx\b|\.full\b", body), name
        assert not re.search(r"\bcall\b|\.local\b", body), name


def test_the_check_sees_what_it_looks_for(tmp_path: Path) -> None:
    """With the compiler's own defaults, products and sums are fused, and it says so."""
    (source,) = (path for path in SOURCES if path.stem == "adadelta")
    text = ptx_of(source, "compute_80", tmp_path / "kernels.ptx", flags=["--use_fast_math"])
    found = set(re.findall(ARITHMETIC, text))
    assert {"fma.rn.ftz.f32", "fma.rn.f64", "sqrt.approx.ftz.f32"} <= found, found


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_vectors_are_read_and_written_whole(source: Path, tmp_path: Path) -> None:
    """16 bytes at a time for every dtype, or for the larger of two: as four or two words, whatever is in them."""
    text = ptx_of(source, "compute_80", tmp_path / "kernels.ptx")
    patterns = {
        "ld": r"\bld\.global(?:\.nc)?\.v(?:4\.[bfu]32|2\.[bfu]64)",
        "st": r"\bst\.global\.v(?:4\.[bfu]32|2\.[bfu]64)",
    }
    for name, body in re.findall(r"\.entry (\w+)\((.*?)^}", text, re.MULTILINE | re.DOTALL):
        if re.search(r"\d(?:update|square_sums)_kernel", name):
            assert re.search(patterns["ld"], body), name
        if re.search(r"\dupdate_kernel", name):
            # Of a parameter and its state, all that have as many bytes as the largest of them.
            state_is_larger = re.search(r"kernelIf(?!NS0_5PlainIf)", name)
            param_is_larger = re.search(r"kernelI(?!f)\w*?PlainIf", name)
            least = 2 if state_is_larger else 1 if param_is_larger else 3
            assert len(re.findall(patterns["st"], body)) >= least, name
