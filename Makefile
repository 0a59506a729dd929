PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/requirements-dev.txt
JOBS := 10000000
TIMES := 10
SECONDS := 600
SEED := 1
MODULES := pqueue.py
SEEDS := 1
N := 60
PYTHONS :=
ATTACKS := (fuzz or histories or power_loss or model_allows or QueueMachine) and not mutants

.PHONY: help run quick contract test check format sql mutants screenshots bench soak attack lock clean

help:  ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

run: $(VENV)/requirements.txt  ## Run the whole system in the foreground; Ctrl-C stops it
	@umask 077; mkdir -p var/log var/supervisor.d; $(BIN)/python ops.py --check && PATH="$(CURDIR)/$(BIN):$$PATH" exec $(BIN)/supervisord -n -c supervisord.conf

quick: $(READY)  ## Check format, lint and types, and run the contract suite on SQLite and the model test
	@$(BIN)/python tests/run.py quick

contract: $(READY)  ## Run the contract suite on every backend
	@$(BIN)/python tests/run.py contract

test: $(READY)  ## Run every test; under each Python of PYTHONS also the contract suite, bare
	@$(BIN)/python tests/run.py all $(PYTHONS)

check: $(READY)  ## Check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

sql: $(READY)  ## Write docs/postgres.sql, the statements that PostgreSQL receives
	PYTHONPATH=. $(BIN)/python tests/test_statements.py

mutants: $(READY)  ## Test N random mutants of MODULES, and list those that survive; MODULES="FILE …" N=N SEEDS="N …"
	$(BIN)/python tests/random_mutants.py $(MODULES) --number $(N) --seeds $(SEEDS)

screenshots: $(READY)  ## Save screenshots of the dashboard in docs; needs Chromium
	PYTHONPATH=. $(BIN)/python tests/screenshots.py docs

bench: $(READY)  ## Run the benchmark against bare SQLite and other queues
	$(BIN)/python -m bench

soak: $(READY)  ## Put 10 million jobs through the queue, then attack it at random TIMES as long; JOBS=N TIMES=N
	PYTHONPATH=. $(BIN)/python tests/soak.py --jobs $(JOBS)
	PQUEUE_SOAK=$(TIMES) $(BIN)/python -m pytest -s -k "$(ATTACKS)" tests

attack: $(READY)  ## Attack the whole system for SECONDS, then check every job; SECONDS=N SEED=N
	PYTHONPATH=. $(BIN)/python tests/attack.py --seconds $(SECONDS) --seed $(SEED)

COMPILE := UV_CUSTOM_COMPILE_COMMAND="make lock" uv pip compile --quiet --upgrade --universal --python-version 3.10 \
	--generate-hashes pyproject.toml
lock:  ## Lock the newest versions that pyproject.toml allows; needs uv
	$(COMPILE) --extra cli --extra dashboard --extra supervisor -o requirements.txt
	$(COMPILE) --extra all --group dev -c requirements.txt -o requirements-dev.txt

clean:  ## Remove the virtual environment and caches; var/ stays
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info

$(VENV)/%.txt: %.txt  # a copy of the installed requirements
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@cp $< $@
