"""What the AVX-512 kernels compute in ways of their own, for every float: inverses, roundings to bfloat16, and decays."""

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


FLAGS = {"AVX512": [], "AVX512_BF16": ["-mavx512bf16"]}


@pytest.mark.parametrize("capability", FLAGS)
def test_inverses_and_roundings_are_those_of_the_other_instruction_sets(capability: str, tmp_path: Path) -> None:
    if not kernels.is_loaded:
        pytest.skip("which instruction sets there are is known to the compiled library")
    before = kernels.cpu_capability()
    try:
        kernels.set_cpu_capability(capability)
    except RuntimeError:
        pytest.skip(f"this processor does not have {capability}")
    kernels.set_cpu_capability(before)

    driver = tmp_path / "driver"
    kernels_of_set = ROOT / "csrc" / "cpu" / "kernels" / f"{capability.lower()}.cpp"
    command = [
        CXX, *compile_flags(), f'-DKERNELS="{kernels_of_set}"',
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c", *FLAGS[capability],
        str(ROOT / "tests" / "csrc" / "exhaustive" / "driver.cpp"), "-o", str(driver),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    found = subprocess.run([str(driver)], capture_output=True, text=True, check=True).stdout.splitlines()
    assert found == [
        "bfloat16 of every float: 0",
        "decay: 0",
        "inverse of every root in range: 0",
        "inverse of every root in range without denormal numbers: 0",
        "inverse from every estimate, 11 billion: 0",
    ]
