"""A program for 8 simulated devices: python partitioned.py SYSTEM MESH,MESH prints a JSON object for the tests.

A process of its own, since the number of devices must be known before JAX begins. MESH is data x fsdp x tensor, with
/PARTS behind it where the batch is accumulated in parts. A third word names the platform whose way of attention the
meshes take.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import random_params
from platforms import attend_as
from systems import PLAIN, batch_of, problem

from flexattn_jax.config import override, preset
from flexattn_jax.costs.estimate import estimate
from flexattn_jax.models.vlm import VLM
from flexattn_jax.partitioning import AXES, PartitionConfig, make_partition, with_shardings
from flexattn_jax.training.checkpoints import Checkpointer
from flexattn_jax.training.data import TrainBatch
from flexattn_jax.training.loss import IGNORED, answer_rows
from flexattn_jax.training.optimizer import OptimizerConfig, build_optimizer
from flexattn_jax.training.state import create_state
from flexattn_jax.training.step import make_eval_step, make_train_step, vlm_loss

SAMPLES = 8
SMALL = {"decoder.num_layers": 3, "vision.num_layers": 2, "decoder.num_kv_heads": 2, "flexattention.threshold": 60.0}
SYSTEMS = {
    "flex": {},
    "flex:2": {"flexattention.selection": "top_k", "flexattention.capacity": 2, "flexattention.union_capacity": 4},
    "paper": {"flexattention.variant": "paper"},
    "dense": PLAIN | {"dense.tiles": 2, "image_size": 84},
    "cogagent": PLAIN | {"crossattention.width": 24, "crossattention.num_heads": 2, "image_size": 168},
    "vistog": PLAIN | {"grouping.groups": 6},
    "fastv": PLAIN | {"reduction.tokens": 5},
}
OPTIMIZER = OptimizerConfig(warmup_share=0.0, clip_norm=None, learning_rate=1e-3)


def config_of(system):
    """The tiny preset with three layers as one of SYSTEMS."""
    return override(preset("tiny"), {**{k: v for k, v in SMALL.items() if "flexattention" not in k}, **SYSTEMS[system]})


def batch_for(config):
    """A batch of prompts of several lengths, one of them without a picture, whose last tokens are learned."""
    lengths = [6 + i % 4 for i in range(SAMPLES)]
    batch = batch_of(config, *problem(config, lengths, [None if i == 3 else 1 for i in range(SAMPLES)]))
    labels = np.full(batch.token_ids.shape, IGNORED, np.int32)
    for row, length in zip(range(SAMPLES), batch.lengths, strict=True):
        labels[row, length - 3 : length] = batch.token_ids[row, length - 3 : length]
    return TrainBatch(batch, labels, answer_rows(labels, batch.image_start, 4))


def run(system, mesh, accumulation=1):
    """Two steps and an evaluation on a mesh (None: one device); what they give, as numpy arrays and numbers."""
    config = config_of(system)
    sizes = dict(zip(AXES, (1, 1, 1, 1) if mesh is None else mesh, strict=True))
    partition = make_partition(
        PartitionConfig(**sizes, largest_replicated=3000), jax.devices()[:1] if mesh is None else None
    )
    optimizer, loss, batch = build_optimizer(OPTIMIZER, 100), vlm_loss(VLM(config)), batch_for(config)

    def create(params):
        return create_state(params, OPTIMIZER, optimizer, 0)

    params = random_params(config, seed=2)
    shardings = partition.state_shardings(jax.eval_shape(create, params))
    state = jax.jit(create, out_shardings=shardings)(params)
    arrays = partition.place_batch(batch, SAMPLES)
    step = make_train_step(
        loss, optimizer, lambda step: jax.numpy.float32(0.7), accumulation, None, partition, shardings
    )
    evaluate = make_eval_step(loss, partition)
    found = {
        "constraints": [
            len(re.findall(r"sharding_constraint|@Sharding", program.lower(state, arrays).as_text()))
            for program in (step, evaluate)
        ],
        "largest_share": max(
            leaf.addressable_shards[0].data.size / leaf.size
            for leaf in jax.tree.leaves(state.params)
            if leaf.size > 3000
        ),
    }
    if mesh is not None:
        totals = estimate(step.lower(state, arrays).compile().as_text())
        found["selecting"] = [totals.selecting, totals.selecting_collectives, len(totals.collectives)]
    total, tokens = evaluate(state, arrays)
    found["eval_loss"] = float(total / tokens)
    state, metrics = step(state, arrays)
    found["loss"] = float(metrics["loss"])
    found["cells"] = float(metrics.get("cells_per_row", 0))
    gradient = jax.tree.map(np.asarray, jax.tree.leaves(state.moments[0].mu))
    state, metrics = step(state, arrays)
    found |= {"second_loss": float(metrics["loss"]), "compiled": step._cache_size()}
    return found, gradient, state, partition


def see_one(system, partition):
    """What the tower sees of one picture, whose squares no mesh of 8 devices divides."""
    config = config_of(system)
    see = partition.traced(lambda params, pixels: VLM(config).apply({"params": params}, pixels, method=VLM.see))
    views = jax.jit(see)(random_params(config, seed=2), batch_for(config).batch.pixels[:1])
    return [np.asarray(leaf) for leaf in jax.tree.leaves(views)]


def difference(one, other):
    """Largest difference of two lists of arrays, relative to the largest number of each array."""
    return max(
        float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30)) for a, b in zip(one, other, strict=True) if a.any()
    )


def moved(state, shardings):
    """How many leaves differ from a state that is saved and read into other shardings."""
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = Checkpointer(Path(folder), keep=1)
        checkpointer.save(2, state, {})
        checkpointer.wait()
        back, _ = checkpointer.restore(2, with_shardings(state, shardings))
        checkpointer.close()
    raw = [jax.tree.leaves(s.replace(key=jax.random.key_data(s.key))) for s in (state, back)]
    assert [leaf.sharding for leaf in raw[1]] == [
        leaf.sharding for leaf in jax.tree.leaves(back.replace(key=jax.random.key_data(back.key)))
    ]
    return sum(not np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(*raw, strict=True))


def main(system, meshes, platform="cpu"):
    """Everything about one system."""
    one, gradient, _, whole = run(system, None)
    views = see_one(system, whole)
    if platform != "cpu":
        attend_as(platform, pytest.MonkeyPatch())
    answer = {"one": one, "meshes": {}}
    states = []
    for name in meshes.split(","):
        sizes, _, parts = name.partition("/")
        found, own, state, partition = run(system, (1, *map(int, sizes.split("x"))), int(parts or 1))
        answer["meshes"][name] = found | {
            "gradient_difference": difference(gradient, own),
            "views_difference": difference(views, see_one(system, partition)),
        }
        states.append((state, partition))
    if len(states) > 1:
        (state, _), (_, other) = states[0], states[-1]
        answer["moved"] = moved(state, other.state_shardings(state))
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
