# make demo   prepare Shakespeare's plays, train a small GPT on them, print what it writes
# make test   the tests          make lint   the style checks          make clean   remove .venv
# make test-slow, make test-gpu  the tests that take minutes, and those that need a CUDA device

PYTHON ?= python3
BIN := .venv/bin
TRAIN_ARGS ?=

.PHONY: demo test test-slow test-gpu lint clean

demo: .venv/runtime
	$(BIN)/python prepare.py plays
	$(BIN)/python train.py config/train_plays_char.py $(TRAIN_ARGS)
	$(BIN)/python sample.py --out_dir=out/plays_char --start="ROMEO:"

test: .venv/dev
	$(BIN)/python -m pytest -n auto

test-slow: .venv/dev
	$(BIN)/python -m pytest -m slow

test-gpu: .venv/dev
	$(BIN)/python -m pytest -m gpu

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: kqv needs Python 3.10 or newer: make PYTHON=python3.12, for example")'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/runtime: .venv/python requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: .venv/runtime requirements-dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@
