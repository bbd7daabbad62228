# make run    the whole loop on a small real model (CPU is enough): 19 minutes on 2 cores with AVX512-BF16,
#             and once 12 to 18 for the outside judge
# make test   the tests, but for those of make test-long: kills by the dozen, 100,000 fuzzed rows, a sweep, a loop on servers;
#             make test-browser those that open pages in headless Chromium, where it is installed
# make lab    JupyterLab on the tour; its file browser has the repository, its terminals have srlm
# make bench  how fast this machine is, against transformers and trl: benchmarks/latest.json (about 15 minutes;
#             QUICKSTART=1 runs the quickstart for it, otherwise the last run's manifests are read)
#
# PYTHON       the interpreter that makes .venv (3.11 to 3.13)
# TORCH        what pip installs for torch; set by default to a CPU build where there is no NVIDIA GPU
# TORCH_INDEX  a wheel index to take it from, e.g. https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PARAMS ?= params/quickstart.yaml
ARGS ?=

# two workers with a core each: tests wait for kernels more than they compute
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: run test test-quick test-long test-browser lab bench lint example

run: $(READY)
	$(BIN)/srlm run $(PARAMS) $(ARGS)

test: $(READY)
	$(BIN)/ruff check .
	$(PYTEST) -m "not long" --durations=10

test-quick: $(READY)
	$(PYTEST) -m "not slow"

test-long: $(READY)
	$(BIN)/python -m pytest -m long

test-browser: $(READY)
	$(BIN)/python -m pytest -m browser -rs

lab: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) \
		--LabApp.default_url=/lab/tree/notebooks/00_tour.ipynb

bench: $(READY)
	QUICKSTART=$(QUICKSTART) $(BIN)/python -m benchmarks $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .

# results/example is one rendered quickstart run without its weights
example: $(READY)
	$(BIN)/srlm run params/quickstart.yaml
	$(BIN)/python -m srlm_utils.example results/quickstart

$(READY): pyproject.toml constraints.txt scripts/setup.sh
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" TORCH_INDEX="$(TORCH_INDEX)" sh scripts/setup.sh $(VENV)
	touch $(READY)
