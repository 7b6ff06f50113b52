# On a fresh machine with Python >= 3.11 and make, each of these does its whole set-up in .venv first:
#   make demo    the main job offline, in minutes; ends with the path of the report
#   make test    the tests
#   make lint    ruff and pyright
#   make bench   the benchmarks beside their peers, which get environments of their own under .venvs (several GB)
# PYTHON=/path/to/python chooses another Python.

PYTHON ?= $(shell command -v python3 || command -v python)
VENV := .venv
RUN := $(VENV)/bin/python
WORKDIR ?= runs/demo
PYTEST_ARGS ?=
BENCH_ARGS ?=

ifeq ($(strip $(PYTHON)),)
$(error no python3 found: install Python 3.11 or newer, or say PYTHON=/path/to/python)
endif

.PHONY: demo test lint bench peers peer-hf peer-trl peer-saelens peer-tunix env env-test clean

demo: env
	@if [ -e $(WORKDIR)/summary.json ]; then echo "$(WORKDIR) holds a finished run; 'rm -r $(WORKDIR)' starts a new one"; fi
	@$(RUN) -m jaxrl_llm saerl --config=configs/saerl.py:demo --workdir=$(WORKDIR)

test: env-test
	@$(RUN) -m pytest $(PYTEST_ARGS)

lint: env-test
	@$(RUN) -m ruff check .
	@$(RUN) -m pyright

# A benchmark or peer that fails stops none of the others; the end then says which and is an error. Those that ask for a trained model are not
# among them: their own --help says how they are run.
bench: env-test
	@failed=; $(MAKE) --no-print-directory -k peers || failed=" peers"; \
	for name in $$(ls benchmarks/*.py | sed -e 's|benchmarks/||' -e 's|\.py$$||' | grep -v -x -e __init__ -e common -e sae_quality -e sae_features); do \
		echo "== $$name"; $(RUN) -m benchmarks.$$name $(BENCH_ARGS) || failed="$$failed $$name"; done; \
	if [ -n "$$failed" ]; then echo "failed:$$failed" >&2; exit 1; fi

# What the peers pin clashes with what we pin and with each other. torch goes in first, so that no later call brings another.
peers: peer-hf peer-trl peer-saelens peer-tunix

peer-hf:
	@$(PYTHON) .ci/venv.py .venvs/hf torch==2.13.0 -- transformers==5.23.0

peer-trl:
	@$(PYTHON) .ci/venv.py .venvs/trl torch==2.13.0 -- trl==1.16.0

peer-saelens:
	@$(PYTHON) .ci/venv.py .venvs/saelens torch==2.13.0 -- sae-lens==6.54.0

peer-tunix:
	@$(PYTHON) .ci/venv.py .venvs/tunix google-tunix==0.1.7

env:
	@$(PYTHON) .ci/venv.py $(VENV) -e .

env-test:
	@$(PYTHON) .ci/venv.py $(VENV) -e '.[test]'

clean:
	rm -rf $(VENV) .venvs .pytest_cache .ruff_cache .hypothesis *.egg-info build dist
