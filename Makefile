# Two commands do everything: `make demo` (sets up, then runs the main job) and `make test`.
# A virtual environment that is active is used; otherwise one is made in .venv.
VENV ?= $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
PYTHON ?= python3
PY := $(VENV)/bin/python

.PHONY: help setup demo test test-all test-fast mutants clients services check proto metrics-docs bench gate prove-image clean

help: ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: ## install everything into the virtual environment (quick the second time)
	@test -x "$(PY)" || $(PYTHON) tools/setup_env.py --check-version
	@test -x "$(PY)" || $(PYTHON) -m venv "$(VENV)" || { rm -rf "$(VENV)"; exit 1; }
	@"$(PY)" tools/setup_env.py

demo: setup ## quantize the demo model, serve it, talk to it; KEEP=1 leaves the server up
	@"$(PY)" demo/run.py $(if $(KEEP),--keep)

# Fast tests run beside each other, each with one thread, and one more of them than there are cores:
# some wait. Engines want the machine for themselves.
WORKERS = $(shell expr 1 + $$(nproc))
# Waiting OpenMP threads take the CPU from what they wait for: five times as much, on two busy cores.
ONE_THREAD := OMP_NUM_THREADS=1
FAST := tests/unit tests/integration tests/rules tests/deploy tests/upgrade tests/package tests/docs
SPREAD := $(ONE_THREAD) "$(PY)" -m pytest $(FAST) -n $(WORKERS) --dist worksteal
# CI=1: a test that fails runs once more with fresh servers; if it passes then, it is told as FLAKY.
AGAIN := $(if $(CI),--reruns 1)
# What the first part has to tell (skipped, flaky), for the end of the second.
NOTES := TESTS_NOTES="$(CURDIR)/out/test-notes.json"

test: setup check ## every behaviour, with the real engine (minutes); CI=1 runs failed tests again
	@mkdir -p out && rm -f out/test-notes.json
	@$(NOTES) $(SPREAD) $(AGAIN)
	@$(NOTES) $(ONE_THREAD) "$(PY)" -m pytest tests/e2e $(AGAIN)

test-all: ## the same in full: plain vLLM asked live (and recorded), all cases, broken behaviours
	@$(MAKE) clients
	@TESTS_ALL=1 TESTS_PLAIN_VLLM=record $(MAKE) test
	@$(MAKE) mutants

test-fast: setup ## unit, integration and rule tests, without an engine (seconds)
	@$(SPREAD)

mutants: setup ## break the product in twenty ways; a test must notice each (minutes)
	@$(ONE_THREAD) "$(PY)" tools/mutants.py $(ARGS)

clients: setup ## install the client libraries and agents that tests and a benchmark use, in out/clients (2 GB)
	@"$(PY)" tools/setup_clients.py

services: ## install what tests use and the package index does not have (Debian, as root)
	@PATH="$(VENV)/bin:$(PATH)" tools/install_services.sh

check: setup ## lint, formatting and types
	@"$(VENV)/bin/ruff" check .
	@"$(VENV)/bin/ruff" format --check .
	@mkdir -p out/types/packhorse && ln -sfn ../../../serve ../../../quantize out/types/packhorse/
	@cd out/types && "$(VENV)/bin/mypy" --config-file ../../pyproject.toml

proto: setup ## generate serve/rpc/pb from proto/
	@"$(PY)" tools/make_proto.py

metrics-docs: setup ## write docs/metrics.md from serve/metrics.py
	@"$(PY)" tools/make_metrics_docs.py

bench: setup ## benchmarks (hours: one trains a model and runs other tools); each ends in one JSON line, kept figures are in bench/results
	@"$(PY)" bench/quality.py
	@"$(PY)" bench/kv_cache.py
	@"$(PY)" bench/quantize_peers.py
	@"$(PY)" bench/mixed.py
	@"$(PY)" bench/memory.py
	@"$(PY)" bench/faults.py --soak-minutes 20
	@"$(PY)" bench/floods.py
	@"$(PY)" bench/routing.py
	@"$(PY)" bench/adapters.py
	@"$(PY)" -m bench.observe
	@"$(PY)" bench/cache_load.py
	@"$(MAKE)" clients && "$(PY)" bench/clients.py
	@"$(PY)" bench/serve_load.py --layers
	@"$(PY)" bench/serve_load.py --grpc
	@"$(PY)" bench/serve_load.py --compare --ceiling

gate: setup ## CPU per streamed token of our own layers, against the commit before (a minute)
	@"$(PY)" bench/gate.py $(ARGS)

prove-image: setup ## run the Dockerfile's own steps in a clean root, then its command (root, debootstrap, 12 GB, minutes)
	@"$(PY)" tools/run_dockerfile.py deploy/docker/Dockerfile --work out/image --model demo/model $(ARGS)

clean: ## remove .venv and outputs
	rm -rf "$(CURDIR)/.venv" out
