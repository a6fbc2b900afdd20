"""The C++ compiler, and the flags that setup.py compiles the kernels with, for tests that compile something of csrc/."""

import os
import re
import shlex
import sysconfig
from pathlib import Path

from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parent.parent

CXX = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")[0]


def compile_flags() -> list[str]:
    """Those of setup.py, with where PyTorch's headers are."""
    flags = re.search(r"COMPILE_FLAGS = \[(.*?)\n\]", (ROOT / "setup.py").read_text(), re.DOTALL)
    assert flags is not None
    own = re.findall(r'^ *"(-[^"{]+)"', flags[1], re.MULTILINE)
    return ["-std=c++20", *own, *(f"-I{path}" for path in include_paths())]
