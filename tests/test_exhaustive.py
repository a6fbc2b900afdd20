"""What the AVX-512 loops compute in ways of their own, for every float: square roots, and roundings to bfloat16."""

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from torch_adadelta import ops

ROOT = Path(__file__).resolve().parent.parent
CXX = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")[0]

pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree"),
    pytest.mark.skipif(shutil.which(CXX) is None, reason=f"there is no C++ compiler ({CXX})"),
]


FLAGS = {"AVX512": [], "AVX512_BF16": ["-mavx512bf16"]}


@pytest.mark.parametrize("capability", FLAGS)
def test_roots_and_roundings_are_those_of_the_other_instruction_sets(capability: str, tmp_path: Path) -> None:
    if not ops.is_loaded:
        pytest.skip("which instruction sets there are is known to the compiled library")
    before = ops.cpu_capability()
    try:
        ops.set_cpu_capability(capability)
    except RuntimeError:
        pytest.skip(f"this processor does not have {capability}")
    ops.set_cpu_capability(before)

    flags = re.search(r"COMPILE_FLAGS = \[(.*?)\n\]", (ROOT / "setup.py").read_text(), re.DOTALL)
    assert flags is not None
    driver = tmp_path / "driver"
    loops = ROOT / "csrc" / "cpu" / f"loops_{capability.lower()}.cpp"
    command = [
        CXX, "-std=c++20", *re.findall(r'^ *"(-[^"{]+)"', flags[1], re.MULTILINE), f'-DLOOPS="{loops}"',
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c", *FLAGS[capability],
        *(f"-I{path}" for path in include_paths()), str(ROOT / "tests" / "exhaustive" / "driver.cpp"), "-o", str(driver),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    found = subprocess.run([str(driver)], capture_output=True, text=True, check=True).stdout.splitlines()
    assert found == [
        "bfloat16 of every float: 0",
        "root of every float: 0",
        "root of every float without subnormal numbers: 0",
        "root from every estimate, 24 billion: 0",
    ]
