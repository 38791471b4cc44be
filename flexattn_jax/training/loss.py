"""Next-token loss on answers, with the rows that predict them reading high resolution."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flexattn_jax.inputs.batching import Batch, text_places
from flexattn_jax.models.vlm import VLM

IGNORED = -100  # label of a token that no loss is taken on


def expand_labels(
    labels: Sequence[np.ndarray],
    image_start: Sequence[int],
    slots: int,
    length: int,
    segments: Sequence[np.ndarray | None] | None = None,
    blocks: tuple[int, int] | None = None,
) -> np.ndarray:
    """Makes room for the picture in labels, as batching does in ids: its slots and the right padding are IGNORED.

    Args:
      labels: of each sample, one for each id, the picture's place-holder counting as one.
      image_start: (B,) place of the place-holder, -1 for a sample without a picture.
      slots: N.
      length: T.
      segments: of each sample, Sample.segments; blocks: Batch.blocks.

    Returns:
      (B, T) int32.
    """
    expanded = np.full((len(labels), length), IGNORED, np.int32)
    segments = [None] * len(labels) if segments is None else segments
    for line, own, start, texts in zip(expanded, labels, image_start, segments, strict=True):
        if start >= 0:
            own = np.concatenate([own[:start], np.full(slots, IGNORED), own[start + 1 :]])
        line[text_places(texts, len(own), start, slots, blocks)] = own
    return expanded


def answer_rows(labels: np.ndarray, image_start: np.ndarray, capacity: int | None = None) -> np.ndarray:
    """Rows that predict answers: for every run of labels at positions a..b, rows a-1..b-1 (released code).

    Args:
      labels: (B, T) int, IGNORED where no answer is.
      image_start: (B,) int; a sample without a picture (-1) has no rows, since there is nothing to read.
      capacity: R; None: as many as the fullest sample has.

    Returns:
      (B, R) int32, T where unused.

    Raises:
      ValueError: a sample has more rows than the capacity.
    """
    labels = np.asarray(labels)
    rows = [
        np.flatnonzero(sample[1:] != IGNORED) if start >= 0 else np.zeros(0, int)
        for sample, start in zip(labels, image_start, strict=True)
    ]
    most = max(1, *map(len, rows))
    if capacity is not None and most > capacity:
        raise ValueError(f"a sample has {most} rows that predict an answer, but there is room for {capacity}")
    filled = np.full((len(rows), capacity or most), labels.shape[1], np.int32)
    for line, row in zip(filled, rows, strict=True):
        line[: len(row)] = row
    return filled


def next_token_loss(
    model: VLM,
    params: dict,
    batch: Batch,
    labels: jax.Array,
    readers: jax.Array,
    alpha: jax.Array | None = None,
    key: jax.Array | None = None,
    capture: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, dict]]:
    """Mean cross-entropy over all answer tokens of the batch.

    Args:
      batch: whole conversations.
      labels: (B, T) int32, IGNORED where no loss is taken.
      readers: (B, R) int32, see `answer_rows`.
      alpha: () float32, min(1, epoch * warmup); None: 1.
      key: of what is random in this step, see `VLM.__call__`; None in evaluation.

    Returns:
      The loss (), and the logits (B, T, V) with the model's named intermediates.
    """
    logits, named = model.apply({"params": params}, batch, None, readers, alpha, key, capture=capture)
    targets = labels[:, 1:]
    counted = targets != IGNORED
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], jnp.where(counted, targets, 0))
    return jnp.where(counted, losses, 0).sum() / jnp.maximum(counted.sum(), 1), (logits, named)
