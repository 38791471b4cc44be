# make demo: set up a fresh machine and answer questions about real photographs.   make test: set up and test.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
READY  := $(VENV)/.ready

MINI   := runs/mini
.PHONY: demo test slow check bench train-mini study clean

demo: runs/demo/checkpoint/config.json
	$(RUN) eval.py --config=configs/vstar.py --config.pictures=8 --workdir=runs/demo/vstar

runs/demo/checkpoint/config.json: | $(READY)
	$(RUN) -m flexattn_jax.evaluation.demo runs/demo/source
	$(RUN) -m flexattn_jax.checkpoints.import_weights --source runs/demo/source --out runs/demo/checkpoint

test: $(READY)
	$(RUN) -m pytest

slow: $(READY)
	$(RUN) -m pytest -m slow

check: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The shipped FlexAttention model, from nothing: its tower, captions, LLaVA-1.5 at low resolution, FlexAttention.
train-mini: $(READY)
	$(RUN) train.py --config=configs/train_mini.py:tower --workdir=$(MINI)/tower
	$(RUN) train.py --config=configs/train_mini.py:captions --workdir=$(MINI)/seed0/captions --config.start.checkpoint=$(MINI)/tower/model
	$(RUN) train.py --config=configs/train_mini.py:lowres --workdir=$(MINI)/seed0/lowres --config.start.checkpoint=$(MINI)/seed0/captions/model
	$(RUN) train.py --config=configs/train_mini.py:flex --workdir=$(MINI)/seed0/flex --config.start.checkpoint=$(MINI)/seed0/lowres/model
	$(RUN) eval.py --config=configs/vstar.py:mini --config.models=$(MINI)/seed0 --workdir=$(MINI)/vsearch

# Every arm with three seeds, and all that docs/mini.md tells of them.
study: $(READY)
	$(RUN) tools/mini_study.py --out=$(MINI) --seeds=0,1,2

bench: $(READY)
	$(RUN) benchmarks/flexattention_cost.py

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet --config-settings editable_mode=compat --editable ".[test]"
	touch $(READY)

clean:
	rm -rf $(VENV) runs build *.egg-info
