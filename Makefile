# What a person types, and what CI calls. `make serve` and `make test` set up what they need, once.
PYTHON ?= python3
MODEL ?= smollm2
DEVICE ?= cpu

VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*+cpu\).*/\1/p' requirements.lock)
UV := $(shell sed -n 's/^\(uv==[^ ;]*\).*/\1/p' requirements.lock)

.PHONY: help serve test lint format lock

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

serve: $(VENV)/.ready env-webui tcmalloc  ## start controller, worker, API server and web UI; MODEL=path DEVICE=cpu|xpu ARGS="..."
	@exec $(BIN)/python -m ipex_vllm.up --model-path '$(MODEL)' --device $(DEVICE) $(ARGS)

test: $(VENV)/.ready lint env-webui chromium deploy-tools  ## lint, type-check and run all tests but ipex-llm's own
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.ready  ## reformat and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# PyTorch's CPU build is not on PyPI. pip finds it where its configuration names a source for it; else uv knows
# PyTorch's own index. All else is pinned in the lock, and --no-deps keeps CUDA's libraries out. torchvision is PyPI's,
# which is for CUDA: without the line at Python's start nothing that imports it would run beside PyTorch's CPU build.
# The C++ library is built again when its sources change: one of another version would compute otherwise.
kernel_sources := $(wildcard ipex_vllm/low_bit/csrc/*.cpp ipex_vllm/low_bit/csrc/*/*)
$(VENV)/.ready: requirements.lock pyproject.toml $(wildcard setup.py) $(kernel_sources)
	@echo "setting up $(VENV): about 3 minutes and 3 GB, once"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(UV)"
	$(BIN)/python -c "import importlib.metadata as m; assert 'torch=='+m.version('torch') == '$(TORCH)'" 2>/dev/null \
		|| $(BIN)/pip install --quiet --disable-pip-version-check --no-deps "$(TORCH)" 2>/dev/null \
		|| $(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend cpu --no-deps "$(TORCH)"
	grep -v '^torch==' requirements.lock > $(VENV)/rest.lock
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --no-deps -r $(VENV)/rest.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	echo 'import runpy; runpy.run_path("$(CURDIR)/ipex_vllm/torchvision_operators.py")["install"]()' \
		> "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchvision_operators.pth"
	$(BIN)/python -m ipex_vllm.worker --help >/dev/null  # lists vLLM's options, which takes long once
	touch $@

lock:  ## resolve pyproject.toml again into requirements.lock
	$(BIN)/uv pip compile pyproject.toml --extra cpu --extra fastchat --extra dev --universal --python-version 3.11 \
		--torch-backend cpu --no-annotate --no-header --quiet --output-file requirements.lock
	sed -i -e "/sys_platform == 'never'/d" -e '/^torchvision==.*+cpu/d' -e 's/^\(torchvision==[^ ;]*\).*/\1/' requirements.lock

# The environments beside the main one: envs/NAME says what each is made of, and here is where it lies. What takes long
# to build is kept outside the checkout, which then has a link to it.
ENVS := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/ipex-vllm
IPEX_LLM_ENV ?= $(ENVS)/venv-ipex-llm
IPEX_ENV ?= $(ENVS)/venv-ipex
IPEX_VLLM_WEBUI_ENV ?= .venv-webui
ENV_PYTHON ?= python3.11

environments := ipex-llm ipex openvino webui
place_ipex-llm := $(IPEX_LLM_ENV)
place_ipex := $(IPEX_ENV)
place_openvino := .venv-openvino
place_webui := $(IPEX_VLLM_WEBUI_ENV)

# What PyTorch's CUDA build asks for and a CPU never calls.
cuda_only := $(addprefix --no-emit-package ,triton $(addsuffix -cu12,$(addprefix nvidia-,cublas cuda-cupti cuda-nvrtc \
	cudnn cufft cufile curand cusolver cusparse cusparselt nccl nvjitlink nvtx)))
lock_ipex-llm := $(cuda_only)
lock_ipex := $(cuda_only)
lock_openvino := --torch-backend cpu --no-emit-package torch --override envs/openvino/overrides

.PHONY: $(environments:%=env-%) $(environments:%=lock-%) test-ipex-llm test-ipex

env-ipex-llm:  ## build the environment of --engine ipex-llm (about 5 minutes, 2.7 GB, once)
env-ipex:  ## build the environment of the HF worker's --ipex (about 4 minutes, 2.7 GB, once)
env-openvino:  ## build the environment of the OpenVINO GenAI peer
env-webui:  ## build the environment of FastChat's web UI

$(environments:%=env-%): env-%:
	envs/build.sh $* $(place_$*) $(if $(filter webui,$*),$(PYTHON),$(ENV_PYTHON))
	$(if $(filter-out .venv-$*,$(place_$*)),test -d .venv-$* -a ! -L .venv-$* || ln -sfnT $(abspath $(place_$*)) .venv-$*)

$(environments:%=lock-%): lock-%: $(VENV)/.ready  # like `lock`, for that environment
	$(BIN)/uv pip compile --no-config --quiet --no-header --no-annotate --python-version 3.11 $(lock_$*) \
		envs/$*/requirements.in --output-file envs/$*/requirements.lock

test-ipex-llm:  ## run the protocol's tests against the ipex-llm engine
test-ipex:  ## run the tests of the HF worker's --ipex, and the protocol's, in its environment

test-ipex-llm test-ipex: test-%: env-%
	PYTHONPATH=$(CURDIR) .venv-$*/bin/python -m pytest tests/$(subst -,_,$*) tests/serving/test_protocol.py \
		tests/serving/test_fastchat.py

# llama.cpp's own programs, compiled for this machine from the sources that llama-cpp-python's sdist carries. Outside the
# lock: a peer that is measured, which nothing here imports.
LLAMA_CPP := .cache/llama-cpp
LLAMA_CPP_PYTHON := 0.3.36
# Where its AMX code dies (docs/negative-results.md): LLAMA_CPP_FLAGS="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
LLAMA_CPP_FLAGS ?=
llama_cpp_off := $(addprefix -D,$(addsuffix =OFF,LLAMA_CURL LLAMA_OPENSSL LLAMA_BUILD_TESTS LLAMA_BUILD_EXAMPLES LLAMA_BUILD_UI))
.PHONY: env-llama-cpp
env-llama-cpp: $(LLAMA_CPP)/bin/llama-server  ## build the llama.cpp peer (about 15 minutes; needs cmake and ninja)

$(LLAMA_CPP)/bin/llama-server: | $(VENV)/.ready
	mkdir -p $(LLAMA_CPP)
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --dest $(LLAMA_CPP) \
		llama-cpp-python==$(LLAMA_CPP_PYTHON)
	tar -xzf $(LLAMA_CPP)/llama_cpp_python-$(LLAMA_CPP_PYTHON).tar.gz -C $(LLAMA_CPP) --strip-components 1
	cmake -S $(LLAMA_CPP)/vendor/llama.cpp -B $(LLAMA_CPP) -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
		-DCMAKE_C_FLAGS="$(LLAMA_CPP_FLAGS)" -DCMAKE_CXX_FLAGS="$(LLAMA_CPP_FLAGS)" $(llama_cpp_off)
	ninja -C $(LLAMA_CPP) llama-server llama-quantize llama-perplexity

# AMD's operators for vLLM, of the release that is for this PyTorch, in a folder of their own (benchmarks/compare/systems.py).
ZENTORCH := .cache/zentorch
.PHONY: env-zentorch
env-zentorch: $(ZENTORCH)/zentorch  ## fetch the zentorch peer, for AMD's CPUs with AVX-512

$(ZENTORCH)/zentorch: | $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(ZENTORCH) zentorch==2.13.0.2 deprecated==1.3.1 wrapt==2.5.2

# What is not on PyPI, for Debian and Ubuntu.
.PHONY: chromium deploy-tools tcmalloc
apt_get := apt-get update -qq && apt-get install -y -qq --no-install-recommends

chromium:  ## install what the web UI's tests drive (Debian and Ubuntu)
	command -v chromium >/dev/null || { $(apt_get) chromium fonts-dejavu-core fonts-noto-color-emoji; }

tcmalloc:  ## install the allocator that the worker preloads (Debian and Ubuntu, as root; serving does without)
	@ls /usr/lib/*/libtcmalloc_minimal.so.4 /usr/lib64/libtcmalloc_minimal.so.4 2>/dev/null | grep -q . \
		|| { test "$$(id -u)" = 0 && $(apt_get) libtcmalloc-minimal4 >/dev/null 2>&1; } \
		|| echo "tcmalloc is not installed; with it allocating is faster: apt-get install libtcmalloc-minimal4"

deploy-tools:  ## install nginx and systemd-analyze, which the tests of docs/deploy call (Debian and Ubuntu)
	{ test -x /usr/sbin/nginx && command -v systemd-analyze >/dev/null; } || { $(apt_get) nginx-light systemd; }

# Measuring. BENCH_OUT is where results go.
BENCH_OUT ?= .cache/bench
.PHONY: bench bench-smoke

spec_bench := main
spec_bench-smoke := smoke

bench: .cache/models/llama-1.1b/model.safetensors  ## measure the project's main table
bench-smoke: .cache/models/llama-160m/model.safetensors  ## compare two systems on a small model

bench bench-smoke: $(VENV)/.ready
	$(BIN)/python -m benchmarks.compare benchmarks/configs/$(spec_$@).yaml --out $(BENCH_OUT)/$(spec_$@)
	$(BIN)/python -m benchmarks.report $(BENCH_OUT)/$(spec_$@)

.cache/models/%/model.safetensors: | $(VENV)/.ready
	$(BIN)/python -m benchmarks.make_model --shape $* --out $(@D)
