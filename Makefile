# `make demo` and `make test` set everything up on a machine that has python3 (3.11 to 3.13).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-all test-versions test-axolotl lint docs format clean

# Tiny models: one thread a process is faster than threads that wait for each other.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

# What a command needs, and no more: the demo no engine, optimizer or linter.
DEMO := $(VENV)/.demo
TEST := $(VENV)/.test
LINT := $(VENV)/.lint
# Python compiles what is imported; pip would compile all, in a minute.
INSTALL = $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable

$(DEMO): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 14); sys.exit(not ok and \
	  "ogpsa_trl needs Python 3.11 to 3.13, but $(PYTHON) is " + sys.version.split()[0] + \
	  ". Run: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[scripts]'
	@touch $@

$(TEST): $(DEMO)
	$(INSTALL) '.[test]'
	@touch $@

$(LINT): $(TEST)
	$(INSTALL) '.[lint]'
	@touch $@

# Pretraining the base model is large enough for two threads.
demo: export OMP_NUM_THREADS := 2
demo: $(DEMO)
	$(BIN)/python -m ogpsa_trl.cli.main demo

# On all cores, file by file: those of a file share what is expensive.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile

test: $(TEST)
	$(PYTEST)

# What `make test` leaves out: the other engines, launches, kills, whole scripts.
test-slow: $(TEST)
	$(PYTEST) -m slow

test-all: $(TEST)
	$(PYTEST) -m "not gpu"

# The oldest releases that the package is installed with; the newest are those of constraints.txt.
test-versions:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --no-compile \
	  --constraint tests/environments/oldest.txt --editable '.[test]'
	.venv-oldest/bin/python -m pytest -n auto --dist loadfile -m "not slow and not gpu and not pinned"

# The plugin, beside axolotl and what it needs of its pins.
test-axolotl:
	$(PYTHON) -m venv .venv-axolotl
	.venv-axolotl/bin/python -m pip install --quiet --no-compile \
	  --requirement tests/environments/axolotl.txt
	.venv-axolotl/bin/python -m pip install --quiet --no-deps --editable . axolotl==0.19.0
	.venv-axolotl/bin/python -m pytest -m slow tests/test_axolotl.py

lint: $(LINT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

docs: $(TEST)
	$(BIN)/python docs/make_api.py
	$(BIN)/python docs/make_recipes.py

format: $(LINT)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-* runs .pytest_cache .ruff_cache .hypothesis
