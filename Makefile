# Needs only make and Python 3.11 or newer with its venv module. Everything else is set up in .venv.
.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo up test check format types bench bench-quick bench-long soak reference lock clean

BIN := .venv/bin

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-12s %s\n", $$1, $$2 }'

setup: ## Make .venv with Millpond and its local models (nothing to do: under a second)
	@scripts/setup

setup-dev:
	@scripts/setup dev

demo: setup ## Watch one real AI job take the whole road, a killed worker included
	@$(BIN)/millpond demo

up: setup ## Start everything on this machine: Postgres, API, worker
	@$(BIN)/millpond up

test: ## Run the whole test suite
	@scripts/test

check: setup-dev ## Format, lint, strict types, import layers
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q --confcutdir tests/house tests/house/test_layers.py

format: setup-dev ## Rewrite the code in the one format; fixes what the linter can fix safely
	@$(BIN)/ruff check --fix-only -q .
	@$(BIN)/ruff format .

bench: setup-dev ## Measure beside DBOS, PgQueuer, Celery and BullMQ; prints ratios against the bar (about 20 minutes)
	@scripts/peers
	@$(BIN)/python -m benchmarks.compare

bench-quick: setup-dev ## Measure submit, drain, three steps and idle dispatch in under 3 minutes
	@$(BIN)/python -m benchmarks.quick

bench-long: setup-dev ## Measure features, row-level security, waiting runs, a deep backlog, retention and steadiness (over an hour)
	@$(BIN)/python -m benchmarks.compare --only features,rls,waiting,backlog,retention,steadiness

soak: setup-dev ## Kill and stop workers for a quarter of an hour: nothing lost, nothing repeated, no limit passed (MILLPOND_SOAK_S, MILLPOND_FLOOD_S)
	@$(BIN)/python -m pytest -m soak --timeout 3600 -s tests/soak tests/property tests/engine

reference: setup-dev ## Write the tables of docs/ that follow from the code
	@$(BIN)/python scripts/reference.py

lock: ## Resolve every dependency anew into constraints.txt
	@scripts/lock

clean: ## Remove what was built here; data of `make up` stays
	@rm -rf .venv .venv-peers benchmarks/peers/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis .demo build dist benchmarks/out
	@find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
