# make demo     the environment, then cross-entropy and DivideMix on digits with 50 % of the labels drawn anew (minutes on 2 cores)
# make test     the environment, then the fast tests (about 5 minutes on 2 cores)
# make test-slow the long tests (under 35 minutes)
# make test-all both
# make gpu      on a machine with a CUDA card, with its own Python: the tests that need one, then the benchmarks and an ablation
#               (gpu-*.json), as far as GPU_SECONDS=480 go; GPU_PARTS="bench ablation" are these parts alone
# make lint     ruff, and mypy for types (under a minute)

PYTHON ?= python3
GPU_SECONDS ?= 480
PY := .venv/bin/python
PYTEST := $(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile

# The tests start processes of their own: idle OpenMP threads that spin would take the cores from them.
test test-slow: export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo test test-slow test-all gpu lint clean

# The environment is whole only when the marker is newer than the pins: an install that was interrupted is repeated.
.venv/.installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: .venv/.installed
	$(PY) benchmarks/demo.py

test: .venv/.installed
	$(PYTEST) -m "not slow and not gpu"

test-slow: .venv/.installed
	$(PYTEST) -m "slow and not gpu"

test-all: test test-slow

gpu:
	$(PYTHON) benchmarks/gpu.py --seconds $(GPU_SECONDS) $(GPU_PARTS)

lint: .venv/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis
