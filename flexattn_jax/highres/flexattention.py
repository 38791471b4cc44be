"""FlexAttention (arXiv 2407.20228, section 3): the attention map over the few low-resolution tokens of a picture
selects the cells of its high-resolution grid that the next layer reads.

One layer, top to bottom, is `flex_attention`. With q, k, v of the sequence (low-resolution and text tokens) and f_HR
the picture's high-resolution features, cell by cell:

    o, lse   = softmax(q k^T / sqrt(d)) v                     all T rows, fused, no high-resolution token in sight
    o', lse' = softmax(q_R k_hd^T / sqrt(d)) v_hd             R rows, the cells that the layer below selected,
               k_hd, v_hd = f_HR[cells] W'_K, f_HR[cells] W'_V
    o_R      = merge(o_R, o')                                 exactly one softmax over both, by log-sum-exp
    map      = sum over heads of exp(q_R k_image^T / sqrt(d) - lse)
    cells    = strongest K cells where max-pool(255 * min-max(map)) > threshold       for the layer above,
               without `revisit` of those that the row has not read

Which rows R read, and how they come by k_hd and v_hd, differs between uses; the algorithm does not:
  - a prompt, a decoding step:   R = 1, the newest row; keys are projected when a cell is first selected
                                 and kept, values weighed before they are projected (`cells.read_cached`)
  - scoring of answer options:   R = all option rows of a question, against the same cache
  - training:                    R = rows that predict answers; the union of their cells is projected
                                 (`cells.read_union`)
  - variant "paper":             R = all rows, reading one shared selection
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from flexattn_jax.config import FlexAttentionConfig, VLMConfig
from flexattn_jax.highres.cells import PROJECTED_AT_ONCE, Part, Picture, read_cached, read_union
from flexattn_jax.highres.step import Rows, Step
from flexattn_jax.ops.attention import merge, row_probabilities
from flexattn_jax.ops.cache import LayerCache, read_rows, whole, write_rows
from flexattn_jax.ops.selection import (
    SCOPE,
    Selection,
    empty_selection,
    keep_cells,
    normalise_map,
    pool_cells,
    unite_rows,
)
from flexattn_jax.partitioning import constrain, per_sample

# jax.named_scope of the condition for layers that have FlexAttention, where one body runs all; costs/ know it by it.
LAYER_SCOPE = "flexattention"


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
    grounded: bool = False,
) -> tuple[jax.Array, Selection, jax.Array]:
    """One layer: the rows read the cells that the layer below selected, and their maps select for the layer above.

    Args:
      query: (B, R, H, d), rotated, of the readers. Where other rows select (variant "paper"), all T rows read.
      lowres: attention of these rows to the sequence.
      keys: (B, X, J*d), rotated keys among which the picture's N low-resolution ones are.
      selection: of the layer below, for the Q selectors.
      read: attention of the readers' queries (B, R, H, d) to the selected cells; None where nothing is selected.
      layer: index in the whole decoder, for selector "random".
      positions: (B, T) int32, sequence positions of the call's T rows, for selector "random".
      alpha: share of high resolution in the readers' outputs while training warms up; None: all of it.
      key: of selector "random" in this step of training; None: that of config.seed.
      grounded: whether the map has a gradient; the selection never has.

    Returns:
      Attention output of the readers (B, R, H, d), the new selection, and the map (B, Q, N) float32 that made it.
    """
    out, lse = lowres
    if read is not None:
        full_out, full_lse = merge(lowres, read(query, selection))
        if alpha is not None:
            full_out = ((1 - alpha) * out + alpha * full_out).astype(out.dtype)
        out = full_out
        # The released code takes the map from the softmax without high resolution; the paper's Map' includes it.
        if config.variant == "paper":
            lse = full_lse

    if config.variant == "paper":
        query, lse = take_rows(query, rows.selectors), take_rows(lse, rows.selectors)
    operands = query, keys, lse
    if not grounded:
        operands = jax.lax.stop_gradient(operands)
    attention = image_map(*operands, picture.start, picture.content.shape[-1])
    candidate = (picture.start >= 0)[:, None] & (rows.selectors < positions.shape[1])
    places = take_rows(positions, rows.selectors)
    with jax.named_scope(SCOPE):
        keys = sample_keys(config, query.shape[0], key)
        seen = None if config.revisit else selection.seen | selection.keep
        own = (jax.lax.stop_gradient(attention), picture.content, candidate, places, keys, seen)
        selection = per_sample(partial(select, config), *own, layer, in_axes=(0,) * len(own) + (None,))
    selection = selection.replace(seen=seen)
    selection = jax.tree.map(lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)), selection)
    return out, selection, attention


def image_map(query: jax.Array, keys: jax.Array, lse: jax.Array, start: jax.Array, count: int) -> jax.Array:
    """Attention of a few rows to the picture's tokens in the sequence, summed over heads.

    Args:
      query: (B, Q, H, d); keys: (B, X, J*d); lse: (B, Q, H) of the softmax that the map belongs to.
      start: (B,) place of the first image token among the keys.
      count: N, how many there are.

    Returns:
      (B, Q, N) float32.
    """
    first, several = jnp.maximum(start, 0), query.shape[1] > 1
    if several:  # for one row it would cost more to copy the picture's keys than to read all
        keys = per_sample(partial(_cut, count=count, axis=0), keys, first)
    # Summed over heads, and so over the devices that they lie on; everything after it is a sample's own affair.
    probabilities = constrain(row_probabilities(query, keys, lse), "batch", None, None)
    return probabilities if several else per_sample(partial(_cut, count=count, axis=1), probabilities, first)


def _cut(x: jax.Array, first: jax.Array, count: int, axis: int) -> jax.Array:
    """Entries first (B,) .. first + count - 1 of each sample of x, along an axis of the sample."""
    return jax.vmap(lambda x, first: jax.lax.dynamic_slice_in_dim(x, first, count, axis))(x, first)


def select(
    config: FlexAttentionConfig,
    attention: jax.Array,
    content: jax.Array,
    candidate: jax.Array,
    positions: jax.Array,
    keys: jax.Array | None,
    seen: jax.Array | None,
    layer: jax.Array,
) -> Selection:
    """Cells that each selector row keeps; each sample's depend on nothing of another.

    Args:
      attention: (B, Q, N) map.
      content: (B, N), see Picture.
      candidate: (B, Q) bool, rows that may select at all.
      positions: (B, Q); keys: (B,), of `sample_keys`; layer: (): together the source of selector "random".
      seen: (B, Q, C) bool, cells that the rows have read, which are passed over; None: all may be selected.

    Returns:
      At most K cells a row, see FlexAttentionConfig.
    """
    cells = config.num_cells
    everywhere = jnp.broadcast_to(candidate[..., None], (*candidate.shape, cells))
    if config.selector == "all":
        return keep_cells(jnp.zeros(everywhere.shape), everywhere, cells)
    if seen is not None:
        everywhere = everywhere & ~seen
    if config.selector == "attention":
        if config.variant == "released":  # padded bands are zeroed before the minimum is taken
            attention = attention * content[:, None]
        scores = pool_cells(normalise_map(attention), config.cell_grid)
        wanted = scores > config.threshold if config.selection == "threshold" else scores >= 0
        return keep_cells(scores, everywhere & wanted, config.row_capacity)
    if config.selector == "random":
        scores = random_scores(keys, layer, positions, cells)
    else:  # "center": the nearer to the middle, the stronger
        offset = jnp.arange(config.cell_grid) - (config.cell_grid - 1) / 2
        scores = jnp.broadcast_to(255.0 / (1 + offset[:, None] ** 2 + offset**2).ravel(), everywhere.shape)
    share = max(1, round(config.ablation_share * cells))
    return keep_cells(scores, everywhere, share if config.selection == "threshold" else config.row_capacity)


def sample_keys(config: FlexAttentionConfig, batch: int, key: jax.Array | None) -> jax.Array | None:
    """(B,) random keys of selector "random"; None for any other.

    Args:
      key: in training: every step and sample then draws other cells. None: config.seed, so that a sample's cells do not
        depend on the batch that it came in.
    """
    if config.selector != "random":
        return None
    return jnp.broadcast_to(jax.random.key(config.seed), (batch,)) if key is None else jax.random.split(key, batch)


def random_scores(keys: jax.Array, layer: jax.Array, positions: jax.Array, cells: int) -> jax.Array:
    """(B, Q, C) float32 in 0..255, a function of (key of the sample, layer, position) alone."""

    def draw(key: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(key, position), (cells,), maxval=255.0)

    keys = jax.vmap(lambda key: jax.random.fold_in(key, layer))(keys)
    return jax.vmap(jax.vmap(draw, in_axes=(None, 0)))(keys, positions)


def take_rows(x: jax.Array, rows: jax.Array) -> jax.Array:
    """x (B, T, ...) at rows (B, n): (B, n, ...); a row outside gives the last one, to be ignored."""
    if x.shape[1] == rows.shape[1] == 1:  # said plainly, a product that `attend` has made is not made again
        return x
    return read_rows(x, (), rows)


def put_rows(x: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    """x (B, T, ...) with rows (B, n) replaced by values (B, n, ...); rows outside are dropped."""
    return write_rows(x, (), rows, values)


def read_in_layer(
    config: VLMConfig,
    step: Step,
    query: jax.Array,
    lowres: Part,
    keys: jax.Array,
    selection: Selection,
    index: jax.Array | int,
    cache: LayerCache | None,
) -> tuple[jax.Array, Selection, LayerCache | None, dict]:
    """`flex_attention` in a decoder layer: where cells come from, and what the layer above is told.

    Layers before first_layer pass by. Where layers are scanned, one body runs all of them and a condition tells which.

    Args:
      step, query, lowres, keys, selection: see Step and `flex_attention`.
      index: of the layer in the decoder; a Python int where layers are not scanned.
      cache: as `open_layer` gives it; None without one.

    Returns:
      Attention output (B, T, H, d), the new selection, the cache, and named intermediates (of layers that pass by: of
      the shapes of the others').
    """
    flex, place, scanned = config.flexattention, index - config.num_plain_layers, not isinstance(index, int)
    at, at_once = (place,) if scanned else (), 1 if query.shape[1] == 1 else PROJECTED_AT_ONCE
    query, own_lowres = jax.tree.map(lambda x: take_rows(x, step.rows.readers), (query, lowres))

    def pass_by():
        nothing = jnp.zeros((*selection.keep.shape[:2], config.num_lowres_tokens), jnp.float32)
        return own_lowres[0], selection, nothing, _cells_of(cache)

    def attend_cells():
        chosen, cells = selection, cache
        kernels = step.projections if scanned else step.projections[place]

        def read(rows_query, wanted):
            nonlocal cells
            if cache is None:
                own = (whole(kernel, at) for kernel in kernels)
                return read_union(rows_query, wanted, step.picture, *own, flex.sample_capacity)
            limits = flex.row_capacity, at_once
            part, cells = read_cached(rows_query, wanted, step.picture, *kernels, cache, at, *limits)
            return part

        if step.given is not None:
            chosen = chosen.replace(keep=step.given[place])
        out, chosen, attention = flex_attention(
            flex,
            query,
            own_lowres,
            keys,
            step.rows,
            step.picture,
            chosen,
            # Nothing is selected yet in the first layer; where layers are scanned, only the selection itself can tell.
            read if scanned or place else None,
            index,
            step.positions,
            step.alpha,
            step.key,
            step.grounded,
        )
        return out, chosen if cache is not None else limit_union(flex, chosen), attention, _cells_of(cells)

    if scanned:
        with jax.named_scope(LAYER_SCOPE):
            own, selection, attention, cells = jax.lax.cond(place >= 0, attend_cells, pass_by)
    else:
        own, selection, attention, cells = attend_cells() if place >= 0 else pass_by()
    out = put_rows(lowres[0], step.rows.readers, own) if scanned or place > 0 else lowres[0]
    if cache is not None:
        cache = cache.replace(**cells)
    named = {"cells": selection.keep, "overflow": selection.overflow}
    if step.capture or step.grounded:
        named["map"] = attention
    if step.capture:
        named["strength"] = selection.strength
    return out, selection, cache, named


def _cells_of(cache: LayerCache | None) -> dict[str, jax.Array]:
    """What reading cells changes in a layer's cache."""
    return {} if cache is None else {"key_hd": cache.key_hd, "projected": cache.projected}


def start_selection(config: FlexAttentionConfig, batch: int, selectors: int) -> Selection:
    """What the first FlexAttention layer reads: nothing."""
    nothing = empty_selection(batch, selectors, config.num_cells)
    return nothing if config.revisit else nothing.replace(seen=nothing.keep)


def limit_union(config: FlexAttentionConfig, selection: Selection) -> Selection:
    """The selection inside the union capacity U, for reading with `read_union`."""
    if config.sample_capacity >= config.num_cells:
        return selection
    with jax.named_scope(SCOPE):
        return per_sample(lambda rows: unite_rows(rows, config.sample_capacity)[0], selection)
