"""High-resolution cells: what the layers know of a picture's, and how rows read those that were selected."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from flexattn_jax.config import VLMConfig
from flexattn_jax.ops.attention import MASKED, attend, merge
from flexattn_jax.ops.cache import LayerCache, read_rows, whole, write_rows
from flexattn_jax.ops.resize import resize_rope
from flexattn_jax.ops.rope import apply_rope, rope_table
from flexattn_jax.ops.selection import Selection, cell_tokens, keep_of_listed, list_cells

CELLS_AT_ONCE = 4  # cells projected or read by one turn of the loops in read_cached


Part = tuple[jax.Array, jax.Array]  # output (B, ., H, d) and log-sum-exp (B, ., H)


@flax.struct.dataclass
class Picture:
    """What the layers know of each sample's picture.

    start: (B,) int32, position of its first low-resolution token in the sequence; -1: the sample has no picture.
    content: (B, N) bool, False on the rows or columns of the low-resolution grid that are padding.
    tokens: (B, C, P, D) high-resolution features, cell by cell; without gradient.
    valid: (C, P) bool, False where a cell is padded to P tokens.
    cos, sin: (B, C, P, d/2) float32, the rotation of these tokens.
    """

    start: jax.Array
    content: jax.Array
    tokens: jax.Array
    valid: jax.Array
    cos: jax.Array
    sin: jax.Array


def make_picture(
    config: VLMConfig, start: jax.Array, content: jax.Array, tokens: jax.Array
) -> tuple[Picture, dict[str, jax.Array]]:
    """The Picture of features in cells, and named intermediates: its rotation in raster order.

    Args:
      start: (B,); content: (B, N); tokens: (B, C, P, D), see Picture.
    """
    cos, sin = highres_rope(config, start)
    index, valid = cell_tokens(config.highres_grid, config.flexattention.cell_grid)
    picture = Picture(start, content, tokens, jnp.asarray(valid), cos[:, index], sin[:, index])
    return picture, {"highres_cos": cos, "highres_sin": sin}


def highres_rope(config: VLMConfig, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rotation of high-resolution tokens: the sequence's table at the image slots, resized to the finer grid.

    Args:
      start: (B,) first image slot of each sample.

    Returns:
      cos, sin: (B, M, d/2) float32 in raster order.
    """
    positions = jnp.maximum(start, 0)[:, None] + jnp.arange(config.num_lowres_tokens)
    tables = rope_table(positions, config.decoder.head_dim, config.decoder.rope_theta)
    grid, fine = config.lowres_grid, config.highres_grid
    return tuple(
        resize_rope(table.reshape(-1, grid, grid, table.shape[-1]), fine).reshape(-1, fine**2, table.shape[-1])
        for table in tables
    )


def project_cells(
    tokens: jax.Array, cos: jax.Array, sin: jax.Array, key_kernel: jax.Array, value_kernel: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Keys and values of high-resolution tokens: tokens (..., D), cos and sin (..., d/2) -> two of (..., J*d)."""
    key, value = (tokens @ kernel.T.astype(tokens.dtype) for kernel in (key_kernel, value_kernel))
    heads = key.reshape(*key.shape[:-1], -1, 2 * cos.shape[-1])
    return apply_rope(heads, cos, sin).reshape(key.shape), value


def read_union(
    query: jax.Array,
    selection: Selection,
    picture: Picture,
    key_kernel: jax.Array,
    value_kernel: jax.Array,
    capacity: int,
) -> Part:
    """Reads cells that are projected on the spot: each sample's union of cells once, a mask for each row.

    Args:
      query: (B, R, H, d).
      selection: (B, Q, C), within a union of at most `capacity` cells (`unite_rows`).
      key_kernel, value_kernel: (J*d, D).
      capacity: U, static.
    """
    tokens, cos, sin, keep = picture.tokens, picture.cos, picture.sin, selection.keep
    valid = jnp.broadcast_to(picture.valid, tokens.shape[:3])
    if capacity < keep.shape[-1]:
        cells, _ = list_cells(keep.any(axis=1), capacity)
        tokens, cos, sin, valid = (read_rows(x, (), cells) for x in (tokens, cos, sin, valid))
        keep = keep_of_listed(keep, cells)
    key, value = project_cells(tokens, cos, sin, key_kernel, value_kernel)
    mask = keep[..., None] & valid[:, None]  # (B, Q, U, P)
    flat = lambda x: x.reshape(x.shape[0], -1, x.shape[-1])  # noqa: E731
    return attend(query, flat(key), flat(value), mask.reshape(*mask.shape[:2], -1))


def read_cached(
    query: jax.Array,
    selection: Selection,
    picture: Picture,
    key_kernel: jax.Array,
    value_kernel: jax.Array,
    cache: LayerCache,
    at: tuple,
) -> tuple[Part, LayerCache]:
    """Reads cells through a cache: a cell is projected when it is first selected and never again.

    The work follows the number of cells selected, not the capacity: both loops run over lists of cells in steps of
    CELLS_AT_ONCE, as often as the sample with the longest list needs.

    Args:
      query: (B, R, H, d).
      selection: (B, Q, C).
      cache: of this layer, with `at` its index prefix (see ops/cache.py).

    Returns:
      The attention to the selected cells, and the cache with them projected.
    """
    batch, rows, query_heads, _ = query.shape
    wanted = selection.keep.any(axis=1)
    projected = whole(cache.projected, at)
    length = -(-wanted.shape[-1] // CELLS_AT_ONCE) * CELLS_AT_ONCE

    missing, missing_count = list_cells(wanted & ~projected, length)

    def project(state):
        turn, key_hd, value_hd = state
        cells = jax.lax.dynamic_slice_in_dim(missing, turn * CELLS_AT_ONCE, CELLS_AT_ONCE, axis=1)
        tokens, cos, sin = (read_rows(x, (), cells) for x in (picture.tokens, picture.cos, picture.sin))
        key, value = project_cells(tokens, cos, sin, key_kernel, value_kernel)
        return turn + 1, write_rows(key_hd, at, cells, key), write_rows(value_hd, at, cells, value)

    _, key_hd, value_hd = jax.lax.while_loop(
        lambda state: state[0] * CELLS_AT_ONCE < missing_count.max(), project, (0, cache.key_hd, cache.value_hd)
    )

    listed, count = list_cells(wanted, length)

    def read(state):
        turn, out, lse = state
        cells = jax.lax.dynamic_slice_in_dim(listed, turn * CELLS_AT_ONCE, CELLS_AT_ONCE, axis=1)
        key, value = (read_rows(x, at, cells).reshape(batch, -1, x.shape[-1]) for x in (key_hd, value_hd))
        keep = keep_of_listed(selection.keep, cells)
        mask = keep[..., None] & picture.valid.at[cells].get(mode="clip")[:, None]
        out, lse = merge((out, lse), attend(query, key, value, mask.reshape(*keep.shape[:2], -1)))
        return turn + 1, out, lse

    nothing = jnp.zeros_like(query), jnp.full((batch, rows, query_heads), MASKED, jnp.float32)
    _, out, lse = jax.lax.while_loop(lambda state: state[0] * CELLS_AT_ONCE < count.max(), read, (0, *nothing))
    cache = cache.replace(
        key_hd=key_hd,
        value_hd=value_hd,
        projected=cache.projected | wanted if not at else cache.projected.at[at].set(projected | wanted),
    )
    return (out, lse), cache
