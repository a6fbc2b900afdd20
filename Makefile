# make demo · test · bench · lint: each from nothing. They make .venv and install what they need into it.

# Another PyTorch: make test TORCH=torch==2.10.0
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

CPP_FILES = $(shell find csrc tests/cuda_emulator tests/instructions -type f -not -name '*.json')

# A stamp for each PyTorch and set of extras; each also installs the package itself, compiled and editable.
INSTALLED := $(VENV)/.$(subst =,_,$(TORCH))

.PHONY: demo test nightly bench lint format clean

demo: $(INSTALLED)-examples
	$(VENV)/bin/python examples/train_digits.py

test: $(INSTALLED)-test-keras-examples
	$(VENV)/bin/python -m pytest

# What takes hours: LIVES drawn lives of an optimizer (see tests/test_drawn_lives.py), each time others.
LIVES ?= 100000
nightly: $(INSTALLED)-test
	TORCH_ADADELTA_LIVES=$(LIVES) $(VENV)/bin/python -m pytest tests/test_drawn_lives.py

# Some ten minutes; BENCH=--quick takes one, BENCH=--docs puts the figures into the documentation.
BENCH ?=
bench: $(INSTALLED)-bench-keras
	$(VENV)/bin/python benchmarks/bench.py $(BENCH)

lint: $(INSTALLED)-lint-test-examples
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP_FILES)

format: $(INSTALLED)-lint-test-examples
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP_FILES)

clean:
	rm -rf $(VENV) build dist *.egg-info torch_adadelta/*.so

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first: the library is compiled against it.
$(INSTALLED): $(VENV)/bin/python $(SOURCES)
	$(PIP) "setuptools>=77" ninja $(TORCH)
	$(PIP) --no-build-isolation --editable .
	rm -f $(VENV)/.torch*
	touch $@

comma := ,
empty :=
space := $(empty) $(empty)
$(INSTALLED)-%: $(INSTALLED)
	$(PIP) --no-build-isolation --editable ".[$(subst -,$(comma),$*)]"
	touch $@
