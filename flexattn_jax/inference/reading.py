"""Prompts to be read: whole ones, or what follows beginnings that have been read once for many questions."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from flexattn_jax.config import VLMConfig
from flexattn_jax.inputs.batching import Batch
from flexattn_jax.models.vlm import VLM, Features, Memory
from flexattn_jax.ops.cache import LayerCache, new_cache


@flax.struct.dataclass
class Prompts:
    """What a program reads before it decodes or scores.

    batch: whole prompts; with `beginnings` what follows them, of which token_ids and lengths are read.
    features: of the pictures, where they have been encoded already.
    beginnings: of each sample, the Memory of a batch of one that `read_beginning` left, all equally long; or None.
    """

    batch: Batch
    features: Features | None = None
    beginnings: tuple[Memory, ...] | None = None


def read_prompts(model: VLM, params: dict, prompts: Prompts, room: int) -> tuple[jax.Array, Memory, dict]:
    """Reads prompts into a cache with room for `room` more tokens.

    Returns:
      Logits of each prompt's last token (B, V) float32, the memory, and named intermediates.
    """
    variables, batch, width = {"params": params}, prompts.batch, prompts.batch.token_ids.shape[1]
    if prompts.beginnings is None:
        return model.apply(variables, batch, width + room, prompts.features, method=VLM.prefill)
    memory = join(model.config, prompts.beginnings, width + room)
    return model.apply(variables, memory, batch.token_ids, batch.lengths, method=VLM.extend)


def can_share(config: VLMConfig) -> bool:
    """Whether a prompt's beginning, its picture included, is read in the same way whatever follows.

    It is not where the last row decides what is dropped, nor where every row reads what the last one selects.
    Cross-attention could, but nobody has written it.
    """
    shared_selection = config.reads_highres and config.flexattention.variant == "paper"
    return config.reduction is None and config.crossattention is None and not shared_selection


def read_beginning(model: VLM, params: dict, batch: Batch, features: Features) -> Memory:
    """Reads the beginning of prompts about one picture, up to the picture's last token; no row reads high resolution.

    Args:
      batch: of one sample; features: of its picture.

    Returns:
      Its memory, without room and without high-resolution keys.
    """
    width = batch.token_ids.shape[1]
    _, memory, _ = model.apply({"params": params}, batch, width, features, ends=False, method=VLM.prefill)

    def bare(layer: LayerCache) -> LayerCache:
        return layer.replace(key_hd=None, projected=None)

    return memory.replace(cache=jax.tree.map(bare, memory.cache, is_leaf=_is_layer))


def join(config: VLMConfig, beginnings: tuple[Memory, ...], room: int) -> Memory:
    """The memory of a batch whose samples begin as `beginnings`, each with a copy of its own and `room` more tokens."""
    batch, stacked = len(beginnings), config.scan_layers
    length = jax.tree.leaves(beginnings[0].cache)[0].shape[-2]
    empty = new_cache(config, batch, length + room, pictures=True)

    def fill(layer: LayerCache, *parts: LayerCache) -> LayerCache:
        def put(into: jax.Array, *values: jax.Array) -> jax.Array:
            # An unrolled layer of one sample has no axis for it, see LayerCache.
            value = (
                jnp.concatenate(values, axis=1) if stacked else jnp.stack(values).reshape(*into.shape[:-2], length, -1)
            )
            return jax.lax.dynamic_update_slice(into, value, (0,) * into.ndim)

        key, value = (put(getattr(layer, name), *(getattr(p, name) for p in parts)) for name in ("key", "value"))
        return layer.replace(key=key, value=value)

    cache = jax.tree.map(fill, empty, *(b.cache for b in beginnings), is_leaf=_is_layer)
    first = beginnings[0].picture
    picture = None
    if first is not None:
        joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(b.picture for b in beginnings))
        picture = joined.replace(valid=first.valid)
    return Memory(cache, jnp.concatenate([b.lengths for b in beginnings]), picture)


def _is_layer(node: object) -> bool:
    return isinstance(node, LayerCache)
