"""Samples of any length to arrays of a few static shapes, so that a second batch in a bucket compiles nothing.

Everything here is numpy and deterministic; sequences are padded on the right, so positions do not shift.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np

from flexattn_jax.config import IMAGE_PLACEHOLDER, ConfigError, VLMConfig
from flexattn_jax.inputs.images import content_mask


class BatchError(ValueError):
    """Samples that do not fit a batch; the message says which limit or form they miss."""


@flax.struct.dataclass
class Batch:
    """What the model reads.

    Attributes:
        token_ids: (B, T) int32; image slots and right padding hold 0.
        lengths: (B,) int32, real lengths with the picture's slots (N of them in LLaVA-1.5).
        image_start: (B,) int32, first image slot; -1 for a sample without a picture.
        content: (B, N) bool, False on image slots that show only padding (all True without a picture).
        pixels: (B, 3, S, S) float32 normalised, zeros for a sample without a picture; None if no sample has one.
        views: what the tower saw of the pictures (`VLM.see`), in place of pixels.
        blocks: (P, n) of a batch whose samples hold several texts behind one beginning: the first P positions are the
            beginning, which all of them read; every n positions after it are one text, padded on the right, which
            reads the beginning and itself, as if it followed it alone. None: every sample is one text.
    """

    token_ids: Any
    lengths: Any
    image_start: Any
    content: Any
    pixels: Any = None
    views: Any = None
    blocks: tuple[int, int] | None = flax.struct.field(pytree_node=False, default=None)


@flax.struct.dataclass
class OptionBatch:
    """Continuations to score after the prompts of a `Batch`.

    Attributes:
        token_ids: (B, O, To) int32, padded on the right with 0; O options a sample, To tokens an option.
        lengths: (B, O) int32; 0 where a sample has fewer options.
    """

    token_ids: Any
    lengths: Any


class Sample(NamedTuple):
    """One prompt, or several that begin alike.

    Attributes:
        ids: prompt ids, the picture as one IMAGE_PLACEHOLDER or as N image tokens of the checkpoint's vocabulary.
        pixels: (3, S, S) float32 from `images.preprocess`, or None without a picture.
        size: (width, height) of the picture before padding; None if it fills the square.
        views: what the tower saw of the picture, without a batch axis, in place of pixels.
        segments: (n,) int, ascending, which text each id belongs to: 0 is the beginning, then 1, 2, ... (Batch.blocks);
            None: one text.
        encoded: the picture's features go to the model beside the batch.
    """

    ids: Sequence[int]
    pixels: np.ndarray | None = None
    size: tuple[int, int] | None = None
    views: Any = None
    segments: np.ndarray | None = None
    encoded: bool = False

    @property
    def has_picture(self) -> bool:
        return self.pixels is not None or self.views is not None or self.encoded


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Static sizes, each ascending; what is counted is rounded up to the next one."""

    text_lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)  # without the picture's slots
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    block_lengths: tuple[int, ...] = (8, 14, 16, 24, 32, 64, 128, 256)  # n, of texts that share a beginning
    option_lengths: tuple[int, ...] = (8, 32, 128, 256)  # To
    option_counts: tuple[int, ...] = (4, 8, 32)  # O

    def __post_init__(self):
        for field in dataclasses.fields(self):
            sizes = getattr(self, field.name)
            whole = isinstance(sizes, (tuple, list)) and all(map(_is_count, sizes))
            if not whole or not sizes or list(sizes) != sorted(set(sizes)):
                raise ConfigError(f"buckets.{field.name} {sizes!r} must be ascending whole numbers from 1 on")

    def text_length(self, needed: int) -> int:
        """The bucket for `needed` tokens of text; BatchError if it is longer than the largest."""
        return _round_up(needed, self.text_lengths, "a prompt has {0} tokens beside its picture", "shorten it")

    def batch_size(self, needed: int) -> int:
        """The bucket for `needed` samples; BatchError if there are more than the largest."""
        return _round_up(needed, self.batch_sizes, "a batch has {0} samples", "split it")

    def block_length(self, needed: int) -> int:
        """The bucket for a text of `needed` tokens behind a beginning; BatchError if it is longer than the largest."""
        return _round_up(needed, self.block_lengths, "a text behind a common beginning has {0} tokens", "shorten it")

    def option_length(self, needed: int) -> int:
        """The bucket for an option of `needed` tokens; BatchError if it is longer than the largest."""
        return _round_up(needed, self.option_lengths, "an option has {0} tokens", "shorten it")

    def option_count(self, needed: int) -> int:
        """The bucket for `needed` options of one sample; BatchError if there are more than the largest."""
        return _round_up(needed, self.option_counts, "a sample has {0} options", "score them in parts")


