"""The C++ compiler, and the flags that setup.py compiles the kernels with, for what compiles something of csrc/.

    python tests/compilers.py

prints the flags, for scripts.
"""

import ast
import os
import shlex
import sysconfig
from pathlib import Path
from typing import Any

from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parent.parent

CXX = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")[0]


def compile_flags() -> list[str]:
    """Those of setup.py, with the standard that PyTorch adds and where its headers are."""
    values: dict[str, Any] = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("TARGET_VERSION", "COMPILE_FLAGS"):
            values[ast.unparse(node.targets[0])] = eval(ast.unparse(node.value), dict(values))
    includes = [flag for path in include_paths() for flag in ("-isystem", path)]
    return ["-std=c++20", *values["COMPILE_FLAGS"], *includes]


if __name__ == "__main__":
    print(shlex.join(compile_flags()))
