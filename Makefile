# The two commands a newcomer needs are `make demo` and `make test`; everything installs into .venv.
# PYTHON names the interpreter that makes it (3.11 or newer), VENV another place for it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
SAMPLES ?= assets/samples/cat.jpg assets/samples/rocket.jpg
TARGET ?= dog
PYTEST_ARGS ?= -n auto --dist loadscope

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PIP_ROOT_USER_ACTION := ignore

.PHONY: help demo install dev test test-slow test-lowest lint check format docs bench bench-short comparison wheel sbom audit fuzz clean distclean

help:  ## say what can be made
	@sed -n 's/^\([a-z-]*\):.*## /\1 - /p' $(MAKEFILE_LIST)

demo: $(VENV)/.installed  ## how would a cat, and a rocket, have to change to become a dog? Beside a plain model
	$(BIN)/ratioctl counterfactual $(SAMPLES) --target $(TARGET) --eps 0.5..3 --model cifar10-ratio --model cifar10-plain --out demo
	@echo; echo "Look at these:"; \
	echo "  demo/index.html            both models side by side, as a page for the browser"; \
	echo "  demo/*/$(TARGET)/grid.png      a photograph, then what $(TARGET) would take, budget by budget;"; \
	echo "                             folders with -2 hold the plain model's answers: noise"; \
	echo "  demo/counterfactuals.json  every number behind them"

install: $(VENV)/.installed  ## make .venv and install the package with everything it can do, editable

dev: $(VENV)/.dev  ## the same with the development extras

test: $(VENV)/.dev  ## the whole suite, less the tests marked slow; PYTEST_ARGS="-k recipes" narrows it
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(VENV)/.dev  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(VENV)/.dev  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test  ## lint and tests: what must pass before a commit

docs: $(VENV)/.docs  ## build the documentation site into build/site
	$(BIN)/python -m tools.generate_reference
	$(BIN)/zensical build --clean

format: $(VENV)/.dev  ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

BENCHES := $(addprefix benchmarks.,training counterfactual scoring startup growth memory) experiments.digits
SHORT := $(BENCHES) $(addprefix experiments.,validity sparsity transfer)

bench: $(VENV)/.dev  ## the benchmarks, one after the other; DATA=cifar10.tar.xz:test adds AutoAttack's
	@set -e; for name in $(BENCHES); do echo "== $$name"; $(BIN)/python -m $$name; done
	@$(if $(DATA),$(BIN)/python -m benchmarks.autoattack $(DATA))

bench-short: $(VENV)/.dev  ## benchmarks and studies at small sizes, ratios beside the stored ones; no timing fails
	@set -e; for name in $(SHORT); do $(BIN)/python -m $$name --short > /dev/null; done

# About seven hours of one core, nearly three of them for fine-tune; given again, it goes on where it stopped. The sets are yours to name.
SOURCES := --train $(TRAIN) --test $(TEST) --outside $(OUTSIDE) --ood $(OOD)
comparison: $(VENV)/.dev  ## Table 1 with our recipes: TRAIN=.. TEST=.. OUTSIDE=".." OOD="NAME=SOURCE .."
	$(BIN)/python -m experiments.comparison digits --json runs/comparison-digits.json
	$(BIN)/python -m experiments.comparison small $(SOURCES) --json runs/comparison-small.json
	$(BIN)/python -m experiments.comparison fine-tune $(SOURCES) --json runs/comparison-fine-tune.json
	@set -e; for what in digits small fine-tune; do $(BIN)/python -m experiments.comparison_report runs/comparison-$$what.json; done

# Files in the wheel carry the date of the last commit, so the same commit makes the same bytes.
wheel: $(VENV)/.dev  ## dist/*.whl, recipes and assets inside; the same bytes every time
	rm -rf dist
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct 2> /dev/null || echo 1577836800) $(BIN)/python -m build --wheel

# What the tests ran with, less what only the development needs: exact versions with their hashes.
build/requirements.txt: $(VENV)/.dev $(VENV)/.release
	mkdir -p build
	$(BIN)/python -m pip freeze --exclude-editable > build/constraints.txt
	$(BIN)/uv pip compile -q --python $(BIN)/python --extra torch --extra sign --constraint build/constraints.txt --generate-hashes \
	  --no-header pyproject.toml -o $@

sbom: wheel build/requirements.txt  ## dist/ratioctl.cdx.json: the wheel's bill of materials (CycloneDX), and its pins
	$(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --mc-type application --output-reproducible \
	  --of JSON -o dist/ratioctl.cdx.json build/requirements.txt
	cp build/requirements.txt dist/

audit: build/requirements.txt  ## look these versions up in the advisory databases (needs the network)
	$(BIN)/pip-audit --requirement build/requirements.txt --require-hashes --disable-pip --strict

# Warnings are let pass: yesterday's libraries warn about today's Python. The browser's tests are left out:
# yesterday's Playwright does not know today's Chromium.
LOWEST := build/lowest
LOWEST_ARGS ?= -q -W default --ignore=tests/browser
test-lowest: $(VENV)/.release  ## the suite with the lowest versions that pyproject.toml allows (Python 3.11)
	$(BIN)/uv venv -q --allow-existing --python 3.11 $(LOWEST)
	$(BIN)/uv pip install -q --python $(LOWEST)/bin/python --resolution lowest-direct -e '.[dev]'
	$(LOWEST)/bin/python -m pytest -p no:cacheprovider $(LOWEST_ARGS)

fuzz: $(VENV)/.dev  ## the parsers that are ours, 100,000 inputs each at most, two minutes each at most
	$(BIN)/python -m pip install -q -e '.[fuzz]'
	$(BIN)/python -m tools.fuzz

clean:  ## remove what was built and measured, keep .venv and runs
	rm -rf build dist demo counterfactuals reports *.egg-info
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## remove .venv too
	rm -rf $(VENV)

# The stamps carry the date of the last successful install: again only after pyproject.toml has changed.
$(VENV)/.installed: pyproject.toml
	@python=; for candidate in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
	  if command -v $$candidate > /dev/null 2>&1 \
	    && $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then python=$$candidate; break; fi; \
	done; \
	[ "$$python" ] || { echo "No Python 3.11 or newer found. Install one, or name it: make PYTHON=/path/to/python3"; exit 1; }; \
	echo "$$python -m venv $(VENV)"; $$python -m venv $(VENV) \
	  || { echo "$$python cannot make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install -e '.[torch]'
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install -e '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(BIN)/python -m pip install -e '.[docs]'
	@touch $@

$(VENV)/.release: $(VENV)/.installed
	$(BIN)/python -m pip install -e '.[release]'
	@touch $@
