"""What a decoder layer remembers between calls, in buffers of static length.

A segment's cache is either a LayerCache whose arrays have a leading layer axis (scanned layers: the whole stack is
carried through the loop and updated in place) or a tuple of LayerCaches (unrolled layers). `at` is the index prefix
that makes both look alike: (layer,) or (). FlexAttention's cells have entries for its own layers only, counted from
first_layer.
"""

from __future__ import annotations

import math

import flax.struct
import jax
import jax.numpy as jnp

from flexattn_jax.config import Segment, VLMConfig
from flexattn_jax.ops.selection import cell_tokens
from flexattn_jax.partitioning import per_sample

# Larger entries are read by slices on TPU, while so many slices are no long program.
GATHERED_BYTES, MOST_CUT = 512 << 10, 64


@flax.struct.dataclass
class LayerCache:
    """Keys and values of one layer (or of a stack of layers, with a leading axis).

    Heads lie side by side in the last axis, and an unrolled layer's cache of a single sample has no axis for it: with
    either, XLA's CPU code copies the cache several times to write one row (44 against 25 ms for 16 layers of width 1024
    and 676 positions on 2 cores, projections included).

    key, value: (B, S, J*d) of the sequence; (S, J*d) for one sample of an unrolled layer.
    key_hd: (B, C, P, J*d), keys of high-resolution cells, filled when a cell is first selected; None where they are not
      read. Values are not kept (`cells.read_cached`).
    key_hd, value_hd: of cross-attention, (B, M, its width), without B as `key`.
    projected: (B, C) bool, cells that are filled.
    """

    key: jax.Array
    value: jax.Array
    key_hd: jax.Array | None = None
    value_hd: jax.Array | None = None
    projected: jax.Array | None = None


SegmentCache = LayerCache | tuple[LayerCache, ...]


def new_cache(config: VLMConfig, batch: int, length: int, pictures: bool) -> dict[str, SegmentCache]:
    """Empty caches for all segments.

    Args:
      batch: B.
      length: S, sequence positions to make room for where the decoder begins; later segments may need fewer.
      pictures: some sample has a picture: make room for its high-resolution keys, and none for the tokens
        that a segment does without.
    """
    decoder, dtype = config.decoder, jnp.dtype(config.dtype)
    width = decoder.num_kv_heads * decoder.head_dim

    def layers(segment: Segment, lead: tuple[int, ...], lead_hd: tuple[int, ...] | None) -> LayerCache:
        """The cache of a stack, `lead` (layers,), or of one layer, (); lead_hd: the same of cells; None: without."""
        samples = () if batch == 1 and not lead else (batch,)
        room = length - (config.num_slots - segment.num_slots if pictures else 0)
        cache = LayerCache(*(jnp.zeros((*lead, *samples, room, width), dtype) for _ in "kv"))
        if pictures and config.crossattention is not None:
            shape = (*lead, *samples, config.highres_grid**2, config.crossattention.width)
            return cache.replace(key_hd=jnp.zeros(shape, dtype), value_hd=jnp.zeros(shape, dtype))
        if not (pictures and config.reads_highres) or lead_hd is None:
            return cache
        cells = cell_tokens(config.highres_grid, config.flexattention.cell_grid)[0].shape
        return cache.replace(
            key_hd=jax.lax.empty((*lead_hd, batch, *cells, width), dtype),  # read where `projected` says so
            projected=jnp.zeros((*lead_hd, batch, cells[0]), bool),
        )

    def stack(segment: Segment) -> SegmentCache:
        if config.scan_layers:
            return layers(segment, (segment.num_layers,), (config.num_flex_layers,))
        have_cells = (i >= config.num_plain_layers for i in range(segment.num_layers))
        return tuple(layers(segment, (), () if cells else None) for cells in have_cells)

    return {segment.name: stack(segment) for segment in config.segments}