def _round_up(needed: int, sizes: tuple[int, ...], what: str, remedy: str) -> int:
    for size in sizes:
        if size >= needed:
            return size
    raise BatchError(f"{what.format(needed)}, the limit is {sizes[-1]}; {remedy} or configure larger buckets")


def expand_image_tokens(ids: Sequence[int], config: VLMConfig) -> tuple[np.ndarray, int]:
    """Makes room for the picture: `config.num_slots` slots holding 0 where its place-holder stood.

    Args:
        ids: with IMAGE_PLACEHOLDER once, or a run of exactly N `config.image_token_id` (Hugging Face's processors
            write the run), or neither.
        config: gives the slots, N, the image token and the vocabulary.

    Returns:
        ids (length,) int32, and the first image slot, -1 without a picture.

    Raises:
        BatchError: no ids, more than one picture, a run of another length, or ids outside the vocabulary.
    """
    ids = np.asarray(ids)
    if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise BatchError(f"prompt ids must be a non-empty list of integers, not {ids.dtype} of shape {ids.shape}")
    slots, written = config.num_slots, config.num_lowres_tokens
    placeholders = np.flatnonzero(ids == IMAGE_PLACEHOLDER)
    run = np.flatnonzero(ids == config.image_token_id) if config.image_token_id is not None else placeholders[:0]
    if len(placeholders) > 1 or (len(placeholders) and len(run)):
        raise BatchError(
            f"prompt ids hold {len(placeholders)} place-holders ({IMAGE_PLACEHOLDER}) and {len(run)} image tokens; "
            "one picture a prompt is supported: write it once, in one of the two forms"
        )
    if len(run) and (len(run) != written or run[-1] - run[0] + 1 != written):
        raise BatchError(
            f"prompt ids hold {len(run)} image tokens (id {config.image_token_id}); one picture is a single run of "
            f"{written} of them, or {IMAGE_PLACEHOLDER} once"
        )
    image_ids = placeholders if len(placeholders) else run
    text = np.delete(ids, image_ids)
    if text.size and (text.min() < 0 or text.max() >= config.decoder.vocab_size):
        wrong = text[(text < 0) | (text >= config.decoder.vocab_size)][0]
        raise BatchError(
            f"prompt ids hold {wrong}, but the model's vocabulary is 0..{config.decoder.vocab_size - 1}; "
            "is the tokeniser of another checkpoint?"
        )
    if not len(image_ids):
        return ids.astype(np.int32), -1
    start = int(image_ids[0])
    return np.insert(text, start, np.zeros(slots, text.dtype)).astype(np.int32), start


