# Two commands do everything, set-up included:
#   make demo   generated images -> MAE teacher -> distilled ResNet-18, table, pictures, report.html
#   make test   the whole test suite
# PYTHON=python3.12 make ... picks another interpreter; VENV=/path another place for the environment.

PYTHON ?= python3
VENV ?= .venv
ONEDL_VENV ?= .venv-onedl
BIN = $(VENV)/bin
OUT ?= demo_out
DEMO_FLAGS ?=
# the tests take one process a core and one thread a process: small tensors gain nothing from more
TEST_FLAGS ?= -n auto
GPU_FLAGS ?=
INSTALL = $(BIN)/pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: demo test test-fast test-gpu test-onedl lint format docs clean help

help:
	@sed -n 's/^#   //p' Makefile
	@echo 'make lint   ruff and mypy;  make format   ruff format'
	@echo 'make docs   the documentation as a site, docs/_build/html/index.html'
	@echo 'make test-gpu   what needs a CUDA device'
	@echo 'make test-onedl   tests/openmmlab and tests/mmcv_ops with the OneDL forks, in an environment of its own'

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
	$(BIN)/hgkd demo --out $(OUT) $(DEMO_FLAGS)

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TEST_FLAGS)

test-fast: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TEST_FLAGS) -m 'not slow'

# what needs a CUDA device, one test at a time; the other tests leave it out where there is none
test-gpu: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m gpu $(GPU_FLAGS)

# setup.py reads HGKD_ONEDL and requires the forks instead of the originals; MMCV_WITH_OPS=0 builds onedl-mmcv without a compiler
test-onedl: export HGKD_ONEDL = 1
test-onedl: export MMCV_WITH_OPS = 0
test-onedl:
	$(MAKE) test VENV=$(ONEDL_VENV) TEST_FLAGS='$(TEST_FLAGS) tests/openmmlab tests/mmcv_ops'

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# -W and -n: a link that leads nowhere is an error, and so is a public name without a docstring; no network is used
docs: $(VENV)/.installed-docs
	mkdir -p docs/_build/source
	$(BIN)/python -m sphinx -c docs -b html -d docs/_build/doctrees -W --keep-going -n -q docs/_build/source docs/_build/html
	@echo '== open docs/_build/html/index.html'

clean:
	rm -rf $(VENV) $(ONEDL_VENV) $(OUT) docs/_build .pytest_cache .mypy_cache .ruff_cache
