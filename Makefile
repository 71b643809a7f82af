# Every habit is one word, from nothing: the environment is made on first use and renewed when sources change.
#   make demo        reconstruct a scene that the package makes itself
#   make test        all tests
#   make bench       all benchmarks (a while)
#   make lint        ruff, mypy, clang-format;  make format  applies what can be applied
#   make sanitize    the CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
#   make kernel-report  registers, spills and instructions of every CUDA kernel, for docs/kernels (needs nvcc)
#   make gpu-check   on a machine with a GPU: build, test, measure; uses that machine's Python, installs nothing
PYTHON ?= python3
VENV ?= .venv
# Test processes: one for each core, each with one thread.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

BIN := $(VENV)/bin
STAMP := $(VENV)/installed
CXX_FILES = $(shell git ls-files --cached --others --exclude-standard '*.h' '*.cpp' '*.cu' '*.cuh')

# What the compiled module is made from: a change rebuilds it. Python files need nothing, the install is editable.
SOURCES := pyproject.toml setup.py constraints.txt CMakeLists.txt $(shell find csrc cmake -type f)

.PHONY: demo test bench lint format sanitize kernel-report gpu-check clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/vggt-mv demo

test: $(STAMP)
	VGGT_MV_REQUIRE_EXT=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) $(ARGS)

bench: $(STAMP)
	VGGT_MV_REQUIRE_EXT=1 $(BIN)/python -m pytest -q -o addopts= --benchmark-only $(or $(ARGS),benchmarks)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

sanitize: $(STAMP)
	$(BIN)/python tests/sanitizers/run.py $(ARGS)

kernel-report: $(STAMP)
	$(BIN)/python -m pip install --quiet nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	$(BIN)/python benchmarks/kernel_report.py $(ARGS)

gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(ARGS)

clean:
	rm -rf build $(VENV)
