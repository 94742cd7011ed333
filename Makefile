# SPDX-License-Identifier: MIT
# Every target works on a fresh clone: it makes .venv, installs the pinned packages and builds the extension first.
PYTHON ?= python3
ARCH ?= 90a
KERNELS ?= $(notdir $(basename $(wildcard csrc/cuda/*.cu)))
BIN := .venv/bin
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)

.PHONY: demo test test-without-extension bench lint cpp sass gpu-code clean
.DEFAULT_GOAL := test
# Lets Python write bytecode: modules are compiled once, not by each of the processes that the tests start.
unexport PYTHONDONTWRITEBYTECODE

# Upgrades pip first: the version that comes with Python may take a minute to resolve what a newer one does in seconds.
.venv/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --upgrade pip
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt torch setuptools ninja
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --no-build-isolation --editable '.[test,demo,bench]'
	touch $@

demo: .venv/installed
	$(BIN)/python -m examples.multi_mnist

# Passive waiting: OpenMP threads that spin while they wait would take time from the other test process.
test: .venv/installed
	OMP_WAIT_POLICY=passive TRITON_INTERPRET=1 GRADSURGERY_REQUIRE=cpu,triton $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# The same without the compiled extension, and without interpreted kernels.
test-without-extension: export PYTHONPATH = $(CURDIR)/tests/without_extension
test-without-extension: .venv/installed
	$(BIN)/python -c 'from gradsurgery._extension import C; assert C is None'
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

bench: .venv/installed
	$(BIN)/python -m pytest bench --benchmark-enable --benchmark-only
	$(BIN)/python -m bench.peers
	$(BIN)/python -m bench.report

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(filter %.h %.inl %.cpp %.cu %.cuh,$(SOURCES)) bench/*.cu \
		tests/cpp/*.c tests/cpp/*.cpp tests/cpp/*.h

cpp:
	cmake -S . -B build/cmake
	cmake --build build/cmake --parallel
	ctest --test-dir build/cmake --output-on-failure --parallel 2

# Checks the machine code that nvcc makes of the kernels.
sass: .venv/installed
	mkdir -p build/sass$(ARCH)
	printf '%s\n' $(KERNELS) | xargs -P 2 -I NAME \
		nvcc -std=c++20 -O3 -gencode arch=compute_$(ARCH),code=sm_$(ARCH) -Icsrc -Icsrc/include \
		-c csrc/cuda/NAME.cu -o build/sass$(ARCH)/NAME.o
	$(BIN)/python tests/cpp/check_sass.py $(KERNELS:%=build/sass$(ARCH)/%.o)

# Checks that .ci/run has no time for: the longest tests of interpreted kernels, nvcc's code of all kernels (for the
# oldest GPUs too), all Triton kernels, and programs in C++ and in C that link the static library with CUDA.
gpu-code: .venv/installed
	$(MAKE) sass
	$(MAKE) sass ARCH=80
	TRITON_INTERPRET=1 GRADSURGERY_REQUIRE=triton GRADSURGERY_TEST_WHOLE=1 $(BIN)/python -m pytest tests/test_triton_compile.py \
		tests/test_triton.py tests/test_rounded_gram.py tests/test_gram_methods.py tests/test_cagrad.py tests/test_gram.py \
		tests/test_weights.py tests/test_combine.py tests/test_graddrop.py tests/test_peers.py
	cmake -S . -B build/cuda -DGRADSURGERY_CUDA=ON -DBUILD_SHARED_LIBS=OFF -DBUILD_TESTING=OFF \
		-DCMAKE_CUDA_ARCHITECTURES=90a-real
	cmake --build build/cuda --parallel 2
	cmake --install build/cuda --prefix build/cuda/installed
	cmake -S tests/cpp -B build/cuda/consumer -DCMAKE_PREFIX_PATH=$(CURDIR)/build/cuda/installed
	cmake --build build/cuda/consumer
	ctest --test-dir build/cuda/consumer --output-on-failure
	cmake -S tests/consumers/c -B build/cuda/c -DCMAKE_PREFIX_PATH=$(CURDIR)/build/cuda/installed
	cmake --build build/cuda/c
	ctest --test-dir build/cuda/c --output-on-failure

clean:
	rm -rf .venv build gradsurgery/*.so *.egg-info
