"""What kernels compute in ways of their own, for every float: inverses, roundings to bfloat16, decays, and masters."""

import shutil
import subprocess
from pathlib import Path

import pytest
from compilers import CXX, ROOT, compile_flags

from torch_adadelta.backends import kernels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree"),
    pytest.mark.skipif(shutil.which(CXX) is None, reason=f"there is no C++ compiler ({CXX})"),
]


AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c"]
FLAGS = {
    "default": [],
    "AVX2": ["-mavx2", "-mf16c"],
    "AVX512": AVX512,
    "AVX512_BF16": [*AVX512, "-mavx512bf16"],
}


def said(driver: str, capability: str, folder: Path) -> list[str]:
    """What a driver prints of the kernels for an instruction set."""
    if not kernels.is_loaded:
        pytest.skip("which instruction sets there are is known to the compiled library")
    before = kernels.cpu_capability()
    try:
        kernels.set_cpu_capability(capability)
    except RuntimeError:
        pytest.skip(f"this processor does not have {capability}")
    kernels.set_cpu_capability(before)

    program = folder / "driver"
    kernels_of_set = ROOT / "csrc" / "cpu" / "kernels" / f"{capability.lower()}.cpp"
    source = ROOT / "tests" / "csrc" / "exhaustive" / driver
    definition = f'-DKERNELS="{kernels_of_set}"'
    command = [CXX, *compile_flags(), definition, *FLAGS[capability], str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    return subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("capability", ["AVX512", "AVX512_BF16"])
def test_inverses_and_roundings_are_those_of_the_other_instruction_sets(capability: str, tmp_path: Path) -> None:
    assert said("driver.cpp", capability, tmp_path) == [
        "bfloat16 of every float: 0",
        "decay: 0",
        "inverse of every root in range: 0",
        "inverse of every root in range without denormal numbers: 0",
        "inverse from every estimate, 11 billion: 0",
    ]


@pytest.mark.parametrize("capability", FLAGS)
def test_masters(capability: str, tmp_path: Path) -> None:
    """All 2^32 of them, and all 2^32 pairs of a parameter and a remainder."""
    ways = ["by itself", "as a tensor", "in a group", "in a group in order"]
    if capability in ("default", "AVX512_BF16"):  # where every group is in order
        ways.pop()
    assert said("masters.cpp", capability, tmp_path) == [
        f"every {what} {way}: 0" for what in ("master", "pair") for way in ways
    ]
