# Everything runs in .venv, which the first command makes. Only PyPI (and npm, for pyright) is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TESTS := $(BIN)/python -m pytest -n 2 --dist loadgroup
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-all support check docs format benchmark compare dist clean

demo: $(VENV)/.demo  ## fine-tune a real model on real data with and without LoRA-DA
	$(BIN)/python scripts/demo.py

test: $(VENV)/.dev  ## the fast tests
	OMP_NUM_THREADS=1 $(TESTS) -m "not slow and not multi_rank and not gpu"

test-all: $(VENV)/.dev  ## what is slow or needs two processes, and every row of docs/support.md
	OMP_NUM_THREADS=1 $(TESTS) -m "(slow or multi_rank or support) and not gpu"

support: $(VENV)/.dev  ## every row of docs/support.md alone
	OMP_NUM_THREADS=1 $(TESTS) -m "support and not gpu"

check: $(VENV)/.dev docs  ## format, lint, types, import floors, the links of the documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

docs: $(VENV)/.dev  ## the documentation as a site, in build/site; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmark: $(VENV)/.demo  ## what an initialisation costs, and how it scales, on a quiet machine
	$(BIN)/python benchmarks/initialization_cost.py
	$(BIN)/python benchmarks/scaling.py

compare: $(VENV)/.demo  ## LoRA-DA, plain LoRA and PEFT's starts on Python's functions: hours, and it goes on where it was stopped
	$(BIN)/python benchmarks/compare_inits.py --held_out functions --statistics .cache/statistics \
		--design benchmarks/designs/compare.json --output outputs/compare.jsonl

dist: $(VENV)/.dev  ## what is published: sdist and wheel, checked
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV): torch and what else it takes, some minutes."
	@$(BIN)/python -m pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV): torch and what else it takes, some minutes."
	@$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:  ## what can be made again in minutes: the hours of measurements in outputs and .cache stay
	rm -rf $(VENV) build *.egg-info
