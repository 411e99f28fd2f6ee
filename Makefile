# Every target sets itself up: a virtual environment in .venv with skive (editable) and what the
# target needs. Needs Python 3.11 or newer with its headers, and a C++ compiler.
#
#   make demo       compile and run the keyword-spotting example, float32 and INT8
#   make test       the tests (without those marked slow)
#   make test-all   all tests
#   make onnx       compiles every backend case of ONNX and counts what passes in docs/onnx.md
#   make bench      the example in turns with onnxruntime and OpenVINO
#   make fuzz       random graphs and damaged files, ten minutes
#   make shipped    the tests of kernels with the compiler's flags of artefacts, not those that compile fastest
#   make exhaustive every integer kernel against NumPy on hundreds of shapes: hours; goes on where it stopped
#   make lint       ruff
#   make typing     mypy
#   make asan       the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
#   make clean      removes .venv and build/
#
# Variables: PYTHON=python3.12 chooses the interpreter. TORCH= tests without PyTorch, whose tests
# then skip; TORCH="torch==X.Y" another version. PyTorch that is already in .venv is left alone.

VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
CXX_FOUND := $(firstword $(foreach c,$(CXX) c++ g++ clang++,$(shell command -v $(c) 2>/dev/null)))

# The first interpreter on PATH that is new enough, can make virtual environments and has headers.
USABLE := import ensurepip, os, sys, sysconfig, venv; \
  assert sys.version_info >= (3, 11); \
  assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3.14 python3,\
  $(if $(shell $(p) -c '$(USABLE)' 2>/dev/null && echo yes),$(p))))

# What the build of the package depends on.
PACKAGE := pyproject.toml setup.py CMakeLists.txt bindings/module.cpp

.PHONY: demo test test-all onnx bench fuzz shipped exhaustive lint typing asan clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.installed
	$(BIN)/python examples/keyword_spotting/run.py

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow"

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

onnx: $(VENV)/.installed-dev
	mkdir -p build
	SKIVE_CXXFLAGS=-O1 $(BIN)/python -m pytest -n $(JOBS) -m slow tests/frontend/test_onnx_backend.py \
	  --junitxml=build/onnx.xml
	$(BIN)/python tests/frontend/test_onnx_backend.py build/onnx.xml docs/onnx_cases.json
	$(BIN)/python docs/generate.py

bench: $(VENV)/.installed-bench
	$(BIN)/skive bench examples/keyword_spotting/kws_dscnn.onnx --input input=1x1x49x10 \
	  --against onnxruntime,openvino

fuzz: $(VENV)/.installed-dev
	$(BIN)/python tests/fuzz/fuzz_files.py --seconds 180 --jobs $(JOBS) --command-every 200
	$(BIN)/python tests/fuzz/fuzz_graphs.py --seconds 300 --jobs $(JOBS)
	$(BIN)/python tests/fuzz/fuzz_quantized.py --seconds 120

shipped: $(VENV)/.installed-dev
	SKIVE_KERNELS_AS_SHIPPED=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" tests/kernels

# Zig's clang where there is no other.
exhaustive: $(VENV)/.installed-dev
	@command -v clang++ >/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[zig]"
	$(BIN)/python tests/kernels/exhaustive.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

# mypy does not see through the import hook of an editable install: it gets a folder of links that
# looks like the installed package.
typing: $(VENV)/.installed-dev
	rm -rf build/typing && mkdir -p build/typing/skive
	ln -s $(addprefix $(CURDIR)/,$(wildcard compiler/*.py compiler/*.pyi compiler/py.typed \
	  $(patsubst %/__init__.py,%,$(wildcard compiler/*/__init__.py)) passes kernels)) build/typing/skive/
	cd build/typing && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
	  --cache-dir $(CURDIR)/.mypy_cache -p skive

asan: $(VENV)/.installed-dev
	$(BIN)/python -m cmake --preset asan -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	$(BIN)/python -m cmake --build --preset asan
	$(BIN)/ctest --preset asan

clean:
	rm -rf $(VENV) build examples/keyword_spotting/build examples/keyword_spotting/build_int8

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no usable Python on PATH: 3.11 or newer is needed, with venv" \
	  "and headers (Debian: apt-get install python3-venv python3-dev)" >&2; exit 1; }
	@test -n "$(CXX_FOUND)" || { echo "error: no C++ compiler on PATH (Debian: apt-get install g++)" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python $(PACKAGE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "onnxruntime>=1.20" "openvino>=2025"
	touch $@

# PyTorch goes first and pinned: left to itself pip chooses the newest, whose CUDA libraries take
# several gigabytes.
$(VENV)/.installed-dev: $(VENV)/bin/python $(PACKAGE)
	@test -z "$(TORCH)" || $(BIN)/python -c "import torch" 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" || \
	  echo "$(TORCH) cannot be installed: its tests will be skipped"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  $$($(BIN)/python -c "import torch" 2>/dev/null && echo "onnxscript>=0.5") -e ".[dev]"
	touch $@ $(VENV)/.installed
