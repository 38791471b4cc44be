# make demo: set up a fresh machine and answer questions about real photographs.   make test: set up and test.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
READY  := $(VENV)/.ready

.PHONY: demo test slow check bench clean

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

bench: $(READY)
	$(RUN) benchmarks/flexattention_cost.py

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet --config-settings editable_mode=compat --editable ".[test]"
	touch $(READY)

clean:
	rm -rf $(VENV) runs build *.egg-info
