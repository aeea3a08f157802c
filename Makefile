# Every chore of the project. Needs Python >= 3.11 with pip and venv; everything else goes into .venv, at the versions
# of requirements.lock. `make` alone lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that run the tests, one thread each: more threads than cores would only wait for one another.
JOBS ?= 2
# The full `steadynorm compare` with fewer seeds (3 instead of 10, tuned on 1 instead of 3) and steps (400, not 2000).
DEMO_DIR := steadynorm-report
DEMO_FLAGS ?= --seeds 3 --tuning-seeds 1 --steps 400
# torch is moved by hand, never by `make lock`: what the layer promises is measured against one version of it.
TORCH := 2.13.0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test coverage bench doctest lint types docs install lock clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "make %-9s %s\n", $$1, $$2 }'

demo: $(VENV)/.installed-runtime ## train one network with and without batch norm (a short run) and write the report
	$(BIN)/steadynorm compare $(DEMO_FLAGS) --out $(DEMO_DIR)
	@echo "The report: $(CURDIR)/$(DEMO_DIR)/report.html"

test: $(VENV)/.installed-test ## run every test and doctest
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadgroup

# By itself, as tracing makes the tests take half as long again.
coverage: $(VENV)/.installed-test ## run them with coverage, which must be 95 % of lines
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadgroup --cov --cov-report=term

bench: $(VENV)/.installed-runtime $(VENV)/.installed-docs ## measure speed on an idle machine (half an hour) and write the tables
	$(BIN)/python benchmarks/cpu.py
	$(BIN)/python benchmarks/training_steps.py
	$(BIN)/python benchmarks/cpu_table.py

doctest: $(VENV)/.installed-test ## run the docstrings' examples alone (`make test` runs them too)
	$(BIN)/pytest src

lint: $(VENV)/.installed-lint types ## check style, import direction and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

types: $(VENV)/.installed-lint $(VENV)/.installed-test ## check the types alone
	$(BIN)/pyright

docs: $(VENV)/.installed-docs ## build the site into site/, warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

install: $(VENV)/.installed-test,lint,docs ## install everything at once, for development
	@touch $(VENV)/.installed-runtime $(VENV)/.installed-test $(VENV)/.installed-lint $(VENV)/.installed-docs

# One rule serves every set of extras. The build backend comes from the lock as well, hence no build isolation.
$(VENV)/.installed-%: pyproject.toml requirements.lock | $(VENV)/.created
	$(BIN)/python -m pip install -c requirements.lock hatchling
	$(BIN)/python -m pip install -c requirements.lock --no-build-isolation -e '$(if $(filter runtime,$*),.,.[$*])'
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "steadynorm needs Python >= 3.11, and $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing)." \
	    "Install one, then name it: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot make a virtual environment:" \
	    "on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	@touch $@

lock: ## write requirements.lock anew, from the newest versions that pyproject.toml allows
	@rm -rf $(VENV)-lock
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install hatchling 'torch==$(TORCH)' -e '.[test,lint,docs]'
	{ echo "# Exact versions for every extra, used as pip's constraints (pip install -c). Written by \`make lock\`."; \
	  $(VENV)-lock/bin/python -m pip freeze --all --exclude-editable \
	  | sed 's/+.*//' | grep -vE '^(nvidia-|cuda-|pip=)'; } > requirements.lock.new
	mv requirements.lock.new requirements.lock
	rm -rf $(VENV)-lock

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) $(VENV)-lock site dist $(DEMO_DIR) .coverage .pytest_cache .hypothesis .ruff_cache .import_linter_cache
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