def open_layer(cache: SegmentCache, index: jax.Array | int) -> tuple[LayerCache, tuple]:
    """The arrays that hold layer `index` of a segment, and the index prefix `at` under which they hold it."""
    return (cache[index], ()) if isinstance(cache, tuple) else (cache, (index,))


def close_layer(cache: SegmentCache, index: jax.Array | int, layer: LayerCache) -> SegmentCache:
    """The segment's cache with layer `index` as `open_layer` gave it and the layer has updated it."""
    return (*cache[:index], layer, *cache[index + 1 :]) if isinstance(cache, tuple) else layer


def whole(array: jax.Array, at: tuple) -> jax.Array:
    """One layer's array."""
    return jax.lax.dynamic_index_in_dim(array, at[0], keepdims=False) if at else array


def read_sequence(array: jax.Array, at: tuple) -> jax.Array:
    """One layer's keys or values of the sequence, (B, S, J*d)."""
    return array[None] if array.ndim == 2 else whole(array, at)


def write_sequence(array: jax.Array, at: tuple, values: jax.Array, first: jax.Array | None = None) -> jax.Array:
    """Writes values (B, T, J*d) to sequence positions first (B,) .. first + T - 1; first None: from position 0 on.

    One slice a sample: a scatter over the batch, which would say the same, makes XLA's CPU code copy the whole buffer.
    """
    if array.ndim == 2:
        return jax.lax.dynamic_update_slice(array, values[0], (0 if first is None else first[0], 0))
    values = values.reshape((1,) * len(at) + values.shape)
    if first is None:
        return jax.lax.dynamic_update_slice(array, values, (*at, 0, 0, 0))
    for sample in range(len(first)):
        row = jax.lax.slice_in_dim(values, sample, sample + 1, axis=len(at))
        array = jax.lax.dynamic_update_slice(array, row, (*at, sample, first[sample], 0))
    return array


def write_rows(array: jax.Array, at: tuple, places: jax.Array, values: jax.Array) -> jax.Array:
    """Writes values (B, n, ...) to places (B, n) of axis 1; a place outside the array is dropped."""

    def write(array: jax.Array, at: tuple, places: jax.Array, values: jax.Array) -> jax.Array:
        samples = jnp.arange(places.shape[0])[:, None]
        return array.at[(*at, samples, places)].set(values, mode="drop")

    return per_sample(write, array, at, places, values, in_axes=(len(at), None, 0, 0), out_axis=len(at))


def read_rows(array: jax.Array, at: tuple, places: jax.Array) -> jax.Array:
    """Entries at places (B, n) of axis 1: (B, n, ...); a place outside the array gives its last entry."""

    def read(array: jax.Array, at: tuple, places: jax.Array) -> jax.Array:
        entry_bytes = math.prod(array.shape[len(at) + 2 :]) * array.dtype.itemsize
        if entry_bytes <= GATHERED_BYTES or places.size > MOST_CUT:
            return gather_rows(array, at, places)
        return jax.lax.platform_dependent(array, at, places, tpu=cut_rows, default=gather_rows)

    return per_sample(read, array, at, places, in_axes=(len(at), None, 0))


def gather_rows(array: jax.Array, at: tuple, places: jax.Array) -> jax.Array:
    """`read_rows` by one gather."""
    samples = jnp.arange(places.shape[0])[:, None]
    return array.at[(*at, samples, places)].get(mode="clip")


def cut_rows(array: jax.Array, at: tuple, places: jax.Array) -> jax.Array:
    """`read_rows` by a slice for each place. TPU's compiler gathers larger entries in parts, and copies a part of the
    whole array for each of them first."""
    axes, entry = len(at) + 2, array.shape[len(at) + 2 :]
    rows = [
        jax.lax.dynamic_slice(array, (*at, sample, place, *(0,) * len(entry)), (*(1,) * axes, *entry))
        for sample, own in enumerate(places)
        for place in own
    ]
    return jnp.concatenate([row.reshape(1, *entry) for row in rows]).reshape(*places.shape, *entry)
