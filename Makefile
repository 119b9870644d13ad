# Two commands on a fresh machine with Python 3.11: `make demo`, `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/installed
STACK := .venv/stack
PORT ?= 8000

.PHONY: help demo stack stack-down stack-status test test-long test-stack test-all lint clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(INSTALLED)

demo: $(INSTALLED)  ## photos to a better picture over HTTP, all on this machine (KEEP=1 leaves it up, PORT=8000)
	@$(BIN)/python infra/local/demo.py --port $(PORT) $(if $(KEEP),--keep)

$(STACK): $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,stack]'
	@touch $(STACK)

stack: $(STACK)  ## the shape of production on this machine: PostgreSQL, S3, MLflow, three Ray nodes, Serve, Prometheus
	@$(BIN)/python infra/local/stack up

stack-down: $(INSTALLED)  ## stop it; what it stored stays (`python infra/local/stack --help` tells more)
	@$(BIN)/python infra/local/stack down

stack-status: $(INSTALLED)  ## one line for each of its parts
	@$(BIN)/python infra/local/stack status

test: $(INSTALLED)  ## all tests but the long ones and those on the stack
	$(BIN)/python -m pytest -m "not long and not stack" -n 2 --dist loadfile --no-loadscope-reorder

test-long: $(INSTALLED)  ## the long ones only: the whole demo within its budgets, chaos
	$(BIN)/python -m pytest -m "long and not stack" --timeout 1800

test-stack: $(STACK)  ## photos to a served champion on a stack of its own, then parts of it killed (half an hour, tells how it goes)
	$(BIN)/python -m pytest -m stack --timeout 1800 -v -s

test-all: test test-long test-stack  ## all three

lint: $(INSTALLED)  ## formatting, lint, types and import rules only
	$(BIN)/python -m pytest tests/unit/test_repository.py

clean:  ## remove what was installed and built, not your runs
	rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
