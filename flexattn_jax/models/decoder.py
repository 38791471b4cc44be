"""LLaMA decoder: one stack of equal layers, or several with tokens dropped between them."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flexattn_jax.config import DecoderConfig, Segment, VLMConfig
from flexattn_jax.highres import flexattention, pruning
from flexattn_jax.highres.crossattention import CrossAttention
from flexattn_jax.highres.step import Carry, Step
from flexattn_jax.ops.attention import attend, attend_blocks, merge
from flexattn_jax.ops.cache import SegmentCache, close_layer, open_layer, read_sequence, write_sequence
from flexattn_jax.ops.layers import Kernel, Linear, layer_stack, product
from flexattn_jax.ops.rope import apply_rope, rope_table
from flexattn_jax.partitioning import constrain


class SelfAttention(nn.Module):
    """Causal self-attention; with FlexAttention on top, or ranking the picture's tokens, where the segment does so."""

    config: VLMConfig
    segment: Segment

    @nn.compact
    def __call__(self, x: jax.Array, carry: Carry, index: Any, step: Step) -> tuple[jax.Array, Carry, dict]:
        """x (B, T, D), normalised -> attention output (B, T, D), the new carry, named intermediates."""
        decoder = self.config.decoder
        batch, length, _ = x.shape
        query, key, value = (
            Linear(heads * decoder.head_dim, name=f"{part}_proj")(x).reshape(batch, length, heads, decoder.head_dim)
            for part, heads in (("q", decoder.num_heads), ("k", decoder.num_kv_heads), ("v", decoder.num_kv_heads))
        )
        query, key = apply_rope(query, step.cos, step.sin), apply_rope(key, step.cos, step.sin)
        query = constrain(query, "batch", None, "heads", None)
        key, value = (constrain(part.reshape(batch, length, -1), "batch", None, "heads") for part in (key, value))

        cache, at = (None, ()) if carry.cache is None else open_layer(carry.cache, index)
        if cache is not None and step.append:
            cache = cache.replace(
                key=write_sequence(cache.key, at, key, step.past),
                value=write_sequence(cache.value, at, value, step.past),
            )
        if step.past is None:
            if step.blocks is None:
                sequence, keys = attend(query, key, value, causal=True), key
            else:
                sequence, keys = attend_blocks(query, key, value, *step.blocks), key
        else:
            keys, values = read_sequence(cache.key, at), read_sequence(cache.value, at)
            place = jnp.arange(keys.shape[1])
            if step.append:  # what was just written is read back with the rest
                newest = step.past[:, None] + jnp.arange(length)
                sequence = attend(query, keys, values, place <= newest[..., None])
            else:
                past = attend(query, keys, values, (place < step.past[:, None])[:, None])
                sequence = merge(past, attend(query, key, value, step.mask))

        out, selection, named = sequence[0], carry.selection, {}
        if step.rows is not None:
            out, selection, cache, named = flexattention.read_in_layer(
                self.config, step, query, sequence, keys, selection, index, cache
            )
        elif selection is not None:
            selection = pruning.rank_slots(query, keys, sequence[1], step.slots, self.segment.num_slots)
        out = constrain(out.reshape(batch, length, -1), "batch", None, "heads")
        out = constrain(Linear(decoder.width, name="o_proj")(out), "batch", None, None)
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
        hidden = constrain(jax.nn.silu(gate) * up, "batch", None, "mlp")
        return constrain(Linear(x.shape[-1], name="down_proj")(hidden), "batch", None, None)


class DecoderLayer(nn.Module):
    """A pre-norm decoder layer of any segment."""

    config: VLMConfig
    segment: Segment

    @nn.compact
    def __call__(self, carry: Carry, index: Any, step: Step) -> tuple[Carry, dict]:
        """One layer; `index` counts within the segment (where no tokens are dropped: the decoder).

        Returns:
          The carry and named intermediates.
        """
        decoder, hidden = self.config.decoder, carry.hidden
        x = rms_norm(decoder, hidden.dtype, "input_norm")(hidden)
        attention, carry, named = SelfAttention(self.config, self.segment, name="self_attn")(x, carry, index, step)
        if step.capture:
            named |= {"hidden": hidden, "attention": attention}
        carry = carry.replace(hidden=hidden + attention)
        if self.config.crossattention is not None and step.picture is not None:
            carry = CrossAttention(self.config, name="cross_attn")(carry, index, step.picture)
        x = rms_norm(decoder, hidden.dtype, "post_attention_norm")(carry.hidden)
        return carry.replace(hidden=carry.hidden + GatedMLP(decoder.mlp_dim, name="mlp")(x)), named


def rms_norm(config: DecoderConfig, dtype: jnp.dtype, name: str) -> nn.RMSNorm:
    """RMSNorm with a float32 mean square."""
    return nn.RMSNorm(epsilon=config.norm_eps, dtype=dtype, param_dtype=dtype, name=name)


