# One word a task; `make help` lists them. VENV=none uses the active interpreter, installs nothing and only builds in place.
VENV ?= .venv
DEVICE ?= cpu
ARGS ?=

ifeq ($(VENV),none)
PY := python3
ENVIRONMENT :=
else
PY := $(VENV)/bin/python
ENVIRONMENT := $(VENV)/.installed
endif

.PHONY: help install build test test-slow demo bench gpu aot lint docs doctor clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(VENV)/.installed: requirements.txt pyproject.toml setup.py
	@test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -U pip
	$(PY) -m pip install -q --disable-pip-version-check $$(grep -E '^(torch|setuptools|wheel|ninja|numpy)==' requirements.txt)
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

install: build  ## environment, dependencies, the package with its compiled library (in place)

build: $(ENVIRONMENT)  ## the compiled library alone, incrementally
	@$(PY) setup.py -q build_ext --inplace

# --dist worksteal: tests that follow each other stay in one process, which computes their gold once.
test: build  ## every fast check; ends with the ten slowest and the number of operator cells
	$(PY) -m pytest -n 2 --dist worksteal --durations=10 --require-cells $(ARGS)

test-slow: build  ## the slow tests: tensors beyond 2^31 elements, emulated AMX and CUDA, the kill test, training curves
	$(PY) -m pytest -m slow $(ARGS)

demo: build  ## train a small InternLM2 on the standard library's source, kernels beside plain PyTorch
	$(PY) -m internlm2 demo --device $(DEVICE) $(ARGS)

bench: build  ## every operator against its peers and the machine's limit; writes benchmarks/results/
	$(PY) -m benchmarks $(ARGS)

gpu:  ## on a machine with an NVIDIA GPU, in the active interpreter: build, shared checks, yardsticks, benchmarks
	@python3 -m benchmarks.gpu $(ARGS)

aot: build  ## static audit of every GPU kernel against the committed table
	$(PY) -m tools.audit --check $(ARGS)

lint: $(ENVIRONMENT)  ## ruff
	$(PY) -m ruff check .

docs: build  ## rewrites the generated parts of README.md, docs/ and benchmarks/results/README.md
	$(PY) -m tools.docs --write
	$(PY) -m benchmarks report

doctor: build  ## what is installed, what loaded or why not, a self-test of each operator
	$(PY) -m internlm2_kernels doctor

clean:
	rm -rf build dist *.egg-info internlm2_kernels/_C.*.so
