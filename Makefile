# segnb from a fresh clone: `make run`. Everything is installed into $(VENV), nothing outside this folder is touched.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help run test check test-full lab clean sync

help:
	@echo "make run        set up, draw the demo data, run every stage: $(RUN)"
	@echo "make test       set up, then everything that CI checks"
	@echo "make check      the quick checks, for every commit"
	@echo "make test-full  make test, what takes minutes, and the real pictures of ../shared"
	@echo "make lab        JupyterLab on the notebooks"
	@echo "make sync       clean the notebooks, write segnb/*.py and README.md from them"
	@echo "make clean      remove $(VENV), runs and drawn data"

$(STAMP): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("segnb needs Python 3.10 or newer, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.11 …")'
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV): a minute or two"
	$(BIN)/python -m pip install --disable-pip-version-check --use-pep517 -c constraints.txt -e '.[dev]'
	@touch $@

run: $(STAMP)
	$(BIN)/segnb run demo --set data.root=data/demo --out $(RUN)
	@echo
	@echo "Look at  $(RUN)/eda/                what is in the data"
	@echo "         $(RUN)/models/             learning curves and predictions"
	@echo "         $(RUN)/scores.json         how good it is"
	@echo "         $(RUN)/submission.csv      the file to upload"
	@echo "         $(RUN)/notebooks/          every executed notebook"
	@echo "Then:    make lab, and open nbs/10_eda.ipynb"

test: $(STAMP)
	$(BIN)/python tests/sync.py --check
	$(BIN)/python tests/notebooks.py
	$(BIN)/python -m pytest tests -m "not real and not full"

check: $(STAMP)
	$(BIN)/python tests/sync.py --check
	$(BIN)/python -m pytest tests -m quick -q

test-full: $(STAMP)
	$(BIN)/python tests/sync.py --check
	$(BIN)/python tests/notebooks.py
	$(BIN)/python -m pytest tests -rs

lab: $(STAMP)
	$(BIN)/jupyter lab $$(test "$$(id -u)" != 0 || echo --allow-root) nbs

sync: $(STAMP)
	$(BIN)/python tests/sync.py

clean:
	rm -rf $(VENV) runs data/demo data/.demo-* *.egg-info build dist .pytest_cache
