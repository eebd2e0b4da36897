# Everything on a fresh machine with Python 3.11+, git and make: `make train`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
SYNCED := $(VENV)/.synced
# In two processes, for much of what starts Ray is waiting. Tests that share what is dear stay together: tests/conftest.py.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder --durations=25
# In one process, and never beside another suite: the hosts share this machine's cores.
CLUSTER := $(BIN)/python -m pytest tests/cluster --durations=25

.PHONY: train test quick lint types unit integration slow cluster coverage fuzz bench gpu image clean
.DEFAULT_GOAL := train

$(UV):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet 'uv>=0.12.11,<1'

# Compiled bytecode halves the start of Ray's processes.
$(SYNCED): pyproject.toml uv.lock | $(UV)
	$(UV) sync --locked --compile-bytecode --extra export --extra tonic
	touch $@

train: $(SYNCED)
	$(BIN)/spikefleet data prepare digits
	$(BIN)/spikefleet train digits --workers 2
	$(BIN)/spikefleet evaluate models:/sg_resnet_digits@champion
	$(BIN)/spikefleet registry best --task classification --metric top1
	@echo
	@echo "next: spikefleet recipes; spikefleet predict models:/sg_resnet_digits@champion IMAGE; spikefleet ui"
	@echo "      (in $(BIN)/, or with 'uv run')"

# Everything but what is marked slow; what takes longest starts first. Over hosts, when the machine has nothing else to
# do: a clean run, a worker and a host that die, SIGTERM, who is let in; three minutes, skipped where hosts cannot be made.
test: $(SYNCED)
	$(MAKE) --jobs 2 lint types
	$(PYTEST) tests/integration tests/robustness tests/unit -m "not slow"
	$(CLUSTER) -m "not slow"

# While you work: under three minutes.
quick: $(SYNCED)
	$(MAKE) --jobs 2 lint types
	$(MAKE) unit

lint: $(SYNCED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/lint-imports

types: $(SYNCED)
	$(BIN)/mypy

unit: $(SYNCED)
	$(PYTEST) tests/unit -m "not slow"

integration: $(SYNCED)
	$(PYTEST) tests/integration -m "not slow"

# What neither quick nor test runs; each such test says why. No test is no failure (pytest's exit code 5).
slow: $(SYNCED)
	$(PYTEST) tests/integration tests/robustness tests/unit -m slow || [ $$? -eq 5 ]

# Over three hosts in network namespaces, in which workers and hosts die. Needs root and iproute2; skipped elsewhere.
# What `make test` leaves out of them, and a look for secrets in what they have left; CLUSTER_OPTIONS= for all of them.
CLUSTER_OPTIONS ?= -m "slow or traces"
cluster: $(SYNCED)
	$(CLUSTER) $(CLUSTER_OPTIONS)

# Lines that the tests reach in this process and those that they fork or start, but not in Ray's.
coverage: $(SYNCED)
	$(PYTEST) tests/integration tests/robustness tests/unit -m "not slow" --cov --cov-report=term:skip-covered

# Each fuzzer for FUZZ_SECONDS, with inputs of FUZZ_SEED: another seed tries others.
FUZZ_SECONDS ?= 30
FUZZ_SEED ?= 1
fuzz: $(SYNCED)
	FUZZ_SECONDS=$(FUZZ_SECONDS) FUZZ_SEED=$(FUZZ_SEED) $(BIN)/python -m pytest tests/robustness -k fuzz -rP --timeout 0

bench: $(SYNCED)
	for bench in tests/bench/bench_*.py; do $(BIN)/python $$bench || exit 1; done

# Correctness and speed on a CUDA device, and a short training on it, in under four minutes: tests/gpu/run.py.
# `make gpu GPU_OPTIONS=--dry` tries the script on the CPU.
GPU_OPTIONS ?=
FASHION_MNIST ?= /usr/share/datasets/fashion-mnist
gpu: $(SYNCED)
	CUBLAS_WORKSPACE_CONFIG=:4096:8 PYTHONPATH=tests $(BIN)/python -m gpu.run --out out/gpu.json --fashion-mnist $(FASHION_MNIST) $(GPU_OPTIONS)

# The image of k8s/, built and run as its pods would be; by hand, as root, on Debian: tests/image/run.py.
IMAGE_OPTIONS ?=
image: $(SYNCED)
	PYTHONPATH=tests $(BIN)/python -m image.run $(IMAGE_OPTIONS)

clean:
	rm -rf runs stores .coverage .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
