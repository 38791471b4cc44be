"""Cells of a picture: where they lie, how an attention map ranks them, and which of them are kept.

A cell is the unit of selection: the high-resolution grid is cut into cell_grid x cell_grid blocks, and a block is read
whole or not at all. Ranking C = 81 cells costs XLA nothing; ranking M = 5184 tokens in every layer would cost seconds
of compile time. All shapes are static; nothing here sorts.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

SCOPE = "selection"  # jax.named_scope of choosing and gathering cells; profiles and costs/ know them by it
_STEPS = 64  # of 1 in 0..255; rounding moves a strength by 0.0002


@flax.struct.dataclass
class Selection:
    """Cells that a set of Q query rows keeps.

    keep: (B, Q, C) bool.
    strength: (B, Q, C) float32, what ranked the cells (0..255 for an attention map), -1 where a cell is not kept.
    overflow: (B, Q) int32, cells over the threshold that the capacity had no room for.
    seen: (B, Q, C) bool, cells that the rows have read before these; None where they may be selected again.
    """

    keep: jax.Array
    strength: jax.Array
    overflow: jax.Array
    seen: jax.Array | None = None


def empty_selection(batch: int, rows: int, cells: int) -> Selection:
    """The selection that keeps nothing: (B, Q, C) False."""
    return Selection(
        keep=jnp.zeros((batch, rows, cells), bool),
        strength=jnp.full((batch, rows, cells), -1.0, jnp.float32),
        overflow=jnp.zeros((batch, rows), jnp.int32),
    )


def cell_tokens(grid: int, cell_grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens of a grid x grid raster each cell holds.

    Token (y, x) belongs to cell (floor(y * cell_grid / grid), floor(x * cell_grid / grid)): the released code's nearest
    up-scaling of its cell mask. A grid that is no multiple of cell_grid gives ragged cells, hence the padding.

    Returns:
      index: (C, P) int32, row-major raster index; padding repeats the cell's first token.
      valid: (C, P) bool, False on padding.
    """
    cell = np.arange(grid) * cell_grid // grid
    owner = cell[:, None] * cell_grid + cell[None, :]
    members = [np.flatnonzero(owner.ravel() == c) for c in range(cell_grid**2)]
    size = max(map(len, members))
    index = np.stack([np.pad(m, (0, size - len(m)), constant_values=m[0]) for m in members]).astype(np.int32)
    valid = np.stack([np.arange(size) < len(m) for m in members])
    return index, valid


def gather_cells(tokens: jax.Array, grid: int, cell_grid: int) -> jax.Array:
    """Tokens (B, grid**2, D), row-major, cell by cell: (B, C, P, D), padding as in `cell_tokens`.

    Where cells are equal, it is an exchange of axes: TPU's compiler takes longer for a gather.
    """
    if grid % cell_grid:
        return tokens[:, cell_tokens(grid, cell_grid)[0]]
    batch, _, width = tokens.shape
    side = grid // cell_grid
    squares = tokens.reshape(batch, cell_grid, side, cell_grid, side, width).swapaxes(2, 3)
    return squares.reshape(batch, cell_grid**2, side**2, width)


