#!/usr/bin/env bash
# Runs the CPU kernels, compiled anew, under sanitizers:
#
#     scripts/sanitize.sh [address] [thread]
#
# address: AddressSanitizer, UndefinedBehaviorSanitizer and LeakSanitizer, under tests/csrc/sanitizers/driver.cpp and under
#          the tests of the ops (TESTS names others).
# thread:  ThreadSanitizer, under the driver. Python and OpenMP are left out: they are not compiled for it.
#
# PYTHON is an interpreter with PyTorch and the tests' requirements, CXX the compiler (g++ or clang++). What is built
# stays in build/sanitize, and is built again only where a source has changed.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
CXX=${CXX:-c++}
TESTS=${TESTS:-tests/csrc/test_ops.py tests/csrc/test_op_options.py tests/csrc/test_tensor_lists.py tests/csrc/test_aliasing.py tests/csrc/test_cpu_*.py}

# The flags of the build; what they do to roundings is tested, so it is what must be watched.
flags=$("$PYTHON" tests/compilers.py)
libraries=$("$PYTHON" -c 'import torch.utils.cpp_extension as c; print(*c.library_paths())')

link=(-ltorch -ltorch_cpu -lc10 -ldl -pthread)
for path in $libraries; do
  link+=("-L$path" "-Wl,-rpath,$path")
done

# Compiles the library and the driver into build/sanitize/NAME. Arguments: NAME, the options that choose sanitizers.
build() {
  local folder=build/sanitize/$1
  shift
  mkdir -p "$folder"
  local compile="$CXX $flags -O1 -g -fPIC -fno-omit-frame-pointer $*"
  for source in $(find csrc -name '*.cpp') tests/csrc/sanitizers/driver.cpp; do
    local object=$folder/$(echo "$source" | tr / _).o
    if [ ! -e "$object" ] || [ -n "$(find csrc setup.py "$source" -newer "$object" -type f)" ]
    then
      echo "$compile -c $source -o $object"
    fi
  done | xargs -d '\n' -r -P "$(nproc)" -I{} sh -c '{}'
  $CXX "$@" -shared "$folder"/csrc_*.o -o "$folder/_C.so" "${link[@]}"
  $CXX "$@" -rdynamic "$folder"/tests_*.o -o "$folder/driver" -Wl,--no-as-needed "${link[@]}"
}

check_address() {
  build address -fsanitize=address,undefined -fno-sanitize-recover=all
  # What PyTorch keeps until the end of the process is reachable, and so no leak.
  build/sanitize/address/driver build/sanitize/address/_C.so

  # The package with the library that is watched. The sanitizers are loaded before Python, which was not built with them,
  # and with them libstdc++, some of whose functions they replace.
  local package=$PWD/build/sanitize/address/package
  rm -rf "$package"
  mkdir -p "$package"
  cp -r torch_adadelta "$package"
  cp build/sanitize/address/_C.so "$package/torch_adadelta"
  local tests=()
  for test in $TESTS; do
    tests+=("$PWD/$test")
  done
  local preloaded=()
  for library in libasan libubsan libstdc++; do
    preloaded+=("$($CXX -print-file-name=$library.so)")
  done
  # Not in the checkout, for Python first looks for modules where it is started. Without the leaks that Python itself
  # leaves at its end, and without the tests of more than 2^31 elements, which take long here.
  cd "$package"
  LD_PRELOAD="${preloaded[*]}" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
    PYTHONPATH=$PWD GOMP_SPINCOUNT=0 "$PYTHON" -m pytest -q -n auto -p no:cacheprovider -k "not int32" "${tests[@]}"
  cd - >/dev/null
}

check_thread() {
  build thread -fsanitize=thread
  TSAN_OPTIONS=halt_on_error=1 build/sanitize/thread/driver build/sanitize/thread/_C.so
}

for sanitizer in "${@:-address thread}"; do
  for name in $sanitizer; do
    "check_$name"
    echo "sanitize: $name: nothing found"
  done
done
