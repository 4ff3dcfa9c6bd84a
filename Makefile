# Two commands: `make serve` and `make test`. Everything else is convenience.
PYTHON ?= python3
VENV   ?= .venv
HOST   ?= 127.0.0.1
PORT   ?= 8000
MODELS ?= smollm2-135m minilm
BIN    := $(VENV)/bin

.PHONY: serve test test-all lint bench setup setup-dev clean

setup: $(VENV)/.serve
setup-dev: $(VENV)/.dev

$(VENV)/bin/python:
	$(PYTHON) scripts/check_python.py
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: pyproject.toml constraints.txt scripts/setup.py | $(VENV)/bin/python
	$(BIN)/python scripts/setup.py serve
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt scripts/setup.py | $(VENV)/.serve
	$(BIN)/python scripts/setup.py dev
	@touch $@

serve: setup
	$(BIN)/headrace serve $(MODELS) --host $(HOST) --port $(PORT)

test: setup-dev
	$(BIN)/python -m pytest

test-all: setup-dev
	$(BIN)/python -m pytest -m "slow or not slow"

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup-dev
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf $(VENV) build dist
