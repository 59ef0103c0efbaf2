# The project's commands; `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EVENTS ?= 100000
RUN_DIR ?= runs/demo
SYSTEM_PACKAGES := chromium iproute2 fonts-dejavu-core redis-server prometheus

.DEFAULT_GOAL := help
.PHONY: help install dev system-packages demo test test-slow test-all unit coverage golden lint format bench bench-serving clean

help:  ## list the commands
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

dev: $(VENV)/.installed-dev  ## create .venv with the test and lint tools as well

demo: $(VENV)/.installed  ## install, generate demo data, run every stage, show the results
	$(BIN)/recsys-ray demo-data --out data/demo-$(EVENTS) --events $(EVENTS)
	$(BIN)/recsys-ray run --config configs/demo.yaml --set run_dir=$(RUN_DIR) \
		--set data.items=data/demo-$(EVENTS)/items --set data.interactions=data/demo-$(EVENTS)/interactions \
		--set data.users=data/demo-$(EVENTS)/users --set data.oracle=data/demo-$(EVENTS)/oracle

system-packages:  ## install the system packages that some tests need (Debian and Ubuntu, as root)
	@if dpkg -s $(SYSTEM_PACKAGES) >/dev/null 2>&1; then \
		echo "installed already: $(SYSTEM_PACKAGES)"; \
	elif ! command -v apt-get >/dev/null; then \
		echo "apt-get is missing. Use your package manager to install the equivalents of these Debian packages:" \
			"$(SYSTEM_PACKAGES)." >&2; exit 1; \
	elif [ "$$(id -u)" != 0 ]; then \
		echo "Installing $(SYSTEM_PACKAGES) needs root: run sudo make system-packages." >&2; exit 1; \
	else \
		export DEBIAN_FRONTEND=noninteractive && apt-get update -qq && \
		apt-get install -qq -y --no-install-recommends $(SYSTEM_PACKAGES) </dev/null >/dev/null; \
	fi

test: $(VENV)/.installed-dev  ## run all tests except the slow ones
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n 2 --dist loadfile tests/unit
	$(BIN)/pytest -m "not slow" --ignore=tests/unit

test-slow: $(VENV)/.installed-dev  ## run the slow tests: other full runs, studies, tuning, two hosts
	$(BIN)/pytest -m slow

test-all: test test-slow  ## run both

unit: $(VENV)/.installed-dev  ## run the unit tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n 2 --dist loadfile tests/unit

coverage: $(VENV)/.installed-dev  ## run the tests and report the lines covered
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n 2 --dist loadfile tests/unit --cov --cov-report=
	$(BIN)/pytest -m "not slow" --ignore=tests/unit --cov --cov-append --cov-report=term:skip-covered

golden: $(VENV)/.installed-dev  ## record new golden figures, after a change that was meant to move metrics
	$(BIN)/python -m tests.golden

lint: $(VENV)/.installed-dev  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev  ## run the benchmarks, which compare ratios, not seconds
	$(BIN)/python -m tests.benchmarks

bench-serving: $(VENV)/.installed-dev  ## load-test the endpoint over a million items (needs wrk; takes minutes to set up)
	$(BIN)/python -m tests.benchmarks.serving $(if $(SOAK),--soak $(SOAK))

clean:  ## remove runs and generated data
	rm -rf runs data/demo-*
