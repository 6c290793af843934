# `make demo` and `make test` set themselves up: a virtual environment of their own, the package built into it, then run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CXX_SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp')
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(CXX_SOURCES)

.PHONY: demo test lint nightly aot bench gpu table examples install clean

install: $(VENV)/.installed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Built anew when a source of the native module or a requirement changes; Python files are used in place.
$(VENV)/.installed: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m moe_kernels.info
	touch $@

demo: install
	$(BIN)/advmoe demo

test: install
	$(BIN)/python -m pytest -m "not nightly"

# More examples for each property too.
nightly: install
	MOE_KERNELS_HYPOTHESIS=nightly $(BIN)/python -m pytest -m "nightly or not nightly"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

examples: install
	$(BIN)/python examples/train_digits.py
	$(BIN)/python examples/own_model.py

# The Triton kernels for GPUs that are not here.
aot: install
	$(BIN)/python -m bench.aot

# On a machine with a GPU: tests and figures.
gpu: install
	$(BIN)/python -m bench.gpu --json bench/results/gpu.json

bench: install
	$(BIN)/python -m pytest bench --benchmark-only

table: install
	$(BIN)/python -m bench.table

clean:
	rm -rf $(VENV) build dist *.egg-info moe_kernels/_C*.so
