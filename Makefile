# Needs Python 3.11+ and make; everything else is fetched by the first target that needs it.
#   make demo PYTHON=python3.12     another interpreter
#   make demo TORCH=cpu             PyTorch without CUDA (about 1 GB on disk instead of 6)

BIN := .venv/bin
# The stamp is newer than what it was made from exactly when the environment is up to date.
STAMP := .venv/.set-up
SOURCES := accrual streams consumers trainer examples tests bench scripts

export PYTHON TORCH

.DEFAULT_GOAL := help
.PHONY: help setup demo test kill-tests chaos chaos-sink lint types constraints clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and fetch the development broker (a second run does nothing)

$(STAMP): pyproject.toml constraints.txt accrual/kafka.lock scripts/setup.sh
	@sh scripts/setup.sh
	@touch $@

demo: $(STAMP) ## run the main job: the whole loop on real data, a few minutes; ARGS="--stream credit-risk" for the other stream
	@$(BIN)/accrual demo $(ARGS)

test: $(STAMP) ## run all tests, as two processes; ARGS="-m 'not slow'" for the quick ones
	@$(BIN)/python -m pytest --numprocesses 2 $(ARGS)

kill-tests: $(STAMP) ## kill -9 every worker at random moments, COUNT times each (20 unless given)
	@ACCRUAL_KILL_COUNT=$(or $(COUNT),20) $(BIN)/python -m pytest tests/system/test_kill.py $(ARGS)

chaos: $(STAMP) ## faults of all kinds, SEEDS=200 times (10 unless given), FROM=0, JOBS=4 at once; see docs/chaos.md
	@$(BIN)/python -m tests.chaos.run --seeds $(or $(SEEDS),10) --from $(or $(FROM),0) $(if $(JOBS),--jobs $(JOBS))

chaos-sink: $(STAMP) ## faults of sink, catalog and store, SEEDS=200 times (10 unless given), FROM=0, JOBS=2 at once
	@$(BIN)/python -m tests.chaos_sink.run --seeds $(or $(SEEDS),10) --from $(or $(FROM),0) $(if $(JOBS),--jobs $(JOBS))

lint: $(STAMP) ## style, formatting and import rules
	@$(BIN)/ruff check $(wildcard $(SOURCES))
	@$(BIN)/ruff format --check $(wildcard $(SOURCES))
	@$(BIN)/lint-imports

types: $(STAMP) ## mypy --strict
	@$(BIN)/mypy

constraints: $(STAMP) ## pin anew all versions that pyproject.toml allows (needs uv)
	@sh scripts/constraints.sh

clean: ## remove what set-up, runs and tools left in the checkout
	@if [ -x $(BIN)/accrual ]; then $(BIN)/accrual broker stop; fi
	rm -rf .venv .accrual .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache report.html \
		bench/peers/kafka_streams/target
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
