# `make demo` and `make test` do all their own set-up, in .venv below this folder.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

# What `make test` runs, each file's tests in one process.
SHORT = -n auto --dist loadfile -m "not interop and not long"

.PHONY: bench coverage demo test faults fuzz interop clock lint types docs wheel clean

$(READY): setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV) || { echo "on Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

# The whole thing on one machine: a provider with sample mail, a collection, what became of it.
demo: $(READY)
	mkdir -p $(VENV)/tmp
	TMPDIR=$(abspath $(VENV))/tmp $(BIN)/salmon-revsmtp demo

test: $(READY)
	$(BIN)/python -m pytest $(SHORT)

# The same, measured: every process and thread that the tests start, too.
coverage: export COVERAGE_FILE = $(abspath $(VENV))/coverage/data
coverage: $(READY)
	rm -rf $(VENV)/coverage
	mkdir $(VENV)/coverage
	$(BIN)/python -m coverage run -m pytest $(SHORT)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

# Everything broken that can break, at length: a sample of it, of the commit's or of SEED=2; FULL=1
# for all of it.
faults: $(READY)
	$(BIN)/python -m pytest -n auto -m long

# Hostile inputs for the SMTP machine, of the commit's seed or of SEED=2; FULL=1 for a million.
fuzz: $(VENV)/.fuzz-ready
	$(BIN)/python tests/fuzz/campaign.py

$(VENV)/.fuzz-ready: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,fuzz]'
	touch $@

# Against real servers; tests/interop/install-server provides them (as root).
interop: $(READY)
	$(BIN)/python -m pytest -m interop

# A VPS and a home by the README's commands, from two empty folders to mail at home: how long it takes.
clock: $(READY)
	$(BIN)/python tests/two_ends.py --install

# Beside its peers, those that are here; QUICK=1 only shows that it works.
bench: $(READY)
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --cache-dir $(VENV)/.import_linter

types: $(READY)
	$(BIN)/mypy --strict salmon_revsmtp tests benchmarks

docs: $(READY)
	$(BIN)/python -m sphinx -q -W -b html docs docs/_build

wheel: $(READY)
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info
