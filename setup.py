"""Builds the compiled library; everything else is in pyproject.toml.

TORCH_ADADELTA_NO_EXT=1 leaves the library out: the package then runs on its Python paths.
"""

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

# The oldest PyTorch whose stable ABI is used, as torch/csrc/stable wants it. The result runs on every later one.
TARGET_VERSION = "0x020a000000000000"

COMPILE_FLAGS = [
    f"-DTORCH_TARGET_VERSION={TARGET_VERSION}",
    "-O3",
    "-fvisibility=hidden",
    # Square roots and conditions become vector instructions; neither flag changes a result.
    "-fno-math-errno",
    "-fno-trapping-math",
    # GCC would add two rows of squares at a time (loops_body.h says why not).
    "-fno-loop-unroll-and-jam",
    # Every operation is rounded on its own, as in Keras.
    "-ffp-contract=off",
]


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3 on one platform: the library has no Python symbol."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


def compiler() -> str:
    return shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")[0]


def options() -> dict:
    if os.environ.get("TORCH_ADADELTA_NO_EXT") == "1":
        return {}
    if shutil.which(compiler()) is None:
        print(
            f"warning: torch_adadelta is installed without its compiled library, for there is no C++ compiler "
            f"({compiler()}); it will run, many times slower",
            file=sys.stderr,
        )
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        sys.exit(
            "torch_adadelta is compiled against the PyTorch that you have, and pip hides it from this build: install "
            "torch first, then run `pip install --no-build-isolation .` (or set TORCH_ADADELTA_NO_EXT=1 to do without "
            "the compiled library)."
        )
    sources = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
    library = CppExtension(
        "torch_adadelta._C",
        sources,
        depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
        extra_compile_args=COMPILE_FLAGS,
        py_limited_api=True,  # no libtorch_python
    )
    return {
        "ext_modules": [library],
        "cmdclass": {
            "build_ext": BuildExtension.with_options(no_python_abi_suffix=True),
            "bdist_wheel": PlatformWheel,
        },
    }


# setup.py is also run to ask for metadata and to make an sdist, neither of which compiles.
BUILDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}
setup(**(options() if BUILDS.intersection(sys.argv) else {}))
