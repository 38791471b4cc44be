"""LLaMA decoder in two segments: plain layers, and layers that read high resolution where the last one pointed."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from flexattn_jax.config import DecoderConfig, VLMConfig
from flexattn_jax.highres import flexattention
from flexattn_jax.highres.flexattention import Picture, Rows
from flexattn_jax.models.layers import Kernel, Linear, layer_stack
from flexattn_jax.ops.attention import attend, attend_blocks, merge
from flexattn_jax.ops.cache import SegmentCache, close_layer, open_layer, read_sequence, write_sequence
from flexattn_jax.ops.rope import apply_rope, rope_table
from flexattn_jax.ops.selection import Selection


@flax.struct.dataclass
class Step:
    """What all layers of one call share.

    positions: (B, T) int32, places of this call's tokens in the sequence (rotation, cache slots).
    cos, sin: (B, T, d/2) float32, filled in by the decoder.
    mask: bool, broadcastable to (B, T, T), which of this call's tokens each of them may read, where they continue a
      cache without being appended to it; everywhere else it is the earlier ones and itself.
    blocks: Batch.blocks.
    past: (B,) int32, tokens already in the cache, all of which are read; None: this call starts the sequence.
    picture, rows: None where no row of this call reads high resolution.
    alpha: () float32, see flex_attention; None: 1.
    key: random key of selector "random"; None: FlexAttentionConfig.seed.
    given: (layers of the second segment, B, Q, C) bool, cells read in each layer in place of those selected, to
      find out what the selection is worth; without a cache only. The first layer reads none.
    append: write this call's keys and values to the cache.
    capture: return the residual stream and the attention outputs of all layers.
    """

    positions: jax.Array
    mask: jax.Array | None = None
    cos: jax.Array | None = None
    sin: jax.Array | None = None
    past: jax.Array | None = None
    picture: Picture | None = None
    rows: Rows | None = None
    alpha: jax.Array | None = None
    key: jax.Array | None = None
    given: jax.Array | None = None
    blocks: tuple[int, int] | None = flax.struct.field(pytree_node=False, default=None)
    append: bool = flax.struct.field(pytree_node=False, default=True)
    capture: bool = flax.struct.field(pytree_node=False, default=False)


@flax.struct.dataclass
class Carry:
    """What goes from layer to layer: hidden (B, T, D), the selection (None in plain layers), the segment's cache."""

    hidden: jax.Array
    selection: Selection | None
    cache: SegmentCache | None


class SelfAttention(nn.Module):
    """Causal self-attention; in the second segment with FlexAttention on top."""

    config: VLMConfig
    flex: bool

    @nn.compact
    def __call__(self, x: jax.Array, carry: Carry, index: Any, step: Step) -> tuple[jax.Array, Carry, dict]:
        """x (B, T, D), normalised -> attention output (B, T, D), the new carry, named intermediates."""
        decoder, flex = self.config.decoder, self.config.flexattention
        batch, length, _ = x.shape
        query, key, value = (
            Linear(heads * decoder.head_dim, name=f"{part}_proj")(x).reshape(batch, length, heads, decoder.head_dim)
            for part, heads in (("q", decoder.num_heads), ("k", decoder.num_kv_heads), ("v", decoder.num_kv_heads))
        )
        query, key = apply_rope(query, step.cos, step.sin), apply_rope(key, step.cos, step.sin)
        key, value = (part.reshape(batch, length, -1) for part in (key, value))

        cache, at = (None, ()) if carry.cache is None else open_layer(carry.cache, index)
        if cache is not None and step.append:
            cache = cache.replace(
                key=write_sequence(cache.key, at, key, step.past),
                value=write_sequence(cache.value, at, value, step.past),
            )
        if step.past is None:
            if step.blocks is None:
                lowres, keys = attend(query, key, value, causal=True), key
            else:
                lowres, keys = attend_blocks(query, key, value, *step.blocks), key
        else:
            keys, values = read_sequence(cache.key, at), read_sequence(cache.value, at)
            place = jnp.arange(keys.shape[1])
            if step.append:  # what was just written is read back with the rest
                lowres = attend(query, keys, values, place <= step.positions[..., None])
            else:
                past = attend(query, keys, values, (place < step.past[:, None])[:, None])
                lowres = merge(past, attend(query, key, value, step.mask))

        named, selection = {}, carry.selection
        if self.flex:
            kernels = tuple(
                Kernel(decoder.num_kv_heads * decoder.head_dim, decoder.width, x.dtype, name=f"{part}_proj_hd")()
                for part in "kv"
            )
        if self.flex and step.rows is not None:

            def read(rows_query, cells):
                nonlocal cache
                if cache is None:
                    return flexattention.read_union(rows_query, cells, step.picture, *kernels, flex.sample_capacity)
                part, cache = flexattention.read_cached(rows_query, cells, step.picture, *kernels, cache, at)
                return part

            # Nothing is selected yet in the first layer; where layers are scanned, only the selection itself can tell.
            nothing_selected = isinstance(index, int) and index == 0
            if step.given is not None:
                selection = selection.replace(keep=step.given[index])
            layer = index + self.config.num_plain_layers
            out, selection, attention = flexattention.flex_attention(
                flex,
                query,
                lowres,
                keys,
                step.rows,
                step.picture,
                selection,
                None if nothing_selected else read,
                layer,
                step.positions,
                step.alpha,
                step.key,
            )
            if cache is None:
                selection = flexattention.limit_union(flex, selection)
            named = {"cells": selection.keep, "overflow": selection.overflow}
            if step.capture:
                named |= {"map": attention, "strength": selection.strength}
        else:
            out = lowres[0]
        out = Linear(decoder.width, name="o_proj")(out.reshape(batch, length, -1))
        if cache is not None:
            cache = close_layer(carry.cache, index, cache)
        return out, Carry(hidden=carry.hidden, selection=selection, cache=cache), named


