#!/usr/bin/env bash
# Builds, tests and measures torch_adadelta on a machine with an NVIDIA GPU, from a bare checkout, in under 8 minutes.
#
#     scripts/gpu_check.sh OUT
#
# Needs PyTorch with CUDA, nvcc, a C++ compiler, ninja and pytest with hypothesis; no network. PYTHON chooses the
# interpreter. Writes to the checkout and to OUT only. Every stage runs, whatever became of those before it;
# OUT/summary.txt has a line for each, and the exit status is 0 if none failed.
set -uo pipefail

if [[ $# -ne 1 ]]; then
  echo "usage: $0 OUT" >&2
  exit 2
fi
mkdir -p "$1/scratch" || exit 2
OUT=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
PYTHON=${PYTHON:-python3}
: >"$OUT/summary.txt"

# Code for the GPUs that are here, unless told otherwise; and caches that would go elsewhere.
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
: "${TORCH_CUDA_ARCH_LIST:=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sort -u | paste -sd ';')}"
export TORCH_CUDA_ARCH_LIST TORCH_ADADELTA_CUDA=1 PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export TMPDIR=$OUT/scratch XDG_CACHE_HOME=$OUT/scratch CUDA_CACHE_PATH=$OUT/scratch TRITON_CACHE_DIR=$OUT/scratch/triton

failures=0
# stage NAME SECONDS COMMAND...: runs it, its output in OUT/NAME.log, and notes what became of it.
stage() {
  local name=$1 limit=$2 start=$SECONDS result=ok
  shift 2
  timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1 || result="FAILED: exit status $? (124: after $limit s)"
  # A test run in which all was skipped proves nothing.
  if [[ $name == test || $name == *check ]]; then
    grep -aqE '[0-9]+ passed' "$OUT/$name.log" || result="${result/#ok/FAILED}: nothing passed"
    result="$result; $(tail -n 1 "$OUT/$name.log")"
  fi
  [[ $result == ok* ]] || failures=$((failures + 1))
  printf '%-12s %4d s  %s\n' "$name" "$((SECONDS - start))" "$result" | tee -a "$OUT/summary.txt"
}

# Where setuptools is too old for pyproject.toml, which names what a build in place does not need, once more without it.
build() {
  rm -f torch_adadelta/*.so
  "$PYTHON" setup.py build_ext --inplace --build-temp "$OUT/scratch/build" || {
    mkdir -p "$OUT/scratch/torch_adadelta" && cp -r setup.py csrc "$OUT/scratch" &&
      (cd "$OUT/scratch" && "$PYTHON" setup.py build_ext --inplace) && cp "$OUT"/scratch/torch_adadelta/*.so torch_adadelta
  } || return 1
  [[ -e torch_adadelta/_C.so && -e torch_adadelta/_C_cuda.so ]]
}
export -f build
export OUT PYTHON

gpu="import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_properties(0))"
stage versions 40 bash -c 'git rev-parse HEAD; nvidia-smi && nvcc --version && "$PYTHON" -c "$0"' "$gpu"
stage build 80 bash -c build
stage diagnostics 30 "$PYTHON" -m torch_adadelta
stage test 150 "$PYTHON" -m pytest tests/cuda -ra -q -p no:cacheprovider --durations=15 --junitxml="$OUT/test.xml"
# Tests that are small enough to run many times slower.
short="test_short_vectors_tails_and_gaps or test_short_square_sums or test_nothing_but_empty_tensors"
for tool in memcheck racecheck; do
  if ! command -v compute-sanitizer >/dev/null; then
    echo "$tool skipped: there is no compute-sanitizer" | tee -a "$OUT/summary.txt"
    continue
  fi
  stage "$tool" 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 99 \
    "$PYTHON" -m pytest tests/cuda -q -p no:cacheprovider -k "$short"
done
stage benchmark 80 "$PYTHON" benchmarks/bench.py --device cuda --output "$OUT"
# torch.compile takes long, and is only a baseline: with what time is left.
left=$((470 - SECONDS))
stage compiled $((left > 45 ? left : 45)) "$PYTHON" benchmarks/bench.py --device cuda --quick --compile \
  --workload 1x64M --workload 1x64M-bfloat16 --output "$OUT/compiled"

rm -rf "$OUT/scratch"
echo "$failures failures in $SECONDS s" | tee -a "$OUT/summary.txt"
[[ $failures -eq 0 ]]
