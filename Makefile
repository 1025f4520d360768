# make run | make test | make test-all | make check | make install: each prepares what it needs first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.fedsim-installed

.PHONY: run test test-all test-matrix check format install clean

run: $(STAMP)
	$(BIN)/python run_simulation.py

PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	$(PYTEST) -m 'not matrix'

# The matrices: every fault at every moment, strategies stopped in every round, soak.
test-matrix: $(STAMP)
	$(PYTEST) -m matrix

test-all: $(STAMP)
	$(PYTEST)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)

# uv where it is installed, venv and pip otherwise; constraints.txt pins every version.
# What is downloaded is shown: torch alone brings gigabytes.
$(STAMP): pyproject.toml constraints.txt
	@echo "installing fedsim and what it needs into $(VENV): about 6 GB the first time"
	@if command -v uv >/dev/null 2>&1; then \
		{ [ -x $(BIN)/python ] || uv venv --python $(PYTHON) $(VENV); } && \
		uv pip install --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'; \
	else \
		{ [ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV); } && \
		$(BIN)/python -m pip install --disable-pip-version-check \
			--constraint constraints.txt --editable '.[dev]'; \
	fi
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
