# make run    set up, train simulations/opt125m_hosl through `flwr run`, write runs/<time>-opt125m_hosl
# make test   set up, run the fast tests and the real Flower tests
# make lint   ruff and mypy
# make test-latest   the fast tests with the newest versions that pyproject.toml allows, in .venv-latest
# make fault-test   kill, slow down and cut off real processes (REPEAT=10: ten times each); long
# make docs   the documentation as a site, site/index.html
# make deploy-demo   SuperLink, three SuperNodes, TLS and authentication on this machine
# SIMULATION=simulations/quickstart make run    another simulation
# ARGS="-c steps=50 -c seed=1" make run         other run-config values

PYTHON ?= python3
VENV ?= .venv
LATEST ?= .venv-latest
REPEAT ?= 1
SIMULATION ?= simulations/opt125m_hosl
BIN := $(VENV)/bin

.PHONY: setup dev run deploy-demo docs test fast-test integration-test fault-test test-latest \
	lint clean

setup: $(VENV)/.ready
dev: $(VENV)/.dev

# what a run needs: no torchao, which says much wherever transformers finds and imports it
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "hosl-flower needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing hosl-flower and what it needs into $(VENV): some minutes ..."
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[simulation,tensorboard]'
	@touch $@

$(VENV)/.dev: $(VENV)/.ready
	@echo "installing what tests need, too ..."
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

run: setup
	$(BIN)/python -m hosl_flower simulate $(SIMULATION) $(ARGS)
	@echo "next: . $(BIN)/activate, then python -m hosl_flower report <the directory of results>"

deploy-demo: setup
	$(BIN)/python deploy/demo.py

docs: $(VENV)/.docs
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

test: fast-test integration-test

fast-test: dev
	$(BIN)/python -m pytest

integration-test: dev
	$(BIN)/python -m pytest -m slow
	$(BIN)/python -m pytest tests/integration --override-ini addopts='-q -n 2 --dist load'

fault-test: dev
	REPEAT=$(REPEAT) $(BIN)/python -m pytest tests/faults --override-ini addopts='-q --durations=0'

# made anew each time: what is newest changes. torch stays as it is pinned: pip would fetch a new
# release of it with gigabytes of CUDA, and its release decides the bits that some tests compare
test-latest:
	$(PYTHON) -m venv --clear $(LATEST)
	grep '^torch==' constraints.txt > $(LATEST)/constraints.txt
	$(LATEST)/bin/python -m pip install --quiet --upgrade --constraint $(LATEST)/constraints.txt --editable '.[dev]'
	@echo "not as in constraints.txt:"; \
		$(LATEST)/bin/python -m pip freeze --exclude-editable | grep -vxFf constraints.txt || true
	$(LATEST)/bin/python -m pytest

lint: dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(LATEST) site .mypy_cache .ruff_cache .pytest_cache
