# make serve and make test need Python 3.11-3.13, a C++20 compiler and the package registries.
SHELL := bash

PYTHON ?= python3
PORT ?= 8000
MODEL ?= demo

VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python
CUDA := $(wildcard csrc/cuda/*/*)
SIMT := $(wildcard tests/simt/*.h tests/simt/*.cpp)
PLANTED := tests/sanitize/planted.cu
CPP := $(wildcard csrc/*.cpp csrc/common/* csrc/params/* csrc/cpu/*/*)
OP_TESTS := $(wildcard $(patsubst voxkern/reference/%.py,tests/ops/test_%.py,$(wildcard voxkern/reference/*.py)))

# Prints an extra's requirements: installing them as '.[extra]' would build the extension again.
EXTRA = $(RUN) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$(1)"])'

# cmake in a folder of build/, with the environment's tools and its torch.
CMAKE = PATH=$(CURDIR)/$(BIN):$$PATH cmake
CONFIGURE = $(CMAKE) -S . -G Ninja -DVOXKERN_TORCH=$$($(RUN) -c 'import torch; print(torch.__path__[0])')

.PHONY: build serve test simt cuda-check triton-check lint format bench peers sanitize clean

build: $(VENV)/built

# With torch in place first, the extension is built against it: no second copy in an isolated build.
$(VENV)/torch: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v <= (3, 13) and f"Python 3.11-3.13 is needed, not {v}: make PYTHON=python3.12")'
	$(RUN) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' > $(VENV)/build-requires.txt
	$(BIN)/pip install --quiet -r $(VENV)/build-requires.txt
	touch $@

$(VENV)/built: $(VENV)/torch setup.py CMakeLists.txt $(CPP) $(CUDA)
	$(BIN)/pip install --quiet --no-build-isolation -e .
	touch $@

# moshi is an oracle for the codec; it pins an older torch than it needs, so it comes without its pins.
$(VENV)/test: $(VENV)/built
	$(BIN)/pip install --quiet --no-build-isolation -e '.[test]'
	$(BIN)/pip install --quiet --no-deps moshi einops sentencepiece || echo 'moshi is not to be had: its tests will be skipped'
	$(BIN)/pip install --quiet $$($(call EXTRA,judge)) || echo 'no recogniser is to be had: the voice is not listened to'
	touch $@

$(VENV)/lint: $(VENV)/torch
	$(BIN)/pip install --quiet $$($(call EXTRA,lint))
	touch $@

serve: $(VENV)/built
	$(RUN) -m vox_serve.launch --model $(MODEL) --port $(PORT)

# The CUDA kernels for the host, with the header's own planted bugs.
simt: $(VENV)/simt

$(VENV)/simt: $(VENV)/torch tests/simt/CMakeLists.txt CMakeLists.txt $(CPP) $(CUDA) $(SIMT)
	$(CONFIGURE) -B build/simt
	$(CMAKE) --build build/simt --target simt
	touch $@

# The op tests once more for each instruction set that the processor has besides its best, and with
# the Triton kernels interpreted.
test: $(VENV)/test $(VENV)/simt
	$(RUN) -m pytest -q
	VOXKERN_ISA=baseline $(RUN) -m pytest -q $(OP_TESTS) -k 'not simt'
	! grep -qw avx2 /proc/cpuinfo || VOXKERN_ISA=avx2 $(RUN) -m pytest -q $(OP_TESTS) -k 'not simt'
	TRITON_INTERPRET=1 $(RUN) -m pytest -q $(OP_TESTS) tests/serve/test_triton.py -k triton

# Every CUDA kernel for every target: needs nvcc, no GPU.
cuda-check: $(VENV)/torch
	$(RUN) tools/cuda_check.py

# Every Triton kernel at CSM-1B's shapes, for NVIDIA and AMD: needs no GPU.
triton-check: $(VENV)/test
	$(RUN) tools/triton_check.py

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP) $(CUDA) $(SIMT) $(PLANTED)

format: $(VENV)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP) $(CUDA) $(SIMT) $(PLANTED)

bench: $(VENV)/test
	$(RUN) bench/run.py all

peers: $(VENV)/built
	$(RUN) bench/run.py peers

# The CPU kernels, and the CUDA kernels on the host, under the address and undefined-behaviour
# sanitizers; the latter in another order of threads than in make test. Python itself leaks by
# design; pytest must leave file descriptor 2 alone, or their last words are lost.
sanitize: $(VENV)/test
	$(CONFIGURE) -B build/sanitize -DVOXKERN_SANITIZE=ON
	$(CMAKE) --build build/sanitize --target voxkern voxkern_simt
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=print_stacktrace=1 VOXKERN_LIBRARY=build/sanitize/_C.so \
	VOXKERN_SIMT_LIBRARY=build/sanitize/tests/simt/voxkern_simt.so VOXKERN_SIMT_ORDER=descending $(RUN) -m pytest -q --capture=sys $(OP_TESTS)

clean:
	rm -rf $(VENV) build voxkern/_C.so voxkern/_C_cuda.so
