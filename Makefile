# Two commands are all a newcomer needs: make demo, make test.

# What to install as torch. On Linux without a GPU, to avoid gigabytes of CUDA libraries:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LMMS := $(VENV)/lmms
SERVE := $(VENV)/serve
JOBS ?= 2

.PHONY: demo test test-slow test-lmms test-serve lint speed clean

demo: $(VENV)/.installed
	$(BIN)/foveate demo --out demo

test: lint
	$(BIN)/python -m pytest -n $(JOBS)

test-slow: $(VENV)/.testing
	$(BIN)/python -m pytest -m slow -n $(JOBS)

test-lmms: $(LMMS)/.installed
	$(LMMS)/bin/python -m pytest tests/lmms

test-serve: $(SERVE)/.installed
	FOVEATE_LOAD_SECONDS=120 $(SERVE)/bin/python -m pytest tests/serve -m "slow or not slow"

lint: $(VENV)/.testing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

speed: $(VENV)/.testing
	$(BIN)/python benchmarks/speed.py

clean:
	rm -rf $(VENV) demo

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[plot]"
	touch $@

$(VENV)/.testing: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[plot,train]" --group dev
	touch $@

$(LMMS)/.installed: pyproject.toml tests/lmms/requirements.txt
	$(PYTHON) -m venv $(LMMS)
	$(LMMS)/bin/python -m pip install --quiet --upgrade pip
	$(LMMS)/bin/python -m pip install --quiet $(TORCH)
	$(LMMS)/bin/python -m pip install --quiet --no-deps lmms-eval==0.7.3
	$(LMMS)/bin/python -m pip install --quiet --requirement tests/lmms/requirements.txt --editable .
	touch $@

$(SERVE)/.installed: pyproject.toml
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip install --quiet --upgrade pip
	$(SERVE)/bin/python -m pip install --quiet $(TORCH)
	$(SERVE)/bin/python -m pip install --quiet --editable ".[serve,ray]" playwright --group dev
	touch $@
