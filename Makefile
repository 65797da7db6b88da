# make demo   set up, then run the main job          make test   set up everything, then run the tests
# make lint | types | docs | bench | clean           choose a Python with  make PYTHON=python3.12 ...
#                                                    tests on four cores:  make test JOBS=4
#
# Setting up is done once and marked by stamp files in the environment; it is repeated only when pyproject.toml or
# constraints.txt change, so a second call needs no network.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt

.PHONY: demo test lint types docs bench clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.ready-demo
	$(BIN)/trimtab demo $(ARGS)

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest --numprocesses $(JOBS) $(ARGS)

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready-dev
	$(BIN)/mypy

docs: $(VENV)/.ready-dev
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.ready-dev
	for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) site build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find trimtab tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "trimtab needs Python 3.10 or newer, and '$(PYTHON)' is not: name one with  make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -m venv --clear $(VENV) || { \
	  echo "'$(PYTHON) -m venv' failed (see above): Debian and Ubuntu ship it as the package python3-venv." >&2; exit 2; }
	@touch $@

# The build back end comes first and from the same constraints, so that nothing is resolved in an isolated environment.
$(VENV)/.builder: $(VENV)/.made constraints.txt
	$(PIP) hatchling editables
	@touch $@

$(VENV)/.ready-demo: $(VENV)/.builder pyproject.toml
	$(PIP) --no-build-isolation --editable '.[workloads]'
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.builder pyproject.toml
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@
