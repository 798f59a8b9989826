# Every target sets up the virtual environment that it needs on first use. PYTHON=... says which Python makes it, VENV=... where.
# With OFFLINE=1 that Python itself runs everything, with what is installed for it: no environment, no network; the kernels are
# compiled in place. TORCH="torch==2.11.0 --index-url ..." says which PyTorch is installed, where not tools/wheel_index.py does.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The tiles of Triton's kernels were assembled with this one. PyTorch for GPUs brings its own; its CPU build brings none.
TRITON ?= triton==3.8.0
override OFFLINE := $(filter-out 0,$(OFFLINE))
ifneq ($(OFFLINE),)
PY := PYTHONPATH=$(CURDIR):$(CURDIR)/python:$(CURDIR)/tools/ptxsim$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON)
READY := in-place
CUTLASS := :
else
PY := $(BIN)/python
READY := $(VENV)/.installed
# CUTLASS's headers are the emulator's yardstick. Their wheel wants packages of CUDA that nobody needs here.
CUTLASS = $(PIP) install --quiet --no-deps "nvidia-cutlass==4.2.0.0"
endif
PIP := $(BIN)/python -m pip --disable-pip-version-check
CXX_FILES = $(shell find csrc examples tools -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.c')
CLANG_FORMAT := $(PY) -c "from clang_format import clang_format; clang_format()"
RESULTS := benchmarks/results

.PHONY: demo test cuda-check cuda-counters test-ptxsim test-zero bench bench-all bench-front-ends bench-experts bench-grouped bench-compile bench-scale \
	gpu-proof counters peft-tests peft-versions lint format docs clean in-place

demo: $(READY)
	$(PY) -m loradash.cli finetune --out runs/demo

# Where pytest-xdist is installed, files of tests are shared out over processes of one thread each, the slowest folder first.
# WORKERS=... says how many; 0 runs all in one.
WORKERS ?= 2
test: $(READY)
	shared=$$($(PY) -c "import xdist; print('-n $(WORKERS) --dist loadfile --no-loadscope-reorder')" 2>/dev/null); \
		OMP_NUM_THREADS=1 $(PY) -m pytest $$shared

# The build with CUDA has an environment of its own, whose PyTorch (5 GB) matches the toolkit at CUDA_HOME, or with OFFLINE=1 the
# interpreter in hand. It needs no GPU; where there is one, the operator's tests run on it. The tests run against the installed
# package: pytest is told neither of pyproject.toml nor of this folder, and PYTHONPATH names only the helpers of tests.
CUDA_TORCH ?= torch==2.14.1
CUDA_VENV ?= .venv-cuda
CUDA_PYTHON := $(abspath $(CUDA_VENV))/bin/python
CUDA_PYTEST = -m pytest -q -c /dev/null --rootdir .. --import-mode=importlib -p no:cacheprovider
CUDA_BUILD := LORADASH_CUDA=1 LORADASH_REQUIRE_EXTENSION=1
ifneq ($(OFFLINE),)
CUDA_TESTS := PYTHONPATH=.:$(CURDIR):$(CURDIR)/python:$(CURDIR)/tools/ptxsim$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) $(CUDA_PYTEST)
cuda-check:
	$(CUDA_BUILD) $(PYTHON) tools/offline.py cuda-check
else
CUDA_TESTS := PYTHONPATH=. $(CUDA_PYTHON) $(CUDA_PYTEST)
cuda-check:
	test -x $(CUDA_PYTHON) || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_PYTHON) -m pip install --quiet "setuptools>=77" wheel ninja pytest hypothesis "$(CUDA_TORCH)"
	$(CUDA_BUILD) $(CUDA_PYTHON) -m pip install --quiet --no-build-isolation .
endif
	cd tests && $(CUDA_TESTS) backends/cuda/cuda_leg.py
	! command -v nvidia-smi >/dev/null || (cd tests && $(CUDA_TESTS) --device cuda -k cuda operator/test_error_rule.py)

# The emulator has tests of its own, which run when it changes; what they passed with is recorded in tools/ptxsim/TESTED.
test-ptxsim: $(READY)
	$(CUTLASS)
	cd tools/ptxsim && $(if $(OFFLINE),$(PY),$(abspath $(BIN))/python) -m pytest -q
	$(PY) tools/ptxsim/source_hash.py

# The emulator counts what the GPU kernels request; no GPU is needed.
counters: $(READY)
	$(PY) -m benchmarks.counters.triton_counters --architecture sm_80 --out $(RESULTS)
	$(PY) -m benchmarks.counters.triton_counters --architecture sm_90 --out $(RESULTS)

cuda-counters: $(READY)
	$(CUTLASS)
	$(PY) -m benchmarks.counters.cuda_counters --out $(RESULTS)

# Benchmarks run on the card where PyTorch sees one, else on the CPU. BENCH_SECONDS=... ends those of a card, which a later `make bench`
# goes on with.
ON_CARD := $(PY) -c "import sys, torch; sys.exit(not torch.cuda.is_available())"
ON_CPU := OMP_NUM_THREADS=1 $(PY) -m
bench: $(READY)
	if $(ON_CARD); then $(PY) -m benchmarks.layers.device $(if $(BENCH_SECONDS),--seconds $(BENCH_SECONDS)); else \
		$(ON_CPU) benchmarks.layers.ratios --out $(RESULTS) \
		&& $(ON_CPU) benchmarks.prelaunch.speed --out $(RESULTS) $(if $(FACTORS),--factors $(FACTORS)); fi

