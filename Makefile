# python3 (3.11 or newer), make and git are enough: every target makes its environment in .venv.
PYTHON ?= python3
PROFILE ?= mini
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Where this is set, each of a run's many processes compiles 2,500 modules again: 10 s.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help reproduce publish publish-real test slow lab kernel book lint bench mini-world clean

help:
	@echo "make reproduce  every notebook, results below runs/ (PROFILE=smoke|mini|paper, JOBS=2)"
	@echo "make test       the test suite        make slow     the tests that need minutes"
	@echo "make lab        JupyterLab            make lint     ruff and nbstripout"
	@echo "make book       executed notebooks as a site    make kernel  for a JupyterLab started elsewhere"
	@echo "make publish    what figures/ and the README's tables hold (hours; resumes)"
	@echo "make bench      the benchmarks        make mini-world  train and sample the mini world again (hours)"

# uv installs in seconds where the index has it; plain pip does the same slowly.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet uv 2>/dev/null || echo "uv is not to be had: using pip"
	@if $(BIN)/python -m uv --version >/dev/null 2>&1; \
	then $(BIN)/python -m uv pip install --quiet --python $(BIN)/python -e '.[test,dist,real,book]'; \
	else $(BIN)/python -m pip install --quiet -e '.[test,dist,real,book]'; fi
	@touch $@

# --- notebooks side by side: each waits for those whose runs it reads ------------------------------

CORES ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
JOBS ?= $(shell if command -v nvidia-smi >/dev/null || [ $(CORES) = 1 ]; then echo 1; else echo 2; fi)
# A notebook that runs beside another takes its share of the cores.
SHARE = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(( $(CORES) / $(JOBS) ))}
# In this order make starts what is ready; what takes longest stands early.
NUMBERS := 00 03 01 02 04 08 05 07 06 09 10
RUNS := $(NUMBERS:%=run-%)

.PHONY: $(RUNS) notebooks
run-01 run-02 run-03 run-04: run-00
run-05: run-01
run-06: run-01 run-02 run-03 run-04
run-07: run-04
run-08: run-03
run-10: run-01
run-09: run-00 run-01 run-02 run-03 run-04 run-05 run-06 run-07 run-08
$(RUNS): run-%:
	@$(SHARE) $(BIN)/rsd run $* -p profile $(PROFILE) $(ARGUMENTS_$*) 2>&1 | sed -u 's/^/$* | /'; exit $${PIPESTATUS[0]}
$(RUNS): SHELL := /bin/bash
notebooks: $(RUNS)

reproduce: $(READY)
	@$(MAKE) --no-print-directory -j$(JOBS) notebooks
	@$(BIN)/rsd tables --profile $(PROFILE)

# The one way into figures/ and the README's tables. Runs that are there are not trained again.
# REAL and UNSHOWN are folders of real pairs: their scores go into figures/, of REAL pictures too.
publish: $(READY)
	@$(MAKE) --no-print-directory -j$(JOBS) notebooks PROFILE=mini \
	  $(foreach n,$(filter-out 10,$(NUMBERS)),ARGUMENTS_$(n)='-p figures figures $(PUBLISH_$(n))')
	@$(MAKE) --no-print-directory publish-real

publish-real: $(READY)
	@for folder in $(REAL); do $(BIN)/rsd run 10 -p source $$folder -p figures figures || exit 1; done
	@for folder in $(UNSHOWN); do $(BIN)/rsd run 10 -p source $$folder -p figures figures -p shown false || exit 1; done
	@$(BIN)/rsd tables --figures figures --write README.md

PUBLISH_01 := -p seeds 3 -p sweep true
PUBLISH_02 := -p seeds 3
PUBLISH_03 := -p seeds 3
PUBLISH_04 := -p seeds 3
PUBLISH_05 := -p seeds 3
PUBLISH_06 := -p seeds 3
PUBLISH_08 := -p seeds 3
PUBLISH_07 := -p seeds 3 -p study long -p brief 3 -p count 250 -p few 40 -p half true

# --- the rest -------------------------------------------------------------------------------------

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile --no-loadscope-reorder

slow: $(READY)
	$(BIN)/python -m pytest -m slow --timeout=1800

# Opens on a page that says what is here; what kernels say is encrypted. LAB holds further options.
lab: $(READY)
	@$(BIN)/python book/start.py
	$(BIN)/jupyter lab --ServerApp.root_dir="$${RSD_ROOT:-.}" --LabApp.default_url=/lab/tree/runs/start.ipynb --KernelManager.transport_encryption=auto $(LAB)

# For a JupyterLab or an editor that was started elsewhere.
kernel: $(READY)
	$(BIN)/python -m ipykernel install --user --name rsd --display-name "Reverse Stable Diffusion"

# The executed notebooks of a profile as a site that opens from a file: runs/book/index.html
book: $(READY)
	@$(BIN)/python book/build.py --profile $(PROFILE)

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
