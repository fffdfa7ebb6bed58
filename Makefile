# Everything runs in .venv, made here. The README shows the pip lines for those who do not use make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart test test-slow lint benchmark clean

quickstart: $(VENV)/.core
	$(BIN)/lightning-qk fit --config configs/quickstart.yaml

test: $(VENV)/.test
	$(BIN)/python -m pytest

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmark: $(VENV)/.core
	$(BIN)/python benchmarks/run.py

# torch first and alone: the pinned version may be at hand as a CPU build, where a range would bring CUDA.
$(VENV)/.core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e .
	touch $@

$(VENV)/.test: $(VENV)/.core
	$(INSTALL) -e ".[test]"
	touch $@

$(VENV)/.lint: $(VENV)/.core
	$(INSTALL) -e ".[lint]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
