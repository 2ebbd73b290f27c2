# Each target sets up all it needs in .venv.
PYTHON ?= python3
export OMP_WAIT_POLICY = passive  # spinning OpenMP threads slow a shared machine many times

demo: .venv/ready
	.venv/bin/python pmsacl.py

test: .venv/ready
	.venv/bin/python -m pytest

lint: .venv/ready-lint
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy *.py kernels/*.py

check: lint test

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt
	touch $@

.venv/ready-lint: .venv/ready .ci/requirements.txt
	.venv/bin/pip install --quiet --requirement .ci/requirements.txt
	touch $@

.PHONY: demo test lint check
