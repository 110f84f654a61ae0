# Four commands, each doing its own set-up. PYTHON names the interpreter that the environment is made with.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: repro test lab setup spark install clean

repro: setup   ## run what has changed, say the verdict
	@mlkit repro

test: setup spark ## every test: those in the notebooks, and those that cross them
	@nbdev-test nbs --skip-folder-re "^(stages|[_.].*)$$" --n-workers 2
	@pytest

lab: setup     ## JupyterLab, on this machine only
	@jupyter lab --ip 127.0.0.1 nbs

spark:         # half a gigabyte that only tests need, and only where there is a Java to run it
	@command -v java >/dev/null || { echo "no java: the tests of Spark are skipped"; exit 0; }; $(BIN)/python -c 'import pyspark' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[spark]'

# What was installed is kept beside it, so only a change of these two files installs again.
setup:
	@cat pyproject.toml constraints.txt | cmp -s - $(VENV)/ready || $(MAKE) --no-print-directory install
	@mlkit setup

install:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "mlkit needs Python 3.11 or 3.12, '$(PYTHON)' is another; try: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "no venv; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "installing into $(VENV): some minutes, once"
	@rm -rf mlkit.egg-info; $(BIN)/python -m pip uninstall --quiet -y mlkit 2>/dev/null; : # of a checkout from before the name was ours
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@cat pyproject.toml constraints.txt > $(VENV)/ready

clean:         ## what the pipeline made; the environments and the cache stay
	@find .mlkit -mindepth 1 -maxdepth 1 ! -name kafka -exec rm -rf {} + 2>/dev/null; : # kafka holds data
	@rm -rf data models serving reports scratch .pytest_cache
	@echo "removed the pipeline's outputs; 'make repro' restores them from DVC's cache"
