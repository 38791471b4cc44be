"""Cross-attention to high resolution in every decoder layer (CogAgent, arXiv 2312.08914, section 2.2).

Between a layer's self-attention and its MLP, with x the hidden states and f the picture's high-resolution features:

    f  = f + learned positions
    x' = x + softmax(norm(x) W_Q (f W_K)^T / sqrt(d)) (f W_V) W_O          every row, no rotation, no causal mask

W_O and the positions begin at zero, so that a model begins as what it was without cross-attention. The keys and values
of a picture are computed once, in the prompt's pass, and kept.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from flexattn_jax.config import VLMConfig
from flexattn_jax.highres.step import Carry
from flexattn_jax.ops.attention import attend
from flexattn_jax.ops.cache import close_layer, open_layer, read_sequence, write_sequence
from flexattn_jax.ops.layers import Linear
from flexattn_jax.partitioning import constrain


@flax.struct.dataclass
class Source:
    """What is attended to.

    tokens: (B, M, F) with positions, F the width of `CrossAttentionConfig.source`; None where the cache has their keys.
    present: (B,) bool, False for a sample without a picture, whose rows read nothing.
    """

    tokens: jax.Array | None
    present: jax.Array


class Positions(nn.Module):
    """A learned position for each high-resolution token, zero at first."""

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """features (B, M, F) -> (B, M, F)."""
        table = self.param("positions", nn.initializers.zeros_init(), features.shape[1:], features.dtype)
        return constrain(features + table.astype(features.dtype), "batch", None, None)


class CrossAttention(nn.Module):
    """One layer's cross-attention, with a norm of its own."""

    config: VLMConfig

    @nn.compact
    def __call__(self, carry: Carry, index: Any, source: Source) -> Carry:
        """Adds what the rows (B, T, D) of carry.hidden read of the source; `index` counts within the segment."""
        settings, hidden = self.config.crossattention, carry.hidden
        norm = nn.RMSNorm(
            epsilon=self.config.decoder.norm_eps, dtype=hidden.dtype, param_dtype=hidden.dtype, name="norm"
        )
        query = Linear(settings.width, name="q_proj")(norm(hidden))
        query = constrain(query.reshape(*query.shape[:2], settings.num_heads, -1), "batch", None, "heads", None)
        cache, at = (None, ()) if carry.cache is None else open_layer(carry.cache, index)
        if source.tokens is None:
            key, value = read_sequence(cache.key_hd, at), read_sequence(cache.value_hd, at)
        else:
            key, value = (
                constrain(Linear(settings.width, name=f"{part}_proj")(source.tokens), "batch", None, "heads")
                for part in "kv"
            )
            if cache is not None:
                cache = cache.replace(
                    key_hd=write_sequence(cache.key_hd, at, key), value_hd=write_sequence(cache.value_hd, at, value)
                )
        out, _ = attend(query, key, value)
        out_proj = Linear(hidden.shape[-1], kernel_init=nn.initializers.zeros_init(), name="o_proj")
        out = constrain(out.reshape(*out.shape[:2], -1), "batch", None, "heads")
        out = constrain(jnp.where(source.present[:, None, None], out_proj(out), 0), "batch", None, None)
        if cache is not None:
            cache = close_layer(carry.cache, index, cache)
        return carry.replace(hidden=hidden + out, cache=cache)
