# Every target sets up its own virtual environment on first use. PYTHON=... and VENV=... change which and where.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
# Without an NVIDIA GPU the CPU build of PyTorch will do, a tenth of the download; its index first, the default one else.
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip --disable-pip-version-check
CXX_FILES = $(shell find csrc examples -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
STAMP := $(VENV)/.installed

.PHONY: demo test cuda-check cuda-counters test-ptxsim bench bench-all counters lint format docs clean

demo: $(STAMP)
	$(BIN)/loradash finetune --out runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest

# The build with CUDA: an environment of its own, whose PyTorch (5 GB) matches the toolkit at CUDA_HOME. Needs no GPU; where
# there is one, the operator's tests run on it.
CUDA_TORCH ?= torch==2.14.1
CUDA_VENV ?= .venv-cuda
cuda-check:
	test -x $(CUDA_VENV)/bin/python || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --quiet "setuptools>=77" wheel ninja pytest hypothesis "$(CUDA_TORCH)"
	LORADASH_CUDA=1 LORADASH_REQUIRE_EXTENSION=1 $(CUDA_VENV)/bin/python -m pip install --quiet --no-build-isolation .
	cd tests && $(abspath $(CUDA_VENV))/bin/python -m pytest -q -c /dev/null --rootdir . -p no:cacheprovider cuda_leg.py
	cd tests && ! $(abspath $(CUDA_VENV))/bin/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())" \
		|| $(abspath $(CUDA_VENV))/bin/python -m pytest -q -c /dev/null --rootdir . -p no:cacheprovider -k cuda test_error_rule.py

# The emulator's own tests; run them when it changes. CUTLASS's headers serve as their yardstick.
test-ptxsim: $(STAMP)
	$(PIP) install --quiet --no-deps "nvidia-cutlass==4.2.0.0"
	cd tools/ptxsim && ../../$(BIN)/python -m pytest -q tests
	$(BIN)/python tools/ptxsim/source_hash.py

# What the GPU kernels request, counted by the emulator: needs no GPU.
counters: $(STAMP)
	$(BIN)/python -m benchmarks.counters.triton_counters --architecture sm_80 --out benchmarks/results
	$(BIN)/python -m benchmarks.counters.triton_counters --architecture sm_90 --out benchmarks/results

cuda-counters: $(STAMP)
	$(PIP) install --quiet --no-deps "nvidia-cutlass==4.2.0.0"
	$(BIN)/python -m benchmarks.counters.cuda_counters --out benchmarks/results

bench: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.layers.ratios --out benchmarks/results
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.prelaunch.speed --out benchmarks/results $(if $(FACTORS),--factors $(FACTORS))

bench-all: bench
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.layers.ratios --compiled
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-group-by=group --benchmark-json=benchmarks/results/pytest.json

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

docs: $(STAMP)
	$(BIN)/python -m pydoc -w loradash loradash_kernels && mkdir -p docs/api && mv loradash.html loradash_kernels.html docs/api/

clean:
	rm -rf build dist *.egg-info loradash_kernels/*.so runs

# Kernels compile once, against the PyTorch of this environment: no build isolation.
$(STAMP): pyproject.toml setup.py tools/ptxsim/pyproject.toml $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip "setuptools>=77" wheel ninja
	$(BIN)/python -c "import torch" 2>/dev/null || { command -v nvidia-smi >/dev/null && $(PIP) install "$(TORCH)"; } \
		|| $(PIP) install --retries 0 --timeout 5 --index-url $(CPU_INDEX) "$(TORCH)" || $(PIP) install "$(TORCH)"
	$(PIP) install --quiet --no-build-isolation -e ".[dev]" -e tools/ptxsim
	touch $@
