# make sft dpo ARGS="model=gpt2 dataset=hh_rlhf beta=0.3" GPUS=4      ARGS, GPUS and LAUNCH go to every target named
ARGS ?=
GPUS ?=
LAUNCH ?= ddp
BETAS ?= 0.01,0.05,0.1,0.3,0.5
VENV := .venv
PY := $(VENV)/bin/python
RUN = $(if $(filter-out 1,$(GPUS)),TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 $(VENV)/bin/accelerate launch --config_file \
	launch/accelerate/$(LAUNCH).yaml --num_processes $(GPUS),$(PY))
# The first interpreter of a version that TRL and bitsandbytes run on; `make PYTHON=...` names another.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)

.NOTPARALLEL:
.PHONY: help install check inspect sft dpo sweep evaluate report pairs export chat deepspeed test test-real test-slurm test-chaos test-gpu \
	bench bench-data bench-eval config-reference lint clean
.DEFAULT_GOAL := help

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed  ## make .venv and install what constraints.txt pins

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "dpo-pipeline needs Python 3.11, 3.12 or 3.13 and found none on PATH: install one, or name it with make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

check: install  ## say what would keep sft and dpo from running; fetch model and data, train nothing
	@$(PY) -m dpo_pipeline.sft $(ARGS) check=true && $(PY) -m dpo_pipeline.dpo $(ARGS) check=true

inspect: install  ## show what is wrong with the data: prints, and writes report/data.html
	@$(PY) -m dpo_pipeline.inspect_data $(ARGS)

sft: install deepspeed  ## fine-tune the base model on the answers to imitate; on 4 GPUs with GPUS=4
	@$(RUN) -m dpo_pipeline.sft $(ARGS)

dpo: install deepspeed  ## align the SFT policy with the pairs; ends with the table; on 4 GPUs with GPUS=4
	@$(RUN) -m dpo_pipeline.dpo $(ARGS)

sweep: sft  ## sft, then dpo for each of BETAS=0.05,0.1,0.3, a GPU each; ends with a report and a recommended beta
	@$(PY) -m dpo_pipeline.dpo -m $(ARGS) beta=$(BETAS)

evaluate: install deepspeed  ## measure whether it is better: all policies of a name, KL, win rates, safety; prints the table, writes the report
	@$(RUN) -m dpo_pipeline.evaluate $(ARGS)

pairs: install  ## sample completions of the SFT, score them with a judge, and write preference pairs
	@$(RUN) -m dpo_pipeline.pairs $(ARGS)

export: install  ## merge the DPO policy into one 16-bit model with a model card, for any library
	@$(PY) -m dpo_pipeline.export $(ARGS)

chat: install  ## talk to the DPO policy; ARGS="compare=true" shows its reference beside it
	@$(PY) -m dpo_pipeline.chat $(ARGS)

report: install  ## show how all policies of a name compare: prints, and writes report/index.html
	@$(PY) -m dpo_pipeline.report $(ARGS)

deepspeed: install
	@case $(LAUNCH) in zero*) $(PY) -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("deepspeed"))' || \
		{ echo 'error: LAUNCH=$(LAUNCH) needs DeepSpeed, which is not installed: $(PY) -m pip install -e ".[deepspeed]"'; exit 1; };; esac

test: install  ## run every test that needs nothing but this checkout
	@$(PY) -m pytest -n 2 --dist loadfile -m "not real and not slurm"

test-real: install  ## run the tests on the real models and data of ../shared
	@$(PY) -m pytest -m real

test-slurm: install  ## get Slurm from Debian into .slurm/ and run the tests on it
	@tests/slurm/get.sh && $(PY) -m pytest -m slurm

test-chaos: install  ## kill runs at random moments, resume them and compare; prints the tally
	@$(PY) -m tests.chaos

test-gpu: install  ## check one GPU in under 8 minutes: precisions, references, memory, speed; prints a table
	@$(PY) -m tests.gpu $(ARGS)

bench-data: install  ## time the preparation of 160,000 pairs against DPOTrainer's own; prints peak memory
	@$(PY) tests/bench/data.py

bench-eval: install  ## time batched sampling against a `generate` loop of batch 1
	@$(PY) tests/bench/evaluation.py

bench: install  ## time DPO against `trl dpo`, with each saving switched off; ARGS="--sweep", ARGS="--device cuda"
	@$(PY) -m tests.bench.training $(ARGS)

config-reference: install  ## write conf/README.md from the comments of the config
	@$(PY) -m tests.config_reference

lint: install  ## check style
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .

clean:  ## remove .venv (results in outputs/ stay)
	rm -rf $(VENV)
