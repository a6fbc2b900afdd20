"""The AVX-512 loops' square roots by multiplication, against the processor's: every float, every estimate they may get."""

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


@pytest.fixture
def has_avx512() -> None:
    if not ops.is_loaded:
        pytest.skip("which instruction sets there are is known to the compiled library")
    before = ops.cpu_capability()
    try:
        ops.set_cpu_capability("AVX512")
    except RuntimeError:
        pytest.skip("this processor has no AVX-512")
    ops.set_cpu_capability(before)


@pytest.mark.usefixtures("has_avx512")
def test_roots_by_multiplication_are_those_of_the_divider(tmp_path: Path) -> None:
    flags = re.search(r"COMPILE_FLAGS = \[(.*?)\n\]", (ROOT / "setup.py").read_text(), re.DOTALL)
    assert flags is not None
    driver = tmp_path / "driver"
    command = [
        CXX, "-std=c++20", *re.findall(r'^ *"(-[^"{]+)"', flags[1], re.MULTILINE),
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c", *(f"-I{path}" for path in include_paths()),
        str(ROOT / "tests" / "roots" / "driver.cpp"), "-o", str(driver),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    found = subprocess.run([str(driver)], capture_output=True, text=True, check=True).stdout.splitlines()
    assert found == [
        "every float: 0",
        "every float without subnormal numbers: 0",
        "every estimate, 24 billion: 0",
    ]
