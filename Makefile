# Commands that do their own set-up. PYTHON names the interpreter that the environment is made with.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: repro test test-full lab setup spark install clean

repro: setup   ## run what has changed, give the verdict
	@mlkit repro

test: setup spark ## every test: those in the notebooks, and those that cross them
	@nbdev-test nbs --skip-folder-re "^(stages|[_.].*)$$" --n-workers 2
	@tests/in_two.sh

test-full: export MLKIT_TEST_FULL = 1
test-full: test ## the same with every case and seed, and ten kills at random moments

lab: setup     ## JupyterLab, on this machine only
	@jupyter lab --ip 127.0.0.1 nbs

# $(call watched,NAME,COMMAND): a command that is silent for minutes, with a line that moves: the seconds, and the last
# line of its log. On a terminal it is one line, elsewhere a line every twenty seconds. What has failed shows its log.
watched = log=$(VENV)/$(1).log; $(2) > $$log 2>&1 & pid=$$!; trap 'kill $$pid; exit 130' INT TERM HUP; n=0; \
	while kill -0 $$pid 2>/dev/null; do \
	  sleep 1; n=$$((n + 1)); last=$$(tail -n 1 $$log | tr -d '\r' | cut -c 1-70); \
	  if [ -t 1 ]; then printf '\r\033[K%5d s  %s' $$n "$$last"; elif [ $$((n % 20)) -eq 0 ]; then printf '%5d s  %s\n' $$n "$$last"; fi; \
	done; if [ -t 1 ]; then printf '\r\033[K'; fi; wait $$pid || { tail -n 20 $$log; exit 1; }

spark:         # half a gigabyte that only tests need, and only where there is a Java to run it
	@command -v java >/dev/null || { echo "no java: the tests of Spark are skipped"; exit 0; }; $(BIN)/python -c 'import pyspark' 2>/dev/null || \
	  { $(call watched,spark,$(PIP) install --progress-bar off -c constraints.txt -e '.[spark]'); }

# What was installed is kept beside it, so only a change of these two files installs again.
setup:
	@cat pyproject.toml constraints.txt | cmp -s - $(VENV)/ready || $(MAKE) --no-print-directory install
	@mlkit setup

install:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "mlkit needs Python 3.11 or 3.12, '$(PYTHON)' is another; try: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "no venv; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "installing into $(VENV): some minutes, once"
	@rm -rf mlkit.egg-info; $(PIP) uninstall --quiet -y mlkit 2>/dev/null; : # of a checkout from before the name was ours
	@$(call watched,install,$(PIP) install --progress-bar off --no-compile -c constraints.txt -e '.[dev]')
	@$(PIP) install --quiet --no-deps -c constraints.txt timm # it asks for torchvision, which has no build for a torch of the CPU
	@$(call watched,compile,{ echo "compiling what was installed"; $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || :; }) # by all cores, where pip takes one; some packages hold files of other Pythons
	@cat pyproject.toml constraints.txt > $(VENV)/ready

clean:         ## what the pipeline made; the environments and the cache stay
	@find .mlkit -mindepth 1 -maxdepth 1 ! -name kafka ! -name serve ! -name monitoring ! -name alerts.jsonl -exec rm -rf {} + 2>/dev/null; : # they hold data
	@rm -rf data models serving reports scratch .pytest_cache
	@echo "removed the pipeline's outputs; 'make repro' restores them from DVC's cache"
