"""Greedy decoding: one prefill and one compiled loop, no host round trip a token."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from flexattn_jax.highres.cells import Picture
from flexattn_jax.inputs.batching import Batch
from flexattn_jax.models.vlm import VLM, Memory


@flax.struct.dataclass
class Generated:
    """What `generate` returns.

    tokens: (B, n) int32, the end-of-sequence token included where it came; entries from `counts` on are padding.
    counts: (B,) int32, tokens generated.
    cells: (layers, B, C) bool, cells selected by the last prompt token, or None without high resolution.
    overflow: (layers, B) int32, or None.
    cells_read: (B,) int32, cells projected in all layers together over prompt and answer, or None.
    """

    tokens: jax.Array
    counts: jax.Array
    cells: jax.Array | None
    overflow: jax.Array | None
    cells_read: jax.Array | None


def generate(model: VLM, params: dict, batch: Batch, active: jax.Array, limit: jax.Array, capacity: int) -> Generated:
    """Answers a batch of prompts greedily.

    Args:
      params: of the model.
      batch: prompts and pictures.
      active: (B,) bool, False for samples that only fill the batch.
      limit: () int32, most tokens to generate, at most `capacity`.
      capacity: n, static room for new tokens.

    Returns:
      Up to `limit` tokens for each sample; a sample stops after its end-of-sequence token.
    """
    config = model.config
    logits, memory, named = model.apply(
        {"params": params}, batch, batch.token_ids.shape[1] + capacity, method=VLM.prefill
    )
    first = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    tokens = jnp.full((first.shape[0], capacity), config.pad_token_id, jnp.int32).at[:, 0].set(first)
    state = (jnp.ones((), jnp.int32), first, active & (first != config.eos_token_id), tokens, memory)

    def step(state):
        count, token, running, tokens, memory = state
        logits, memory, _ = model.apply({"params": params}, memory, token, method=VLM.decode)
        token = jnp.where(running, jnp.argmax(logits, axis=-1), config.pad_token_id).astype(jnp.int32)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], count, axis=1)
        # A finished sample's lengths grow with the others'; its cache is read by nobody any more.
        return count + 1, token, running & (token != config.eos_token_id), tokens, memory

    count, _, _, tokens, memory = jax.lax.while_loop(lambda s: (s[0] < limit) & s[2].any(), step, state)
    ended = tokens == config.eos_token_id
    counts = jnp.where(ended.any(axis=1), ended.argmax(axis=1) + 1, jnp.minimum(count, limit))
    cells, overflow = selected(named)
    return Generated(tokens, counts.astype(jnp.int32), cells, overflow, cells_projected(memory))


def selected(named: dict) -> tuple[jax.Array | None, jax.Array | None]:
    """Cells (layers, B, C) and overflow (layers, B) of the first selector row, for the layers that read them.

    Layer first_layer reads nothing and what the last layer selects is read by nobody, so entry i is what layer
    first_layer + 1 + i reads.
    """
    if "cells" not in named:
        return None, None
    return named["cells"][:-1, :, 0], named["overflow"][:-1, :, 0]


def cells_projected(memory: Memory) -> jax.Array | None:
    """(B,) cells whose keys and values the cache holds, all layers together."""
    if not isinstance(memory.picture, Picture):
        return None
    flex = memory.cache["flex"]
    filled = jnp.stack([layer.projected for layer in flex]) if isinstance(flex, tuple) else flex.projected
    return filled.sum(axis=(0, 2), dtype=jnp.int32)