class Projections(nn.Module):
    """A layer's projections of high-resolution tokens to keys and values, which read cell by cell."""

    config: VLMConfig

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """Two kernels (J*d, D)."""
        decoder, dtype = self.config.decoder, jnp.dtype(self.config.dtype)
        features = decoder.num_kv_heads * decoder.head_dim
        return tuple(Kernel(features, decoder.width, dtype, name=f"{part}_proj_hd")() for part in "kv")


class Decoder(nn.Module):
    """Embedding, segments of layers, final norm, head."""

    config: VLMConfig

    def setup(self):
        decoder, dtype = self.config.decoder, jnp.dtype(self.config.dtype)
        self.embedding = self.param(
            "embedding", nn.initializers.normal(0.02), (decoder.vocab_size, decoder.width), dtype
        )
        self.final_norm = rms_norm(decoder, dtype, "final_norm")
        if not decoder.tie_embeddings:
            self.lm_head = Kernel(decoder.vocab_size, decoder.width, dtype)

    def embed(self, token_ids: jax.Array) -> jax.Array:
        """token_ids (B, T) int32 -> (B, T, D)."""
        # Parts that samples are split over, too, are brought together: looked up there, rows would travel.
        table = constrain(self.embedding.astype(self.config.dtype), "vocab", None)
        return constrain(table[token_ids], "batch", None, None)

    def head(self) -> jax.Array:
        """(V, D), in the model's type."""
        return self._head().astype(self.config.dtype)

    def _head(self) -> jax.Array:
        return self.embedding if self.config.decoder.tie_embeddings else self.lm_head()

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden (..., D), after the final norm -> (..., V) float32."""
        logits = product(hidden, self._head())
        return constrain(logits.astype(jnp.float32), "batch", *(None,) * (logits.ndim - 2), "vocab")

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
          Hidden states (B, T, D) after the final norm, zero in rows that were dropped on the way; the cache; and named
          intermediates. Of FlexAttention: `cells` (layers, B, Q, C) bool and `overflow` (layers, B, Q), made by layers
          first_layer .. L-1, and with step.capture `map` (layers, B, Q, N) and `strength`. Of token dropping:
          `kept_rows` (cuts, B, T) bool, what each cut left. With step.capture for all L layers also `hidden`
          (L, B, T, D), their inputs, and `attention`, their attention outputs; and `final_hidden` (B, T, D).
        """
        config, length = self.config, hidden.shape[1]
        step = step.replace(projections=self._projections())
        caches, named, selection, kept, kept_rows = dict(cache or {}), {}, None, None, []
        for i, segment in enumerate(config.segments):
            here = step
            if i and step.slots is not None:
                if step.past is not None:
                    here = pruning.skip_dropped(config.reduction, step, config.num_slots - segment.num_slots)
                else:
                    hidden, step, rows = pruning.drop_slots(
                        config.reduction, hidden, step, selection, segment.num_slots
                    )
                    here, kept = step, rows if kept is None else jnp.take_along_axis(kept, rows, axis=1)
                    kept_rows.append(pruning.mark_rows(kept, length))
            cos, sin = rope_table(here.positions, config.decoder.head_dim, config.decoder.rope_theta)
            carry = Carry(hidden, self._selection(segment, hidden, step), caches.get(segment.name))
            stack = layer_stack(
                DecoderLayer,
                segment.name,
                segment.num_layers,
                config.scan_layers,
                config.remat,
                config=config,
                segment=segment,
            )
            carry, outputs = stack(carry, here.replace(cos=cos, sin=sin))
            hidden, selection = carry.hidden, carry.selection
            if cache is not None:
                caches[segment.name] = carry.cache
            for key, value in outputs.items():
                if step.rows is not None and key not in ("hidden", "attention"):
                    value = value[config.num_plain_layers :]
                if kept is not None:
                    value = jax.vmap(lambda x, kept=kept: pruning.undrop_rows(x, kept, length))(value)
                named[key] = jnp.concatenate([named[key], value]) if key in named else value
        if kept is not None:
            hidden = pruning.undrop_rows(hidden, kept, length)
            named["kept_rows"] = jnp.stack(kept_rows)
        hidden = self.final_norm(hidden)
        if step.capture:
            named["final_hidden"] = hidden
        return hidden, caches if cache is not None else None, named

    def _projections(self) -> Any:
        """See Step.projections. A stack beside that of the layers: not all layers have them, and one body runs all."""
        config, count = self.config, self.config.num_flex_layers
        if not count:
            return None
        if not config.scan_layers:
            return tuple(Projections(config, name=f"highres_{i}")() for i in range(count))
        stacked = nn.vmap(
            Projections,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            axis_size=count,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return stacked(config, name="highres")()

    def _selection(self, segment: Segment, hidden: jax.Array, step: Step) -> Any:
        """What the first layer of a segment gets as Carry.selection."""
        batch = hidden.shape[0]
        if step.rows is not None:
            return flexattention.start_selection(self.config.flexattention, batch, step.rows.selectors.shape[1])
        if step.slots is not None and step.past is None and segment != self.config.segments[-1]:
            return jnp.zeros((batch, segment.num_slots), jnp.float32)
        return None