# On the card at hand, with the interpreter at hand and what it has: nothing is installed. REHEARSE=1 takes the CPU, and the
# environment of `make test`. LIMIT=SECONDS bounds the call, OUT=FOLDER receives the results (docs/gpu-proof.md).
PROOF = -m benchmarks.proof $(if $(LIMIT),--limit $(LIMIT)) $(if $(OUT),--out $(OUT)) $(if $(STAGES),--stages $(STAGES))
ifdef REHEARSE
gpu-proof: $(READY)
	$(PY) $(PROOF) --rehearse
else
gpu-proof:
	$(PYTHON) $(PROOF)
endif

bench-all: bench
	$(ON_CARD) || $(ON_CPU) benchmarks.layers.ratios --compiled
	$(ON_CPU) pytest benchmarks --benchmark-enable --benchmark-group-by=group --benchmark-json=$(RESULTS)/pytest.json

# A training step under transformers' Trainer through every front end, on the CPU.
bench-front-ends: $(READY)
	$(ON_CPU) benchmarks.front_ends --out $(RESULTS)

# Adapters on experts beside PEFT's, on the CPU.
bench-experts: $(READY)
	$(ON_CPU) benchmarks.layers.experts --out $(RESULTS)

# DeepSpeed has no wheel; without its own kernels it is installed in seconds. It lies beside the environment, for these targets alone:
# where it can be imported, accelerate and transformers do so.
ZERO := $(abspath $(VENV))/deepspeed
WITH_ZERO := PYTHONPATH=$(ZERO)$${PYTHONPATH:+:$$PYTHONPATH} OMP_NUM_THREADS=1 $(PY) -m
$(ZERO): $(READY)
	DS_BUILD_OPS=0 $(PIP) install --quiet --no-build-isolation --no-deps --target $@ "deepspeed==0.19.8" einops hjson msgpack py-cpuinfo ninja
bench-scale: $(ZERO)
	$(WITH_ZERO) benchmarks.scale --out $(RESULTS)
test-zero: $(ZERO)
	$(WITH_ZERO) pytest tests/distributed/test_zero.py

# Whole models under torch.compile: what is compiled, kept and exported; nothing is timed.
bench-compile: $(READY)
	$(ON_CPU) benchmarks.compiled --out $(RESULTS)

# Three projections that share x: as a group, as layers, with PEFT, frozen.
bench-grouped: $(READY)
	$(ON_CPU) benchmarks.layers.grouped --out $(RESULTS)

# PEFT's own tests with this library beneath them and without; its sdist comes from PyPI, or lies in SDIST=FOLDER. ONLY="--file
# test_mixed --switch accelerated" runs a part, and then writes no results.
peft-tests: $(READY)
	$(ON_CPU) tools.peft_tests $(if $(SDIST),--sdist $(SDIST)) $(if $(JOBS),--jobs $(JOBS)) $(or $(ONLY),--out $(RESULTS))

# The front ends' tests at both ends of what pyproject.toml allows: the oldest frameworks have an environment of their own.
OLDEST_VENV ?= .venv-oldest
OLDEST := $(abspath $(OLDEST_VENV))/bin/python
FRONT_ENDS = -m pytest tests/integrations tests/model/test_quantised.py tests/model/test_presets.py
peft-versions: $(READY)
	test -x $(OLDEST) || $(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST) -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja
	$(if $(TORCH),$(OLDEST) -m pip install $(TORCH),$(OLDEST) tools/wheel_index.py install)
	$(OLDEST) -m pip install --quiet pytest pytest-benchmark hypothesis scipy $$($(OLDEST) tools/oldest.py)
	$(OLDEST) -m pip install --quiet --no-build-isolation -e .
	$(OLDEST) $(FRONT_ENDS)
	$(PY) $(FRONT_ENDS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run --Werror $(CXX_FILES)
	$(PY) -m mypy

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(CXX_FILES)

docs: $(READY)
	$(PY) -m pydoc -w loradash loradash_kernels && mkdir -p docs/api && mv loradash.html loradash_kernels.html docs/api/

# The stamp goes with the compiled part, so that the next `make test` builds it again.
clean:
	rm -rf build dist *.egg-info tools/ptxsim/*.egg-info loradash_kernels/*.so runs $(VENV)/.installed

in-place:
	$(PYTHON) tools/offline.py $(or $(filter-out in-place,$(MAKECMDGOALS)),demo)

# Kernels compile once, against the PyTorch of this environment, which is why the build is not isolated.
$(VENV)/.installed: pyproject.toml setup.py tools/ptxsim/pyproject.toml $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip "setuptools>=77" wheel ninja
	$(if $(TORCH),$(PIP) install $(TORCH),$(BIN)/python tools/wheel_index.py install)
	$(BIN)/python -c "import triton" 2>/dev/null || test "$$(uname -s)" != Linux || $(PIP) install --quiet "$(TRITON)"
	$(PIP) install --quiet --no-build-isolation -e ".[dev]" -e tools/ptxsim
	touch $@
