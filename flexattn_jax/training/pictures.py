"""Pictures of the cells that held-out samples select, for TensorBoard: how selection changes as training goes on."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from flexattn_jax.config import VLMConfig
from flexattn_jax.models.vlm import VLM
from flexattn_jax.partitioning import Partition
from flexattn_jax.training.data import TrainBatch

SIDE = 224  # pixels of one picture in the strip
_DIMMED = 0.3  # brightness of what is not read


def make_selection(model: VLM, partition: Partition) -> Callable[[dict, TrainBatch], jax.Array]:
    """A jitted (params, batch) -> (layers, B, C) bool: cells that each sample's first answer row reads."""

    def selection(params: dict, batch: TrainBatch) -> jax.Array:
        _, named = model.apply({"params": params}, batch.batch, None, batch.readers)
        return named["cells"][:-1, :, 0]

    return jax.jit(partition.traced(selection), out_shardings=partition.replicated)


def draw_selection(pixels: np.ndarray, cells: np.ndarray, config: VLMConfig) -> np.ndarray:
    """One picture a layer, side by side, dimmed where it is not read.

    Args:
      pixels: (3, S, S) normalised.
      cells: (layers, C) bool.

    Returns:
      (SIDE, SIDE * layers, 3) uint8.
    """
    mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (config.image_mean, config.image_std))
    picture = np.clip(pixels * std + mean, 0, 1).transpose(1, 2, 0)
    at = np.arange(SIDE) * picture.shape[0] // SIDE
    picture = picture[at][:, at]
    # Tokens, and so pixels, belong to cells by rounding down, as in ops/selection.py.
    grid, side = config.highres_grid, config.flexattention.cell_grid
    owner = (np.arange(SIDE) * grid // SIDE) * side // grid
    read = cells.reshape(-1, side, side)[:, owner][:, :, owner]
    strip = picture[None] * np.where(read, 1.0, _DIMMED)[..., None]
    return (255 * np.concatenate(list(strip), axis=1)).round().astype(np.uint8)


def first_with_pictures(batch: TrainBatch, count: int) -> TrainBatch:
    """The first rows that have a picture and an answer, at most `count`."""
    length = batch.labels.shape[1]
    rows = np.flatnonzero((batch.batch.image_start >= 0) & (batch.readers < length).any(axis=1))[:count]
    return jax.tree.map(lambda x: np.asarray(x)[rows], batch)
