"""High-resolution cells: what the layers know of a picture's, and how rows read those that were selected."""

from __future__ import annotations

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from flexattn_jax.config import VLMConfig
from flexattn_jax.ops.attention import MASKED, attend, merge, scaled_logits, softmax, weighted_blocks
from flexattn_jax.ops.cache import LayerCache, read_rows, whole, write_rows
from flexattn_jax.ops.resize import resize_rope
from flexattn_jax.ops.rope import apply_rope, rope_table
from flexattn_jax.ops.selection import SCOPE, Selection, cell_tokens, gather_cells, keep_of_listed, list_cells
from flexattn_jax.partitioning import constrain, per_sample

# Cells, by one turn of the loops in read_cached. A token's row misses one or none in most layers, a prompt's all.
PROJECTED_AT_ONCE, READ_AT_ONCE = 4, 8

Part = tuple[jax.Array, jax.Array]  # output (B, ., H, d) and log-sum-exp (B, ., H)


@flax.struct.dataclass
class Picture:
    """What the layers know of each sample's picture.

    start: (B,) int32, position of its first low-resolution token in the sequence; -1: the sample has no picture.
    content: (B, N) bool, False on the rows or columns of the low-resolution grid that are padding.
    tokens: (B, C, P, D) high-resolution features, cell by cell; without gradient.
    rotation: (B, C, P, d) float32, cosines and sines of these tokens' rotation side by side.
    valid: (C, P) bool, False where a cell is padded to P tokens; None where none is.
    """

    start: jax.Array
    content: jax.Array
    tokens: jax.Array
    rotation: jax.Array
    valid: jax.Array | None


def make_picture(
    config: VLMConfig, start: jax.Array, content: jax.Array, tokens: jax.Array
) -> tuple[Picture, dict[str, jax.Array]]:
    """The Picture of features in cells, and named intermediates: its rotation in raster order.

    Args:
      start: (B,); content: (B, N); tokens: (B, C, P, D), see Picture.
    """
    rotation = highres_rope(config, start)
    grids = config.highres_grid, config.flexattention.cell_grid
    _, valid = cell_tokens(*grids)
    tokens = constrain(tokens, "batch", None, None, None)
    padding = None if valid.all() else jnp.asarray(valid)
    cos, sin = jnp.split(rotation, 2, axis=-1)
    picture = Picture(start, content, tokens, gather_cells(rotation, *grids), padding)
    return picture, {"highres_cos": cos, "highres_sin": sin}


def highres_rope(config: VLMConfig, start: jax.Array) -> jax.Array:
    """Rotation of high-resolution tokens: the sequence's table at the image slots, resized to the finer grid.

    Args:
      start: (B,) first image slot of each sample.

    Returns:
      (B, M, d) float32 in raster order, cosines and sines side by side.
    """
    positions = jnp.maximum(start, 0)[:, None] + jnp.arange(config.num_lowres_tokens)
    tables = rope_table(positions, config.decoder.head_dim, config.decoder.rope_theta)
    grid, zoom = config.lowres_grid, config.flexattention.zoom_ratio
    table = jnp.concatenate(tables, axis=-1).reshape(-1, grid, grid, config.decoder.head_dim)
    return resize_rope(table, zoom).reshape(len(table), -1, table.shape[-1])


def project_keys(tokens: jax.Array, rotation: jax.Array, kernel: jax.Array) -> jax.Array:
    """Rotated keys of high-resolution tokens: tokens (..., D), rotation (..., d) -> (..., J*d)."""
    key = _project(tokens, kernel)
    cos, sin = jnp.split(rotation, 2, axis=-1)
    return apply_rope(key.reshape(*key.shape[:-1], -1, rotation.shape[-1]), cos, sin).reshape(key.shape)


