# Fresh machine → environment → demo or tests. Needs Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# On a machine without a GPU, CONSTRAINTS pins a CPU build of torch; `make CONSTRAINTS= …` leaves the choice to pip.
CONSTRAINTS ?= constraints-ci.txt
export UV_FIND_LINKS := $(or $(UV_FIND_LINKS),$(PIP_FIND_LINKS))
export UV_SYSTEM_CERTS ?= true
# Tests run in one process per core; threads inside them would only get in each other's way.
export OMP_NUM_THREADS ?= 1
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile
INSTALL := $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[dev]'

.PHONY: env demo test slurm-test test-kills lint check format clean

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python $(INSTALL) || $(BIN)/python -m pip install --quiet $(INSTALL)
	touch $@

demo: env
	$(BIN)/python -m scripts.demo

test: env
	$(PYTEST)

slurm-test: env
	$(BIN)/python -m pytest tests/slurm

test-kills: env
	KILLS=$${KILLS:-50} $(BIN)/python -m pytest tests/sharding/test_kill.py -m slow -s

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint
	$(PYTEST) -m "not slow" -q -x

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache
