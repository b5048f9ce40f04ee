# make demo | test | bench | gpu-report | lint | format | wheel | clean
#
# Every target sets up what it needs in its own virtual environment. On a machine where plain torch
# would pull CUDA packages that are not wanted, set TORCH, e.g. TORCH="torch==2.13.0+cpu --index-url …".

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# One architecture for development; wheels have all of CMakeLists.txt.
KVEVICT_CUDA_ARCHS ?= 90a-real
export PIP_DISABLE_PIP_VERSION_CHECK = 1

BIN := $(VENV)/bin
SOURCES := $(shell find csrc third_party/cmake tests/host tests/emulation -name '*.cpp' -o -name '*.h' -o -name '*.cu' \
  -o -name '*.cuh' -o -name '*.map' -o -name '*.cmake' -o -name CMakeLists.txt) CMakeLists.txt setup.py pyproject.toml
CPP_SOURCES := $(shell find csrc tests bench -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
INSTALL := $(BIN)/pip install --quiet --no-build-isolation --use-pep517

.PHONY: demo test bench gpu-report lint format wheel clean

# The trained model of this repository; for any other one, or timings: $(BIN)/python -m kvevict.demo.
demo: $(VENV)/.library
	$(BIN)/python -m bench.fidelity.demo --out demo-out $(ARGS)

test: lint
	$(BIN)/python -m pytest tests $(ARGS)

bench: $(VENV)/.library
	$(BIN)/python -m pytest bench $(ARGS)

# With the Python, torch and CUDA that the machine has, and no network: no virtual environment.
gpu-report:
	$(PYTHON) -m bench.gpu.report --out $(or $(OUT),build/gpu) $(ARGS)

lint: $(VENV)/.library
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)
	$(BIN)/mypy

format: $(VENV)/.requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

wheel: $(VENV)/.requirements
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip wheel --no-build-isolation --use-pep517 --no-deps --wheel-dir dist .

clean:
	rm -rf build dist demo-out kvevict/lib kvevict.egg-info tests/host/_kvevict_host*.so tests/emulation/lib $(VENV)

$(VENV)/.requirements: third_party/build-requirements.txt third_party/test-requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -r third_party/build-requirements.txt -r third_party/test-requirements.txt
	touch $@

$(VENV)/.library: $(VENV)/.requirements $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" KVEVICT_HOST_MODULE=ON KVEVICT_EMULATION=ON \
	  KVEVICT_CUDA_ARCHS=$(KVEVICT_CUDA_ARCHS) $(INSTALL) -e .
	touch $@
