"""FlexAttention (arXiv 2407.20228, section 3): the attention map over the few low-resolution tokens of a picture
selects the cells of its high-resolution grid that the next layer reads.

One layer, top to bottom, is `flex_attention`. With q, k, v of the sequence (low-resolution and text tokens) and f_HR
the picture's high-resolution features, cell by cell:

    o, lse   = softmax(q k^T / sqrt(d)) v                     all T rows, fused, no high-resolution token in sight
    o', lse' = softmax(q_R k_hd^T / sqrt(d)) v_hd             R rows, the cells that the layer below selected,
               k_hd, v_hd = f_HR[cells] W'_K, f_HR[cells] W'_V
    o_R      = merge(o_R, o')                                 exactly one softmax over both, by log-sum-exp
    map      = sum over heads of exp(q_R k_image^T / sqrt(d) - lse)
    cells    = strongest K cells where max-pool(255 * min-max(map)) > threshold       for the layer above

Which rows R read, and how they come by k_hd and v_hd, differs between uses; the algorithm does not:
  - a prompt, a decoding step:   R = 1, the newest row; cells are projected when first selected and kept (`read_cached`)
  - scoring of answer options:   R = all option rows of a question, against the same cache
  - training:                    R = rows that predict answers; the union of their cells is projected (`read_union`)
  - variant "paper":             R = all rows, reading one shared selection
"""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from flexattn_jax.config import FlexAttentionConfig
from flexattn_jax.ops.attention import MASKED, attend, merge, scaled_logits
from flexattn_jax.ops.cache import LayerCache, read_rows, whole, write_rows
from flexattn_jax.ops.rope import apply_rope
from flexattn_jax.ops.selection import (
    Selection,
    empty_selection,
    keep_cells,
    keep_of_listed,
    list_cells,
    normalise_map,
    pool_cells,
    unite_rows,
)

CELLS_AT_ONCE = 4  # cells projected or read by one turn of the loops in read_cached


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


@flax.struct.dataclass
class Rows:
    """Query rows that take part, as places in this call's T rows; a place of T or more stands for no row.

    readers: (B, R) int32, rows that read high-resolution tokens.
    selectors: (B, Q) int32, rows whose maps select; Q = R (each reader selects for itself) or Q = 1 (shared).
    """

    readers: jax.Array
    selectors: jax.Array


Part = tuple[jax.Array, jax.Array]  # output (B, ., H, d) and log-sum-exp (B, ., H)


def flex_attention(
    config: FlexAttentionConfig,
    query: jax.Array,
    lowres: Part,
    keys: jax.Array,
    rows: Rows,
    picture: Picture,
    selection: Selection,
    read: Callable[[jax.Array, Selection], Part] | None,
    layer: jax.Array,
    positions: jax.Array,
    alpha: jax.Array | None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Selection, jax.Array]:
    """One layer: the rows read the cells that the layer below selected, and their maps select for the layer above.

    Args:
      query: (B, T, H, d), rotated.
      lowres: attention of all T rows to the sequence.
      keys: (B, X, J*d), rotated keys among which the picture's N low-resolution ones are.
      selection: of the layer below, for the Q selectors.
      read: attention of the readers' queries (B, R, H, d) to the selected cells; None where nothing is selected.
      layer: index in the whole decoder, for selector "random".
      positions: (B, T) int32, sequence positions of the T rows, for selector "random".
      alpha: share of high resolution in the readers' outputs while training warms up; None: all of it.
      key: of selector "random" in this step of training; None: that of config.seed.

    Returns:
      Attention output (B, T, H, d), the new selection, and the map (B, Q, N) float32 that made it.
    """
    out, lse = lowres
    map_lse = lse
    if read is not None:
        low_out, low_lse = take_rows(out, rows.readers), take_rows(lse, rows.readers)
        full_out, full_lse = merge((low_out, low_lse), read(take_rows(query, rows.readers), selection))
        if alpha is not None:
            full_out = ((1 - alpha) * low_out + alpha * full_out).astype(out.dtype)
        out = put_rows(out, rows.readers, full_out)
        # The released code takes the map from the softmax without high resolution; the paper's Map' includes it.
        if config.variant == "paper":
            map_lse = put_rows(lse, rows.readers, full_lse)

    attention = image_map(
        take_rows(query, rows.selectors), keys, take_rows(map_lse, rows.selectors), picture.start, picture.content
    )
    candidate = (picture.start >= 0)[:, None] & (rows.selectors < query.shape[1])
    places = take_rows(positions, rows.selectors)
    selection = select(config, attention, picture.content, candidate, layer, places, key)
    return out, selection, attention


