"""Where the time goes: each part of an answer by itself, beside what it counts and what machines could do.

    python benchmarks/parts.py [--passes 5] [--out runs/benchmarks/parts.json]

At the benchmark's size (common.SHAPE), one picture and one prompt. Measured: median wall seconds of each part compiled
alone, and this machine's speed at a product of matrices (2048 x 2048) and at reading memory. Counted: operations and
bytes that the part needs, and from both the roofline: the least time that this machine, and the named chips in
bfloat16, could take. A part compiled alone may take longer or shorter than inside of the whole.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from common import POSITIONS, SHAPE, environment, prompts, random_params, shape, shown, spread, write
from rich.console import Console
from rich.table import Table

from flexattn_jax.config import VLMConfig, override
from flexattn_jax.costs.estimate import roofline_seconds
from flexattn_jax.costs.targets import GPUS, TPUS
from flexattn_jax.highres.cells import make_picture, project_keys, read_cached
from flexattn_jax.highres.flexattention import image_map, select
from flexattn_jax.models.flops import connector_flops, decoder_flops, tower_flops
from flexattn_jax.models.vlm import VLM
from flexattn_jax.ops.cache import LayerCache
from flexattn_jax.ops.selection import Selection

CHIPS = {"v5e": TPUS["v5e"], "v5p": TPUS["v5p"], "h100": GPUS["h100"]}
KEPT = 8  # cells of a layer, 10 %


@dataclasses.dataclass(frozen=True)
class Part:
    """One part: what runs, how often an answer needs it, and what it counts (once).

    floats: numbers that are read or written, in the model's type.
    """

    run: Callable[[], object]
    times: str
    flops: float
    floats: float


def build_parts(config: VLMConfig, params: dict) -> dict[str, Part]:
    """All parts, their inputs ready."""
    model, batch = VLM(config), prompts(config)
    decoder, cells = config.decoder, config.flexattention.num_cells
    compiled = lambda function, *args: partial(jax.jit(function), *args)  # noqa: E731
    weights = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731

    see = jax.jit(lambda p, x: model.apply({"params": p}, x, method=VLM.see))
    views = jax.block_until_ready(see(params, batch.pixels))
    connect = jax.jit(lambda p, v: model.apply({"params": p}, v, method=VLM.connect)[0])
    features = jax.block_until_ready(connect(params, views))
    parts = {
        "tower": Part(lambda: see(params, batch.pixels), "a picture", tower_flops(config), weights(params["vision"])),
        "connector": Part(
            lambda: connect(params, views),
            "a picture",
            connector_flops(config),
            weights(params["connector"]) + sum(leaf.size for leaf in jax.tree.leaves((views, features))),
        ),
    }

    off = VLM(override(config, {"flexattention.enabled": False}))
    bare, low = batch.replace(pixels=None), features.replace(highres=None)
    room = POSITIONS + 64
    prefill = jax.jit(lambda p, b, f: off.apply({"params": p}, b, room, f, method=VLM.prefill)[:2])
    _, memory = jax.block_until_ready(prefill(params, bare, low))
    decode = jax.jit(lambda p, m, t: off.apply({"params": p}, m, t, method=VLM.decode)[0])
    head = 2.0 * decoder.width * decoder.vocab_size
    layers = weights(params["decoder"]) - weights(params["decoder"]["embedding"])
    kept = 2 * POSITIONS * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim
    parts["decoder, prompt"] = Part(
        lambda: prefill(params, bare, low), "a prompt", decoder_flops(off.config, POSITIONS) + head, layers + kept
    )
    parts["decoder, token"] = Part(
        lambda: decode(params, memory, jnp.ones(1, jnp.int32)),
        "a token",
        decoder_flops(off.config, 1) + head + 4.0 * kept / 2,
        layers + kept,
    )

    rng = np.random.default_rng(3)
    width, tokens = decoder.num_kv_heads * decoder.head_dim, features.highres.shape[2]
    picture, _ = make_picture(config, batch.image_start, batch.content, features.highres)
    query = jnp.asarray(rng.standard_normal((1, 1, decoder.num_heads, decoder.head_dim)), jnp.float32)
    keys = jnp.asarray(rng.standard_normal((1, room, width)), jnp.float32)
    kernels = [jnp.asarray(0.02 * rng.standard_normal((width, decoder.width)), jnp.float32) for _ in "kv"]

    def choose(query, keys):
        maps = image_map(query, keys, jnp.zeros(query.shape[:3]), batch.image_start, config.num_lowres_tokens)
        candidate, places = jnp.ones((1, 1), bool), jnp.zeros((1, 1), jnp.int32)
        return select(config.flexattention, maps, batch.content, candidate, places, None, 0)

    each = f"a row, x {config.num_flex_layers} layers"
    scores = 2.0 * config.num_lowres_tokens * width
    parts["selection"] = Part(compiled(choose, query, keys), each, scores, config.num_lowres_tokens * width)
    first = picture.tokens[:, :KEPT], picture.rotation[:, :KEPT]
    parts[f"keys of {KEPT} cells"] = Part(
        compiled(project_keys, *first, kernels[0]),
        "once a layer and cell",
        2.0 * KEPT * tokens * decoder.width * width,
        2 * KEPT * tokens * width + width * decoder.width,
    )
    for count in (KEPT, cells):
        keep = jnp.asarray(np.isin(np.arange(cells), rng.permutation(cells)[:count]))[None, None]
        chosen = Selection(keep, jnp.where(keep, 1.0, -1.0), jnp.zeros((1, 1), jnp.int32))
        cache = jnp.asarray(rng.standard_normal((1, cells, tokens, width)), jnp.float32)

        def read(query, cache, chosen=chosen, count=count):
            layer = LayerCache(None, None, cache, None, jnp.ones((1, cells), bool))
            part, layer = read_cached(query, chosen, picture, *kernels, layer, (), count)
            return part, layer.key_hd

        donating = jax.jit(read, donate_argnums=1)
        state = [cache]

        def run(donating=donating, state=state):  # the cache goes round, as in decoding
            part, state[0] = donating(query, state[0])
            return part

        parts[f"reading {count} cells"] = Part(
            run,
            f"a row, x {config.num_flex_layers - 1} layers",
            count * tokens * 2.0 * decoder.num_heads * (decoder.head_dim + decoder.width) + 2.0 * width * decoder.width,
            count * tokens * (width + decoder.width) + width * decoder.width,
        )
    return parts


def machine() -> dict[str, float]:
    """Operations a second of a product of matrices, and bytes a second of reading memory, measured."""
    matrix = jnp.ones((2048, 2048), jnp.float32)
    large = jnp.ones(1 << 27, jnp.float32)
    product, total = jax.jit(lambda x: x @ x), jax.jit(jnp.sum)
    return {
        "flops": 2.0 * 2048**3 / min(timed(lambda: product(matrix), 5)),
        "bandwidth": large.nbytes / min(timed(lambda: total(large), 5)),
    }


def timed(run: Callable[[], object], passes: int) -> list[float]:
    """Seconds of each pass, after one that compiles."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(passes):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a toy, to see whether this runs")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/benchmarks/parts.json"))
    options = parser.parse_args()
    where, config, about = environment(), shape(small=options.small), "a toy" if options.small else SHAPE
    config = override(config, {"flexattention.selection": "top_k", "flexattention.capacity": KEPT})
    params = random_params(config)
    here = machine()
    rows = {}
    for name, part in build_parts(config, params).items():
        rooflines = {"this machine": max(part.flops / here["flops"], 4 * part.floats / here["bandwidth"])}
        for chip, able in CHIPS.items():
            rooflines[chip] = roofline_seconds(part.flops, 2 * part.floats, able)
        seconds = timed(part.run, options.passes)
        rows[name] = {
            "seconds": spread(seconds),
            "times": part.times,
            "gflop": part.flops / 1e9,
            "floats": part.floats,
            "roofline_s": rooflines,
        }
    table = Table("part", "how often", "ms (measured)", "GFLOP", "MB, float32", "least ms here", *CHIPS,
                  title="measured and counted: " + about)  # fmt: skip
    for name, row in rows.items():
        ms = {key: 1000 * value for key, value in row["seconds"].items()}
        least = [f"{1000 * value:.3g}" for value in row["roofline_s"].values()]
        table.add_row(name, row["times"], shown(ms), f"{row['gflop']:.3g}", f"{4 * row['floats'] / 1e6:.3g}", *least)
    console = Console(width=140)
    console.print(table)
    console.print(f"this machine: {here['flops'] / 1e9:.0f} GFLOP/s, {here['bandwidth'] / 1e9:.1f} GB/s (measured)")
    write(options.out, {"shape": about, "parts": rows, "machine": here, "environment": where})


if __name__ == "__main__":
    main()
