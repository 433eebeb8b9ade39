PYTHON ?= python3
BIN := .venv/bin

.PHONY: report test bench minis install dev clean

report: install
	$(BIN)/loopscope report --out out/report.html --overwrite

test: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

bench: install
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks

minis: install
	$(BIN)/python -m loopscope.training.minis

install: .venv/.installed

dev: .venv/.installed-dev

.venv/.installed: setup.cfg constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv out build *.egg-info