class GatedMLP(nn.Module):
    """SwiGLU."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (..., D) -> (..., D)."""
        gate, up = Linear(self.width, name="gate_proj")(x), Linear(self.width, name="up_proj")(x)
        return Linear(x.shape[-1], name="down_proj")(jax.nn.silu(gate) * up)


class DecoderLayer(nn.Module):
    """A pre-norm decoder layer of either segment."""

    config: VLMConfig
    flex: bool

    @nn.compact
    def __call__(self, carry: Carry, index: Any, step: Step) -> tuple[Carry, dict]:
        """One layer; `index` counts within the segment. Returns the carry and named intermediates."""
        decoder, hidden = self.config.decoder, carry.hidden
        x = rms_norm(decoder, hidden.dtype, "input_norm")(hidden)
        attention, carry, named = SelfAttention(self.config, self.flex, name="self_attn")(x, carry, index, step)
        if step.capture:
            named |= {"hidden": hidden, "attention": attention}
        hidden = hidden + attention
        x = rms_norm(decoder, hidden.dtype, "post_attention_norm")(hidden)
        return carry.replace(hidden=hidden + GatedMLP(decoder.mlp_dim, name="mlp")(x)), named


def rms_norm(config: DecoderConfig, dtype: jnp.dtype, name: str) -> nn.RMSNorm:
    """RMSNorm with a float32 mean square."""
    return nn.RMSNorm(epsilon=config.norm_eps, dtype=dtype, param_dtype=dtype, name=name)


class Decoder(nn.Module):
    """Embedding, two segments of layers, final norm, head."""

    config: VLMConfig

    def setup(self):
        decoder, dtype = self.config.decoder, jnp.dtype(self.config.dtype)
        self.embedding = self.param(
            "embedding", nn.initializers.normal(0.02), (decoder.vocab_size, decoder.width), dtype
        )
        self.final_norm = rms_norm(decoder, dtype, "final_norm")
        if not decoder.tie_embeddings:
            self.lm_head = Linear(decoder.vocab_size)

    def embed(self, token_ids: jax.Array) -> jax.Array:
        """token_ids (B, T) int32 -> (B, T, D)."""
        return self.embedding[token_ids].astype(self.config.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden (..., D), after the final norm -> (..., V) float32."""
        if self.config.decoder.tie_embeddings:
            logits = hidden @ self.embedding.T.astype(hidden.dtype)
        else:
            logits = self.lm_head(hidden)
        return logits.astype(jnp.float32)

    @nn.compact
    def __call__(
        self, hidden: jax.Array, step: Step, cache: dict[str, SegmentCache] | None
    ) -> tuple[jax.Array, dict[str, SegmentCache] | None, dict]:
        """Runs all layers.

        Args:
          hidden: (B, T, D) embeddings.
          step: see Step; its cos and sin are filled in here.
          cache: by segment, as `new_cache` makes it; None: nothing is remembered.

        Returns:
          Hidden states (B, T, D) after the final norm, the cache, and named intermediates: `cells` (layers, B, Q, C)
          bool and `overflow` (layers, B, Q), made by layers first_layer .. L-1; with step.capture also `map`
          (layers, B, Q, N), `strength`, and for all L layers `hidden` (L, B, T, D), their inputs, and
          `attention`, their attention outputs; and `final_hidden` (B, T, D).
        """
        config, flex = self.config, self.config.flexattention
        cos, sin = rope_table(step.positions, config.decoder.head_dim, config.decoder.rope_theta)
        step = step.replace(cos=cos, sin=sin)
        caches, named = dict(cache or {}), {}
        for name, length in (("plain", config.num_plain_layers), ("flex", config.num_flex_layers)):
            if not length:
                continue
            selection = None
            if name == "flex" and step.rows is not None:
                selection = flexattention.start_selection(flex, hidden.shape[0], step.rows.selectors.shape[1])
            segment = layer_stack(
                DecoderLayer, name, length, config.scan_layers, config.remat, config=config, flex=name == "flex"
            )
            carry = Carry(hidden=hidden, selection=selection, cache=caches.get(name))
            carry, outputs = segment(carry, step)
            hidden = carry.hidden
            if cache is not None:
                caches[name] = carry.cache
            for key, value in outputs.items():
                named[key] = jnp.concatenate([named[key], value]) if key in named else value
        hidden = self.final_norm(hidden)
        if step.capture:
            named["final_hidden"] = hidden
        return hidden, caches if cache is not None else None, named
