# python3 (3.11 or newer), make and git are enough: every target makes its environment in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help reproduce test slow lab lint bench mini-world clean

help:
	@echo "make reproduce  run every notebook at the default size (PROFILE=smoke|mini|paper)"
	@echo "make test       the test suite        make slow   the tests that need minutes"
	@echo "make lab        JupyterLab            make lint   ruff and nbstripout"
	@echo "make bench      the benchmarks        make mini-world  train and sample the mini world again (hours)"

# uv installs in seconds where the index has it; plain pip does the same slowly.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet uv 2>/dev/null || echo "uv is not to be had: using pip"
	@if $(BIN)/python -m uv --version >/dev/null 2>&1; \
	then $(BIN)/python -m uv pip install --quiet --python $(BIN)/python -e '.[test,dist]'; \
	else $(BIN)/python -m pip install --quiet -e '.[test,dist]'; fi
	@touch $@

reproduce: $(READY)
	$(BIN)/rsd reproduce --profile $(or $(PROFILE),mini)

test: $(READY)
	$(BIN)/python -m pytest -m "not slow"

slow: $(READY)
	$(BIN)/python -m pytest -m slow --timeout=1800

lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir=notebooks

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify notebooks/*.ipynb

bench: $(READY)
	@for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

# Everything below data/mini, in the order of what needs what; a step that is done is not done again. Needs npm once, for the sprites.
WORLD := data/mini/build
mini-world: $(READY)
	$(BIN)/python $(WORLD)/train_autoencoder.py
	$(BIN)/python $(WORLD)/train_clip.py
	$(BIN)/python $(WORLD)/train_unet.py
	$(BIN)/python $(WORLD)/train_encoder.py vit
	$(BIN)/python $(WORLD)/train_encoder.py swin
	$(BIN)/python $(WORLD)/train_blip.py
	$(BIN)/python $(WORLD)/train_judge.py
	$(BIN)/python $(WORLD)/sample_dataset.py
	$(BIN)/python $(WORLD)/measure.py
	$(BIN)/python $(WORLD)/contact_sheet.py

clean:
	rm -rf $(VENV) data/cache
