"""What FlexAttention costs over the same model without it: prefill and decode, side by side in one run.

    python benchmarks/flexattention_cost.py [--passes 5] [--steps 16] [--out runs/benchmarks/flexattention_cost.json]

Random weights at a size between a toy and the real thing: decoder 1024 x 16 layers (16 heads, MLP 2752, vocabulary
32,000), CLIP-like tower 512 x 8 layers, picture 1008 px, prompt of 636 positions (576 of the picture), float32.
Arms: off (the low-resolution LLaVA-1.5), 10 % (8 of 81 cells a layer, the strongest by attention), all cells.
Every pass times every arm once, in turn, so that a slow minute of the machine falls on all of them; the first pass,
which compiles, is not counted. Measured: wall seconds, medians with the smallest and largest. Counted: cells read.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from flexattn_jax.config import DecoderConfig, FlexAttentionConfig, VisionConfig, VLMConfig, override
from flexattn_jax.inference.generation import cells_projected
from flexattn_jax.inputs.batching import Batch
from flexattn_jax.models.vlm import VLM, Features

POSITIONS, IMAGE_START, ROOM = 636, 35, 64
ARMS = {
    "off": {"flexattention.enabled": False},
    "10 % of the cells": {"flexattention.selection": "top_k", "flexattention.capacity": 8},
    "all cells": {"flexattention.selector": "all"},
}


def shape(scan_layers: bool) -> VLMConfig:
    """The benchmark's model."""
    return VLMConfig(
        vision=VisionConfig(width=512, mlp_dim=2048, num_layers=8, num_heads=8),
        decoder=DecoderConfig(width=1024, mlp_dim=2752, num_layers=16, num_heads=16, num_kv_heads=16, head_dim=64),
        flexattention=FlexAttentionConfig(),
        image_size=1008,
        scan_layers=scan_layers,
    )


def random_params(config: VLMConfig, batch: Batch) -> dict:
    """Normal(0, 0.02) matrices and unit scales."""
    shapes = jax.eval_shape(lambda: VLM(config).init(jax.random.key(0), batch))["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("scale", "bias"):
            return jnp.full(leaf.shape, path[-1].key == "scale", leaf.dtype)
        return jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32))

    return jax.tree_util.tree_map_with_path(draw, shapes)


class Arm:
    """One way of running the model; its programs are compiled when first called."""

    def __init__(self, config: VLMConfig, params: dict, batch: Batch, features: Features):
        self.model, self.params, self.batch = VLM(config), params, batch.replace(pixels=None)
        self.features = features if config.reads_highres else features.replace(highres=None)
        self._prefill = jax.jit(self._prefill_from_features)
        self._decode = jax.jit(self._decode_token, donate_argnums=1)

    def _prefill_from_features(self, params, batch, features):
        room = POSITIONS + ROOM
        return self.model.apply({"params": params}, batch, room, features, method=VLM.prefill)[:2]

    def _decode_token(self, params, memory, token):
        logits, memory, named = self.model.apply({"params": params}, memory, token, method=VLM.decode)
        cells = named["cells"][:-1].sum() if "cells" in named else jnp.zeros((), jnp.int32)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), memory, cells

    def run(self, steps: int) -> dict:
        """One prefill from given features and `steps` decoding steps; seconds of each, and cells read a step."""
        start = time.perf_counter()
        logits, memory = jax.block_until_ready(self._prefill(self.params, self.batch, self.features))
        prefill, decode, cells = time.perf_counter() - start, [], []
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        for _ in range(steps):
            start = time.perf_counter()
            token, memory, read = jax.block_until_ready(self._decode(self.params, memory, token))
            decode.append(time.perf_counter() - start)
            cells.append(int(read))
        projected = cells_projected(memory)
        return {
            "prefill": prefill,
            "decode": decode,
            "cells_read_a_step": cells,
            "cells_projected": 0 if projected is None else int(projected[0]),
        }


def shown(entry: dict, digits: int) -> str:
    """A spread as "median (min-max)"."""
    return f"{entry['median']:.{digits}f} ({entry['min']:.{digits}f}-{entry['max']:.{digits}f})"


def spread(values: list[float]) -> dict:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passes", type=int, default=5, help="counted passes over all arms")
    parser.add_argument("--steps", type=int, default=16, help="decoding steps a pass")
    parser.add_argument("--scan", action="store_true", help="scanned layers, as on accelerators")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/benchmarks/flexattention_cost.json"))
    options = parser.parse_args()
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"note: the machine is busy (load {load:.1f}); figures will be too high and spread wide")

    config = shape(options.scan)
    pixels = np.random.default_rng(1).standard_normal((1, 3, 1008, 1008)).astype(np.float32)
    batch = Batch(
        token_ids=jnp.ones((1, POSITIONS), jnp.int32),
        lengths=jnp.array([POSITIONS]),
        image_start=jnp.array([IMAGE_START]),
        content=jnp.ones((1, config.num_lowres_tokens), bool),
        pixels=pixels,
    )
    params = random_params(config, batch)
    encode = jax.jit(lambda p, x: VLM(config).apply({"params": p}, x, method=VLM.encode)[0])
    features = jax.block_until_ready(encode(params, pixels))
    arms = {name: Arm(override(config, changes), params, batch, features) for name, changes in ARMS.items()}
    for arm in arms.values():
        arm.run(2)
    runs: dict[str, list[dict]] = {name: [] for name in arms}
    tower = []
    for _ in range(options.passes):
        start = time.perf_counter()
        jax.block_until_ready(encode(params, pixels))
        tower.append(time.perf_counter() - start)
        for name, arm in arms.items():
            runs[name].append(arm.run(options.steps))

    rows = {}
    for name, found in runs.items():
        rows[name] = {
            "prefill_s": spread([run["prefill"] for run in found]),
            "decode_s": spread([seconds for run in found for seconds in run["decode"]]),
            "cells_read_a_decode_step": statistics.mean(c for run in found for c in run["cells_read_a_step"]),
            "cells_projected": found[-1]["cells_projected"],
        }
        for part in ("prefill", "decode"):  # pass by pass, so that a drift of the machine cancels
            ratios = [
                statistics.median(np.atleast_1d(run[part])) / statistics.median(np.atleast_1d(off[part]))
                for run, off in zip(found, runs["off"], strict=True)
            ]
            rows[name][f"{part}_over_off"] = spread(ratios)
    table = Table("arm", "prefill s", "over off", "decode s / token", "over off", "cells read / step", title="measured")
    for name, row in rows.items():
        table.add_row(
            name,
            *(shown(row["prefill_s"], 2), shown(row["prefill_over_off"], 2)),
            *(shown(row["decode_s"], 3), shown(row["decode_over_off"], 2)),
            f"{row['cells_read_a_decode_step']:.0f}",
        )
    console = Console(width=120)
    console.print(table)
    console.print(f"tower and connector, nine tiles and the small picture: {statistics.median(tower):.2f} s (measured)")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        "jax": jax.__version__,
        "device": str(jax.devices()[0]),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_before": load,
        "scan_layers": options.scan,
    }
    record = {"arms": rows, "tower_s": spread(tower), "environment": environment, "passes": options.passes}
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"written: {options.out}")


if __name__ == "__main__":
    main()
