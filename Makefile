# make demo · test · test-slow · bench · lint · docs · sanitize · wheel · release: each from nothing. They make .venv and install what they need into it.

# Another PyTorch: make test TORCH=torch==2.10.0
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

CPP_FILES = $(shell find csrc tests/csrc -type f -not -name "*.json" -not -name "*.py")

# A stamp for each PyTorch, with the package itself, compiled and editable; and one for each set of extras besides, which
# compiles nothing.
INSTALLED := $(VENV)/.$(subst =,_,$(TORCH))

.PHONY: demo test test-slow prepare-test nightly bench lint format docs sanitize coverage wheel release matrix clean

demo: $(INSTALLED)-examples
	$(VENV)/bin/python examples/train_digits.py

# Workers wait for each other's threads asleep: threads that spin would take the processors from them.
PYTEST = GOMP_SPINCOUNT=0 $(VENV)/bin/python -m pytest --numprocesses auto --dist loadgroup

FOR_TEST := $(INSTALLED)-test-keras-parity-examples-frameworks-wheel
test: $(FOR_TEST)
	$(PYTEST) -m "not slow"

# The rest: installs, wheels, frameworks, docs, examples, benchmarks, whatever compiles, the long state machines.
test-slow: $(FOR_TEST)
	$(PYTEST) -m slow

# What `test` installs, and no more.
prepare-test: $(FOR_TEST)

# What takes hours: the state machine of tests/fuzz/test_optimizer_stateful.py, with other EXAMPLES each time; a million steps.
EXAMPLES ?= 100000
nightly: $(INSTALLED)-test
	TORCH_ADADELTA_EXAMPLES=$(EXAMPLES) $(VENV)/bin/python -m pytest -k stateful_long tests/fuzz/test_optimizer_stateful.py
	$(VENV)/bin/python scripts/long_run.py

# Some 15 minutes; BENCH=--quick takes one, BENCH=--docs makes three runs and puts their medians into the documentation.
BENCH ?=
bench: $(INSTALLED)-bench-parity
	$(VENV)/bin/python benchmarks/bench.py $(BENCH)

lint: $(INSTALLED)-lint-test-keras-examples
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP_FILES)

format: $(INSTALLED)-lint-test-keras-examples
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP_FILES)

# The pages of docs/ and the reference of every public name; a warning is an error.
docs: $(INSTALLED)-docs-keras
	$(VENV)/bin/sphinx-build --quiet --fail-on-warning --keep-going -b html docs docs/_build
	@echo docs/_build/index.html

# The CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer, LeakSanitizer and ThreadSanitizer.
sanitize: $(INSTALLED)-test
	PYTHON="$(abspath $(VENV))/bin/python" scripts/sanitize.sh

# Which lines and branches the tests of the core run, in Python and, by gcov, in the CPU library.
coverage: $(INSTALLED)-test-keras-coverage
	PYTHON="$(abspath $(VENV))/bin/python" scripts/coverage.sh

# One file for every PyTorch from 2.10 and every Python from 3.10, with the CUDA library where there is an nvcc.
wheel: $(INSTALLED)-wheel
	PYTHON="$(abspath $(VENV))/bin/python" scripts/build_wheel.sh

# Wheel, sdist and SHA256SUMS of the tag that is checked out, each of the two installed in a fresh environment.
release: $(INSTALLED)-wheel
	PYTHON="$(abspath $(VENV))/bin/python" TORCH="$(TORCH)" scripts/release.sh

# The wheel's tests on one PyTorch and Python after another; the script says which, and how to choose.
matrix: wheel
	scripts/version_matrix.sh dist/*.whl

clean:
	rm -rf $(VENV) build dist *.egg-info torch_adadelta/*.so

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first: the library is compiled against it. pip would compile all of it each time, in a folder of its own; this way
# ninja compiles what has changed. With another PyTorch, headers are new, too.
$(INSTALLED): $(VENV)/bin/python $(SOURCES)
	$(PIP) "setuptools>=77" ninja $(TORCH)
	TORCH_ADADELTA_NO_EXT=1 $(PIP) --no-build-isolation --editable .
	mkdir -p build
	PATH="$(abspath $(VENV))/bin:$$PATH" $(VENV)/bin/python setup.py build_ext --inplace --force >build/log 2>&1 || { cat build/log; exit 1; }
	rm -f $(VENV)/.torch*
	touch $@

comma := ,
empty :=
space := $(empty) $(empty)
$(INSTALLED)-%: $(INSTALLED)
	$(PIP) "torch_adadelta[$(subst -,$(comma),$*)]"
	touch $@
