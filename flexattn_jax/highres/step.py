"""What the layers of one call share, and what goes from layer to layer, whatever reads high resolution."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax

from flexattn_jax.ops.cache import SegmentCache


@flax.struct.dataclass
class Rows:
    """Query rows that take part in FlexAttention, as places in this call's T rows; T or more stands for no row.

    readers: (B, R) int32, rows that read high-resolution tokens.
    selectors: (B, Q) int32, rows whose maps select; Q = R (each reader selects for itself) or Q = 1 (shared).
    """

    readers: jax.Array
    selectors: jax.Array


@flax.struct.dataclass
class Slots:
    """Where the picture's tokens sit in the sequence, for layers between which some are dropped.

    start: (B,) int32, first slot; -1: the sample has no picture.
    row: (B,) int32, row of this call whose attention ranks the slots; None where the call continues a cache.
    """

    start: jax.Array
    row: jax.Array | None = None


@flax.struct.dataclass
class Step:
    """What all layers of one call share.

    positions: (B, T) int32, places of this call's tokens in the sequence, for rotation.
    cos, sin: (B, T, d/2) float32, filled in by the decoder.
    mask: bool, broadcastable to (B, T, T), which of this call's tokens each of them may read, where they continue a
      cache without being appended to it; everywhere else it is the earlier ones and itself.
    blocks: Batch.blocks.
    past: (B,) int32, tokens already in the cache, all of which are read; None: this call starts the sequence.
    picture: high-resolution features, of the system's own type; None where no row of this call reads any.
    rows: of FlexAttention, None as picture.
    slots: of token dropping; None where nothing is dropped.
    alpha: () or (B, 1, 1, 1) float32, see flex_attention; None: 1.
    key: random key of selector "random"; None: FlexAttentionConfig.seed.
    projections: FlexAttention's kernels of keys and values (J*d, D), of layers first_layer .. L-1: a pair of stacks
      where layers are scanned, else a pair for each layer; filled in by the decoder.
    given: (layers first_layer .. L-1, B, Q, C) bool, cells read in each of them in place of those selected, to find out
      what the selection is worth; without a cache only. The first one reads none.
    append: write this call's keys and values to the cache.
    grounded: return the maps that select, with gradient, for a loss on them.
    capture: return the residual stream and the attention outputs of all layers.
    """

    positions: jax.Array
    mask: jax.Array | None = None
    cos: jax.Array | None = None
    sin: jax.Array | None = None
    past: jax.Array | None = None
    picture: Any = None
    rows: Rows | None = None
    slots: Slots | None = None
    alpha: jax.Array | None = None
    key: jax.Array | None = None
    projections: Any = None
    given: jax.Array | None = None
    blocks: tuple[int, int] | None = flax.struct.field(pytree_node=False, default=None)
    append: bool = flax.struct.field(pytree_node=False, default=True)
    grounded: bool = flax.struct.field(pytree_node=False, default=False)
    capture: bool = flax.struct.field(pytree_node=False, default=False)


@flax.struct.dataclass
class Carry:
    """What goes from layer to layer.

    hidden: (B, T, D).
    selection: FlexAttention's Selection for the next layer; or (B, slots) float32, how the last layer ranks the
      picture's tokens; None in layers that do neither.
    cache: the segment's, None without one.
    """

    hidden: jax.Array
    selection: Any
    cache: SegmentCache | None
