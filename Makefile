# Verbs of the project; `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EVENTS ?= 100000
RUN_DIR ?= runs/demo
SYSTEM_PACKAGES := chromium iproute2 fonts-dejavu-core

.DEFAULT_GOAL := help
.PHONY: help install dev system-packages demo test test-slow test-all unit coverage golden lint format bench clean

help:  ## list the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 17

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

system-packages:  ## install Chromium, a font and iproute2, which some tests need (Debian and Ubuntu, as root)
	@if dpkg -s $(SYSTEM_PACKAGES) >/dev/null 2>&1; then \
		echo "installed already: $(SYSTEM_PACKAGES)"; \
	elif ! command -v apt-get >/dev/null; then \
		echo "There is no apt-get here. Install with your system's tool what these Debian packages hold:" \
			"$(SYSTEM_PACKAGES)." >&2; exit 1; \
	elif [ "$$(id -u)" != 0 ]; then \
		echo "Installing $(SYSTEM_PACKAGES) needs root: run sudo make system-packages." >&2; exit 1; \
	else \
		export DEBIAN_FRONTEND=noninteractive && apt-get update -qq && \
		apt-get install -qq -y --no-install-recommends $(SYSTEM_PACKAGES) </dev/null >/dev/null; \
	fi

test: $(VENV)/.installed-dev  ## all tests but the slow ones
	$(BIN)/pytest -m "not slow"

test-slow: $(VENV)/.installed-dev  ## the slow ones: whole runs of other kinds, studies, tuning, two hosts
	$(BIN)/pytest -m slow

test-all: test test-slow  ## both

unit: $(VENV)/.installed-dev  ## functions and modules, without a whole stage
	$(BIN)/pytest tests/unit

coverage: $(VENV)/.installed-dev  ## which lines make test runs
	$(BIN)/pytest -m "not slow" --cov --cov-report=term:skip-covered

golden: $(VENV)/.installed-dev  ## keep the figures of a small run anew, after a change of the metrics that is meant
	$(BIN)/python -m tests.golden

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
