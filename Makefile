# `make train` and `make test` work from a fresh clone with python3 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup train check test test-all smoke lint format types lock clean seeds docs

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $(STAMP)

train: setup
	$(BIN)/jaxfed data ml-100k
	$(BIN)/jaxfed train configs/ml100k_fedavg.toml --resume

seeds: setup
	$(BIN)/python scripts/seeds.py configs/ml100k_fedavg.toml --seeds 0 1 2

# what XLA is told where it need not make fast programs, only the same ones: a third of the compiler's time, and not
# in 32 parts side by side; tests/conftest.py leaves out what the installed jaxlib does not know
PLAIN := --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false
PLAIN += --xla_cpu_parallel_codegen_split_count=1

# before a commit: two minutes
check: setup lint types
	XLA_FLAGS="$(PLAIN)" $(BIN)/python -m pytest -n 2 --dist worksteal -m "not full and not optimised and not long" \
		tests/core tests/test_layers.py tests/test_names.py

test: setup lint types
	XLA_FLAGS="$(PLAIN)" $(BIN)/python -m pytest -n 2 --dist worksteal -m "not full and not optimised"
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "optimised and not full" $$(grep -rl "mark.optimised" tests)

test-all: setup lint types
	$(BIN)/python -m pytest -n 2 --dist worksteal

# whether it works at all, in a minute or two, for a Python beside that of `make test`: see .ci/run
smoke: setup types
	rm -rf $(VENV)/smoke
	$(BIN)/jaxfed train synthetic_1k --data.mean-length 5 --rounds 2 --evaluation.every 1 --out $(VENV)/smoke
	XLA_FLAGS="$(PLAIN)" JAX_COMPILATION_CACHE_DIR=$(abspath $(VENV))/xla $(BIN)/python -m pytest $(SMOKE)

SMOKE := $(addprefix tests/,test_pythons.py test_wheel.py config/test_config.py data/test_files.py core/test_tables.py)
SMOKE += $(addprefix tests/,sampling/test_cohort.py training/test_checkpoint.py cli/test_newcomer.py)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup
	$(BIN)/mypy

# the site in docs/_build/html, its notebooks executed; a warning is an error. `make test` builds it without them
docs: setup
	$(BIN)/python -m sphinx -q -W --keep-going -b html -D nb_execution_mode=force docs docs/_build/html

# resolves anew what requirements.lock pins; needs uv
lock:
	uv pip compile pyproject.toml --extra dev --extra docs --universal --python-version 3.11 --generate-hashes \
		--no-header --no-annotate --output-file requirements.lock

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache docs/_build docs/reference/generated
