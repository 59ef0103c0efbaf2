# Verbs of the project; `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EVENTS ?= 100000
RUN_DIR ?= runs/demo

.DEFAULT_GOAL := help
.PHONY: help install dev demo test unit lint format bench clean

help:  ## list the verbs
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

install: $(VENV)/.installed  ## create .venv and install

dev: $(VENV)/.installed-dev  ## ... with the tools for tests and checks

demo: $(VENV)/.installed  ## install, generate the demo world, run every stage, show the result
	$(BIN)/recsys-ray demo-data --out data/demo-$(EVENTS) --events $(EVENTS)
	$(BIN)/recsys-ray run --config configs/demo.yaml --set run_dir=$(RUN_DIR) \
		--set data.items=data/demo-$(EVENTS)/items --set data.interactions=data/demo-$(EVENTS)/interactions \
		--set data.users=data/demo-$(EVENTS)/users --set data.oracle=data/demo-$(EVENTS)/oracle

test: $(VENV)/.installed-dev  ## all tests
	$(BIN)/pytest

unit: $(VENV)/.installed-dev  ## the tests that take seconds
	$(BIN)/pytest -m "not slow" tests/unit

lint: $(VENV)/.installed-dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev  ## benchmarks; ratios, not seconds
	$(BIN)/python -m tests.benchmarks

clean:  ## remove runs and generated data
	rm -rf runs data/demo-*
