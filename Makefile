# Each target sets up what it needs: a fresh clone with Python >= 3.11, git and make is enough.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: install book pdf test pages lint sync links clean help

help:           ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nucseg needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV), PyTorch among it: some minutes."
	@# compat: a plain path, so that 'import nucseg' finds the package and not a clone's folder of that name
	$(BIN)/python -m pip install --quiet --config-settings editable_mode=compat --editable '.[book,test]'
	touch $@

install: $(READY) ## make .venv with all that the book, the tests and the commands need

book: $(READY)  ## build the book into book/_build/html, warnings and broken links as errors
	$(BIN)/python book/build.py

pdf: $(READY)   ## print the built book as one PDF; needs Chromium
	$(BIN)/python -m pip install --quiet --config-settings editable_mode=compat --editable '.[pdf]'
	$(BIN)/python book/pdf.py

test: $(READY)  ## run the tests on all cores
	$(BIN)/python -m pytest --numprocesses auto --ignore=tests/book/test_pages.py

pages: $(READY) ## check the built pages in a browser without a network: requests, sliders, accessibility
	$(BIN)/python -m pytest -q --numprocesses auto tests/book/test_pages.py

lint: $(READY)  ## ruff, its formatter, mypy, and that notebooks and their twins agree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python book/sync.py --check

sync: $(READY)  ## make each notebook from its twin, or the reverse, whichever is newer
	$(BIN)/python book/sync.py

links: $(READY) ## try the book's links to other sites; needs a network
	$(BIN)/jupyter-book build --builder linkcheck book

clean:          ## remove what was built, and the environment
	rm -rf book/_build build dist $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
