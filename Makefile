# Commands of the project. They need Python 3.11 to 3.13.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs


.PHONY: venv quickstart quick test test-browser test-e2e test-faults test-slow test-slurm test-real-data coverage lint docs bench clean

venv: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else f"Python 3.11 to 3.13 is needed; {sys.executable} is {v.major}.{v.minor}. Try: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

quickstart: venv  ## run a small experiment on this machine and print its leaderboard
	$(BIN)/harness run experiments/quickstart.yaml

quick: venv  ## one test of each kind, less than a minute
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "quick and not slow"

test: venv  ## the fast tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-browser: venv  ## the reports in Chromium; skipped if it is not installed
	$(BIN)/python -m pytest -m browser tests/browser

test-e2e: venv  ## whole runs with Ray, and tests of several whole trials: packs, killed trials
	$(BIN)/python -m pytest -m "e2e and not slow"

test-faults: venv  ## kills processes, fills disks, stops servers: nothing computed may be lost
	$(BIN)/python -m pytest -m "faults and not slow" tests/faults

test-slow: venv  ## minutes per test: retrains the built-in backbones and more
	$(BIN)/python -m pytest -m slow

test-slurm: venv  ## jobs on a private Slurm on this machine; as root, installs slurm-wlm and munge if missing
	$(BIN)/python -m pytest -m slurm tests/clusters

test-real-data: venv  ## needs COCO_ROOT, COCO_CAPTIONS, FSDD_ROOT, FLICKR_ROOT and REAL_MODELS
	$(BIN)/python -m pytest -m real_data -n 2

coverage: venv  ## lines and branches that the fast tests run, in all processes
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term --cov-report=html

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: venv  ## speed and memory beside other ways to run the same: docs/performance.md; about 40 minutes on 2 quiet cores
	$(BIN)/python -m benchmarks.speed all

docs: $(DOCS_STAMP)  ## the documentation site in build/docs; any warning fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build htmlcov .coverage .coverage.* *.egg-info .mypy_cache .ruff_cache .pytest_cache