def make_batch(
    samples: Sequence[Sample | tuple], config: VLMConfig, buckets: Buckets, pad_batch_to: int | None = None
) -> Batch:
    """Pads samples to a bucket: T is a text bucket, plus the slots if any sample has a picture; B is a batch bucket.

    Rows beyond the samples are text-only of length 1, so that nothing in them is undefined.

    Args:
        samples: `Sample`s or the same as plain tuples; at least one.
        config: the model that will read the batch.
        buckets: the static sizes.
        pad_batch_to: B, instead of the batch bucket.

    Returns:
        a Batch of numpy arrays.

    Raises:
        BatchError: a sample is malformed or too long, there are too many, or some have pixels and others views.
    """
    samples = [Sample(*sample) for sample in samples]
    if not samples:
        raise BatchError("a batch needs at least one sample")
    expanded = [_checked(sample, index, config) for index, sample in enumerate(samples)]
    rows = _batch_rows(len(samples), buckets, pad_batch_to)
    slots = config.num_slots
    with_picture = any(start >= 0 for _, start in expanded)
    from_pixels = any(sample.pixels is not None for sample in samples)
    if from_pixels and any(sample.views is not None for sample in samples):
        raise BatchError("a batch holds pixels of some samples and views of others; give one of the two for all")
    blocks = _find_blocks(samples, expanded, slots, buckets)
    # Where the model drops tokens, a sample without a picture must fit what is left of the others'.
    taken, room = (config.segments[-1].num_slots, slots) if with_picture else (0, 0)
    length = room + buckets.text_length(
        max(
            text_places(s.segments, len(ids), start, slots, blocks)[-1] + 1 - (room if start >= 0 else taken)
            for s, (ids, start) in zip(samples, expanded, strict=True)
        )
    )
    if blocks is not None:
        length -= (length - blocks[0]) % blocks[1]

    batch = Batch(
        token_ids=np.zeros((rows, length), np.int32),
        lengths=np.ones(rows, np.int32),
        image_start=np.full(rows, -1, np.int32),
        content=np.ones((rows, config.num_lowres_tokens), bool),
        pixels=np.zeros((rows, 3, config.image_size, config.image_size), np.float32) if from_pixels else None,
        views=_stacked_views(samples, rows),
        blocks=blocks,
    )
    for row, (sample, (ids, start)) in enumerate(zip(samples, expanded, strict=True)):
        places = text_places(sample.segments, len(ids), start, slots, blocks)
        batch.token_ids[row, places] = ids
        batch.lengths[row] = places[-1] + 1
        batch.image_start[row] = start
        if start >= 0:
            if sample.pixels is not None:
                batch.pixels[row] = sample.pixels
            if sample.size is not None:
                batch.content[row] = content_mask(sample.size, config.lowres_grid)
    return batch


def text_places(
    segments: np.ndarray | None, length: int, start: int, slots: int, blocks: tuple[int, int] | None
) -> np.ndarray:
    """Where in the sequence each of a sample's tokens stands: (length,) int.

    Args:
        segments: Sample.segments, of the ids before the picture's N = `slots` tokens were expanded.
        length: of the expanded ids; start: the first of the picture's, -1 without one.
        blocks: Batch.blocks.
    """
    place = np.arange(length)
    if segments is None:
        return place
    if start >= 0 and len(segments) < length:
        segments = np.insert(segments, start, np.full(slots - 1, segments[start]))
    firsts = np.searchsorted(segments, segments)  # where each one's text begins
    return np.where(segments == 0, place, blocks[0] + (segments - 1) * blocks[1] + place - firsts)


def _find_blocks(
    samples: Sequence[Sample], expanded: Sequence[tuple[np.ndarray, int]], slots: int, buckets: Buckets
) -> tuple[int, int] | None:
    """Batch.blocks of these samples; BatchError if their beginnings differ in length, or one text is no beginning."""
    if not any(sample.segments is not None for sample in samples):
        return None
    beginnings, longest = set(), 1
    for sample, (_, start) in zip(samples, expanded, strict=True):
        if sample.segments is not None:
            counts = np.bincount(sample.segments)
            beginnings.add(
                int(counts[0]) + (slots - 1 if start >= 0 and len(sample.ids) == len(sample.segments) else 0)
            )
            longest = max(longest, *counts[1:])
    if len(beginnings) > 1:
        raise BatchError(
            f"texts share beginnings of {sorted(beginnings)} positions; those of one batch must be as long"
        )
    beginning = beginnings.pop()
    for index, (sample, (ids, _)) in enumerate(zip(samples, expanded, strict=True)):
        if sample.segments is None and len(ids) > beginning:
            raise BatchError(
                f"sample {index} is one text of {len(ids)} positions in a batch of texts that share a beginning of "
                f"{beginning}; give it segments, or a batch of its own"
            )
    return beginning, buckets.block_length(int(longest))


