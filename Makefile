# Needs Python 3.11-3.13, a C++20 compiler and access to a package index.
SHELL := bash

PYTHON ?= python3
PORT ?= 8000
MODEL ?= demo

VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python
CUDA := $(wildcard csrc/cuda/*/*)
SIMT := $(wildcard tests/simt/*.h tests/simt/*.cpp)
PLANTED := $(wildcard tests/sanitize/planted.*)
CPP := $(wildcard csrc/*.cpp csrc/common/* csrc/params/* csrc/cpu/*/*)
# At most 8 workers. Op tests compute: one worker per processor. The other tests wait for sockets and
# processes too: one worker more. Workers have one thread each unless a variable or a test says
# otherwise (conftest.py). They keep compiled modules, which the next run and the processes that tests
# start would compile again.
WORKERS = PYTHONDONTWRITEBYTECODE= $(RUN) -m pytest -q --maxprocesses 8 --dist worksteal -n
PYTEST = $(WORKERS) $$(($$(nproc) + 1))
PYTEST_OPS = $(WORKERS) $$(nproc) $(OP_TESTS)
OP_TESTS := $(wildcard $(patsubst voxkern/reference/%.py,tests/ops/test_%.py,$(wildcard voxkern/reference/*.py)))

# Prints the requirements of an extra. Installing '.[extra]' would build the extension again.
EXTRA = $(RUN) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$(1)"])'

# Prints the package's own requirements: mypy reads their types.
DEPENDENCIES = $(RUN) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"])'

# cmake with the environment's ninja and torch, for builds below build/.
CMAKE = PATH=$(CURDIR)/$(BIN):$$PATH cmake
CONFIGURE = $(CMAKE) -S . -G Ninja -DVOXKERN_TORCH=$$($(RUN) -c 'import torch; print(torch.__path__[0])')

.PHONY: build serve test test-fast cluster-test soak simt cuda-check cuda-link-check gpu-carry triton-check lint format bench peers sanitize tsan fuzz clean

build: $(VENV)/built

# torch comes first, so that the extension is built against it and not against a second copy in an
# isolated build.
$(VENV)/torch: pyproject.toml
	@echo "Making an environment in $(VENV), with torch: 1 GB, some minutes without a word."
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v <= (3, 13) and f"Python 3.11-3.13 is needed, not {v}: make PYTHON=python3.12")'
	@$(RUN) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' > $(VENV)/build-requires.txt
	@$(BIN)/pip install --quiet -r $(VENV)/build-requires.txt
	@touch $@

$(VENV)/built: $(VENV)/torch setup.py CMakeLists.txt $(CPP) $(CUDA)
	@echo "Compiling the kernels: some minutes on two cores."
	@$(BIN)/pip install --quiet --no-build-isolation -e .
	@touch $@

# moshi is an oracle for the codec. It pins an older torch than it needs: install it without its
# dependencies.
$(VENV)/test: $(VENV)/built
	$(BIN)/pip install --quiet --no-build-isolation -e '.[test]'
	$(BIN)/pip install --quiet --no-deps moshi einops sentencepiece || echo 'moshi is unavailable: its tests will be skipped'
	$(RUN) tests/support/node_packages.py || echo "Node's packages are unavailable: their tests will be skipped"
	$(BIN)/pip install --quiet $$($(call EXTRA,judge)) || echo 'the speech recogniser is unavailable: tests that transcribe the voice will be skipped'
	for fuzzer in $$($(call EXTRA,fuzz)); do $(BIN)/pip install --quiet $$fuzzer || echo "$$fuzzer is unavailable: its tests will be skipped"; done
	touch $@

$(VENV)/lint: $(VENV)/torch
	$(BIN)/pip install --quiet $$($(call EXTRA,lint)) $$($(DEPENDENCIES))
	touch $@

serve: $(VENV)/built
	@$(RUN) -m vox_serve.launch --model $(MODEL) --port $(PORT)

# The CUDA kernels compiled for the host, and planted bugs that test the emulator itself.
simt: $(VENV)/simt

$(VENV)/simt: $(VENV)/torch tests/simt/CMakeLists.txt CMakeLists.txt $(CPP) $(CUDA) $(SIMT)
	$(CONFIGURE) -B build/simt
	$(CMAKE) --build build/simt --target simt
	touch $@

# The op tests that an instruction set may change: not the emulated GPU's, nor error messages and schemas.
ISA_TESTS := not (simt or errors or opcheck)

# All tests, then the op tests again: with each lesser instruction set that the processor has, and
# with the Triton kernels in Triton's interpreter. docs/testing.md says what each run covers.
test: $(VENV)/test $(VENV)/simt
	$(PYTEST)
	VOXKERN_ISA=baseline VOXKERN_NUM_THREADS=3 $(PYTEST_OPS) -k '$(ISA_TESTS)'
	! grep -qw avx512_bf16 /proc/cpuinfo || VOXKERN_ISA=avx2 $(PYTEST_OPS) -k '$(ISA_TESTS)'
	TRITON_INTERPRET=1 $(PYTEST_OPS) tests/serve/test_triton.py -k triton

# For every edit: no slow test, no emulated GPU.
test-fast: $(VENV)/test
	$(PYTEST) -m 'not slow' -k 'not simt'

# The tests of HTTP through a cluster's door, then against a cluster of two with real Ray, and tests of
# clusters: about 20 minutes on two cores.
DOOR_TESTS = $(addprefix tests/serve/test_,api.py live.py live_formats.py live_server.py openai_api.py \
  voice_routes.py conversation_routes.py conversing.py speech_context.py request_id.py)
# Not through a door: /health has the state of each replica there, and a replica whose engine has
# failed is gone.
NOT_DOOR = says_what_is_true or readiness_fails or cannot_start_again
# Not against a cluster: they change the engine or the server in their own process.
NOT_CLUSTER = leaves_the_event_loop or more_speakers or end_of_the_server_gives_up or \
  single_utterances_gets_no_context or memory_of_frames or prefilled
cluster-test: $(VENV)/test
	$(BIN)/pip install --quiet $$($(call EXTRA,cluster))
	$(RUN) -m pytest -q --door -k "not ($(NOT_DOOR))" $(DOOR_TESTS)
	$(RUN) -m pytest -q --cluster -k "not ($(NOT_DOOR) or $(NOT_CLUSTER))" $(DOOR_TESTS)
	$(RUN) -m pytest -q tests/serve/test_cluster*.py tests/cluster

# A mixed load with cancels, stalls and faults for MINUTES: results in build/soak.
MINUTES ?= 30
soak: $(VENV)/test
	$(BIN)/pip install --quiet matplotlib
	$(RUN) bench/soak.py --minutes $(MINUTES)

# Compiles every CUDA kernel for every target. Needs nvcc, no GPU.
cuda-check: $(VENV)/torch
	$(RUN) tools/cuda_check.py

# Builds the CUDA library for Hopper against a CUDA torch, loads it and checks that it registers every
# op. Needs nvcc and 8 GB for an environment of its own, no GPU.
LINK := build/cuda-link
cuda-link-check: $(VENV)/torch
	test -x $(LINK)/venv/bin/python || $(PYTHON) -m venv $(LINK)/venv
	$(LINK)/venv/bin/pip install --quiet torch==2.11.0
	$(CMAKE) -S . -B $(LINK)/cmake -G Ninja -DVOXKERN_CUDA=on -DVOXKERN_CUDA_ARCHITECTURES=90a \
	  -DVOXKERN_TORCH=$$($(LINK)/venv/bin/python -c 'import torch; print(torch.__path__[0])')
	$(CMAKE) --build $(LINK)/cmake --target voxkern voxkern_cuda
	$(LINK)/venv/bin/python tools/cuda_link_check.py $(LINK)/cmake

# Gathers what a machine with a GPU and without a network lacks, in build/gpu-carry: wheels, the CUDA
# library, the committed files. CARRY=--no-tree leaves out the last.
gpu-carry: $(VENV)/built cuda-link-check
	$(RUN) bench/gpu_carry.py build/gpu-carry --libraries $(LINK)/cmake $(CARRY)

# Compiles every Triton kernel at CSM-1B's shapes for NVIDIA and AMD. Needs no GPU.
triton-check: $(VENV)/test
	$(RUN) tools/triton_check.py

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(RUN) tools/prose_check.py
	$(RUN) tools/constant_check.py
	$(BIN)/clang-format --dry-run -Werror $(CPP) $(CUDA) $(SIMT) $(PLANTED)

format: $(VENV)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP) $(CUDA) $(SIMT) $(PLANTED)

bench: $(VENV)/test
	$(RUN) bench/run.py all

peers: $(VENV)/built
	$(RUN) bench/run.py peers

# The op tests of the CPU kernels and of the CUDA kernels on the host under the address and
# undefined-behaviour sanitizers. The host runs CUDA threads in another order than in make test.
# Python leaks by design, so leaks are not detected. --capture=sys leaves file descriptor 2 to the
# sanitizers: their last report would be lost otherwise.
sanitize: $(VENV)/test
	$(CONFIGURE) -B build/sanitize -DVOXKERN_SANITIZE=ON
	$(CMAKE) --build build/sanitize --target voxkern voxkern_simt sanitize_planted
	$(RUN) tests/sanitize/check_planted.py build/sanitize/sanitize_planted address
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=print_stacktrace=1 VOXKERN_LIBRARY=build/sanitize/_C.so \
	VOXKERN_SIMT_LIBRARY=build/sanitize/tests/simt/voxkern_simt.so VOXKERN_SIMT_ORDER=descending $(PYTEST_OPS) --capture=sys

# The CPU kernels' team of threads under the thread sanitizer: first on planted races, then small cases
# of every op on three threads, and callers of several threads. torch computes on one thread: its
# OpenMP library is not instrumented, and would give false reports. setarch: the sanitizer supports
# no more address randomisation than older kernels had.
TSAN = OMP_NUM_THREADS=1 VOXKERN_NUM_THREADS=3 TSAN_OPTIONS=exitcode=66 VOXKERN_LIBRARY=build/tsan/_C.so \
	LD_PRELOAD="$$(c++ -print-file-name=libtsan.so) $$(c++ -print-file-name=libstdc++.so)" setarch -R $(RUN)
tsan: $(VENV)/test
	$(CONFIGURE) -B build/tsan -DVOXKERN_SANITIZE_THREAD=ON -DVOXKERN_CUDA=off
	$(CMAKE) --build build/tsan --target voxkern sanitize_planted
	$(RUN) tests/sanitize/check_planted.py build/tsan/sanitize_planted thread
	PYTHONPATH=tests/support $(TSAN) tests/support/sanitizer_cases.py native-cpu
	$(TSAN) -m pytest -q --capture=sys tests/ops/test_team.py -k resizing

# Each fuzz target for FUZZ_MINUTES with atheris; `make test` gives each some seconds. Findings are
# written to build/fuzz.
FUZZ_MINUTES ?= 30
FUZZ_TARGETS := $(notdir $(wildcard tests/fuzz/corpus/*))
fuzz: $(VENV)/test
	set -e; for target in $(FUZZ_TARGETS); do $(RUN) tests/fuzz/fuzz.py $$target $$(($(FUZZ_MINUTES) * 60)); done

# Removes all that make has created, the environment included.
clean:
	rm -rf $(VENV) build voxkern/_C.so voxkern/_C_cuda.so *.egg-info .pytest_cache .ruff_cache .mypy_cache
