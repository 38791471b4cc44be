"""The whole model: picture and prompt in, logits out, with or without a cache."""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from flexattn_jax.config import VLMConfig
from flexattn_jax.highres.cells import Picture, make_picture
from flexattn_jax.highres.crossattention import Positions, Source
from flexattn_jax.highres.flexattention import take_rows
from flexattn_jax.highres.grouping import Grouping
from flexattn_jax.highres.reduction import reduce_features
from flexattn_jax.highres.step import Rows, Slots, Step
from flexattn_jax.highres.visionzip import visionzip
from flexattn_jax.inputs.batching import Batch, BatchError
from flexattn_jax.models.connector import Connector
from flexattn_jax.models.decoder import Decoder
from flexattn_jax.models.vision import Views, build_tower
from flexattn_jax.ops.cache import SegmentCache, new_cache
from flexattn_jax.ops.resize import downscale
from flexattn_jax.ops.selection import gather_cells
from flexattn_jax.partitioning import constrain


@flax.struct.dataclass
class Features:
    """A picture's tokens, which any number of questions may share.

    lowres: (B, slots, D), what sits in the sequence: low resolution; with `dense` high resolution behind it.
    highres: FlexAttention's (B, C, P, D) by cell, without gradient; cross-attention's (B, M, F); else None.
    """

    lowres: jax.Array
    highres: jax.Array | None


@flax.struct.dataclass
class Memory:
    """What a prompt leaves behind for the calls that continue it.

    cache: keys and values by segment.
    lengths: (B,) int32, sequence positions filled.
    picture: high-resolution features (FlexAttention's Picture, cross-attention's Source), or None.
    slots: where the picture's tokens were, in a model that drops some; else None.
    """

    cache: dict[str, SegmentCache]
    lengths: jax.Array
    picture: Picture | Source | None
    slots: Slots | None = None


