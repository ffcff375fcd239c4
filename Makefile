# make demo   prepare Shakespeare's plays, train a small GPT on them, print what it writes
# make test   the tests          make lint   the style checks          make clean   remove the environments
# make test-slow, make test-gpu  the tests that take minutes, and those that need a CUDA device
# make exercise N=3              write a part of the code yourself, and have it graded; without N: which there are
# make gpu    all that one GPU can show, checked and measured in at most ten minutes, into out/gpu
# make fuzz   hostile and damaged files for four minutes; each failure is printed with the command that repeats it
# make test-oldest               the tests with Python 3.10 and the lowest versions that the requirements allow

PYTHON ?= python3
OLDEST_PYTHON ?= python3.10
BIN := .venv/bin
TRAIN_ARGS ?=
FUZZ_ARGS ?=
GPU_ARGS ?=

.PHONY: demo test test-slow test-gpu test-oldest gpu fuzz exercise lint clean

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

gpu: .venv/dev
	$(BIN)/python bench.py gpu $(GPU_ARGS)

fuzz: .venv/dev
	$(BIN)/python tests/fuzz $(FUZZ_ARGS)

test-oldest: .venv-oldest/dev
	.venv-oldest/bin/python -m pytest -n auto

exercise: .venv/dev
	@$(BIN)/python exercises $(N) || true

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv .venv-oldest

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

.venv-oldest/dev: requirements.txt requirements-dev.txt
	@$(OLDEST_PYTHON) -c '' || { echo "error: make test-oldest needs Python 3.10: make test-oldest OLDEST_PYTHON=PATH"; exit 1; }
	$(OLDEST_PYTHON) -m venv .venv-oldest
	sed -n 's/>=/==/p' requirements.txt requirements-dev.txt > .venv-oldest/requirements.txt
	.venv-oldest/bin/python -m pip install --disable-pip-version-check -r .venv-oldest/requirements.txt
	@touch $@
