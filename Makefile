# What a person types, and what CI calls. `make serve` and `make test` set up what they need, once.
PYTHON ?= python3
MODEL ?= demo
DEVICE ?= cpu
PORTS ?=

VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*+cpu\).*/\1/p' requirements.lock)
UV := $(shell sed -n 's/^\(uv==[^ ;]*\).*/\1/p' requirements.lock)

.PHONY: help serve test lint format lock clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

serve: $(VENV)/.ready env-webui  ## start controller, worker, API server and web UI; MODEL=path DEVICE=cpu|xpu ARGS="..."
	@exec $(BIN)/python -m ipex_vllm.up --model-path $(MODEL) --device $(DEVICE) $(ARGS)

test: $(VENV)/.ready lint env-webui chromium  ## lint, type-check and run all tests but ipex-llm's own
	$(BIN)/python -m pytest

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready  ## reformat and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# PyTorch's CPU build is not on PyPI. pip finds it where its configuration names a source for it; else uv knows
# PyTorch's own index. All else is pinned in the lock, and --no-deps keeps CUDA builds of torchvision and friends out.
$(VENV)/.ready: requirements.lock pyproject.toml $(wildcard setup.py)
	@echo "setting up $(VENV): about 3 minutes and 3 GB, once"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(UV)"
	$(BIN)/python -c "import importlib.metadata as m; assert 'torch=='+m.version('torch') == '$(TORCH)'" 2>/dev/null \
		|| $(BIN)/pip install --quiet --disable-pip-version-check --no-deps "$(TORCH)" 2>/dev/null \
		|| $(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend cpu --no-deps "$(TORCH)"
	grep -v '^torch==' requirements.lock > $(VENV)/rest.lock
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --no-deps -r $(VENV)/rest.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

lock:  ## resolve pyproject.toml again into requirements.lock
	$(BIN)/uv pip compile pyproject.toml --extra cpu --extra fastchat --extra dev --universal --python-version 3.11 \
		--torch-backend cpu --no-annotate --no-header --quiet --output-file requirements.lock
	sed -i "/sys_platform == 'never'/d" requirements.lock

include Makefile.envs Makefile.bench Makefile.webui
