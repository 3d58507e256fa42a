# Start with `make demo` and `make test`; everything is installed into .venv.
# PYTHON: the interpreter (3.11 or newer). VENV: another folder for the environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
SAMPLES ?= assets/samples/cat.jpg assets/samples/rocket.jpg
TARGET ?= dog
PYTEST_ARGS ?= -n auto --dist loadscope
KATEX := docs/javascripts/katex

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PIP_ROOT_USER_ACTION := ignore

.PHONY: help demo install dev test test-slow test-lowest lint check format docs bench bench-short comparison wheel sbom audit fuzz clean distclean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1 - /p' $(MAKEFILE_LIST)

demo: $(VENV)/.installed  ## counterfactuals of a cat and a rocket towards dog, by the default model and a plain one
	$(BIN)/ratioctl counterfactual $(SAMPLES) --target $(TARGET) --eps 0.5..3 --steps 250 \
	  --model cifar10-ratio --model cifar10-plain --out demo
	@echo; echo "Look at these:"; \
	echo "  demo/index.html            both models side by side, as a page for the browser"; \
	echo "  demo/*/$(TARGET)/grid.png      a photograph, then what $(TARGET) would take, budget by budget;"; \
	echo "                             folders with -2 hold the plain model's answers: noise"; \
	echo "  demo/counterfactuals.json  every number behind them"

install: $(VENV)/.installed  ## create .venv and install the package with all its features, editable

dev: $(VENV)/.dev  ## the same with the development extras

test: $(VENV)/.dev  ## all tests except those marked slow; PYTEST_ARGS="-k recipes" selects some
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(VENV)/.dev  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(VENV)/.dev  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test  ## lint and tests: what must pass before a commit

docs: $(VENV)/.docs $(KATEX)/katex.min.js  ## build the documentation site into build/site (needs npm)
	$(BIN)/python -m tools.generate_reference
	$(BIN)/python -m tools.gallery
	$(BIN)/zensical build --clean

format: $(VENV)/.dev  ## format the code and apply automatic fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

BENCHES := $(addprefix benchmarks.,training counterfactual explain scoring serve startup growth memory distributed collections) experiments.digits
SHORT := $(BENCHES) $(addprefix experiments.,validity sparsity transfer graph_search)

bench: $(VENV)/.dev  ## the benchmarks, one after the other; DATA=cifar10.tar.xz:test adds AutoAttack's
	@set -e; for name in $(BENCHES); do echo "== $$name"; $(BIN)/python -m $$name; done
	@$(if $(DATA),$(BIN)/python -m benchmarks.autoattack $(DATA))

bench-short: $(VENV)/.dev  ## benchmarks and studies at small sizes, ratios beside the stored ones; no timing fails
	@set -e; for name in $(SHORT); do $(BIN)/python -m $$name --short > /dev/null; done

# About seven hours of one core, nearly three of them for fine-tune; an interrupted run continues.
SOURCES := --train $(TRAIN) --test $(TEST) --outside $(OUTSIDE) --ood $(OOD)
comparison: $(VENV)/.dev  ## Table 1 with our recipes: TRAIN=.. TEST=.. OUTSIDE=".." OOD="NAME=SOURCE .."
	$(BIN)/python -m experiments.comparison digits --json runs/comparison-digits.json
	$(BIN)/python -m experiments.comparison small $(SOURCES) --json runs/comparison-small.json
	$(BIN)/python -m experiments.comparison fine-tune $(SOURCES) --json runs/comparison-fine-tune.json
	@set -e; for what in digits small fine-tune; do $(BIN)/python -m experiments.comparison_report runs/comparison-$$what.json; done

# Files in the wheel have the date of the last commit, so builds of a commit are identical.
wheel: $(VENV)/.dev  ## dist/*.whl with recipes and assets; reproducible
	rm -rf dist
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct 2> /dev/null || echo 1577836800) $(BIN)/python -m build --wheel

# The versions that the tests ran with, without development tools: pinned, with hashes.
build/requirements.txt: $(VENV)/.dev $(VENV)/.release
	mkdir -p build
	$(BIN)/python -m pip freeze --exclude-editable > build/constraints.txt
	$(BIN)/uv pip compile -q --python $(BIN)/python --extra torch --extra sign --constraint build/constraints.txt --generate-hashes \
	  --no-header pyproject.toml -o $@

sbom: wheel build/requirements.txt  ## dist/ratioctl.cdx.json: the wheel's bill of materials (CycloneDX), and its pins
	$(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --mc-type application --output-reproducible \
	  --of JSON -o dist/ratioctl.cdx.json build/requirements.txt
	cp build/requirements.txt dist/

audit: build/requirements.txt  ## check these versions against the advisory databases (needs the network)
	$(BIN)/pip-audit --requirement build/requirements.txt --require-hashes --disable-pip --strict

# Warnings are not errors here: old libraries warn about new Python versions. Browser tests are left out:
# an old Playwright does not support the current Chromium.
LOWEST := build/lowest
LOWEST_ARGS ?= -q -W default --ignore=tests/browser
test-lowest: $(VENV)/.release  ## the suite with the lowest versions that pyproject.toml allows (Python 3.11)
	$(BIN)/uv venv -q --allow-existing --python 3.11 $(LOWEST)
	$(BIN)/uv pip install -q --python $(LOWEST)/bin/python --resolution lowest-direct -e '.[dev]'
	$(LOWEST)/bin/python -m pytest -p no:cacheprovider $(LOWEST_ARGS)

fuzz: $(VENV)/.dev  ## fuzz our own parsers: at most 100,000 inputs and two minutes each
	$(BIN)/python -m pip install -q -e '.[fuzz]'
	$(BIN)/python -m tools.fuzz

clean:  ## remove build and report folders; keep .venv and runs
	rm -rf build dist demo counterfactuals reports *.egg-info
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## remove .venv too
	rm -rf $(VENV)

# The stamps record the last successful install; it is repeated only after pyproject.toml has changed.
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

# Equations are rendered by a copy of KaTeX, so that the site works offline and contacts no other host.
$(KATEX)/katex.min.js:
	@command -v npm > /dev/null || { echo "npm is missing, which fetches KaTeX. Install Node.js."; exit 1; }
	npm install --silent --no-audit --no-fund --ignore-scripts --prefix build/katex katex@0.16.22
	mkdir -p $(KATEX)/fonts
	cp build/katex/node_modules/katex/dist/fonts/*.woff2 $(KATEX)/fonts
	cp build/katex/node_modules/katex/LICENSE build/katex/node_modules/katex/dist/katex.min.css $(KATEX)
	cp build/katex/node_modules/katex/dist/katex.min.js $@

$(VENV)/.release: $(VENV)/.installed
	$(BIN)/python -m pip install -e '.[release]'
	@touch $@
