"""Builds the compiled libraries; everything else is in pyproject.toml.

TORCH_ADADELTA_NO_EXT=1 leaves both out: the package then runs on its Python paths.
TORCH_ADADELTA_CUDA=1 builds the CUDA library even for a PyTorch without CUDA, which cannot load it; 0 leaves it out;
auto, the default, builds it where PyTorch has CUDA and there is an nvcc. TORCH_CUDA_ARCH_LIST replaces the
architectures.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

# The oldest PyTorch whose stable ABI is used, as torch/csrc/stable wants it. The result runs on every later one.
TARGET_VERSION = "0x020a000000000000"

# The oldest architecture; CUDA 13 knows none before it.
OLDEST_ARCHITECTURE = 75

COMPILE_FLAGS = [
    f"-DTORCH_TARGET_VERSION={TARGET_VERSION}",
    "-O3",
    "-fvisibility=hidden",
    # Square roots and conditions become vector instructions; neither flag changes a result.
    "-fno-math-errno",
    "-fno-trapping-math",
    # Every operation is rounded on its own, as in Keras.
    "-ffp-contract=off",
]

# Before PyTorch's libraries, which hold parts of a newer libstdc++ under names without a version: whoever takes those
# depends on how that PyTorch was built.
FIRST_LIBRARIES = ["stdc++"]

CUDA_FLAGS = [
    f"-DTORCH_TARGET_VERSION={TARGET_VERSION}",
    "-DUSE_CUDA",
    "-O3",
    "-Xcompiler=-fvisibility=hidden",
    # The same roundings as on the CPU: nothing fused, nothing flushed, nothing approximate.
    "--fmad=false",
    "--prec-div=true",
    "--prec-sqrt=true",
    "--ftz=false",
]


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3 on one platform: the library has no Python symbol."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


def compiler() -> str:
    return shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")[0]


def cuda_toolkit() -> Path | None:
    """Where the CUDA toolkit is that the CUDA library is to be built with, or None if it is not to be built."""
    import torch

    wanted = os.environ.get("TORCH_ADADELTA_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        sys.exit(f"TORCH_ADADELTA_CUDA must be 0, 1 or auto, not {wanted!r}")
    if wanted == "0" or (wanted == "auto" and torch.version.cuda is None):
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)
    if nvcc is None:
        problem = "there is no nvcc" + (f" in {home}/bin" if home else " on PATH; set CUDA_HOME to a CUDA toolkit")
        if wanted == "1":
            sys.exit(f"TORCH_ADADELTA_CUDA=1, but {problem}")
        print(
            f"warning: torch_adadelta is installed without its CUDA library, for {problem}; on a GPU its Python paths "
            "will run",
            file=sys.stderr,
        )
        return None
    # nvcc may be a script that starts another one; a dry run says where that is at home.
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, check=True
    )
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    return Path(top[1].strip() if top else Path(nvcc).parent.parent).resolve()


def asked(toolkit: Path, option: str) -> str:
    """What nvcc answers."""
    nvcc = str(toolkit / "bin" / "nvcc")
    return subprocess.run([nvcc, option], capture_output=True, text=True, check=True).stdout


def compression_flags(toolkit: Path) -> list[str]:
    """A smaller library, where nvcc is new enough."""
    return ["--compress-mode=size"] if "--compress-mode" in asked(toolkit, "--help") else []


def architecture_flags(toolkit: Path) -> list[str]:
    """Machine code for the first architecture of each major version, which the others run, and PTX for later ones."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return []  # PyTorch's build adds them
    listed = asked(toolkit, "--list-gpu-code")
    known = sorted({int(number) for number in re.findall(r"sm_(\d+)$", listed, re.MULTILINE)})
    known = [number for number in known if number >= OLDEST_ARCHITECTURE]
    firsts = sorted({number // 10: number for number in reversed(known)}.values())
    code = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in firsts]
    return [*code, f"-gencode=arch=compute_{firsts[-1]},code=compute_{firsts[-1]}"]


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
    try:
        runpy.run_path("torch_adadelta/compatibility.py")
    except ImportError as error:
        sys.exit(str(error))
    headers = sorted(str(path) for pattern in ("*.h", "*.cuh") for path in Path("csrc").rglob(pattern))
    libraries = [
        CppExtension(
            "torch_adadelta._C",
            sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
            depends=headers,
            libraries=[*FIRST_LIBRARIES],
            extra_compile_args=COMPILE_FLAGS,
            py_limited_api=True,  # no libtorch_python
        )
    ]
    toolkit = cuda_toolkit()
    if toolkit is not None:
        from torch.utils import cpp_extension

        cpp_extension.CUDA_HOME = str(toolkit)  # which PyTorch looks for only if it was built with CUDA
        libraries.append(
            CppExtension(
                "torch_adadelta._C_cuda",
                sorted(str(path) for path in Path("csrc").rglob("*.cu")),
                depends=headers,
                include_dirs=[str(toolkit / "include")],
                library_dirs=[str(toolkit / "lib64")],
                libraries=[*FIRST_LIBRARIES, "cudart_static", "dl", "pthread", "rt"],
                # By libtorch the loader finds what only a PyTorch with CUDA has.
                extra_link_args=["-Wl,--no-as-needed", "-ltorch"],
                extra_compile_args={
                    "cxx": COMPILE_FLAGS,
                    "nvcc": [*CUDA_FLAGS, *compression_flags(toolkit), *architecture_flags(toolkit)],
                },
                py_limited_api=True,
            )
        )
    return {
        "ext_modules": libraries,
        "cmdclass": {
            "build_ext": BuildExtension.with_options(no_python_abi_suffix=True),
            "bdist_wheel": PlatformWheel,
        },
    }


# setup.py is also run to ask for metadata and to make an sdist, neither of which compiles.
BUILDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}
setup(**(options() if BUILDS.intersection(sys.argv) else {}))
