# `make demo`, `make test`, `make coverage`, `make docs`: each sets up .venv on the first call and reuses it after.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
DEMO := runs/demo

.PHONY: demo test test-all coverage lint docs clean
.DELETE_ON_ERROR:

demo: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m lit_safety fit --config configs/scdpo.yaml --run.root $(DEMO) --run.name fit
	OMP_NUM_THREADS=1 $(PY) -m lit_safety evaluate --config configs/evaluate.yaml --adapter $(DEMO)/fit/latest/adapter --out $(DEMO)/report --processes 2

# Two processes of one thread each are twice as fast as one of two: the toy world's tensors are small.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(READY)
	$(PYTEST) -m "not slow"

test-all: $(READY)
	$(PYTEST)

# Which lines of the package no test runs, into build/coverage, and a table by package. Processes that a test starts are
# counted; those that a test kills are not. Other tests: make coverage TESTS=tests/core
TESTS := tests
coverage: $(READY)
	mkdir -p build/coverage
	$(PYTEST) -m "not slow" --cov --cov-report= $(TESTS)
	$(PY) -m coverage html --quiet --directory build/coverage/html
	$(PY) tests/coverage_table.py

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# The site, into build/site. A broken link, anchor or docstring ends it. The variable leaves a banner out.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --site-dir build/site
	@echo "build/site/index.html"

# Nothing is compiled by DeepSpeed at install time; its operators are built when a run first asks for one.
$(READY): pyproject.toml hatch_build.py constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'lit_safety needs Python 3.11 or newer; call make PYTHON=python3.11 ...')"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,docs]"
	touch $(READY)

clean:
	rm -rf $(VENV) runs build *.egg-info
