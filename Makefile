# Everything a person types. `make help` lists it.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo

.DEFAULT_GOAL := help
.PHONY: help demo demo-policy run-demo test lint bench study study-full images e2e lock clean

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The environment, from the hashed lock; made anew only when the lock changes.
$(VENV)/.installed: requirements-dev.lock pyproject.toml
	@command -v $(PYTHON) > /dev/null || { echo "make: $(PYTHON) is missing. Install Python 3.11 (Debian: apt-get install python3.11 python3.11-venv) or say PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "make: $(PYTHON) is not Python 3.11; say PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "make: $(PYTHON) has no venv module (Debian: apt-get install python3.11-venv)"; exit 1; }
	@echo "==> installing about 220 packages into $(VENV) (5 GB with the CUDA libraries of torch; some minutes, once)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: RECIPE := quickstart
demo: run-demo ## the whole of it on simulated annotators: minutes, no GPU, no network

demo-policy: RECIPE := policies
demo-policy: DEMO := demo-policy
demo-policy: run-demo ## with reward adapters and a policy for each coterie by PPO

run-demo: $(VENV)/.installed
	@mkdir -p $(DEMO)
	@test -s $(DEMO)/pseudonym.key || $(BIN)/python -c 'import secrets; print(secrets.token_hex(32))' > $(DEMO)/pseudonym.key
	COTERIE_PSEUDONYM_KEY_FILE=$(DEMO)/pseudonym.key $(BIN)/coterie run recipes/$(RECIPE).yaml --out $(DEMO)

test: $(VENV)/.installed ## all tests that need no cluster
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed ## ruff, mypy, and the compiled pipeline
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed ## the figures of the README, each beside its reference (hours)
	$(BIN)/python -m benchmarks.ingest
	$(BIN)/python -m benchmarks.discovery
	$(BIN)/python -m benchmarks.intervals
	$(BIN)/python -m benchmarks.verdicts
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.real
	$(BIN)/python -m benchmarks.adapters
	$(BIN)/python -m benchmarks.policies
	$(BIN)/python -m benchmarks.feedback
	$(BIN)/python -m benchmarks.serving
	$(BIN)/python -m benchmarks.stores

study: $(VENV)/.installed ## who gains from coteries, how much, and when not: docs/results.md (two cores, an hour)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.study
	$(BIN)/python -m benchmarks.study render

study-full: $(VENV)/.installed ## all rows of the study, and the policies (hours; a GPU helps)
	$(BIN)/python -m benchmarks.policies
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.study --full
	$(BIN)/python -m benchmarks.study render

images: ## build the images and push them to REGISTRY; prints their digests (docker, podman or buildah)
	containers/images $(REGISTRY)

e2e: $(VENV)/.installed ## all of it on the cluster of KUBECONFIG, with images pushed to REGISTRY
	$(BIN)/python -m tests.e2e $(REGISTRY) $(E2E)

lock: ## resolve the dependencies anew (needs uv)
	uv pip compile pyproject.toml --python-version 3.11 --universal --generate-hashes --no-emit-index-url --no-emit-find-links --no-header -q --extra all -o requirements.lock
	uv pip compile pyproject.toml --python-version 3.11 --universal --generate-hashes --no-emit-index-url --no-emit-find-links --no-header -q --extra dev -c requirements.lock -o requirements-dev.lock
	for image in router predictor; do uv pip compile --group $$image --python-version 3.11 --python-platform linux --generate-hashes --no-emit-index-url --no-emit-find-links --no-header -q -c requirements.lock --override containers/overrides.txt -o containers/$$image.lock; done

clean: ## remove what the demo and the tools left
	rm -rf demo demo-policy build .pytest_cache .mypy_cache .ruff_cache .hypothesis
