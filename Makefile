# `make demo` and `make test` each set everything up in .venv first; only the caches of
# pip, uv and matplotlib lie outside this folder. uv is used where it is present.

VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$p && break; done)
UV := $(shell command -v uv 2>/dev/null)
ifdef UV
PIP := uv pip install --quiet --python $(PY)
else
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
endif

.PHONY: demo test test-oldest lint bench format clean

demo: $(VENV)/.demo
	$(PY) -m experiments suite cliff temporal_order lr_window image_rows

test: $(VENV)/.test
	$(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder

# The laws, on many devices, records and frameworks with the oldest versions, which need
# Python 3.11 to 3.13; OLDEST_TESTS=... runs some of them.
OLDEST := .venv-oldest
OLDEST_TESTS ?= tests/test_laws.py tests/test_forms.py tests/test_shard_map.py \
	tests/test_records.py tests/test_frameworks.py

test-oldest: $(OLDEST)/.done
	$(OLDEST)/bin/python -m pytest -n auto --dist loadfile \
		-p no:cacheprovider $(OLDEST_TESTS)

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

bench: $(VENV)/.demo
	$(PY) -m benchmarks run

format: $(VENV)/.dev
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean:
	rm -rf $(VENV) $(OLDEST)

$(PY):
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed: make PYTHON=/path/to/python"; exit 1; }
ifdef UV
	uv venv --quiet --python $(PYTHON) $(VENV)
else
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade "pip>=25.1"
endif

$(VENV)/.demo: pyproject.toml | $(PY)
	@echo "Installing into $(VENV) ..."
	$(PIP) -e ".[experiments]"
	@touch $@

$(VENV)/.test: pyproject.toml | $(PY)
	@echo "Installing into $(VENV) ..."
	$(PIP) -e ".[experiments]" --group test
	@touch $@

$(VENV)/.dev: pyproject.toml | $(PY)
	@echo "Installing into $(VENV) ..."
	$(PIP) -e ".[experiments]" --group dev
	@touch $@

$(OLDEST)/.done: pyproject.toml
	@echo "Installing into $(OLDEST) ..."
ifdef UV
	uv venv --quiet --clear --python $(PYTHON) $(OLDEST)
	uv pip install --quiet --python $(OLDEST)/bin/python -e . --group oldest
else
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -e . --group oldest
endif
	@touch $@
