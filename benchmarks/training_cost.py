"""What FlexAttention costs a step of training over the same step without it.

    python benchmarks/training_cost.py [--passes 3] [--out runs/benchmarks/training_cost.json]

One conversation of 1024 positions, 576 of them the picture's, 128 rows that predict an answer (common.SHAPE). What the
tower sees is given, as with a frozen tower's kept features; connector and decoder are trained. Arms: off, a union of
27 of 81 cells a sample, all cells. Measured: wall seconds; counted: operations (models/flops.py, tower excluded).
"""

from __future__ import annotations

import argparse
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from common import SHAPE, environment, judged, prompts, random_params, ratios, shape, shown, spread, write
from rich.console import Console
from rich.table import Table

from flexattn_jax.config import override
from flexattn_jax.models.flops import step_flops, tower_flops
from flexattn_jax.models.vision import Views
from flexattn_jax.models.vlm import VLM
from flexattn_jax.training.data import TrainBatch
from flexattn_jax.training.optimizer import OptimizerConfig, build_optimizer
from flexattn_jax.training.state import create_state
from flexattn_jax.training.step import alpha_ramp, make_train_step, vlm_loss

LENGTH, READERS, GOAL = 1024, 128, 1.25
ARMS = {
    "off": {"flexattention.enabled": False},
    "union of 27 cells": {
        "flexattention.selection": "top_k",
        "flexattention.capacity": 8,
        "flexattention.union_capacity": 27,
    },
    "all cells": {"flexattention.selector": "all"},
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passes", type=int, default=3, help="counted passes over all arms")
    parser.add_argument("--remat", default="none", choices=("none", "full", "dots"), help="see ops/layers.py")
    parser.add_argument("--small", action="store_true", help="a toy, to see whether this runs")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/benchmarks/training_cost.json"))
    options = parser.parse_args()
    where = environment()
    config = override(shape(small=options.small), {"remat": options.remat})
    batch = prompts(config, 1, LENGTH)
    params = random_params(config)
    rng = np.random.default_rng(2)
    seen = [rng.standard_normal((1, n, 512)).astype(np.float32) for n in (config.num_lowres_tokens, 5184)]
    labels = np.full((1, LENGTH), -100, np.int32)
    labels[:, -READERS:] = batch.token_ids[:, -READERS:]
    readers = np.arange(LENGTH - READERS - 1, LENGTH - 1, dtype=np.int32)[None]

    settings = OptimizerConfig(schedule="constant")
    optimizer = build_optimizer(settings, total_steps=1000)
    seconds, flops = {name: [] for name in ARMS}, {}
    steps, inputs = {}, {}
    for name, changes in ARMS.items():
        own = override(config, changes)
        steps[name] = make_train_step(vlm_loss(VLM(own)), optimizer, alpha_ramp(10.0, 10))
        views = Views(seen[0], seen[1] if own.reads_highres else None)
        inputs[name] = TrainBatch(batch.replace(pixels=None, views=views), labels, readers)
        flops[name] = step_flops(own, 1, LENGTH, READERS) - tower_flops(own)
    state = create_state(params, settings, optimizer, 0)
    for turn in range(options.passes + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, jax.tree.map(jnp.asarray, inputs[name])))
            if turn:  # the first one compiles
                seconds[name].append(time.perf_counter() - start)

    rows = {
        name: {
            "step_s": spread(found),
            "step_over_off": ratios(found, seconds["off"]),
            "gflop": flops[name] / 1e9,
            "flops_over_off": flops[name] / flops["off"],
        }
        for name, found in seconds.items()
    }
    name = "a toy" if options.small else SHAPE
    about = {"shape": name, "length": LENGTH, "readers": READERS, "remat": options.remat}
    table = Table("arm", "step s", "over off", "", "GFLOP (counted)", "over off", title="measured: " + about["shape"])
    for name, row in rows.items():
        verdict = "" if name == "off" else judged(row["step_over_off"], GOAL)
        table.add_row(
            *(name, shown(row["step_s"]), shown(row["step_over_off"]), verdict),
            *(f"{row['gflop']:.0f}", f"{row['flops_over_off']:.2f}"),
        )
    Console(width=120).print(table)
    write(options.out, {**about, "arms": rows, "environment": where, "passes": options.passes})


if __name__ == "__main__":
    main()
