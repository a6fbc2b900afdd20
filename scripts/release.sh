#!/usr/bin/env bash
# Makes a release of the commit that is checked out, whose tag is v and the version: the wheel, the sdist and their
# SHA256SUMS, in dist/:
#
#     git checkout v0.2.0 && make release
#
# Then it installs each of the two files in a fresh environment, beside PyTorch alone, and lets it take its steps there.
# The CUDA library is compiled in; TORCH_ADADELTA_CUDA=0 leaves it out, for a machine without nvcc.
#
# PYTHON is as for scripts/build_wheel.sh; TORCH is what pip installs in the fresh environments (torch).
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-torch}
export TORCH_ADADELTA_CUDA=${TORCH_ADADELTA_CUDA:-1}

refuse() {
  echo "no release: $1" >&2
  exit 1
}

version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' torch_adadelta/version.py)
tags=$(git tag --points-at HEAD | xargs)
changes=$(git status --porcelain)
[ -z "$changes" ] || refuse "the tree is not that of the commit: commit, stash or remove
$changes"
[[ " $tags " == *" v$version "* ]] || refuse "torch_adadelta/version.py says $version, and the tags of this commit are: \
${tags:-none}; check out v$version, or correct the version, commit it and tag the commit"

PYTHON=$PYTHON scripts/build_wheel.sh
(cd dist && sha256sum -- *.tar.gz *.whl | tee SHA256SUMS)

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for file in dist/*.whl dist/*.tar.gz; do
  echo "$(basename "$file"), in an environment of its own:"
  "$PYTHON" -m venv --clear "$scratch/env"
  pip=("$scratch/env/bin/python" -m pip --disable-pip-version-check install --quiet)
  "${pip[@]}" "$TORCH"
  # What is not a wheel is compiled, with these.
  [[ $file == *.whl ]] || "${pip[@]}" "setuptools>=77" ninja
  TORCH_ADADELTA_CUDA=auto PATH="$scratch/env/bin:$PATH" "${pip[@]}" --no-build-isolation "$file"
  # Not in the tree, whose package would be imported instead.
  page=$(cd "$scratch" && env/bin/python -m torch_adadelta) || refuse "$page"
  echo "$page"
  [[ $page == *"fused          ok"* ]] || refuse "the CPU library of $file does not run"
done