def _stacked_views(samples: Sequence[Sample], rows: int) -> Any:
    """The samples' views with a batch axis, zeros where there is none; None if no sample has any."""
    known = [sample.views for sample in samples if sample.views is not None]
    if not known:
        return None
    nothing = jax.tree.map(np.zeros_like, known[0])
    views = [nothing if sample.views is None else sample.views for sample in samples]
    return jax.tree.map(lambda *parts: np.stack(parts), *views, *[nothing] * (rows - len(views)))


def make_options(
    options: Sequence[Sequence[Sequence[int]]], config: VLMConfig, buckets: Buckets, pad_batch_to: int | None = None
) -> OptionBatch:
    """Pads the options of each sample to static O and To, and the samples as `make_batch` does.

    Args:
        options: for each sample, for each option, its ids (`tokenizer.tokenize_continuation`).
        config: the model, for its vocabulary.
        buckets: the static sizes.
        pad_batch_to: B, instead of the batch bucket.

    Raises:
        BatchError: a sample without options, an empty option, ids outside the vocabulary, or too many of something.
    """
    if not options or not all(options) or not all(len(ids) for sample in options for ids in sample):
        raise BatchError("every sample needs at least one option, and every option at least one token")
    rows = _batch_rows(len(options), buckets, pad_batch_to)
    count = buckets.option_count(max(map(len, options)))
    length = buckets.option_length(max(len(ids) for sample in options for ids in sample))
    batch = OptionBatch(np.zeros((rows, count, length), np.int32), np.zeros((rows, count), np.int32))
    for row, sample in enumerate(options):
        for column, ids in enumerate(sample):
            expanded, start = expand_image_tokens(ids, config)
            if start >= 0:
                raise BatchError("an option holds a picture; only the prompt may")
            batch.token_ids[row, column, : len(ids)] = expanded
            batch.lengths[row, column] = len(ids)
    return batch


def _batch_rows(needed: int, buckets: Buckets, pad_batch_to: int | None) -> int:
    if pad_batch_to is None:
        return buckets.batch_size(needed)
    if pad_batch_to < needed:
        raise BatchError(f"{needed} samples do not fit a batch padded to {pad_batch_to}")
    return pad_batch_to


def _checked(sample: Sample, index: int, config: VLMConfig) -> tuple[np.ndarray, int]:
    """The expanded ids and image start of a sample whose ids, picture and size agree."""
    name = f"sample {index}"
    try:
        ids, start = expand_image_tokens(sample.ids, config)
    except BatchError as error:
        raise BatchError(f"{name}: {error}") from error
    if (start >= 0) != sample.has_picture:
        raise BatchError(
            f"{name} has a picture but no place for it in the prompt; put <image> into the prompt"
            if start < 0
            else f"{name} has <image> in its prompt but no picture; give one, or take <image> out"
        )
    if len(ids) > config.decoder.max_positions:
        raise BatchError(
            f"{name} is {len(ids)} positions long with its picture; the model was trained for "
            f"{config.decoder.max_positions}: shorten the prompt"
        )
    expected = (3, config.image_size, config.image_size)
    if sample.pixels is not None and np.shape(sample.pixels) != expected:
        raise BatchError(f"{name} has pixels of shape {np.shape(sample.pixels)}; this model reads {expected}")
    if start >= 0 and sample.size is not None and not _is_size(sample.size):
        raise BatchError(f"{name} has a picture of size {sample.size!r}; width and height must be at least 1")
    return ids, start


def _is_size(size: Any) -> bool:
    sequence = isinstance(size, (tuple, list)) or getattr(size, "ndim", 0) == 1
    return sequence and len(size) == 2 and all(map(_is_count, size))


def _is_count(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= 1