def image_map(query: jax.Array, keys: jax.Array, lse: jax.Array, start: jax.Array, content: jax.Array) -> jax.Array:
    """Attention of each selector row to the N low-resolution tokens, summed over heads; no gradient.

    Args:
      query: (B, Q, H, d); keys: (B, X, J*d); lse: (B, Q, H) of the softmax that the map belongs to.
      start: (B,) place of the first image token among the keys.
      content: (B, N); only its shape is used.

    Returns:
      (B, Q, N) float32.
    """
    query, keys, lse = jax.lax.stop_gradient((query, keys, lse))
    logits = scaled_logits(query, keys)  # (B, H, Q, X)
    probabilities = jnp.exp(logits - lse.swapaxes(1, 2)[..., None]).sum(axis=1)
    return jax.vmap(lambda row_maps, first: jax.lax.dynamic_slice_in_dim(row_maps, first, content.shape[-1], axis=1))(
        probabilities, jnp.maximum(start, 0)
    )


def select(
    config: FlexAttentionConfig,
    attention: jax.Array,
    content: jax.Array,
    candidate: jax.Array,
    layer: jax.Array,
    positions: jax.Array,
    key: jax.Array | None = None,
) -> Selection:
    """Cells that each selector row keeps.

    Args:
      attention: (B, Q, N) map.
      content: (B, N), see Picture.
      candidate: (B, Q) bool, rows that may select at all.
      layer: (); positions: (B, Q): together with config.seed the source of selector "random", so that a sample's cells
        do not depend on the batch that it came in.
      key: in training, in place of config.seed: every step and sample then draws other cells.

    Returns:
      At most K cells a row, see FlexAttentionConfig.
    """
    cells = config.num_cells
    everywhere = jnp.broadcast_to(candidate[..., None], (*candidate.shape, cells))
    if config.selector == "all":
        return keep_cells(jnp.zeros(everywhere.shape), everywhere, cells)
    if config.selector == "attention":
        if config.variant == "released":  # padded bands are zeroed before the minimum is taken
            attention = attention * content[:, None]
        scores = pool_cells(normalise_map(attention), config.cell_grid)
        wanted = scores > config.threshold if config.selection == "threshold" else scores >= 0
        return keep_cells(scores, everywhere & wanted, config.row_capacity)
    if config.selector == "random":
        batch = positions.shape[0]
        keys = jnp.broadcast_to(jax.random.key(config.seed), (batch,)) if key is None else jax.random.split(key, batch)
        scores = random_scores(keys, layer, positions, cells)
    else:  # "center": the nearer to the middle, the stronger
        offset = jnp.arange(config.cell_grid) - (config.cell_grid - 1) / 2
        scores = jnp.broadcast_to(255.0 / (1 + offset[:, None] ** 2 + offset**2).ravel(), everywhere.shape)
    share = max(1, round(config.ablation_share * cells))
    return keep_cells(scores, everywhere, share if config.selection == "threshold" else config.row_capacity)


def random_scores(keys: jax.Array, layer: jax.Array, positions: jax.Array, cells: int) -> jax.Array:
    """(B, Q, C) float32 in 0..255, a function of (key of the sample, layer, position) alone."""

    def draw(key: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(key, position), (cells,), maxval=255.0)

    keys = jax.vmap(lambda key: jax.random.fold_in(key, layer))(keys)
    return jax.vmap(jax.vmap(draw, in_axes=(None, 0)))(keys, positions)


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


def take_rows(x: jax.Array, rows: jax.Array) -> jax.Array:
    """x (B, T, ...) at rows (B, n): (B, n, ...); a row outside gives the last one, to be ignored."""
    return read_rows(x, (), rows)


def put_rows(x: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    """x (B, T, ...) with rows (B, n) replaced by values (B, n, ...); rows outside are dropped."""
    return write_rows(x, (), rows, values)


def start_selection(config: FlexAttentionConfig, batch: int, selectors: int) -> Selection:
    """What the first FlexAttention layer reads: nothing."""
    return empty_selection(batch, selectors, config.num_cells)


def limit_union(config: FlexAttentionConfig, selection: Selection) -> Selection:
    """The selection inside the union capacity U, for reading with `read_union`."""
    if config.sample_capacity >= config.num_cells:
        return selection
    return unite_rows(selection, config.sample_capacity)[0]
