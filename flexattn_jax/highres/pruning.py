"""Dropping a picture's tokens between decoder layers: FastV (arXiv 2403.06764) and PyramidDrop (arXiv 2410.17247).

Both rank the tokens by the attention that one row, the last of the prompt, pays to them in the layer before the cut,
summed over heads, and keep the strongest; FastV cuts once, after two layers, PyramidDrop after each quarter of them:

    scores  = sum over heads of exp(q_last k_slots^T / sqrt(d) - lse_last)      a side row of fused attention
    keep    = the strongest tokens; equal scores: the earlier token
    hidden  = hidden[all text, kept tokens]                                     T - dropped rows, a static number

The layers after a cut are shorter, and so are their caches. FastV's tokens keep their positions (its released code
indexes positions with what it keeps). PyramidDrop's are numbered anew, as its released code does; that code ranks by
the keys of the layer after the cut, which are then computed for nothing: here the layer before it ranks, as in FastV.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flexattn_jax.config import ReductionConfig
from flexattn_jax.highres.flexattention import image_map, put_rows, take_rows
from flexattn_jax.highres.step import Slots, Step
from flexattn_jax.partitioning import per_sample


def rank_slots(query: jax.Array, keys: jax.Array, lse: jax.Array, slots: Slots, count: int) -> jax.Array:
    """How much attention the ranking row pays to each of the picture's tokens, summed over heads; no gradient.

    Args:
      query: (B, T, H, d), rotated; keys: (B, T, J*d), rotated; lse: (B, T, H) of attention to the sequence.
      count: tokens that a picture has in this layer.

    Returns:
      (B, count) float32.
    """
    row = slots.row[:, None]
    operands = jax.lax.stop_gradient((take_rows(query, row), keys, take_rows(lse, row)))
    return image_map(*operands, slots.start, count)[:, 0]


def keep_strongest(scores: jax.Array, count: int) -> jax.Array:
    """(B, n) float32 -> (B, n) bool, exactly `count` True: the strongest; of equal scores the first."""
    best = per_sample(lambda scores: jax.lax.top_k(scores, count)[1], scores)
    return mark_rows(best, scores.shape[1])


def list_kept(keep: jax.Array, count: int) -> jax.Array:
    """Places of the True entries of keep (B, n), `count` of them in each row, in order: (B, count) int32."""
    batch, length = keep.shape
    target = jnp.where(keep, jnp.cumsum(keep, axis=1) - 1, count)
    places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), keep.shape)
    return put_rows(jnp.zeros((batch, count), jnp.int32), target, places)


def drop_slots(
    config: ReductionConfig, hidden: jax.Array, step: Step, scores: jax.Array, count: int
) -> tuple[jax.Array, Step, jax.Array]:
    """The sequence without the picture's weakest tokens.

    Args:
      hidden: (B, T, D).
      scores: (B, slots) of `rank_slots`.
      count: tokens to keep. A sample without a picture keeps its first T - slots + count rows, which are all it has
        (`make_batch` makes the room).

    Returns:
      hidden (B, T - slots + count, D), the step that fits it, and the rows that were kept, as places in T.
    """
    slots, length = scores.shape[1], hidden.shape[1]
    start, row, place = step.slots.start[:, None], step.slots.row[:, None], jnp.arange(length)
    # Where a prompt ends with its picture, the ranking row is one of the slots; the answer comes from it.
    scores = jnp.where(start + jnp.arange(slots) == row, jnp.inf, scores)
    kept_slots = keep_strongest(scores, count)
    slot = place - start
    is_slot = (slot >= 0) & (slot < slots)
    keep = ~is_slot | take_rows(kept_slots, jnp.clip(slot, 0, slots - 1))
    keep = jnp.where(start >= 0, keep, place < length - slots + count)
    kept = list_kept(keep, length - slots + count)
    row = take_rows(jnp.cumsum(keep, axis=1), row) - 1
    positions = take_rows(step.positions, kept)
    if config.method == "pyramiddrop":
        positions = jnp.broadcast_to(jnp.arange(kept.shape[1]), kept.shape)
    step = step.replace(positions=positions, slots=step.slots.replace(row=row[:, 0]))
    return take_rows(hidden, kept), step, kept


def skip_dropped(config: ReductionConfig, step: Step, dropped: int) -> Step:
    """The step of a call that continues a cache, for a segment whose cache lacks `dropped` of each picture's tokens."""
    missing = jnp.where(step.slots.start >= 0, dropped, 0)
    positions = step.positions
    if config.method == "pyramiddrop":
        positions = positions - missing[:, None]
    return step.replace(positions=positions, past=step.past - missing)


def undrop_rows(x: jax.Array, kept: jax.Array, length: int) -> jax.Array:
    """x (B, n, D) of the kept rows (B, n) -> (B, length, D), zero in the others."""
    return put_rows(jnp.zeros((x.shape[0], length, *x.shape[2:]), x.dtype), kept, x)


def mark_rows(kept: jax.Array, length: int) -> jax.Array:
    """(B, n) places -> (B, length) bool."""
    return put_rows(jnp.zeros((kept.shape[0], length), bool), kept, jnp.ones(kept.shape, bool))
