# Each target sets up all that it needs in .venv. For another torch, in a fresh .venv:
#   make test REQUIREMENTS=.ci/torch-2.11.txt PYTHON=python3.10
PYTHON ?= python3
REQUIREMENTS ?= requirements.txt
# Spinning OpenMP threads slow a shared machine many times.
export OMP_WAIT_POLICY = passive

# Threads that wait shortly before they sleep: up to 1.7 times as fast as passive ones.
demo: export GOMP_SPINCOUNT = 2000
demo: .venv/ready
	.venv/bin/python pmsacl.py

# Two halves of the files side by side, a thread each: half of the time on two cores.
test: .venv/ready
	$(MAKE) --no-print-directory --jobs=2 --keep-going tests-a-to-k tests-others

tests-a-to-k tests-others: export OMP_NUM_THREADS = 1
tests-a-to-k:
	.venv/bin/python -m pytest tests/test_[a-k]*.py
tests-others:
	.venv/bin/python -m pytest tests/test_[!a-k]*.py

# On a machine with a GPU: the tests that need one, then the tables of docs/speed.md.
gpu: .venv/ready
	.venv/bin/python -m pytest tests/test_contrastive.py tests/test_mahalanobis.py
	.venv/bin/python -m pytest -m gpu --ignore=tests/test_contrastive.py --ignore=tests/test_mahalanobis.py
	.venv/bin/python -m bench.kernels
	.venv/bin/python -m bench.training

lint: .venv/ready-lint
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy *.py kernels/*.py baselines/*.py support/*.py bench/*.py

# The students' version of the exercises is made first. The outputs are kept beside the sources.
notebooks: .venv/ready-notebooks
	.venv/bin/python -m support.exercises
	.venv/bin/jupytext --quiet --to ipynb notebooks/*.py
	.venv/bin/jupyter execute --inplace notebooks/*.ipynb

# The blocks of docs/equations.md, from the code.
equations: .venv/ready
	.venv/bin/python -m support.equations

check: lint test notebooks

.venv/ready: $(REQUIREMENTS)
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement $(REQUIREMENTS)
	touch $@

.venv/ready-lint: .venv/ready .ci/requirements.txt
	.venv/bin/pip install --quiet --requirement .ci/requirements.txt
	touch $@

.venv/ready-notebooks: .venv/ready notebooks/requirements.txt
	.venv/bin/pip install --quiet --requirement notebooks/requirements.txt
	touch $@

.PHONY: demo test gpu tests-a-to-k tests-others lint notebooks equations check
