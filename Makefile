# Each target installs what it needs into .venv first, on any machine with Python and make:
#   make demo   the whole pipeline in a few minutes: photos -> pre-training -> bundle -> timm -> Detectron2 (DATA=folder for yours)
#   make test   what has to hold before a change, in minutes
#   make test-all   that, the tests that take longer than ten seconds each, and every released file in its full size, 11 GB
#               one after the other; CI runs this
#   make docs   the documentation as a site, in build/site
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
DATA ?=

.PHONY: demo test test-all docs lint clean

demo: $(VENV)/.demo
	$(BIN)/clove-hub demo --out $(OUT) $(if $(DATA),--data "$(DATA)")

test: $(VENV)/.test lint
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile -m "not slow and not long"

test-all: test
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "slow or long"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/mkdocs build --strict

# torch and torchvision come in one call, so that pip resolves a pair that fits.
$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo]" torchvision
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist *.egg-info
