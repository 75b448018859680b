# make run            set everything up in .venv and train federated speech recognition on the embedded corpus
# make run DATA=dir   the same on your own recordings (no speech synthesiser is installed)
# make run EXPERIMENT=my.toml  an experiment file of your own
# make stamps         fetch recordings in five languages into data/stamps (DIR=folder: elsewhere), without installing anything
# make test           the tests;  make test-all  the slow ones too;  make lint  style and types

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
EXPERIMENT ?= experiments/quickstart.toml
ROUNDS ?=
OUT ?=
STAMPS := tuxpaint-stamps-default
OPTIONS := $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(OUT),--out "$(OUT)")

# Nothing is sent anywhere, and nothing is downloaded at run time.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: run stamps test test-all lint clean

run: $(VENV)/.ready $(if $(DATA),,$(VENV)/.speech)
	$(BIN)/fedclip run "$(EXPERIMENT)" $(if $(DATA),--data-dir "$(DATA)") $(OPTIONS)

# Tux Paint's stamps with their spoken descriptions: Debian's package, 161 MB, 230 MB unpacked, GPL-2. They are read where they are and belong to no release.
stamps: DIR ?= data/stamps
stamps:
	mkdir -p "$(DIR)"
	cd "$(DIR)" && apt-get download $(STAMPS)
	dpkg-deb -x "$(DIR)"/$(STAMPS)_*.deb "$(DIR)"
	rm "$(DIR)"/$(STAMPS)_*.deb
	@echo "Now: .venv/bin/fedclip run experiments/languages.toml --data-dir $(DIR)"

# Two at a time, whole files each: the runs in processes of their own that they wait for leave a core idle.
test: $(VENV)/.dev $(VENV)/.speech
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-all: $(VENV)/.dev $(VENV)/.speech
	$(BIN)/python -m pytest -q -m ""

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV)

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.speech: $(VENV)/.ready
	@echo "Installing eSpeak NG (GPL-3), which speaks the embedded corpus in a process of its own; make run DATA=folder does without."
	$(BIN)/python -m pip install --quiet --editable ".[speech]"
	@touch $@

$(VENV)/.dev: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@
