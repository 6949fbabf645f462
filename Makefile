# make demo   from nothing to a measured chain on this machine
# make test   set-up, then the test suite       make check   format, lint and types too (what .ci/run runs)
# make coverage   which lines the quick tests reach; engines, ranks and programs behind walls run in processes that it does not see
# make gpu-check   what only a card can show, in under ten minutes; on a fresh clone: make gpu-check LOCK=locks/gpu.txt (docs/cards.md)
# make bench  the tables of docs/benchmarks.md   make bench-sandbox   those of docs/sandbox.md
# make reproduce   small reproductions of methods beside their controls, within benchmarks/reproduce/budget.yaml; goes on where it stopped
#   make reproduce SWEEPS=grid/correct   one file of the full grid, which wants a card
#   make reproduced   docs/reproduce.md, and what `selfkd recipes` says of it, from the results that are there
# make docs   the reference of recipes, and the site of docs/ in site/; fails on a broken link
PYTHON ?= $(shell command -v python3.11 || command -v python3)
LOCK ?= locks/cpu.txt
BIN := .venv/bin
REPRODUCE := benchmarks/reproduce
SWEEPS ?= sums quartz
GRID := sums correct number match translation code

.PHONY: demo test check coverage bench bench-sandbox gpu-check nightly reproduce reproduced docs clean

demo: .venv/.engine
	@$(BIN)/selfkd run quickstart

test: .venv/.dev
	$(BIN)/pytest

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

coverage: .venv/.dev
	$(BIN)/pytest -m "not gpu and not nightly and not real" --cov --cov-report=term

nightly: .venv/.dev
	$(BIN)/pytest -m "not gpu"

bench: .venv/.dev
	$(BIN)/python benchmarks/run.py

bench-sandbox: .venv/.dev
	$(BIN)/python benchmarks/sandbox.py

gpu-check: .venv/.engine
	@$(BIN)/python benchmarks/gpu_check.py

reproduce: .venv/.engine
	for sweep in $(SWEEPS); do $(BIN)/selfkd sweep $(REPRODUCE)/$$sweep.yaml && $(MAKE) reproduced || exit 1; done

# The results of sums lie in results.jsonl, those of another sweep beside its file.
reproduced:
	for sweep in $(SWEEPS); do \
	  $(BIN)/selfkd compare $(REPRODUCE)/$$sweep.yaml --jsonl > $(REPRODUCE)/.results || exit 1; \
	  mv $(REPRODUCE)/.results $(REPRODUCE)/$$(test $$sweep = sums && echo results || echo $$sweep).jsonl; done
	{ cat $(REPRODUCE)/head.md; echo; $(BIN)/selfkd compare $(REPRODUCE)/sums.yaml --markdown; \
	  echo; cat $(REPRODUCE)/quartz.md; echo; $(BIN)/selfkd compare $(REPRODUCE)/quartz.yaml --markdown; \
	  echo; cat $(REPRODUCE)/grid.md; \
	  for sweep in $(GRID); do printf '\n### grid/%s\n\n' $$sweep; $(BIN)/selfkd compare $(REPRODUCE)/grid/$$sweep.yaml --markdown || exit 1; done; \
	} > $(REPRODUCE)/.page && mv $(REPRODUCE)/.page docs/reproduce.md
	$(BIN)/python -m selfkd.report.standing $(REPRODUCE) > $(REPRODUCE)/.standing && mv $(REPRODUCE)/.standing recipes/standing.json

docs: .venv/.dev
	$(BIN)/python -m selfkd.recipe.reference > docs/recipes.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

.venv/.engine: $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "selfkd needs Python 3.11 or newer: make demo PYTHON=/path/to/python3.11")'
	@$(PYTHON) locks/install.py $(LOCK) .
	@touch $@

.venv/.dev: .venv/.engine locks/dev.txt
	@$(PYTHON) locks/install.py locks/dev.txt
	@touch $@

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
