# Every target sets itself up: a fresh clone needs Python >= 3.10 and a C++ compiler, nothing else.
# ARGS=... is passed on:  make test ARGS="tests/test_ops.py -k list"

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CONSTRAINTS := tools/constraints.txt
ARGS ?=

.PHONY: demo test sanitize bench gpu wheel lint format verify setup clean
.DEFAULT_GOAL := setup

# torch comes first and alone, so that nothing else decides its version.
$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	@touch $@

$(VENV)/tools.stamp: $(VENV)/torch.stamp pyproject.toml $(CONSTRAINTS)
	$(PIP) --constraint $(CONSTRAINTS) "setuptools>=77" ninja
	WEIGHTXFORM_CPU=0 $(PIP) --constraint $(CONSTRAINTS) --no-build-isolation --editable ".[dev]"
	@touch $@

CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')
$(VENV)/built.stamp: $(VENV)/tools.stamp setup.py $(filter csrc/%,$(CXX_FILES))
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

setup: $(VENV)/built.stamp

demo: setup
	$(BIN)/python -m weightxform demo --quick --output out/demo $(ARGS)

# A file of tests stays in one process. The folders with the long ones come first.
test: setup
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

sanitize: setup
	$(BIN)/python tests/simt/sanitize.py

bench: setup
	$(BIN)/python -m weightxform bench $(ARGS)

verify: setup
	$(BIN)/python -m weightxform verify $(ARGS)

# On a machine with a GPU, with what is installed there: no network, no environment of its own.
OUT ?= out/gpu
gpu:
	$(if $(filter file,$(origin PYTHON)),python3,$(PYTHON)) tools/gpu.py --out $(OUT) $(ARGS)

wheel: $(VENV)/tools.stamp
	$(BIN)/python -m build --no-isolation --outdir dist $(ARGS)

lint: $(VENV)/tools.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(VENV)/tools.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist out $(VENV) *.egg-info weightxform/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
