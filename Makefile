# make demo   corpus -> tokenizer -> dataset -> three runs on one budget -> export -> report, on any laptop
# make test   the whole test suite
# make lint   ruff and mypy
# Each makes the virtual environment .venv first if there is none.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export DS_BUILD_OPS := 0
export PYTHONPATH := $(CURDIR)
# The environment's own ninja and mpirun come before the machine's.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test test-all lint clean

demo: $(READY)
	$(BIN)/python -m tools.demo

# Tests run in two processes of one thread each: most of them start ranks of their own.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile

test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): requirements.txt tests/requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "LateMask needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^torch==' requirements.txt)"
	$(BIN)/pip install --quiet -r tests/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) runs
