#!/usr/bin/env bash
# Which lines and branches of the package the tests run, and which lines of the CPU library:
#
#     scripts/coverage.sh
#
# The library is compiled anew, with gcov; both it and a copy of the package stay in build/coverage, with the reports
# python.txt and cpp.txt, which this also prints. A process that is killed leaves no counts of the library.
#
# The environment chooses:
#   PYTHON  an interpreter with PyTorch, the tests' requirements, coverage and gcovr (python3)
#   CXX     g++ or clang++; GCOV, if it is not the one that belongs to g++ (gcov)
#   TESTS   what to run of tests/ (the tests of the core; not those of other packages, and not those that compile)
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
CXX=${CXX:-c++}
root=$PWD
folder=$root/build/coverage
TESTS=${TESTS:-test_*.py step backends csrc/test_op*.py csrc/test_tensor_lists.py csrc/test_aliasing.py csrc/test_cpu_*.py conformance keras_files}

rm -rf "$folder"
mkdir -p "$folder/package"
cp -r torch_adadelta "$folder/package"
rm -f "$folder"/package/torch_adadelta/*.so

link=(-ltorch -ltorch_cpu -lc10 -ldl -pthread)
for path in $("$PYTHON" -c 'from torch.utils.cpp_extension import library_paths; print(*library_paths())'); do
  link+=("-L$path" "-Wl,-rpath,$path")
done
# The flags of the build: some decide over roundings, and the tests compare bits.
compile="$CXX $("$PYTHON" tests/compilers.py) -O1 -g -fPIC -fprofile-update=atomic --coverage"
for source in $(find csrc -name '*.cpp'); do
  echo "$compile -c $root/$source -o $folder/$(echo "$source" | tr / _).o"
done | xargs -d '\n' -r -P "$(nproc)" -I{} sh -c '{}'
$CXX --coverage -shared "$folder"/*.o -o "$folder/package/torch_adadelta/_C.so" "${link[@]}"

cat >"$folder/rc" <<END
[run]
branch = True
parallel = True
source_pkgs = torch_adadelta
data_file = $folder/data
patch = subprocess
[paths]
source =
    $folder/package/torch_adadelta
    */torch_adadelta
[report]
show_missing = True
skip_covered = True
exclude_also =
    @overload
    raise NotImplementedError
END

# Not in the checkout, for Python first looks for modules where it is started.
cd "$folder/package"
status=0
tests=()
for test in $(cd "$root/tests" && ls -d $TESTS); do
  tests+=("$root/tests/$test")
done
PYTHONPATH=$PWD OMP_NUM_THREADS=2 "$PYTHON" -m coverage run --rcfile="$folder/rc" -m pytest -q -p no:cacheprovider \
  "${tests[@]}" || status=$?
"$PYTHON" -m coverage combine --quiet --rcfile="$folder/rc"
"$PYTHON" -m coverage report --rcfile="$folder/rc" | tee "$folder/python.txt"
cd "$root"
"$PYTHON" -m gcovr --root . --object-directory "$folder" --filter csrc/ --gcov-executable "${GCOV:-gcov}" \
  --exclude-throw-branches --exclude-unreachable-branches "$folder" | tee "$folder/cpp.txt"
exit $status
