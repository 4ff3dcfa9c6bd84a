# Two commands: `make serve` and `make test`. Everything else is convenience.
PYTHON ?= python3
VENV   ?= .venv
HOST   ?= 127.0.0.1
PORT   ?= 8000
MODELS ?= smollm2-135m minilm
JOBS   ?= 2
BIN    := $(VENV)/bin

.PHONY: help serve test test-all lint docs bench setup setup-dev clean

help:  ## these lines
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.serve  ## install what serve needs into .venv (PYTHON=python3.12, VENV=...)
setup-dev: $(VENV)/.dev  ## the same and what tests need

$(VENV)/bin/python:
	$(PYTHON) scripts/check_python.py
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: pyproject.toml constraints.txt scripts/setup.py | $(VENV)/bin/python
	$(BIN)/python scripts/setup.py serve
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt scripts/setup.py | $(VENV)/.serve
	$(BIN)/python scripts/setup.py dev
	@touch $@

serve: setup  ## serve two small real models, fetched once (MODELS="a b" HOST= PORT=)
	$(BIN)/headrace serve $(MODELS) --host $(HOST) --port $(PORT)

# A thread for each of JOBS processes: kernels under Triton's interpreter have no use for more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# The same inputs each time: a change is judged by what it changes. `test-all` draws new ones.
test: setup-dev  ## all that a change must pass, in 2 processes (JOBS=)
	$(PYTEST) --hypothesis-seed=0

test-all: setup-dev  ## the slow tests, too
	$(PYTEST) -m "slow or not slow"

lint: setup-dev  ## format, types and the import rules of ARCHITECTURE.md
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup-dev  ## rewrite the tables in docs/ that are made from the code
	$(BIN)/python scripts/generated_docs.py

bench: setup-dev  ## the benchmarks that make sense on this machine, as JSON lines
	$(BIN)/python -m benchmarks.run

clean:  ## remove .venv and built packages
	rm -rf $(VENV) build dist
