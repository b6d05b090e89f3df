# Everything a developer runs. A POSIX make, and a Python >= 3.10 with its venv module, are enough.
#
#   make demo           a JupyterHub with the gateway on this machine (CHECK=1: drive it once, without a terminal)
#   make test           lint, documentation, and every suite, on SQLite and on PostgreSQL
#   make bench          the table of measurements
#   make engines        SSH servers, a KDC, dockerd and a swarm for use by hand, until Ctrl-C (E=ssh: only that)
#   make test-engines   what a proxy does on its real engine: E=local, E=ssh, E=docker or E=swarm
#   make lint | docs | lock | vendor | clean
#
# PYTHON chooses the interpreter, VENV where its environment lies, ARGS go to demo, pytest or the benchmarks, E names
# engines.

PYTHON = python3
VENV = .venv
BENCH_VENV = .venv-bench-eg
ARGS =
E =

IN = PATH="$$PWD/$(VENV)/bin:$$PWD/node_modules/.bin:$$PATH"
INSTALL = $(PYTHON) requirements/install.py
REPORTS = .test-reports

.POSIX:
.PHONY: help demo test lint docs pytest pytest-sqlite pytest-postgresql packages engines test-engines bench lock vendor clean env-demo env-test env-lint env-docs

help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile

demo: env-demo
	@$(IN) $(VENV)/bin/python -m hub_gateway demo --directory=.demo $${CHECK:+--check} $(ARGS)

# In this order: what is quick to fail comes first.
test: packages env-test
	@rm -rf $(REPORTS)
	@$(MAKE) lint docs pytest

pytest: env-test
	@rm -rf $(REPORTS)
	@status=0; \
	$(MAKE) pytest-sqlite || status=1; \
	$(MAKE) pytest-postgresql || status=1; \
	$(VENV)/bin/python -m tests.report $(REPORTS); \
	exit $$status

pytest-sqlite: env-test
	$(IN) HUB_GATEWAY_TEST_DB=sqlite $(VENV)/bin/python -m pytest --suite-report=$(REPORTS)/sqlite.json $(ARGS)

pytest-postgresql: env-test
	$(IN) HUB_GATEWAY_TEST_DB=postgresql $(VENV)/bin/python -m pytest --suite-report=$(REPORTS)/postgresql.json $(ARGS)

packages:
	@$(PYTHON) -m tests.engines

# Brought up until Ctrl-C, with a line that says how to reach each: all, or those that E names.
engines: packages env-test
	@$(IN) $(VENV)/bin/python -m tests.engines.hand $(E)

# What one engine has to do in the conformance suite, with the table of what ran.
test-engines: packages env-test
	@rm -rf $(REPORTS)
	@status=0; $(MAKE) pytest-sqlite ARGS="tests/contract -k '$(E)' $(ARGS)" || status=1; \
	$(VENV)/bin/python -m tests.report $(REPORTS); exit $$status

lint: env-lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: env-docs
	$(VENV)/bin/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: env-test
	@$(INSTALL) $(BENCH_VENV) bench-eg
	$(IN) $(VENV)/bin/python -m benchmarks --eg-python=$(BENCH_VENV)/bin/python $(ARGS)

lock: env-lint
	@$(IN) requirements/lock.sh $(ARGS)
	@npm install --package-lock-only --omit-lockfile-registry-resolved --no-audit --no-fund

# The scripts and styles that the console's pages carry, in the versions of package-lock.json.
vendor:
	@$(PYTHON) requirements/vendor.py

env-demo:
	@$(INSTALL) $(VENV) demo project chp

env-test:
	@$(INSTALL) $(VENV) demo docs test lint kerberos project chp

env-lint:
	@$(INSTALL) $(VENV) demo docs test lint project

env-docs:
	@$(INSTALL) $(VENV) demo docs project

clean:
	rm -rf $(VENV) $(BENCH_VENV) .venv-agent-* .venv-wheel-* $(REPORTS) node_modules build dist docs/_build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
