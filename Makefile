# `make demo` and `make test` set everything up on a machine that has python3 (3.11 to 3.13).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-engines test-all lint docs format clean

# Tiny models: one thread a process is faster than threads that wait for each other.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 14); sys.exit(not ok and \
	  "ogpsa_trl needs Python 3.11 to 3.13, but $(PYTHON) is " + sys.version.split()[0] + \
	  ". Run: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	@touch $@

# Pretraining the base model is large enough for two threads.
demo: export OMP_NUM_THREADS := 2
demo: $(STAMP)
	$(BIN)/python scripts/demo.py

# What launches processes of its own, for minutes, runs alone; the rest on all cores, file by file.
ALONE := tests/test_engines.py
SIDE_BY_SIDE := -n auto --dist loadfile --ignore $(ALONE)

test: $(STAMP)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)
	$(BIN)/python -m pytest $(ALONE)

# What `make test` leaves out of the engines: all of it, or `ENGINES="zero1 or zero2"`.
test-engines: $(STAMP)
	$(BIN)/python -m pytest $(ALONE) -m slow -k "$(ENGINES)"

test-all: $(STAMP)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not gpu"
	$(BIN)/python -m pytest $(ALONE) -m "not gpu"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(STAMP)
	$(BIN)/python docs/make_api.py
	$(BIN)/python docs/make_recipes.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis
