"""What FlexAttention costs over the same model without it: prefill and decode, alone and in a batch of 8.

    python benchmarks/flexattention_cost.py [--passes 5] [--steps 64] [--out runs/benchmarks/flexattention_cost.json]

Random weights at a size between a toy and the real thing (common.SHAPE), a prompt of 636 positions, of which 576 are
the picture's. Arms: off (the low-resolution LLaVA-1.5), 10 % (8 of 81 cells a layer, the strongest by attention), all
cells; and for prefill dense, every high-resolution token in the sequence. Every pass times every arm once, in turn, so
that a slow minute of the machine falls on all of them; what compiles is not counted. An answer is --steps tokens: with
random weights every token selects other cells, so that its first tokens project many and its last ones few; the table
has the median token, and the whole answer.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
from common import ARMS, SHAPE, environment, judged, prompts, random_params, ratios, shape, shown, spread, write
from rich.console import Console
from rich.table import Table

from flexattn_jax.checkpoints.trees import restack, stack_layers, unstack_layers
from flexattn_jax.config import VLMConfig, override
from flexattn_jax.inference.generation import cells_projected
from flexattn_jax.inputs.batching import Batch
from flexattn_jax.models.vlm import VLM, Features

DENSE = {"flexattention.enabled": False, "dense.tiles": 3}
GOALS = {"10 % of the cells": (1.10, 1.10), "all cells": (1.6, 1.5)}  # prefill and decode over off
TOGETHER = 8


class Arm:
    """One way of running the model; its programs are compiled when first called."""

    def __init__(self, config: VLMConfig, params: dict, batch: Batch, features: Features, room: int):
        self.model, self.params, self.batch = VLM(config), params, batch.replace(pixels=None)
        self.features = features if config.reads_highres else features.replace(highres=None)
        self.room = batch.token_ids.shape[1] + room
        self._prefill = jax.jit(self._prefill_from_features)
        self._decode = jax.jit(self._decode_token, donate_argnums=1)

    def _prefill_from_features(self, params, batch, features):
        return self.model.apply({"params": params}, batch, self.room, features, method=VLM.prefill)[:2]

    def _decode_token(self, params, memory, token):
        logits, memory, named = self.model.apply({"params": params}, memory, token, method=VLM.decode)
        cells = named["cells"][:-1, 0].sum() if "cells" in named else jnp.zeros((), jnp.int32)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), memory, cells

    def prefill(self) -> tuple[float, jax.Array, object]:
        """Seconds, logits and memory."""
        start = time.perf_counter()
        logits, memory = jax.block_until_ready(self._prefill(self.params, self.batch, self.features))
        return time.perf_counter() - start, logits, memory

    def run(self, steps: int) -> dict:
        """One prefill from given features and `steps` decoding steps; seconds of each, and cells read a step."""
        prefill, logits, memory = self.prefill()
        token, decode, cells = jnp.argmax(logits, axis=-1).astype(jnp.int32), [], []
        for _ in range(steps):
            start = time.perf_counter()
            token, memory, read = jax.block_until_ready(self._decode(self.params, memory, token))
            decode.append(time.perf_counter() - start)
            cells.append(int(read))
        found = cells_projected(memory)
        found = {"cells_read": statistics.mean(cells), "cells_projected": 0 if found is None else int(found[0])}
        return {"prefill": prefill, "decode": statistics.median(decode), "answer": sum(decode), **found}


def repeated(tree, times: int):
    """Every sample `times` times."""
    return jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), times, axis=0), tree)


def dense_prefill(config: VLMConfig, params: dict, features: Features, small: bool) -> Arm:
    """Prefill with all tokens in the sequence: the same text, the same weights."""
    dense = override(config, DENSE)
    stacked = params if config.scan_layers else stack_layers(params)
    params = restack(stacked, config, dense)  # without the projections that it does not read
    params, config = params if config.scan_layers else unstack_layers(params), dense
    batch = prompts(config, 1, config.num_slots + (8 if small else 60))
    tokens = features.highres.reshape(1, -1, features.highres.shape[-1])
    return Arm(config, params, batch, Features(jnp.concatenate([features.lowres, tokens], axis=1), None), 0)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passes", type=int, default=5, help="counted passes over all arms")
    parser.add_argument("--steps", type=int, default=64, help="decoding steps a pass")
    parser.add_argument("--batch-steps", type=int, default=8, help="decoding steps a pass of the batch of 8; 0: none")
    parser.add_argument("--no-dense", action="store_true", help="leave out dense prefill, which takes longest")
    parser.add_argument("--scan", action="store_true", help="scanned layers, as on accelerators")
    parser.add_argument("--small", action="store_true", help="a toy, to see whether this runs")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/benchmarks/flexattention_cost.json"))
    options = parser.parse_args()
    where, config = environment(), shape(options.scan, options.small)
    batch = prompts(config)
    params = random_params(config)
    encode = jax.jit(lambda p, x: VLM(config).apply({"params": p}, x, method=VLM.encode)[0])
    features = jax.block_until_ready(encode(params, batch.pixels))
    arms = {
        name: Arm(override(config, changes), params, batch, features, options.steps) for name, changes in ARMS.items()
    }
    for arm in arms.values():
        arm.run(2)
    dense = None if options.no_dense else dense_prefill(config, params, features, options.small)
    if dense:
        dense.prefill()

    runs, tower, dense_s = {name: [] for name in arms}, [], []
    for _ in range(options.passes):
        start = time.perf_counter()
        jax.block_until_ready(encode(params, batch.pixels))
        tower.append(time.perf_counter() - start)
        for name, arm in arms.items():
            runs[name].append(arm.run(options.steps))
        if dense:
            dense_s.append(dense.prefill()[0])

    rows = {name: summarise(found, runs["off"]) for name, found in runs.items()}
    record = {"shape": "toy" if options.small else SHAPE, "arms": rows, "tower_s": spread(tower)}
    record |= {"environment": where | {"scan_layers": options.scan}, "passes": options.passes, "steps": options.steps}
    if dense:
        record["dense"] = {
            "prefill_s": spread(dense_s),
            "flexattention_over_dense": ratios([r["prefill"] for r in runs["10 % of the cells"]], dense_s),
        }
    if options.batch_steps:
        record["batch"] = measure_batch(config, params, batch, features, options)
    print_tables(record)
    write(options.out, record)


def summarise(found: list[dict], off: list[dict]) -> dict:
    """Of an arm: spreads, and ratios to the arm without high resolution."""
    row = {f"{part}_s": spread([run[part] for run in found]) for part in ("prefill", "decode", "answer")}
    for part in ("prefill", "decode", "answer"):
        row[f"{part}_over_off"] = ratios([run[part] for run in found], [run[part] for run in off])
    return row | {name: found[-1][name] for name in ("cells_read", "cells_projected")}


def measure_batch(config: VLMConfig, params: dict, batch: Batch, features: Features, options) -> dict:
    """Tokens a second of 8 samples together over those of one, in turn."""
    found = {}
    for name in ("off", "10 % of the cells"):
        arms = [
            Arm(override(config, ARMS[name]), params, repeated(batch.replace(pixels=None), n), repeated(features, n),
                (options.passes + 1) * options.batch_steps)
            for n in (1, TOGETHER)
        ]  # fmt: skip
        states = [
            (jnp.argmax(logits, axis=-1).astype(jnp.int32), memory) for _, logits, memory in map(Arm.prefill, arms)
        ]
        seconds: list[list[float]] = [[], []]
        for turn in range(options.passes + 1):
            for i, arm in enumerate(arms):
                times, (token, memory) = [], states[i]
                for _ in range(options.batch_steps):
                    start = time.perf_counter()
                    token, memory, _ = jax.block_until_ready(arm._decode(params, memory, token))
                    times.append(time.perf_counter() - start)
                states[i] = token, memory
                if turn:  # the first one compiles
                    seconds[i].append(statistics.median(times))
        rates = [[1 / s for s in seconds[0]], [TOGETHER / s for s in seconds[1]]]
        found[name] = {
            "tokens_a_second_1": spread(rates[0]),
            f"tokens_a_second_{TOGETHER}": spread(rates[1]),
            "ratio": ratios(rates[1], rates[0]),
        }
    return found


def print_tables(record: dict) -> None:
    """What a person reads."""
    console = Console(width=150)
    table = Table("arm", "prefill s", "over off", "", "decode s / token", "over off", "", "answer over off",
                  "cells read / step", "projected", title=f"measured: {record['shape']}")  # fmt: skip
    for name, row in record["arms"].items():
        prefill, decode = GOALS.get(name, (None, None))
        table.add_row(
            name,
            *(shown(row["prefill_s"]), shown(row["prefill_over_off"])),
            judged(row["prefill_over_off"], prefill) if prefill else "",
            *(shown(row["decode_s"], 3), shown(row["decode_over_off"])),
            judged(row["decode_over_off"], decode) if decode else "",
            shown(row["answer_over_off"]),
            *(f"{row['cells_read']:.0f}", str(row["cells_projected"])),
        )
    console.print(table)
    console.print(f"tower and connector, nine tiles and the small picture: {shown(record['tower_s'])} s (measured)")
    if dense := record.get("dense"):
        over = dense["flexattention_over_dense"]
        console.print(
            f"dense prefill {shown(dense['prefill_s'])} s; 10 % over dense {shown(over, 3)} {judged(over, 0.12)}"
        )
    for name, row in record.get("batch", {}).items():
        over = row["ratio"]
        console.print(f"{name}: tokens/s of 8 together over one {shown(over)} {judged(over, 5, at_least=True)}")


if __name__ == "__main__":
    main()
