# `make demo` and `make test` set themselves up: a virtual environment of their own, the package built into it, then run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CXX_SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(CXX_SOURCES)

# What the module is built with (setup.py): tests and demo need no CUDA, and the tests need the simulator.
export MOE_KERNELS_CUDA ?= 0
export MOE_KERNELS_SIMULATOR ?= 1
# Tests run in so many processes, those of a file in one. Idle threads of one must not keep the others' from the cores.
TEST_WORKERS ?= $(shell cores=$$(env -u OMP_NUM_THREADS nproc); echo $$((cores < 4 ? cores : 4)))
TESTS := -n $(TEST_WORKERS) --dist loadfile
test nightly test-matrix: export OMP_WAIT_POLICY ?= passive
CHOICE := $(MOE_KERNELS_CUDA) $(MOE_KERNELS_CUDA_ARCHS) $(MOE_KERNELS_SIMULATOR)

.PHONY: demo test test-matrix lint nightly aot cuda bench gpu sanitize sanitize-threads sanitize-gpu table gate examples install clean FORCE

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
	$(BIN)/python -m pytest $(TESTS) -m "not nightly"

# More examples for each property too.
nightly: install
	MOE_KERNELS_HYPOTHESIS=nightly $(BIN)/python -m pytest $(TESTS) -m "nightly or not nightly"

# The tests with the oldest and the newest versions that are supported, for each Python that is here, in environments of
# their own. torch may come with its CUDA libraries, gigabytes of them, and then with a Triton of its own choice.
MATRIX_PYTHONS ?= python3.11 python3.12
MATRIX_ENDS ?= "torch==2.11.0 triton==3.6.0 numpy==1.26.4" "torch==2.13.0 triton<=3.9.0 numpy>=2"
MATRIX_TESTS ?= tests/moe_kernels tests/advmoe
test-matrix:
	@number=0; for python in $(MATRIX_PYTHONS); do \
	    command -v $$python > /dev/null || { echo "$$python is not here: left out"; continue; }; \
	    for end in $(MATRIX_ENDS); do \
	        number=$$((number + 1)); venv=build/matrix/$$number; echo "== $$python, $$end"; \
	        $$python -m venv --clear $$venv && $$venv/bin/pip install --quiet $$end && \
	        $$venv/bin/pip install --quiet $$end --editable '.[dev]' && \
	        $$venv/bin/pip list | grep -iwE 'torch|triton|numpy' && \
	        $$venv/bin/python -m pytest $(TESTS) -m "not nightly" $(MATRIX_TESTS) || exit 1; \
	    done; \
	done; [ $$number -gt 0 ]

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

# The native code with AddressSanitizer and UndefinedBehaviorSanitizer: random calls for each instruction set that there is,
# and those tests that are about what the kernels compute (not Triton, torch.compile and mistakes planted in the simulator),
# with a module in a folder of its own. libstdc++ is loaded first for its exceptions. Those of the simulated GPU take hours:
# SANITIZE_SELECT=cuda_sim.
SANITIZED := build/sanitize
FUZZ_CASES ?= 2000
SANITIZE_SELECT ?= not cuda_sim
SANITIZE_TESTS ?= $(addprefix tests/moe_kernels/test_,$(addsuffix .py,features winograd fuse batch_norm slices narrow \
    determinism packed_cache pooled_routing regressions errors nn routed_conv2d cuda_sim simulator))
PRELOAD = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so)
sanitize: install
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	    -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DMOE_KERNELS_CUDA=OFF -DMOE_KERNELS_SIMULATOR=ON \
	    -DMOE_KERNELS_SANITIZE=address,undefined
	$(BIN)/cmake --build $(SANITIZED) --target _C fuzz --parallel $(or $(MAX_JOBS),$(shell nproc))
	for isa in generic $$(grep -ow -e avx2 -e avx512f /proc/cpuinfo | sort -u | tr -d f); do \
	    MOE_KERNELS_CPU_ISA=$$isa $(SANITIZED)/fuzz 1 $(FUZZ_CASES) || exit 1; \
	done
	rm -rf $(SANITIZED)/site && mkdir $(SANITIZED)/site && cp -r moe_kernels $(SANITIZED)/site/
	rm $(SANITIZED)/site/moe_kernels/_C*.so && cp $(SANITIZED)/_C*.so $(SANITIZED)/site/moe_kernels/
	LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 PYTHONPATH=$(abspath $(SANITIZED)/site) \
	    $(BIN)/python -m pytest -o pythonpath=$(SANITIZED)/site -m "not nightly" -k "$(SANITIZE_SELECT)" $(SANITIZE_TESTS)

# The same calls, from several threads at once, with ThreadSanitizer: clang, whose OpenMP tells it by the tool archer what
# waits for what.
sanitize-threads: install
	@command -v clang++ > /dev/null || { echo "clang++ is not on PATH: it comes with LLVM, as libomp and archer do"; exit 1; }
	CXX=clang++ $(BIN)/cmake -S . -B $(SANITIZED)-threads -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	    -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DMOE_KERNELS_CUDA=OFF -DMOE_KERNELS_SANITIZE=thread
	$(BIN)/cmake --build $(SANITIZED)-threads --target fuzz --parallel $(or $(MAX_JOBS),$(shell nproc))
	OMP_TOOL_LIBRARIES=$${ARCHER:-$$(dirname $$(readlink -f $$(command -v clang++)))/../lib/libarcher.so} \
	    ARCHER_OPTIONS=verbose=1 TSAN_OPTIONS=ignore_noninstrumented_modules=1 \
	    $(SANITIZED)-threads/fuzz 1 $(FUZZ_CASES) 4 > $(SANITIZED)-threads/log 2>&1; status=$$?; \
	    cat $(SANITIZED)-threads/log; grep -q "Archer detected" $(SANITIZED)-threads/log || { echo "no archer: set ARCHER"; exit 1; }; \
	    exit $$status

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
