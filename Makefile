# Every target sets up the virtual environment that it needs on first use. PYTHON=... says which Python makes it, VENV=... where.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
# Without an NVIDIA GPU the CPU build of PyTorch will do, a tenth of the download; its index is tried first, then the default one.
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip --disable-pip-version-check
CXX_FILES = $(shell find csrc examples tools -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.c')
# CUTLASS's headers are the emulator's yardstick. Their wheel wants packages of CUDA that nobody needs here.
CUTLASS := $(PIP) install --quiet --no-deps "nvidia-cutlass==4.2.0.0"
RESULTS := benchmarks/results
STAMP := $(VENV)/.installed

.PHONY: demo test cuda-check cuda-counters test-ptxsim bench bench-all gpu-proof counters lint format docs clean

demo: $(STAMP)
	$(BIN)/loradash finetune --out runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest

# The build with CUDA has an environment of its own, whose PyTorch (5 GB) matches the toolkit at CUDA_HOME. It needs no GPU; where
# there is one, the operator's tests run on it. The tests run against the installed package: pytest is told neither of
# pyproject.toml nor of this folder, and PYTHONPATH names only the helpers of tests.
CUDA_TORCH ?= torch==2.14.1
CUDA_VENV ?= .venv-cuda
CUDA_PYTHON := $(abspath $(CUDA_VENV))/bin/python
CUDA_PYTEST := PYTHONPATH=. $(CUDA_PYTHON) -m pytest -q -c /dev/null --rootdir .. --import-mode=importlib -p no:cacheprovider
cuda-check:
	test -x $(CUDA_PYTHON) || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_PYTHON) -m pip install --quiet "setuptools>=77" wheel ninja pytest hypothesis "$(CUDA_TORCH)"
	LORADASH_CUDA=1 LORADASH_REQUIRE_EXTENSION=1 $(CUDA_PYTHON) -m pip install --quiet --no-build-isolation .
	cd tests && $(CUDA_PYTEST) backends/cuda/cuda_leg.py
	cd tests && ! $(CUDA_PYTHON) -c "import sys, torch; sys.exit(not torch.cuda.is_available())" \
		|| $(CUDA_PYTEST) -k cuda operator/test_error_rule.py

# The emulator has tests of its own, which run when it changes; what they passed with is recorded in tools/ptxsim/TESTED.
test-ptxsim: $(STAMP)
	$(CUTLASS)
	cd tools/ptxsim && $(abspath $(BIN))/python -m pytest -q
	$(BIN)/python tools/ptxsim/source_hash.py

# The emulator counts what the GPU kernels request; no GPU is needed.
counters: $(STAMP)
	$(BIN)/python -m benchmarks.counters.triton_counters --architecture sm_80 --out $(RESULTS)
	$(BIN)/python -m benchmarks.counters.triton_counters --architecture sm_90 --out $(RESULTS)

cuda-counters: $(STAMP)
	$(CUTLASS)
	$(BIN)/python -m benchmarks.counters.cuda_counters --out $(RESULTS)

# Benchmarks run on the card where PyTorch sees one, else on the CPU. BENCH_SECONDS=... ends those of a card, which a later `make bench`
# goes on with.
ON_CARD := $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"
ON_CPU := OMP_NUM_THREADS=1 $(BIN)/python -m
bench: $(STAMP)
	if $(ON_CARD); then $(BIN)/python -m benchmarks.layers.device $(if $(BENCH_SECONDS),--seconds $(BENCH_SECONDS)); else \
		$(ON_CPU) benchmarks.layers.ratios --out $(RESULTS) \
		&& $(ON_CPU) benchmarks.prelaunch.speed --out $(RESULTS) $(if $(FACTORS),--factors $(FACTORS)); fi

# On the card at hand, with the interpreter at hand and what it has: nothing is installed. REHEARSE=1 takes the CPU, and the
# environment of `make test`. LIMIT=SECONDS bounds the call, OUT=FOLDER receives the results (docs/gpu-proof.md).
PROOF = -m benchmarks.proof $(if $(LIMIT),--limit $(LIMIT)) $(if $(OUT),--out $(OUT)) $(if $(STAGES),--stages $(STAGES))
ifdef REHEARSE
gpu-proof: $(STAMP)
	$(BIN)/python $(PROOF) --rehearse
else
gpu-proof:
	$(PYTHON) $(PROOF)
endif

bench-all: bench
	$(ON_CARD) || $(ON_CPU) benchmarks.layers.ratios --compiled
	$(ON_CPU) pytest benchmarks --benchmark-enable --benchmark-group-by=group --benchmark-json=$(RESULTS)/pytest.json

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

# The stamp goes with the compiled part, so that the next `make test` builds it again.
clean:
	rm -rf build dist *.egg-info tools/ptxsim/*.egg-info loradash_kernels/*.so runs $(STAMP)

# Kernels compile once, against the PyTorch of this environment, which is why the build is not isolated.
$(STAMP): pyproject.toml setup.py tools/ptxsim/pyproject.toml $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip "setuptools>=77" wheel ninja
	$(BIN)/python -c "import torch" 2>/dev/null || { command -v nvidia-smi >/dev/null && $(PIP) install "$(TORCH)"; } \
		|| $(PIP) install --retries 0 --timeout 5 --index-url $(CPU_INDEX) "$(TORCH)" || $(PIP) install "$(TORCH)"
	$(PIP) install --quiet --no-build-isolation -e ".[dev]" -e tools/ptxsim
	touch $@
