# `make demo` and `make test` set themselves up: a virtual environment of their own, the package built into it, then run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CXX_SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(CXX_SOURCES)

# What the module is built with (setup.py): tests and demo need no CUDA, and the tests need the simulator.
export MOE_KERNELS_CUDA ?= 0
export MOE_KERNELS_SIMULATOR ?= 1
CHOICE := $(MOE_KERNELS_CUDA) $(MOE_KERNELS_CUDA_ARCHS) $(MOE_KERNELS_SIMULATOR)

.PHONY: demo test lint nightly aot cuda bench gpu sanitize-gpu table gate examples install clean FORCE

install: $(VENV)/.installed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Written when the choice is another than last time.
$(VENV)/.choice: FORCE | $(VENV)/bin/python
	@echo '$(CHOICE)' | cmp -s - $@ || echo '$(CHOICE)' > $@

# Built anew when a source of the native module, a requirement or the choice changes; Python files are used in place.
$(VENV)/.installed: $(VENV)/bin/python $(VENV)/.choice $(SOURCES)
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

# The CUDA kernels for GPUs that are not here: compiled, warnings being errors, and what came out looked at.
cuda: install
	$(BIN)/cmake -S . -B build/cuda -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	    -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DMOE_KERNELS_CUDA=ON -DMOE_KERNELS_WERROR=ON
	$(BIN)/cmake --build build/cuda --target kernels_cuda --parallel $(or $(MAX_JOBS),$(shell nproc))
	$(BIN)/python -m bench.cuda_ledger

# The tests of a GPU under compute-sanitizer. Memory that torch keeps would hide what lies beyond a tensor; without it a
# graph cannot be captured.
sanitize-gpu: install
	@command -v compute-sanitizer > /dev/null || { echo "compute-sanitizer is not on PATH: it comes with CUDA"; exit 1; }
	@$(BIN)/python -c "from moe_kernels import available_backends as a; r = a()['cuda']; r and exit(f'backend cuda: {r}')"
	for tool in memcheck racecheck initcheck synccheck; do \
	    only=$$([ $$tool = initcheck ] || echo --kernel-name kns=moe); \
	    MOE_KERNELS_BACKEND=cuda PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool $$only \
	        --error-exitcode 1 $(BIN)/python -m pytest tests/gpu --ignore tests/gpu/test_cuda_graphs.py || exit 1; \
	done

# On a machine with a GPU: tests and figures.
gpu: install
	$(BIN)/python -m bench.gpu --json bench/results/gpu.json

bench: install
	$(BIN)/python -m pytest bench --benchmark-only

table: install
	$(BIN)/python -m bench.table

# Fails where something has become much slower, by ratios in one process.
gate: install
	$(BIN)/python -m bench.gate

clean:
	rm -rf $(VENV) build dist *.egg-info moe_kernels/_C*.so
