# Two commands for a newcomer: `make demo` and `make test`. Both make a virtual environment in .venv first;
# a second run installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
DEMO := demo-results
SEARCH := demo-search
# Tests run in this many processes, one thread each.
JOBS ?= 2

.PHONY: demo test test-all lint pytest bench clean help
help:
	@echo "make demo      install, compare six schedules on the bundled digits, search for a better one (under 3 minutes)"
	@echo "make test      install with the test extra, then run ruff, mypy, doctests and tests (about 5 minutes)"
	@echo "make test-all  the same with the tests that take long or repeat what another shows"
	@echo "make bench     the benchmarks (an idle machine, about 10 minutes)"
	@echo "make clean     remove the virtual environment and caches (never results)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "controlat needs Python 3.11 or newer; found $$($(PYTHON) --version). Try: make demo PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch first, by itself: its pin then holds for whatever the others ask for.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing controlat into $(VENV) ..."
	$(PIP) install torch==2.13.0 -c constraints.txt
	$(PIP) install torch==2.13.0 -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "installing the test extra ..."
	$(PIP) install torch==2.13.0 -c constraints.txt -e '.[test]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/controlat evaluate --out $(DEMO)
	$(BIN)/controlat search --out $(SEARCH)
	@echo "(the command is $(BIN)/controlat; 'source $(BIN)/activate' puts it on your path)"

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pytest: $(VENV)/.installed-test
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile \
		--no-loadscope-reorder -m "$(MARKS)"

# Both at once: lint by itself takes half a minute, and one core. Files of tests in the order of their folders: those
# of few and long tests do not come last. Tests start processes, which should not compile the package each time.
test: $(VENV)/.installed-test
	@$(MAKE) --no-print-directory -j 2 lint pytest MARKS="not slow"

test-all: $(VENV)/.installed-test
	@$(MAKE) --no-print-directory -j 2 lint pytest

bench: $(VENV)/.installed-test
	$(BIN)/python benchmarks/pgd.py
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/batchnorm.py
	$(BIN)/python benchmarks/threads.py
	$(BIN)/python benchmarks/importing.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis controlat.egg-info
