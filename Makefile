# make demo: set up a fresh machine and search photographs with the mini model.   make test: set up and test.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
READY  := $(VENV)/.ready

MINI   := runs/mini
SEED   := 1# of the packaged models
LAB    := .venv-lab
TORCH  := .venv-transformers
COSTS  := check default gpu ranking cells resolution systems train depth
.PHONY: demo test slow long check bench bench-training bench-parts bench-transformers bench-weights costs train-mini study clean

demo: $(READY)
	$(RUN) eval.py --config=configs/vstar.py --config.limit=200 --config.pictures=8 --workdir=runs/demo

test: $(READY)
	$(RUN) -m pytest

slow: $(READY)
	$(RUN) -m pytest -m "slow and not long"

long: $(READY)
	$(RUN) -m pytest -m long

check: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The packaged FlexAttention model, from nothing: its tower and connector, then part by part what it searches with.
# Large pages for both, see docs/training.md.
train-mini study: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
train-mini: $(READY)
	$(RUN) tools/mini_study.py --out=$(MINI) --seeds=$(SEED) --arms=flex --train
	$(RUN) eval.py --config=configs/vstar.py --config.models=$(MINI)/seed$(SEED) --workdir=$(MINI)/vsearch

# FlexAttention, its twin and its ablations with three seeds, and all that docs/mini.md tells of them.
study: $(READY)
	$(RUN) tools/mini_study.py --out=$(MINI) --seeds=0,1,2
	$(RUN) tools/mini_charts.py --out=$(MINI) --picture=$(MINI)/study.png

# The tables of docs/performance.md, each in about ten minutes on two cores that do nothing else.
bench bench-training bench-parts bench-transformers: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
bench: $(READY)
	$(RUN) benchmarks/flexattention_cost.py

bench-training: $(READY)
	$(RUN) benchmarks/training_cost.py

bench-parts: $(READY)
	$(RUN) benchmarks/parts.py

bench-transformers: $(TORCH)/.ready
	$(TORCH)/bin/python benchmarks/against_transformers.py

# What bfloat16 and int8 change in the packaged model's answers.
bench-weights: $(READY)
	$(RUN) benchmarks/weights.py --config=configs/vstar.py:mini

# PyTorch apart from the rest, which does not need it.
$(TORCH)/.ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(TORCH)
	$(TORCH)/bin/pip install --quiet --upgrade pip
	$(TORCH)/bin/pip install --quiet --config-settings editable_mode=compat --editable ".[transformers]"
	touch $@

# Every table and chart of docs/compile_costs.md: hours, on a machine that does nothing else. Stopped, it goes on.
costs: $(LAB)/.ready
	for table in $(COSTS); do \
		$(LAB)/bin/python compile_costs.py --config=configs/compile_costs.py:$$table --workdir=runs/costs/$$table || exit 1; \
	done

# Apart from the other environment: JAX looks for the chips of every compiler that is installed whenever it starts.
$(LAB)/.ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(LAB)
	$(LAB)/bin/pip install --quiet --upgrade pip
	$(LAB)/bin/pip install --quiet --config-settings editable_mode=compat --editable ".[lab,tpu,gpu]"
	touch $@

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet --config-settings editable_mode=compat --editable ".[test]"
	touch $(READY)

# Environments; what was run (runs/) stays.
clean:
	rm -rf $(VENV) $(LAB) $(TORCH) build *.egg-info
