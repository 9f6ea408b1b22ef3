# `make demo` and `make test` do all the set-up themselves; once it is done, checking it takes a moment.
# Another host, beside the first: make test VENV=.venv-oldest COMFYUI_PATH=~/ComfyUI-0.3.64

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Test files in two processes at a time, each with one computing thread: two with two each would slow one another down.
JOBS ?= 2
BIN = $(VENV)/bin
PYTEST = OMP_NUM_THREADS=1 "$(BIN)/pytest" -n $(JOBS) --dist loadfile

ifdef COMFYUI_PATH
export COMFYUI_PATH
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-host lint benchmark clean

help:
	@echo "make demo       teach a tiny model a character that it never saw; pictures go to demo/"
	@echo "make test       lint, unit, parity, host and browser tests: a quarter of an hour on two cores"
	@echo "make test-all   the same with the slow ones: several processes, benchmark self-test, more of the small world"
	@echo "make test-host  only the tests that run in ComfyUI"
	@echo "make lint       ruff"
	@echo "make benchmark  measure, and write tests/benchmarks/RESULTS.md"
	@echo "make clean      remove the environment and everything generated"
	@echo "variables       VENV=$(VENV) PYTHON=$(PYTHON) COMFYUI_PATH=$(COMFYUI_PATH) ARGS='more arguments'"

setup:
	@$(PYTHON) tests/setup_environment.py --venv "$(VENV)"

demo:
	@$(PYTHON) tests/setup_environment.py --venv "$(VENV)" --clone-comfyui
	@"$(BIN)/python" tests/demo/run.py $(ARGS)

lint: setup
	@"$(BIN)/ruff" check .

test: lint
	@$(PYTEST) $(ARGS)

test-all: lint
	@$(PYTEST) -m "not world_full" $(ARGS)

test-host: setup
	@$(PYTEST) -m "host or browser" $(ARGS)

benchmark: setup
	@"$(BIN)/python" tests/benchmarks/run.py $(ARGS)

clean:
	rm -rf "$(VENV)" build demo *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path "./.venv*" -prune -exec rm -rf {} +
