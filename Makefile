# make demo | test | style | check | bench | clean: each sets up what it needs in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The first is installed alone: any other package that asks for torch would otherwise bring a CUDA build of several GB.
TORCH ?= torch==2.13.0

# Two OpenMP threads that spin while they wait slow a run down four times when another program wants a core
# (quickstart, 40 steps: 85 s spinning, 21 s passive, two shared cores, 2026-11).
export OMP_WAIT_POLICY := PASSIVE

.PHONY: setup demo test style check bench clean

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[train,dev]"
	touch $(READY)

demo: $(READY)
	rm -rf out/quickstart
	$(BIN)/smt train configs/quickstart.yaml

test: $(READY)
	$(BIN)/python -m pytest

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest tests/test_imports.py

bench: $(READY)
	$(BIN)/python benchmarks/step_time.py

clean:
	rm -rf $(VENV) build out *.egg-info