def _project(tokens: jax.Array, kernel: jax.Array) -> jax.Array:
    return constrain(tokens @ kernel.T.astype(tokens.dtype), "batch", *(None,) * (tokens.ndim - 2), "heads")


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

    def list_union(keep: jax.Array) -> tuple[jax.Array, jax.Array]:
        cells, _ = list_cells(keep.any(axis=1), capacity)
        return cells, keep_of_listed(keep, cells)

    tokens, rotation, valid, keep = picture.tokens, picture.rotation, picture.valid, selection.keep
    if capacity < keep.shape[-1]:
        with jax.named_scope(SCOPE):
            cells, keep = per_sample(list_union, keep)
            tokens, rotation = (read_rows(x, (), cells) for x in (tokens, rotation))
            valid = _valid_of(picture, cells)
    key, value = project_keys(tokens, rotation, key_kernel), _project(tokens, value_kernel)
    mask = _token_mask(keep, valid, tokens.shape[2])
    return attend(query, _flat(key), _flat(value), mask.reshape(*mask.shape[:2], -1))


def read_cached(
    query: jax.Array,
    selection: Selection,
    picture: Picture,
    key_kernel: jax.Array,
    value_kernel: jax.Array,
    cache: LayerCache,
    at: tuple,
    capacity: int,
    at_once: int = PROJECTED_AT_ONCE,
) -> tuple[Part, LayerCache]:
    """Reads cells through a cache: a cell's keys are projected when it is first selected and never again.

    Values are not kept. They are linear in the features and carry no rotation, so that few rows weigh the features
    first and project what comes of it: sum_x p_x (W f_x) = W (sum_x p_x f_x). That is exact, a product with W for each
    row and head in place of one for each token, and half the memory. Many rows project the values on the spot.

    The work follows the number of cells selected, not the capacity: loops run over lists of cells, `at_once` or
    READ_AT_ONCE a turn, as often as the sample with the longest list needs. Where more than half of all cells are
    wanted, they are read where they lie, without a list.

    Args:
      query: (B, R, H, d).
      selection: (B, Q, C).
      key_kernel, value_kernel: (J*d, D), or stacks of them.
      cache: of this layer; `at`: the index prefix of its cells and kernels (see ops/cache.py).
      capacity: K, static, most cells a row of the selection keeps.
      at_once: cells projected by a turn, static.

    Returns:
      The attention to the selected cells, and the cache with their keys projected.
    """
    wanted = selection.keep.any(axis=1)
    projected = whole(cache.projected, at)
    total = wanted.shape[-1]

    missing, missing_count = list_cells(wanted & ~projected, _padded(total, at_once))

    # A token's row projects a cell in few layers: sliced before the loop, the kernel would be copied in all of them.
    slices_in_turn = bool(at) and at_once == 1
    if not slices_in_turn:
        key_kernel = whole(key_kernel, at)

    def project(state):
        turn, key_hd = state
        kernel = key_kernel
        if slices_in_turn:  # of a place that seems to depend on the turn, or compilers would slice before the loop
            turn, place = jax.lax.optimization_barrier((turn, at[0]))
            kernel = whole(kernel, (place,))
        cells = jax.lax.dynamic_slice_in_dim(missing, turn * at_once, at_once, axis=1)
        tokens, rotation = (read_rows(x, (), cells) for x in (picture.tokens, picture.rotation))
        return turn + 1, write_rows(key_hd, at, cells, project_keys(tokens, rotation, kernel))

    _, key_hd = jax.lax.while_loop(lambda state: state[0] * at_once < missing_count.max(), project, (0, cache.key_hd))
    cache = cache.replace(
        key_hd=key_hd,
        projected=cache.projected | wanted if not at else cache.projected.at[at].set(projected | wanted),
    )

    value_kernel = whole(value_kernel, at)
    listed, count = list_cells(wanted, _padded(total, READ_AT_ONCE))
    few_rows = query.shape[1] * query.shape[2] <= value_kernel.shape[0]
    attend_part = attend_features if few_rows else partial(attend_projected, value_kernel=value_kernel)
    width = picture.tokens.shape[-1] if few_rows else query.shape[-1]

    def read_listed(key_hd):
        def read(state):
            turn, *found = state
            cells = jax.lax.dynamic_slice_in_dim(listed, turn * READ_AT_ONCE, READ_AT_ONCE, axis=1)
            keep = keep_of_listed(selection.keep, cells)
            mask = _token_mask(keep, _valid_of(picture, cells), picture.tokens.shape[2])
            part = attend_part(query, read_rows(key_hd, at, cells), read_rows(picture.tokens, (), cells), mask)
            return turn + 1, *merge(tuple(found), part)

        nothing = jnp.zeros((*query.shape[:3], width), jnp.float32), jnp.full(query.shape[:3], MASKED, jnp.float32)
        return jax.lax.while_loop(lambda state: state[0] * READ_AT_ONCE < count.max(), read, (0, *nothing))[1:]

    def read_all(key_hd):
        mask = _token_mask(selection.keep, picture.valid, picture.tokens.shape[2])
        return attend_part(query, whole(key_hd, at), picture.tokens, mask)

    if min(capacity * selection.keep.shape[1], total) * 2 <= total:
        out, lse = read_listed(key_hd)
    else:
        out, lse = jax.lax.cond(count.max() * 2 > total, read_all, read_listed, key_hd)
    if few_rows:
        out = project_values(out.astype(query.dtype), value_kernel, query.shape[-1])
    return (out.astype(query.dtype), lse), cache


