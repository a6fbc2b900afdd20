#!/usr/bin/env bash
# Runs the tests of one wheel, unrebuilt, on one PyTorch and Python after another:
#
#     scripts/version_matrix.sh WHEEL
#
# For each Python there is an environment under $TMPDIR, deleted after use, into which the wheel is installed once, beside
# a PyTorch that is too old, which the import must refuse. The others then take that one's place, one after the other, as
# an upgrade in a user's environment does.
#
# The environment chooses:
#   PYTHONS  interpreters, by name or path; those that are not there are left out (python3.10 … python3.13)
#   TORCHES  versions of PyTorch, and "latest", the newest that pip finds (2.10.0 2.11.0 2.12.1 2.13.0 latest)
#   TESTS    what to run of tests/ (the core suite: backends/test_functional.py csrc/test_ops.py test_optimizer.py test_checkpoint.py conformance/test_step_hooks.py)
#   TOO_OLD  the PyTorch that must be refused, "" for none (2.9.1)
#   RESULTS  the file to which a line of a Markdown table is added for each combination (version_matrix.md)
#
# With PyTorch's own builds for CUDA an environment takes some 7 GB, and an upgrade the same again while it runs.
set -euo pipefail

PYTHONS=${PYTHONS:-python3.10 python3.11 python3.12 python3.13}
TORCHES=${TORCHES:-2.10.0 2.11.0 2.12.1 2.13.0 latest}
TESTS=${TESTS:-backends/test_functional.py csrc/test_ops.py test_optimizer.py test_checkpoint.py conformance/test_step_hooks.py}
TOO_OLD=${TOO_OLD-2.9.1}
RESULTS=$(realpath -m "${RESULTS:-version_matrix.md}")

if [ $# != 1 ] || [ ! -f "$1" ]; then
  echo "usage: scripts/version_matrix.sh WHEEL (make wheel builds one in dist/)" >&2
  exit 2
fi
wheel=$(realpath "$1")
root=$(realpath "$(dirname "$0")/..")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
env=$scratch/env log=$scratch/log
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1

# The tests alone, so that nothing of the checkout can be imported instead of the wheel.
mkdir "$scratch/work"
cp -r "$root/tests" "$root/pyproject.toml" "$scratch/work"

rows=0 failures=0
row() {  # PYTHON PYTORCH RESULT
  rows=$((rows + 1))
  echo "| $1 | $2 | $3 |" | tee -a "$RESULTS"
  case $3 in passed* | refused*) ;; *) failures=$((failures + 1)) ;; esac
}

pip() { "$env/bin/python" -m pip install --quiet "$@" >"$log" 2>&1; }

requirement() { [ "$1" = latest ] && echo torch || echo "torch==$1"; }

versions() {  # of Python and PyTorch in the environment
  "$env/bin/python" -c 'import platform, torch; print(platform.python_version(), torch.__version__)'
}

# How the tests ended, in pytest's words.
run_tests() {
  local status=passed
  (cd "$scratch/work/tests" && "$env/bin/python" -m pytest -q -p no:cacheprovider $TESTS) >"$log" 2>&1 || status=FAILED
  [ $status = passed ] || tail -n 60 "$log" >&2
  echo "$status: $(tail -n 1 "$log" | tr -d = | xargs)"
}

[ -s "$RESULTS" ] || printf '| Python | PyTorch | %s |\n|---|---|---|\n' "${TESTS// /, }" >"$RESULTS"

# Whether the import in the environment is refused, and in which words.
refusal() {
  local said result=refused
  said=$("$env/bin/python" -c 'import torch_adadelta' 2>&1 | tail -n 1)
  [[ $said == "ImportError: torch_adadelta needs PyTorch 2.10 or later"* ]] || result="NOT REFUSED"
  echo "$result: $said"
}

for python in $PYTHONS; do
  if ! "$python" -c '' 2>/dev/null; then
    echo "left out: there is no $python" >&2
    continue
  fi
  rm -rf "$env"
  "$python" -m venv "$env"
  before=
  # pip would put a newer PyTorch in the place of one that is too old; --no-deps forbids it.
  if [ -n "$TOO_OLD" ] && pip "$(requirement "$TOO_OLD")" numpy && pip --no-deps "$wheel"; then
    read -r python_version before < <(versions)
    row "$python_version" "$before" "$(refusal)"
  fi
  for torch in $TORCHES; do
    # For the wheel there is only something to do if it is not there yet.
    if ! pip --upgrade "$(requirement "$torch")" expecttest hypothesis numpy pytest || ! pip "$wheel"; then
      tail -n 5 "$log" >&2
      row "$python" "$torch" "NOT INSTALLED"
      continue
    fi
    read -r python_version torch_version < <(versions)
    row "$python_version" "$torch_version" "$(run_tests)${before:+; in the place of $before}"
    before=$torch_version
  done
done

[ "$rows" -gt 0 ] && [ "$failures" = 0 ]
