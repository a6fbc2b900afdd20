#!/usr/bin/env bash
# Builds the sdist and, out of it, the wheel, into dist/:
#
#     scripts/build_wheel.sh
#
# The wheel is one file for every PyTorch from 2.10 and every Python from 3.10, on every Linux of manylinux_2_28. Where
# there is an nvcc, on PATH or in CUDA_HOME, the CUDA library is in it, too: TORCH_ADADELTA_CUDA=0 leaves it out, and =1
# asks for it. Debug information is left out.
#
# PYTHON is an interpreter with PyTorch, setuptools, ninja and the extra "wheel".
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
nvcc=${CUDA_HOME:+$CUDA_HOME/bin/}nvcc
if command -v "$nvcc" >/dev/null; then
  export TORCH_ADADELTA_CUDA=${TORCH_ADADELTA_CUDA:-1}
fi

rm -rf build/wheel build/stubs dist
"$PYTHON" scripts/link_stubs.py build/stubs
export LDFLAGS="-L$PWD/build/stubs -Wl,--exclude-libs,ALL -Wl,--strip-debug"

"$PYTHON" -c 'from setuptools import build_meta; build_meta.build_sdist("dist")' >/dev/null
"$PYTHON" -m pip wheel --quiet --no-build-isolation --no-deps --no-index --wheel-dir build/wheel dist/*.tar.gz
# auditwheel refuses what asks for more than the tag vouches for. Whoever has PyTorch has its libraries.
PATH="$(dirname "$PYTHON"):$PATH" "$PYTHON" -m auditwheel repair --plat "manylinux_2_28_$(uname -m)" --only-plat \
  --wheel-dir dist --exclude 'libtorch*' --exclude 'libc10*' build/wheel/*.whl
"$PYTHON" scripts/check_wheel.py dist/*.whl