class VLM(nn.Module):
    """Vision tower, connector and decoder: LLaVA-1.5, and what `config` adds to it."""

    config: VLMConfig

    def setup(self):
        config = self.config
        self.vision = build_tower(config.vision, jnp.dtype(config.dtype), config.scan_layers)
        self.connector = Connector(config.decoder.width)
        self.decoder = Decoder(config)
        if config.crossattention is not None:
            self.highres = Positions()
        if config.grouping is not None:
            self.grouping = Grouping(config.grouping, config.vision.width, jnp.dtype(config.dtype))

    def tokens(self, pixels: jax.Array) -> jax.Array:
        """Tower and connector, with gradient: (B, 3, s, s), normalised -> (B, (s / patch)**2, D)."""
        return self.connector(self.vision(pixels))

    def see(self, pixels: jax.Array) -> Views:
        """The tower's features of pictures (B, 3, S, S), normalised, that the model reads; without gradient.

        Semantic tokens have one, for what they begin as; the tower's weights are the caller's to leave alone.
        """
        config, reduction, small = self.config, self.config.reduction, downscale(pixels, self.config.lowres_size)
        if config.trains_in_tower:
            tokens = self.vision.tokens(small, semantic=self.grouping.tokens(small.shape[0]))
            return Views(jax.lax.stop_gradient(tokens.x[:, 1:]), semantic=tokens.semantic)
        if reduction is not None and reduction.method == "visionzip":
            tokens = self.vision.tokens(small, ranked=True)
            row = tokens.row
            views = Views(visionzip(tokens.x, row.scores[:, 1:], row.keys[:, 1:], reduction.tokens))
        else:
            views = self.vision.views(small, pixels if config.tiles else None, config.tiles)
            if reduction is not None and not reduction.in_decoder:
                views = Views(reduce_features(reduction, views.lowres))
        return jax.lax.stop_gradient(views)

    def connect(self, views: Views, key: jax.Array | None = None, learns: bool = False) -> tuple[Features, dict]:
        """Brings what the tower saw to the decoder's width.

        Args:
          views: of `see`.
          key: of grouping's noise in this step of training; None: no noise.
          learns: the connector's gradient is wanted. FlexAttention's high resolution, which gives it none (released
            code), is then connected apart and so keeps nothing for the backward pass.

        Returns:
          The features; and named intermediates `lowres_features` (B, N, Dv), `lowres` (B, N, D), `highres` (B, M, D) in
          raster order; N fewer where `reduction` or `grouping` has made them so, and then `groups` (B, N) int32, the
          group of each patch.
        """
        config = self.config
        views = jax.tree.map(lambda x: jnp.asarray(x, config.dtype), views)
        named = {"lowres_features": views.lowres}
        if config.grouping is not None:
            semantic = views.semantic if config.trains_in_tower else self.grouping.tokens(views.lowres.shape[0])
            grouped, named["groups"] = self.grouping(views.lowres, semantic, key)
            views = views.replace(lowres=grouped)
        cross = config.crossattention
        if not config.tiles or (cross is not None and cross.source == "tower"):
            lowres, highres = self.connector(views.lowres), views.highres
        elif config.reads_highres and learns:
            lowres, highres = self.connector(views.lowres), jax.lax.stop_gradient(self.connector(views.highres))
        else:  # one product for both, of which a compiler makes one program
            tokens = self.connector(jnp.concatenate([views.lowres, views.highres], axis=1))
            lowres, highres = jnp.split(tokens, [views.lowres.shape[1]], axis=1)
        named["lowres"] = lowres
        if highres is None:
            return Features(lowres, None), named
        named["highres"] = highres
        if config.dense is not None:
            return Features(tokens, None), named
        if cross is not None:
            return Features(lowres, self.highres(highres)), named
        cells = gather_cells(highres, config.highres_grid, config.flexattention.cell_grid)
        return Features(lowres, cells), named

    def encode(self, pixels: jax.Array, key: jax.Array | None = None, learns: bool = False) -> tuple[Features, dict]:
        """Encodes pictures (B, 3, S, S), normalised, once at low and once at high resolution: `see`, then `connect`."""
        features, named = self.connect(self.see(pixels), key, learns)
        return features, named | {"lowres_pixels": downscale(pixels, self.config.lowres_size)}

    def assemble(
        self, batch: Batch, features: Features | None, key: jax.Array | None = None, learns: bool = False
    ) -> tuple[jax.Array, Picture | Source | None, Slots | None, dict]:
        """The sequence (B, T, D) with the pictures' tokens in their slots, and what the layers know of the pictures.

        Args:
          batch: see Batch.
          features: of its pictures; None: they are encoded here.
          key, learns: see `connect`.
        """
        config, named = self.config, {}
        hidden = self.decoder.embed(batch.token_ids)
        if features is None:
            if batch.views is not None:
                features, named = self.connect(batch.views, key, learns)
            elif batch.pixels is not None:
                features, named = self.encode(batch.pixels, key, learns)
            else:
                return hidden, None, None, named
        slot = jnp.arange(hidden.shape[1]) - batch.image_start[:, None]  # (B, T)
        is_slot = (slot >= 0) & (slot < config.num_slots) & (batch.image_start >= 0)[:, None]
        tokens = jnp.take_along_axis(features.lowres, jnp.clip(slot, 0, config.num_slots - 1)[..., None], axis=1)
        hidden = constrain(jnp.where(is_slot[..., None], tokens, hidden), "batch", None, None)
        if config.crossattention is not None:
            return hidden, Source(features.highres, batch.image_start >= 0), None, named
        if features.highres is not None:
            picture, rotation = make_picture(config, batch.image_start, batch.content, features.highres)
            return hidden, picture, None, named | rotation
        slots = Slots(batch.image_start) if len({segment.num_slots for segment in config.segments}) > 1 else None
        return hidden, None, slots, named

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
          key: in this step of training, of selector "random" (None: its seed), of FlexAttentionConfig.dropout and of
            grouping's noise (None: neither).
          given: (layers, B, Q, C) bool, cells to read in place of those selected, see Step.
          capture: keep maps and hidden states of every layer.

        Returns:
          (B, T, V) float32 logits (of right padding: meaningless), and named intermediates of `encode` and Decoder.

        Raises:
          BatchError: texts that share a beginning, for variant "paper".
        """
        hidden, named = self.hidden_states(batch, features, readers, alpha, key, given, capture)
        return self.decoder.logits(hidden), named

    def hidden_states(
        self,
        batch: Batch,
        features: Features | None = None,
        readers: jax.Array | None = None,
        alpha: jax.Array | None = None,
        key: jax.Array | None = None,
        given: jax.Array | None = None,
        capture: bool = False,
        grounded: bool = False,
    ) -> tuple[jax.Array, dict]:
        """`__call__` up to the final norm, (B, T, D) in place of logits: a loss need not have all logits at once.

        grounded: see Step.
        """
        hidden, picture, slots, named = self.assemble(batch, features, key, learns=True)
        length = hidden.shape[1]
        last = batch.lengths[:, None] - 1
        readers = last if readers is None else readers
        positions = jnp.arange(length)
        if batch.blocks is not None:
            if slots is not None:
                raise BatchError(
                    "texts that share a beginning cannot be read where the last row of a prompt decides which tokens "
                    f"are dropped (reduction.method {self.config.reduction.method}); give each a sample of its own"
                )
            if isinstance(picture, Picture) and self.config.flexattention.variant == "paper":
                raise BatchError(
                    'texts that share a beginning cannot be read by flexattention.variant "paper", in which one row '
                    'selects for the whole sample; give each a sample of its own, or set it to "released"'
                )
            positions = block_positions(length, *batch.blocks)
        step = Step(
            positions=jnp.broadcast_to(positions, hidden.shape[:2]),
            blocks=batch.blocks,
            picture=picture,
            rows=self._rows(picture, readers, length),
            slots=None if slots is None else slots.replace(row=jnp.minimum(readers[:, 0], last[:, 0])),
            alpha=self._alpha(picture, alpha, key),
            key=key,
            given=given,
            grounded=grounded,
            capture=capture,
        )
        hidden, _, layers = self.decoder(hidden, step, None)
        return hidden, named | layers

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden (..., D) of `hidden_states` -> (..., V) float32."""
        return self.decoder.logits(hidden)

    def head(self) -> jax.Array:
        """(V, D), which makes them, in the model's type."""
        return self.decoder.head()

    def prefill(
        self,
        batch: Batch,
        cache_length: int,
        features: Features | None = None,
        capture: bool = False,
        ends: bool = True,
    ) -> tuple[jax.Array, Memory, dict]:
        """Reads prompts into a cache; the last token of each reads high resolution.

        Args:
          batch: see Batch.
          cache_length: sequence positions to make room for, at least T.
          features: of its pictures; None: they are encoded here.
          ends: False: these are beginnings of prompts (see `extend`), and no token reads high resolution.

        Returns:
          Logits of the last prompt token (B, V) float32 (with capture: of all, (B, T, V)), the memory, and named
          intermediates.

        Raises:
          BatchError: texts that share a beginning, which a cache cannot continue.
        """
        if batch.blocks is not None:
            raise BatchError("texts that share a beginning cannot be continued; give each prompt a sample of its own")
        hidden, picture, slots, named = self.assemble(batch, features)
        length = hidden.shape[1]
        last = batch.lengths[:, None] - 1
        step = Step(
            positions=jnp.broadcast_to(jnp.arange(length), hidden.shape[:2]),
            picture=picture,
            rows=self._rows(picture, last if ends else jnp.full_like(last, length), length),
            slots=None if slots is None else slots.replace(row=last[:, 0]),
            capture=capture,
        )
        cache = new_cache(self.config, hidden.shape[0], cache_length, picture is not None or slots is not None)
        hidden, cache, layers = self.decoder(hidden, step, cache)
        if not capture:
            hidden = take_rows(hidden, last)[:, 0]
        if self.config.crossattention is not None and picture is not None:
            picture = picture.replace(tokens=None)  # the cache has their keys and values
        return self.decoder.logits(hidden), Memory(cache, batch.lengths, picture, slots), named | layers

    def extend(self, memory: Memory, token_ids: jax.Array, lengths: jax.Array) -> tuple[jax.Array, Memory, dict]:
        """Reads what follows the beginnings of prompts; the last token of each reads high resolution, as in `prefill`.

        Args:
          memory: of the beginnings, with room for token_ids.
          token_ids: (B, n) int32, right-padded; lengths: (B,) int32, at least 1.

        Returns:
          Logits of the last token (B, V) float32, the memory of the whole prompts, and named intermediates.
        """
        length, last = token_ids.shape[1], lengths[:, None] - 1
        step = Step(
            positions=memory.lengths[:, None] + jnp.arange(length),
            past=memory.lengths,
            picture=memory.picture,
            rows=self._rows(memory.picture, last, length),
        )
        hidden, cache, named = self.decoder(self.decoder.embed(token_ids), step, memory.cache)
        hidden = take_rows(hidden, last)[:, 0]
        return self.decoder.logits(hidden), memory.replace(cache=cache, lengths=memory.lengths + lengths), named

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
            rows=self._rows(memory.picture, row, 1),
            slots=memory.slots,
            capture=capture,
        )
        hidden, cache, named = self.decoder(self.decoder.embed(token_ids[:, None]), step, memory.cache)
        return self.decoder.logits(hidden[:, 0]), memory.replace(cache=cache, lengths=memory.lengths + 1), named

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
            rows=Rows(readers, readers) if isinstance(memory.picture, Picture) else None,
            slots=memory.slots,
            append=False,
        )
        hidden = self.decoder.embed(token_ids.reshape(batch, -1))
        hidden, cache, named = self.decoder(hidden, step, memory.cache)
        logits = self.decoder.logits(hidden).reshape(batch, options, width, -1)
        return logits, named, memory.replace(cache=cache)

    def _rows(self, picture: Picture | Source | None, readers: jax.Array, length: int) -> Rows | None:
        """FlexAttention's readers and selectors of a call that appends `length` rows to a sequence, by variant."""
        if not isinstance(picture, Picture):
            return None
        if self.config.flexattention.variant == "released":
            return Rows(readers, readers)
        every = jnp.broadcast_to(jnp.arange(length), (readers.shape[0], length))
        return Rows(every, readers[:, :1])

    def _alpha(
        self, picture: Picture | Source | None, alpha: jax.Array | None, key: jax.Array | None
    ) -> jax.Array | None:
        """Weight of high resolution, (B, 1, 1, 1) where some samples of this step go without; see Step.alpha."""
        if key is None or not isinstance(picture, Picture) or not self.config.flexattention.dropout:
            return alpha
        shape = (picture.start.shape[0], 1, 1, 1)
        kept = jax.random.bernoulli(jax.random.fold_in(key, 1), 1 - self.config.flexattention.dropout, shape)
        return kept * (jnp.float32(1) if alpha is None else alpha)


def block_positions(length: int, beginning: int, block: int) -> jax.Array:
    """(T,) int32, positions in which every text goes on where the common beginning ends; see Batch.blocks."""
    place = jnp.arange(length)
    return jnp.where(place < beginning, place, beginning + (place - beginning) % block)
