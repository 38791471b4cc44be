"""A small relative of the `mini` preset and small vsearch pictures, for the tests of what is trained on vsearch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from flexattn_jax.config import VLMConfig, override, preset
from flexattn_jax.inputs.datasets.vsearch_examples import PRESETS, SPLITS, Example, VSearchConfig, generate

# Patches of 8 pixels: 4 x 4 low-resolution tokens, 12 x 12 high-resolution ones in 3 x 3 cells.
CHANGES = {
    "vision.stem_widths": (8, 12),
    "vision.stem_strides": (4, 2),
    "vision.mlp_dim": 16,
    "vision.num_layers": 1,
    "vision.position_dims": 4,
    "decoder.width": 32,
    "decoder.mlp_dim": 48,
    "decoder.num_layers": 3,
    "decoder.num_heads": 4,
    "decoder.num_kv_heads": 2,
    "decoder.head_dim": 8,
    "flexattention.zoom_ratio": 3,
    "flexattention.cell_grid": 3,
    "flexattention.capacity": 3,
    "lowres_size": 32,
    "image_size": 96,
}
SELECTIONS = {
    "top_k": {},
    "threshold": {
        "flexattention.selection": "threshold",
        "flexattention.threshold": 60.0,
        "flexattention.capacity": None,
    },
}


def mini_config(changes: dict | None = None) -> VLMConfig:
    """The small relative, with further changes as for `override`."""
    return override(preset("mini"), CHANGES | (changes or {}))


def search_config(name: str = "standard", **changes) -> VSearchConfig:
    """Settings of vsearch for pictures of 96 pixels."""
    small = {"picture_side": 96, "object_sides": (8, 12), "num_objects": (4, 5)}
    small |= {"attribute_questions": 3, "relation_questions": 2}
    return dataclasses.replace(PRESETS[name], **small | changes)


def draw(count: int, split: str = "train", **changes) -> list[Example]:
    """Examples of such settings."""
    pictures = tuple(count if name == split else 0 for name in SPLITS)
    return list(generate(search_config(pictures=pictures, **changes), split, threads=1))


def compute(function: Callable, *arguments: Any) -> Any:
    """`function` in one program that is compiled quickly, in float32 throughout."""
    with jax.default_matmul_precision("highest"):
        return jax.jit(function).lower(*arguments).compile({"xla_backend_optimization_level": 0})(*arguments)
