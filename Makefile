# Two commands do everything, set-up included:
#   make demo   generated images -> MAE teacher -> distilled ResNet-18, table, pictures, report.html
#   make test   the whole test suite
# PYTHON=python3.12 make ... picks another interpreter; VENV=/path another place for the environment.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
OUT ?= demo_out
DEMO_FLAGS ?=
# the tests take one process a core and one thread a process: small tensors gain nothing from more
TEST_FLAGS ?= -n auto
INSTALL = $(BIN)/pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: demo test test-fast lint format clean help

help:
	@sed -n 's/^#   //p' Makefile
	@echo 'make lint   ruff and mypy;  make format   ruff format'

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# one stamp an extra: a changed requirement installs again, an unchanged one costs nothing
$(VENV)/.installed: $(BIN)/pip setup.py constraints.txt
	@echo '== installing hgkd into $(VENV) (some minutes the first time: torch is large)'
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	@echo '== installing the extra [$*]'
	$(INSTALL) -e '.[$*]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/python tools/demo.py --out $(OUT) $(DEMO_FLAGS)

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TEST_FLAGS)

test-fast: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TEST_FLAGS) -m 'not slow'

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OUT) .pytest_cache .mypy_cache .ruff_cache
