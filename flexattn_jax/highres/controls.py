"""What any reduction of tokens has to beat: a random subset, and a coarser picture."""

from __future__ import annotations

import math

import numpy as np


def random_places(total: int, count: int, seed: int) -> np.ndarray:
    """(count,) int32, ascending: one subset of 0 .. total - 1, the same for every picture."""
    return np.sort(np.random.default_rng(seed).permutation(total)[:count]).astype(np.int32)


def downsampling(grid: int, count: int) -> np.ndarray:
    """Means over areas that cut a grid x grid raster into `count` parts of nearly equal size and shape.

    The raster is cut into about sqrt(count) bands of equal height and each band into equal parts, as many in one as in
    another or one more; a token on a border is shared. For a square number whose side divides the grid's these are the
    usual blocks.

    Returns:
      (count, grid**2) float32, each row's sum 1: tokens = result @ features.
    """
    bands = max(round(math.sqrt(count)), -(-count // grid))
    parts = np.diff(np.arange(bands + 1) * count // bands)
    rows = _shares(grid, bands)
    areas = [np.einsum("y,cx->cyx", rows[i], _shares(grid, int(part))) for i, part in enumerate(parts)]
    return np.concatenate(areas).reshape(count, grid**2).astype(np.float32)


def _shares(length: int, parts: int) -> np.ndarray:
    """(parts, length): the share of each cell in each of `parts` equal intervals."""
    edges, cells = np.arange(parts + 1) * length / parts, np.arange(length)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    return np.maximum(overlap, 0) * parts / length
