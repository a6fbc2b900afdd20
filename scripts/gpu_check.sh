#!/usr/bin/env bash
# Builds, tests and measures torch_adadelta on a machine with an NVIDIA GPU, from a bare checkout, in under 8 minutes.
#
#     scripts/gpu_check.sh OUT
#
# Needs PyTorch with CUDA, nvcc, a C++ compiler, ninja and pytest with hypothesis; no network. PYTHON chooses the
# interpreter. Writes to the checkout and to OUT only: nothing is installed, the libraries are built beside their
# sources. Every stage runs, whatever became of those before it. OUT/summary.txt has a line for each; the exit status is
# 0 if none failed. A stage that cannot run is a failure, except compute-sanitizer's where there is none.
set -uo pipefail

if [[ $# -ne 1 ]]; then
  echo "usage: $0 OUT" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd) || exit 2
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
cd "$ROOT" || exit 2

PYTHON=${PYTHON:-python3}
SUMMARY=$OUT/summary.txt
SCRATCH=$OUT/scratch
mkdir -p "$SCRATCH" || exit 2
: >"$SUMMARY"

# Caches that would go elsewhere.
export TMPDIR=$SCRATCH
export XDG_CACHE_HOME=$SCRATCH/cache CUDA_CACHE_PATH=$SCRATCH/cuda
export TORCHINDUCTOR_CACHE_DIR=$SCRATCH/inductor TRITON_CACHE_DIR=$SCRATCH/triton
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1

# Tests that are small enough to run many times slower.
SHORT="test_short_vectors_tails_and_gaps or test_short_square_sums or test_nothing_but_empty_tensors"

failures=0

# stage NAME SECONDS COMMAND...: runs it, its output in OUT/NAME.log, and notes what became of it.
stage() {
  local name=$1 limit=$2 start=$SECONDS status=0 verdict=ok
  shift 2
  echo "== $name (at most $limit s)"
  timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1 || status=$?
  if [[ $status -eq 124 || $status -eq 137 ]]; then
    verdict="FAILED: stopped after $limit s"
  elif [[ $status -ne 0 ]]; then
    verdict="FAILED: exit status $status"
  fi
  [[ $verdict == ok ]] || failures=$((failures + 1))
  if [[ $name == test || $name == memcheck || $name == racecheck ]]; then
    verdict="$verdict; $(grep -aE '[0-9]+ (passed|failed|error|skipped)' "$OUT/$name.log" | tail -n 1)"
  fi
  printf '%-12s %4d s  %s\n' "$name" "$((SECONDS - start))" "$verdict" | tee -a "$SUMMARY"
  [[ $verdict == ok* ]] || tail -n 15 "$OUT/$name.log"
}

skip() {
  printf '%-12s         skipped: %s\n' "$1" "$2" | tee -a "$SUMMARY"
}

versions() {
  local status=0
  date -u +%Y-%m-%dT%H:%M:%SZ
  git -C "$ROOT" rev-parse HEAD 2>/dev/null || echo "not a git checkout"
  nvidia-smi || status=1
  nvcc --version || "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" --version || status=1
  "$PYTHON" - <<'PROGRAM' || status=1
import platform
import sys

import torch

print("Python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda)
for index in range(torch.cuda.device_count()):
    print(index, torch.cuda.get_device_properties(index))
sys.exit(not torch.cuda.is_available())
PROGRAM
  return "$status"
}

# Not pip: it would write to the environment. Where setuptools is too old for pyproject.toml, which names what a build
# in place does not need, the sources are built without it, in OUT.
build() {
  rm -f "$ROOT"/torch_adadelta/*.so
  if (cd "$ROOT" && "$PYTHON" setup.py build_ext --inplace --build-temp "$SCRATCH/build"); then
    :
  else
    echo "---- once more, without pyproject.toml"
    rm -rf "$SCRATCH/sources"
    mkdir -p "$SCRATCH/sources/torch_adadelta"
    cp -r "$ROOT/setup.py" "$ROOT/csrc" "$SCRATCH/sources/" || return 1
    (cd "$SCRATCH/sources" && "$PYTHON" setup.py build_ext --inplace) || return 1
    cp "$SCRATCH"/sources/torch_adadelta/*.so "$ROOT/torch_adadelta/" || return 1
  fi
  [[ -e $ROOT/torch_adadelta/_C.so && -e $ROOT/torch_adadelta/_C_cuda.so ]]
}

# Unless told otherwise, code for the GPUs that are here, to save time.
if [[ -z ${TORCH_CUDA_ARCH_LIST:-} ]]; then
  TORCH_CUDA_ARCH_LIST=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | paste -sd ';')
fi
[[ -n $TORCH_CUDA_ARCH_LIST ]] && export TORCH_CUDA_ARCH_LIST
export TORCH_ADADELTA_CUDA=1
export -f versions build
export ROOT OUT PYTHON SCRATCH

SANITIZER=$(command -v compute-sanitizer || true)
if [[ -z $SANITIZER && -x ${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer ]]; then
  SANITIZER=${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer
fi

# Together less than 8 minutes, 470 s at most. The first import of PyTorch may have to wait for a cold disk.
stage versions 40 bash -c versions
stage build 80 bash -c build
stage diagnostics 30 "$PYTHON" -m torch_adadelta
stage test 150 "$PYTHON" -m pytest tests/cuda -ra -q -p no:cacheprovider --durations=15 --junitxml="$OUT/test.xml"
for tool in memcheck racecheck; do
  if [[ -n $SANITIZER ]]; then
    stage "$tool" 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$SANITIZER" --tool "$tool" --error-exitcode 99 \
      "$PYTHON" -m pytest tests/cuda -q -p no:cacheprovider -k "$SHORT"
  else
    skip "$tool" "there is no compute-sanitizer"
  fi
done
stage benchmark 80 "$PYTHON" benchmarks/cuda_step.py --json "$OUT/cuda_step.json" --markdown "$OUT/cuda_step.md"
# torch.compile takes long, and is only a peer: with what time is left.
left=$((470 - SECONDS))
if ((left >= 45)); then
  stage compiled "$((left < 150 ? left : 150))" "$PYTHON" benchmarks/cuda_step.py --compile --quick \
    --workload 1x64M --workload 1x64M-bfloat16 --json "$OUT/compiled.json" --markdown "$OUT/compiled.md"
else
  skip compiled "there are $left s left"
fi

# A test run in which all was skipped proves nothing.
if ! grep -aqE '[0-9]+ passed' "$OUT/test.log"; then
  echo "test: nothing passed" | tee -a "$SUMMARY"
  failures=$((failures + 1))
fi

rm -rf "$SCRATCH"
echo "$failures failures in $SECONDS s" | tee -a "$SUMMARY"
[[ $failures -eq 0 ]]