def pool_windows(grid: int, cell_grid: int) -> np.ndarray:
    """Rows (or columns) of the map that one cell row pools: [floor(i*g/c), ceil((i+1)*g/c)), which may overlap.

    Returns:
      (cell_grid, W) int32; a short window repeats its last entry, which no maximum notices.
    """
    starts = np.arange(cell_grid) * grid // cell_grid
    ends = -(-(np.arange(1, cell_grid + 1) * grid) // cell_grid)
    return np.minimum(starts[:, None] + np.arange((ends - starts).max()), ends[:, None] - 1).astype(np.int32)


def normalise_map(attention: jax.Array) -> jax.Array:
    """Scales each row's map to 0..255; a flat map, which says nothing, becomes -1 everywhere.

    Args:
      attention: (..., N) float32, N low-resolution tokens.

    Returns:
      (..., N) float32, ((a - min) / (max - min)) * 255 in that order of operations: a threshold of 255 then keeps
      nothing, as in the released code.
    """
    low = attention.min(axis=-1, keepdims=True)
    span = attention.max(axis=-1, keepdims=True) - low
    return jnp.where(span > 0, (attention - low) / jnp.where(span > 0, span, 1.0) * 255.0, -1.0)


def pool_cells(scores: jax.Array, cell_grid: int) -> jax.Array:
    """Maximum over each cell's window (adaptive max-pooling).

    Args:
      scores: (..., N) float32, row-major over a square grid.

    Returns:
      (..., C). Pooling before or after the strict comparison with a threshold gives the same cells.
    """
    grid = int(scores.shape[-1] ** 0.5)
    windows = pool_windows(grid, cell_grid)
    scores = scores.reshape(*scores.shape[:-1], grid, grid)
    scores = scores[..., windows, :].max(axis=-2)  # (..., cell_grid, g)
    scores = scores[..., windows].max(axis=-1)  # (..., cell_grid, cell_grid)
    return scores.reshape(*scores.shape[:-2], cell_grid**2)


def keep_cells(scores: jax.Array, candidate: jax.Array, capacity: int) -> Selection:
    """Keeps the `capacity` strongest candidates of each row; equal scores: lowest cell first.

    Args:
      scores: (B, Q, C) float32, not negative where candidate.
      candidate: (B, Q, C) bool, cells that may be kept.
      capacity: K, static.

    Returns:
      The selection; candidates beyond the capacity are counted in `overflow`.
    """
    strength = jnp.where(candidate, scores, -1.0)
    keep = candidate
    if capacity < scores.shape[-1]:
        _, best = jax.lax.top_k(strength, capacity)
        keep = candidate & (best[..., None] == jnp.arange(scores.shape[-1])).any(axis=-2)
        strength = jnp.where(keep, strength, -1.0)
    overflow = candidate.sum(axis=-1, dtype=jnp.int32) - keep.sum(axis=-1, dtype=jnp.int32)
    return Selection(keep=keep, strength=strength, overflow=overflow)


def unite_rows(selection: Selection, capacity: int) -> tuple[Selection, jax.Array]:
    """Cells that a sample's rows keep together, at most `capacity` of them.

    Args:
      selection: of Q rows.
      capacity: U, static. Beyond it the cells that are weakest in every row are dropped from all rows and counted;
        of cells whose strengths differ by rounding alone, those with the highest numbers.

    Returns:
      The rows' selection inside the union, and the union (B, C) bool.
    """
    # Every row's strongest cells have 255, but for rounding; in steps that it does not reach, they are equal.
    strength = jnp.round(_STEPS * selection.strength.max(axis=1, keepdims=True))
    union = keep_cells(strength, selection.keep.any(axis=1, keepdims=True), capacity)
    keep = selection.keep & union.keep
    dropped = (selection.keep & ~union.keep).sum(axis=-1, dtype=jnp.int32)
    strength = jnp.where(keep, selection.strength, -1.0)
    united = selection.replace(keep=keep, strength=strength, overflow=selection.overflow + dropped)
    return united, union.keep[:, 0]


def list_cells(keep: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """The kept cells as a list, in the order of their numbers.

    Args:
      keep: (B, C) bool.
      length: entries of the list, static; at least as many as any sample keeps.

    Returns:
      cells: (B, length) int32; unused entries hold C, which a gather clips and a scatter drops.
      count: (B,) int32.
    """
    cells = keep.shape[-1]
    place = jnp.cumsum(keep, axis=-1) - 1  # where in the list each kept cell goes
    hit = keep[:, None, :] & (place[:, None, :] == jnp.arange(length)[None, :, None])  # (B, length, C)
    listed = jnp.where(hit.any(axis=-1), (hit * jnp.arange(cells)).sum(axis=-1), cells)
    return listed.astype(jnp.int32), keep.sum(axis=-1, dtype=jnp.int32)


def keep_of_listed(keep: jax.Array, cells: jax.Array) -> jax.Array:
    """Which of the listed cells each row keeps.

    Args:
      keep: (B, Q, C) bool.
      cells: (B, n) int32 of `list_cells`; an unused entry is kept by no row.

    Returns:
      (B, Q, n) bool.
    """
    return (keep[..., None, :] & (cells[:, None, :, None] == jnp.arange(keep.shape[-1]))).any(axis=-1)
