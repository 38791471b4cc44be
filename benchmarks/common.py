"""What the benchmarks share: the model they measure, random weights, readings side by side, records."""

from __future__ import annotations

import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexattn_jax.checkpoints.trees import unstack_layers
from flexattn_jax.config import DecoderConfig, FlexAttentionConfig, VisionConfig, VLMConfig
from flexattn_jax.costs.lab import BUSY, busy_cores
from flexattn_jax.costs.records import cpu_model
from flexattn_jax.evaluation.report import write_json
from flexattn_jax.inputs.batching import Batch
from flexattn_jax.training.state import draw_params

POSITIONS, IMAGE_START = 636, 35  # of the prompt: 576 of the picture, 60 of text
ARMS = {
    "off": {"flexattention.enabled": False},
    "10 % of the cells": {"flexattention.selection": "top_k", "flexattention.capacity": 8},
    "all cells": {"flexattention.selector": "all"},
}
SHAPE = "decoder 1024 x 16 layers (16 heads, MLP 2752, vocabulary 32,000), tower 512 x 8 layers, 1008 px, float32"


def shape(scan_layers: bool = False, small: bool = False) -> VLMConfig:
    """The benchmarks' model, SHAPE; small: a toy of the same form, to see whether a benchmark runs."""
    width, layers = (128, 10) if small else (1024, 16)
    heads = width // 64
    return VLMConfig(
        vision=VisionConfig(width=512, mlp_dim=2048, num_layers=3 if small else 8, num_heads=8),
        decoder=DecoderConfig(
            width=width,
            mlp_dim=width * 43 // 16,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=64,
            vocab_size=1000 if small else 32000,
        ),
        flexattention=FlexAttentionConfig(),
        image_size=1008,
        scan_layers=scan_layers,
    )


def random_params(config: VLMConfig) -> dict:
    """Of `draw_params`, on the device, as `VLM(config)` reads them."""
    params = jax.tree.map(jnp.asarray, draw_params(config, 0))
    return params if config.scan_layers else unstack_layers(params)


def prompts(config: VLMConfig, samples: int = 1, positions: int = POSITIONS) -> Batch:
    """Prompts of random tokens about random pictures."""
    rng = np.random.default_rng(1)
    ids = rng.integers(3, config.decoder.vocab_size, (samples, positions), np.int32)
    return Batch(
        token_ids=jnp.asarray(ids),
        lengths=jnp.full(samples, positions, jnp.int32),
        image_start=jnp.full(samples, IMAGE_START, jnp.int32),
        content=jnp.ones((samples, config.num_lowres_tokens), bool),
        pixels=rng.standard_normal((samples, 3, config.image_size, config.image_size)).astype(np.float32),
    )


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Pass by pass, so that a drift of the machine cancels."""
    return spread([one / other for one, other in zip(values, base, strict=True)])


def shown(entry: Mapping[str, float], digits: int = 2) -> str:
    """A spread as "median (min-max)"."""
    return f"{entry['median']:.{digits}f} ({entry['min']:.{digits}f}-{entry['max']:.{digits}f})"


def judged(entry: Mapping[str, float], goal: float, at_least: bool = False) -> str:
    """Whether a ratio's median keeps a goal, in words."""
    kept = entry["median"] >= goal if at_least else entry["median"] <= goal
    return f"{'>=' if at_least else '<='} {goal:g}: {'kept' if kept else 'missed'}"


def environment() -> dict[str, Any]:
    """What a reading depends on beside the code; call it before measuring."""
    busy = busy_cores()
    if busy > BUSY:
        print(f"note: other processes use {busy:.1f} cores; figures will be too high and spread wide")
    return {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "busy_before": busy,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }


def write(path: pathlib.Path, record: Mapping[str, Any]) -> None:
    """The record as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    print(f"written: {path}")