def attend_features(query: jax.Array, key: jax.Array, tokens: jax.Array, mask: jax.Array) -> Part:
    """What rows attend to in cells, as features, before any projection to values.

    Args:
      query: (B, R, H, d); key: (B, n, P, J*d), rotated; tokens: (B, n, P, D).
      mask: bool, (B, R or 1, n, P).

    Returns:
      (B, R, H, D) float32, and the log-sum-exp (B, R, H).
    """
    batch, rows, heads, _ = query.shape
    logits = scaled_logits(query, _flat(key))
    weights, lse = softmax(jnp.where(mask.reshape(batch, 1, mask.shape[1], -1), logits, MASKED))
    weights = weights.reshape(batch, heads, rows, *tokens.shape[1:3]).astype(tokens.dtype)
    return weighted_blocks(weights, tokens), lse.swapaxes(1, 2)


def attend_projected(
    query: jax.Array, key: jax.Array, tokens: jax.Array, mask: jax.Array, value_kernel: jax.Array
) -> Part:
    """`attend` to cells whose values are projected here: arguments of `attend_features`; the output is (B, R, H, d)."""
    out, lse = attend(query, _flat(key), _flat(_project(tokens, value_kernel)), mask.reshape(*mask.shape[:2], -1))
    return out.astype(jnp.float32), lse


def project_values(features: jax.Array, value_kernel: jax.Array, width: int) -> jax.Array:
    """Outputs of features that heads have weighed: (B, R, H, D), kernel (J*d, D) with d = width -> (B, R, H, d)."""
    batch, rows, heads, inputs = features.shape
    kernel = value_kernel.reshape(-1, width, inputs).astype(features.dtype)
    grouped = features.reshape(batch, rows, len(kernel), -1, inputs)
    if batch * rows * grouped.shape[3] == 1:  # a batched product would have TPUs copy the kernel twice
        products = kernel.astype(jnp.float32) * grouped[0, 0].astype(jnp.float32)
        return products.sum(axis=-1).astype(features.dtype).reshape(batch, rows, heads, width)
    return jnp.einsum("brjgk,jdk->brjgd", grouped, kernel).reshape(batch, rows, heads, width)


def _valid_of(picture: Picture, cells: jax.Array) -> jax.Array | None:
    """`Picture.valid` of listed cells (B, n): (B, 1, n, P)."""
    return None if picture.valid is None else picture.valid.at[cells].get(mode="clip")[:, None]


def _token_mask(keep: jax.Array, valid: jax.Array | None, tokens: int) -> jax.Array:
    """Which tokens of cells rows read: keep (B, Q, n), valid (..., n, P) or None, P = tokens -> (B, Q, n, P)."""
    mask = keep[..., None]
    return jnp.broadcast_to(mask, (*keep.shape, tokens)) if valid is None else mask & valid


def _padded(length: int, step: int) -> int:
    return -(-length // step) * step


def _flat(cells: jax.Array) -> jax.Array:
    return cells.reshape(cells.shape[0], -1, cells.shape[-1])
