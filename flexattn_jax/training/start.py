"""What a run begins with: a configuration, and parameters read from a checkpoint, drawn, or some of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexattn_jax.checkpoints import layouts
from flexattn_jax.checkpoints.errors import CheckpointError
from flexattn_jax.checkpoints.source import SourceCheckpoint, open_source
from flexattn_jax.checkpoints.store import open_checkpoint
from flexattn_jax.checkpoints.trees import flatten, nest, param_shapes, unstack_layers
from flexattn_jax.config import ConfigError, VLMConfig, override, preset
from flexattn_jax.partitioning import Partition
from flexattn_jax.training.state import draw_params


@dataclasses.dataclass(frozen=True)
class StartConfig:
    """Where the model comes from."""

    checkpoint: str = ""  # folder of an imported, trained or published checkpoint; "": random parameters
    vision_tower: str = ""  # folder of the tower where published safetensors do not hold it
    preset: str = ""  # without a checkpoint: the configuration, see config.preset
    tokenizer: str = ""  # folder of the tokeniser; "": the checkpoint's
    draw_by_width: bool = False  # what is drawn suits a small width, see draw_params
    redraw: str = ""  # parameters that begin anew although the checkpoint has them: beginnings of paths, by comma
    copy_projections: bool = False  # high-resolution keys and values begin with the weights of low resolution's
    read_highres: bool = True  # FlexAttention on; a LLaVA-1.5 checkpoint gets projections drawn by the seed
    dtype: str | None = None  # of the computation; None: float32 on CPU, else bfloat16. Parameters are float32


@dataclasses.dataclass(frozen=True)
class Start:
    """A model to train.

    config: of the model, `dtype` that of the computation.
    tokenizer: folder.
    params: reads or draws the float32 parameters, put straight where a partition says (None: on one device); called
      only if the run does not go on from its own checkpoint.
    """

    config: VLMConfig
    tokenizer: Path
    params: Callable[[Partition | None], dict[str, Any]]


def open_start(start: StartConfig, overrides: Mapping[str, Any], seed: int) -> Start:
    """Opens what a run begins with; reads no parameter yet.

    Args:
      overrides: dotted settings of the model, as for `config.override`.
      seed: of what is drawn.

    Raises:
      CheckpointError, ConfigError: what is missing, damaged or does not go together.
    """
    dtype = start.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    overrides = dict(overrides) | {"dtype": dtype}
    if not start.checkpoint:
        if not (start.preset and start.tokenizer):
            raise ConfigError(
                "there is nothing to begin with: give --config.start.checkpoint, the folder of an imported or "
                "published checkpoint such as liuhaotian/llava-v1.5-7b, or, to train from random parameters, "
                "--config.start.preset and --config.start.tokenizer"
            )
        config = _configure(preset(start.preset), start, overrides)
        return Start(
            config,
            Path(start.tokenizer),
            lambda partition=None: _arranged(
                _placed(draw_params(config, seed, start.draw_by_width), partition), config, start
            ),
        )
    opened = open_checkpoint(start.checkpoint, start.vision_tower or None)
    if start.read_highres and opened.config.flexattention is None:
        if not isinstance(opened, SourceCheckpoint):
            raise CheckpointError(
                f"{start.checkpoint} has no high-resolution projections; import the published checkpoint again with "
                "--flexattention, or set start.read_highres to False"
            )
        opened = open_source(start.checkpoint, start.vision_tower or None, init_seed=seed)
    config = _configure(opened.config, start, overrides)
    # Layers without FlexAttention's projections stay so when what took their place is left out, below.
    flex = config.flexattention if config.num_flex_layers else None
    stacked = dataclasses.replace(config, scan_layers=True, flexattention=flex)
    redrawn = _redrawn(start.redraw, config)
    for name in ("crossattention", "grouping"):  # nobody publishes weights of these
        if getattr(config, name) is not None and getattr(opened.config, name) is None:
            stacked = dataclasses.replace(stacked, **{name: None})
            redrawn |= set(layouts.leaf_shapes(config)) - set(layouts.leaf_shapes(stacked))

    def read(partition: Partition | None = None) -> dict[str, Any]:
        shardings = None if partition is None else partition.state_shardings(param_shapes(stacked))
        flat = flatten(opened.params(config=stacked, dtype="float32", shardings=shardings))
        if redrawn:
            flat |= flatten(_placed(draw_params(config, seed, start.draw_by_width, redrawn), partition))
        return _arranged(nest(flat), config, start)

    return Start(config, Path(start.tokenizer or start.checkpoint), read)


def _configure(config: VLMConfig, start: StartConfig, overrides: dict[str, Any]) -> VLMConfig:
    if config.flexattention is not None:
        return override(config, {"flexattention.enabled": start.read_highres} | overrides)
    if start.read_highres:
        raise ConfigError(f"preset {start.preset!r} has no FlexAttention; set start.read_highres to False")
    return override(config, {key: v for key, v in overrides.items() if not key.startswith("flexattention.")})


def _redrawn(prefixes: str, config: VLMConfig) -> set[str]:
    paths = set(layouts.leaf_shapes(config))
    chosen: set[str] = set()
    for prefix in (p.strip().strip("/") for p in prefixes.split(",") if p.strip()):
        found = {path for path in paths if path == prefix or path.startswith(prefix + "/")}
        if not found:
            raise ConfigError(f"start.redraw names {prefix!r}, but no parameter's path begins so")
        chosen |= found
    return chosen


def _placed(params: dict[str, Any], partition: Partition | None) -> dict[str, Any]:
    """Drawn parameters where the partition wants them, one after the other; None: on the host still."""
    if partition is None:
        return params

    def place(leaf: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(place, params, partition.state_shardings(params))


def _arranged(params: dict[str, Any], config: VLMConfig, start: StartConfig) -> dict[str, Any]:
    if start.copy_projections and config.num_flex_layers:
        flat = flatten(params)
        for part in "kv":
            own = flat[f"decoder/layers/self_attn/{part}_proj/kernel"][config.num_plain_layers :]
            # An array of its own: the step that both are given to takes each one's memory.
            flat[f"decoder/highres/{part}_proj_hd/kernel"] = jnp.copy(own)
        params = nest(flat)
    return params if config.scan_layers else unstack_layers(params)
