"""The whole model: picture and prompt in, logits out, with or without a cache."""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from flexattn_jax.config import VLMConfig
from flexattn_jax.highres.flexattention import Picture, Rows
from flexattn_jax.inputs.batching import Batch, BatchError
from flexattn_jax.models.connector import Connector
from flexattn_jax.models.decoder import Decoder, Step
from flexattn_jax.models.vision import Views, build_tower
from flexattn_jax.ops.cache import SegmentCache, new_cache
from flexattn_jax.ops.resize import downscale, resize_rope
from flexattn_jax.ops.rope import rope_table
from flexattn_jax.ops.selection import cell_tokens


@flax.struct.dataclass
class Features:
    """A picture's tokens, which any number of questions may share.

    lowres: (B, N, D).
    highres: (B, C, P, D) by cell, without gradient; None where the model reads none.
    """

    lowres: jax.Array
    highres: jax.Array | None


@flax.struct.dataclass
class Memory:
    """What a prompt leaves behind for the calls that continue it.

    cache: keys and values by segment.
    lengths: (B,) int32, sequence positions filled.
    picture: high-resolution features, or None where the model reads none.
    """

    cache: dict[str, SegmentCache]
    lengths: jax.Array
    picture: Picture | None


class VLM(nn.Module):
    """Vision tower, connector and decoder. With `config.flexattention` None it is LLaVA-1.5."""

    config: VLMConfig

    def setup(self):
        config = self.config
        self.vision = build_tower(config.vision, jnp.dtype(config.dtype), config.scan_layers)
        self.connector = Connector(config.decoder.width)
        self.decoder = Decoder(config)

    def tower(self, pixels: jax.Array) -> jax.Array:
        """The tower alone, with gradient: (B, 3, s, s), normalised -> (B, (s / patch)**2, Dv)."""
        return self.vision(pixels)

    def see(self, pixels: jax.Array) -> Views:
        """The tower's features of pictures (B, 3, S, S), normalised, at both resolutions; without gradient."""
        small = downscale(pixels, self.config.lowres_size)
        return jax.lax.stop_gradient(self.vision.views(small, pixels if self.config.reads_highres else None))

    def connect(self, views: Views) -> tuple[Features, dict]:
        """Brings what the tower saw to the decoder's width.

        Returns:
          The features; and named intermediates `lowres_features` (B, N, Dv), `lowres` (B, N, D), `highres` (B, M, D) in
          raster order. The connector gets no gradient through high resolution (released code).
        """
        config = self.config
        views = jax.tree.map(lambda x: jnp.asarray(x, config.dtype), views)
        lowres = self.connector(views.lowres)
        named = {"lowres_features": views.lowres, "lowres": lowres}
        if not config.reads_highres:
            return Features(lowres, None), named
        highres = jax.lax.stop_gradient(self.connector(views.highres))
        index, _ = cell_tokens(config.highres_grid, config.flexattention.cell_grid)
        return Features(lowres, highres[:, index]), named | {"highres": highres}

    def encode(self, pixels: jax.Array) -> tuple[Features, dict]:
        """Encodes pictures (B, 3, S, S), normalised, once at low and once at high resolution: `see`, then `connect`."""
        features, named = self.connect(self.see(pixels))
        return features, named | {"lowres_pixels": downscale(pixels, self.config.lowres_size)}

    def assemble(self, batch: Batch, features: Features | None) -> tuple[jax.Array, Picture | None, dict]:
        """The sequence (B, T, D) with the pictures' low-resolution tokens in their slots, and the Picture.

        Args:
          batch: see Batch.
          features: of its pictures; None: they are encoded here.
        """
        config, named = self.config, {}
        hidden = self.decoder.embed(batch.token_ids)
        if features is None:
            if batch.views is not None:
                features, named = self.connect(batch.views)
            elif batch.pixels is not None:
                features, named = self.encode(batch.pixels)
            else:
                return hidden, None, named
        slot = jnp.arange(hidden.shape[1]) - batch.image_start[:, None]  # (B, T)
        is_slot = (slot >= 0) & (slot < config.num_lowres_tokens) & (batch.image_start >= 0)[:, None]
        tokens = jnp.take_along_axis(
            features.lowres, jnp.clip(slot, 0, config.num_lowres_tokens - 1)[..., None], axis=1
        )
        hidden = jnp.where(is_slot[..., None], tokens, hidden)
        if features.highres is None:
            return hidden, None, named
        cos, sin = self.highres_rope(batch.image_start)
        index, valid = cell_tokens(config.highres_grid, config.flexattention.cell_grid)
        picture = Picture(
            start=batch.image_start,
            content=batch.content,
            tokens=features.highres,
            valid=jnp.asarray(valid),
            cos=cos[:, index],
            sin=sin[:, index],
        )
        return hidden, picture, named | {"highres_cos": cos, "highres_sin": sin}

    def highres_rope(self, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Rotation of high-resolution tokens: the sequence's table at the image slots, resized to the finer grid.

        Args:
          start: (B,) first image slot of each sample.

        Returns:
          cos, sin: (B, M, d/2) float32 in raster order.
        """
        config = self.config
        positions = jnp.maximum(start, 0)[:, None] + jnp.arange(config.num_lowres_tokens)
        tables = rope_table(positions, config.decoder.head_dim, config.decoder.rope_theta)
        grid, fine = config.lowres_grid, config.highres_grid
        return tuple(
            resize_rope(table.reshape(-1, grid, grid, table.shape[-1]), fine).reshape(-1, fine**2, table.shape[-1])
            for table in tables
        )

    def __call__(
        self,
        batch: Batch,
        features: Features | None = None,
        readers: jax.Array | None = None,
        alpha: jax.Array | None = None,
        key: jax.Array | None = None,
        given: jax.Array | None = None,
        capture: bool = False,
    ) -> tuple[jax.Array, dict]:
        """Logits of all positions, without a cache: training, and `vlm.logits`.

        Args:
          batch: see Batch.
          features: of its pictures; None: they are encoded here.
          readers: (B, R) int32, rows that read high-resolution tokens, T where unused; None: the last row of each
            sample, as in inference. In training: the rows that predict answers. Variant "paper": all rows read, and
            the first of these rows selects for all.
          alpha: () float32, weight of high resolution during training's warm-up; None: 1.
          key: of selector "random" in this step of training; None: its seed.
          given: (layers, B, Q, C) bool, cells to read in place of those selected, see Step.
          capture: keep maps and hidden states of every layer.

        Returns:
          (B, T, V) float32 logits (of right padding: meaningless), and named intermediates of `encode` and Decoder.

        Raises:
          BatchError: texts that share a beginning, for variant "paper".
        """
        hidden, picture, named = self.assemble(batch, features)
        length = hidden.shape[1]
        last = batch.lengths[:, None] - 1
        rows = self._rows(picture, last if readers is None else readers, length)
        positions = jnp.arange(length)
        if batch.blocks is not None:
            if picture is not None and self.config.flexattention.variant == "paper":
                raise BatchError(
                    'texts that share a beginning cannot be read by flexattention.variant "paper", in which one row '
                    'selects for the whole sample; give each a sample of its own, or set it to "released"'
                )
            positions = block_positions(length, *batch.blocks)
        step = Step(
            positions=jnp.broadcast_to(positions, hidden.shape[:2]),
            blocks=batch.blocks,
            picture=picture,
            rows=rows,
            alpha=alpha,
            key=key,
            given=given,
            capture=capture,
        )
        hidden, _, layers = self.decoder(hidden, step, None)
        return self.decoder.logits(hidden), named | layers

    def prefill(
        self, batch: Batch, cache_length: int, features: Features | None = None, capture: bool = False
    ) -> tuple[jax.Array, Memory, dict]:
        """Reads prompts into a cache; the last token of each reads high resolution.

        Args:
          batch: see Batch.
          cache_length: sequence positions to make room for, at least T.
          features: of its pictures; None: they are encoded here.

        Returns:
          Logits of the last prompt token (B, V) float32 (with capture: of all, (B, T, V)), the memory, and named
          intermediates.

        Raises:
          BatchError: texts that share a beginning, which a cache cannot continue.
        """
        if batch.blocks is not None:
            raise BatchError("texts that share a beginning cannot be continued; give each prompt a sample of its own")
        hidden, picture, named = self.assemble(batch, features)
        length = hidden.shape[1]
        last = batch.lengths[:, None] - 1
        step = Step(
            positions=jnp.broadcast_to(jnp.arange(length), hidden.shape[:2]),
            picture=picture,
            rows=self._rows(picture, last, length),
            capture=capture,
        )
        cache = new_cache(self.config, hidden.shape[0], cache_length, picture is not None)
        hidden, cache, layers = self.decoder(hidden, step, cache)
        if not capture:
            hidden = jnp.take_along_axis(hidden, last[..., None], axis=1)[:, 0]
        return self.decoder.logits(hidden), Memory(cache, batch.lengths, picture), named | layers

    def decode(self, memory: Memory, token_ids: jax.Array, capture: bool = False) -> tuple[jax.Array, Memory, dict]:
        """One more token for each sample; it reads high resolution and selects for itself.

        Args:
          memory: of the prompt and earlier tokens.
          token_ids: (B,) int32.

        Returns:
          Logits (B, V) float32, the memory with the token appended, named intermediates.
        """
        row = jnp.zeros((token_ids.shape[0], 1), jnp.int32)
        step = Step(
            positions=memory.lengths[:, None],
            past=memory.lengths,
            picture=memory.picture,
            rows=None if memory.picture is None else Rows(row, row),
            capture=capture,
        )
        hidden, cache, named = self.decoder(self.decoder.embed(token_ids[:, None]), step, memory.cache)
        return self.decoder.logits(hidden[:, 0]), Memory(cache, memory.lengths + 1, memory.picture), named

    def continuations(self, memory: Memory, token_ids: jax.Array, lengths: jax.Array) -> tuple[jax.Array, dict, Memory]:
        """Logits inside O alternative continuations of each prompt, all read against the prompt's one cache.

        Args:
          memory: of the prompts.
          token_ids: (B, O, n) int32, right-padded.
          lengths: (B, O) int32.

        Returns:
          (B, O, n, V) float32: entry j predicts token j + 1; named intermediates of the O * n rows; and the memory,
          still of the prompts alone, with the cells that the options made it project. Every row that predicts a token
          reads high resolution and selects for itself (the released code's training path).
        """
        batch, options, width = token_ids.shape
        place = jnp.arange(options * width)
        same = place[:, None] // width == place // width
        predicts = (jnp.arange(width) < lengths[..., None] - 1).reshape(batch, -1)
        readers = jnp.where(predicts, place, options * width)
        step = Step(
            positions=memory.lengths[:, None] + place % width,
            mask=(same & (place[:, None] >= place))[None],
            past=memory.lengths,
            picture=memory.picture,
            rows=None if memory.picture is None else Rows(readers, readers),
            append=False,
        )
        hidden = self.decoder.embed(token_ids.reshape(batch, -1))
        hidden, cache, named = self.decoder(hidden, step, memory.cache)
        logits = self.decoder.logits(hidden).reshape(batch, options, width, -1)
        return logits, named, memory.replace(cache=cache)

    def _rows(self, picture: Picture | None, readers: jax.Array, length: int) -> Rows | None:
        """Readers and selectors of a call that starts a sequence, by variant."""
        if picture is None:
            return None
        if self.config.flexattention.variant == "released":
            return Rows(readers, readers)
        every = jnp.broadcast_to(jnp.arange(length), (readers.shape[0], length))
        return Rows(every, readers[:, :1])


def block_positions(length: int, beginning: int, block: int) -> jax.Array:
    """(T,) int32, positions in which every text goes on where the common beginning ends; see Batch.blocks."""
    place = jnp.arange(length)
    return jnp.where(place < beginning, place, beginning + (place - beginning) % block)
