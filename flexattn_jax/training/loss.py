"""Next-token loss on answers, with the rows that predict them reading high resolution."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flexattn_jax.inputs.batching import Batch, text_places
from flexattn_jax.models.vlm import VLM
from flexattn_jax.ops.attention import MASKED
from flexattn_jax.partitioning import constrain

IGNORED = -100  # label of a token that no loss is taken on
LOGITS_AT_ONCE = 1 << 22  # of a sample, in training


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
      slots: positions that a picture takes, `VLMConfig.num_slots`.
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
    grounded: bool = False,
) -> tuple[jax.Array, dict]:
    """Mean cross-entropy over all answer tokens of the batch.

    Args:
      batch: whole conversations.
      labels: (B, T) int32, IGNORED where no loss is taken.
      readers: (B, R) int32, see `answer_rows`.
      alpha: () float32, min(1, epoch * warmup); None: 1.
      key: of what is random in this step, see `VLM.__call__`; None in evaluation.
      grounded: see Step.

    Returns:
      The loss (), and the model's named intermediates; with capture also `logits` (B, T, V) float32.
    """
    variables = {"params": params}
    called = {"capture": capture, "grounded": grounded}
    hidden, named = model.apply(variables, batch, None, readers, alpha, key, **called, method=VLM.hidden_states)
    targets = labels[:, 1:]
    counted = targets != IGNORED
    head = model.apply(variables, method=VLM.head)
    losses = cross_entropy(hidden[:, :-1], head, jnp.where(counted, targets, 0))
    if capture:
        named["logits"] = model.apply(variables, hidden, method=VLM.logits)
    return jnp.where(counted, losses, 0).sum() / jnp.maximum(counted.sum(), 1), named


def grounding_loss(maps: jax.Array, places: jax.Array, draws: int) -> jax.Array:
    """How probably cells drawn from the rows' maps would miss what the rows are asked about.

    Of each such object -log of the probability that one of the draws from the maps of all layers falls on its token:
    where one layer looks, the others need not, and beyond what the draws need no map gains by being sharper. The mean
    over objects. Ours: neither the paper nor the released code teaches maps.

    Args:
      maps: (layers, B, R, N) float32, as `Step.grounded` gives them; the last layer's selects for none.
      places: (B, R) int32, the image token that shows what a row is asked about, -1 for none.
      draws: from each map; as many as a row keeps cells.

    Returns:
      () float32; 0 where no row is asked about anything.
    """
    shares = maps[:-1] / jnp.maximum(maps[:-1].sum(axis=-1, keepdims=True), 1e-9)
    share = jnp.take_along_axis(shares, places[None, ..., None].clip(0), axis=-1)[..., 0]
    missed = draws * jnp.log1p(-share.clip(1e-6, 1 - 1e-6)).sum(axis=0)
    losses = jnp.where(places >= 0, -jnp.log(-jnp.expm1(missed)), 0)
    return losses.sum() / jnp.maximum((places >= 0).sum(), 1)


def cross_entropy(hidden: jax.Array, head: jax.Array, targets: jax.Array, at_once: int = LOGITS_AT_ONCE) -> jax.Array:
    """Cross-entropy of each position, float32; logits (B, T, V) never exist where they are many.

    The vocabulary is taken in equal parts, one after the other, forward for the sum of exponentials and backward, from
    the same logits computed again, for the gradient. The same numbers as all at once, but for the order of sums.

    Args:
      hidden: (B, T, D), after the final norm.
      head: (V, D), in the type of hidden.
      targets: (B, T) int32.
      at_once: logits of a sample that may exist.

    Returns:
      (B, T) float32.
    """
    parts = -(-hidden.shape[1] * head.shape[0] // at_once)
    if parts == 1:
        logits = constrain((hidden @ head.T).astype(jnp.float32), "batch", None, "vocab")
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return _in_parts(hidden, head, targets, parts)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _in_parts(hidden: jax.Array, head: jax.Array, targets: jax.Array, parts: int) -> jax.Array:
    return _in_parts_forward(hidden, head, targets, parts)[0]


def _in_parts_forward(hidden, head, targets, parts):
    def add(carry, part):
        top, total, found = carry
        logits, hit = _part_logits(hidden, targets, parts, head.shape[0], *part)
        higher = jnp.maximum(top, logits.max(axis=-1))
        total = total * jnp.exp(top - higher) + jnp.exp(logits - higher[..., None]).sum(axis=-1)
        return (higher, total, found + jnp.where(hit, logits, 0).sum(axis=-1)), None

    zeros = jnp.zeros(targets.shape, jnp.float32)
    (top, total, found), _ = jax.lax.scan(add, (zeros + MASKED, zeros, zeros), _cut_head(head, parts))
    lse = top + jnp.log(total)
    return lse - found, (hidden, head, targets, lse)


def _in_parts_backward(parts, kept, gradient):
    hidden, head, targets, lse = kept

    def add(into_hidden, part):
        logits, hit = _part_logits(hidden, targets, parts, head.shape[0], *part)
        slope = ((jnp.exp(logits - lse[..., None]) - hit) * gradient[..., None]).astype(hidden.dtype)
        into_hidden += jnp.einsum("btv,vd->btd", slope, part[1], preferred_element_type=jnp.float32)
        return into_hidden, jnp.einsum("btv,btd->vd", slope, hidden)

    zeros = jnp.zeros(hidden.shape, jnp.float32)
    into_hidden, into_head = jax.lax.scan(add, zeros, _cut_head(head, parts))
    into_head = into_head.swapaxes(0, 1).reshape(-1, head.shape[1])[: head.shape[0]]
    return into_hidden.astype(hidden.dtype), into_head, None


_in_parts.defvjp(_in_parts_forward, _in_parts_backward)


def _cut_head(head: jax.Array, parts: int) -> tuple[jax.Array, jax.Array]:
    """Numbers of the parts and their rows (parts, V / parts, D), every parts-th one: each device cuts what it has."""
    rows = jnp.pad(head, ((0, -len(head) % parts), (0, 0))).reshape(-1, parts, head.shape[1]).swapaxes(0, 1)
    return jnp.arange(parts), constrain(rows, None, "vocab", None)


def _part_logits(hidden, targets, parts, vocabulary, number, rows):
    """Logits (B, T, V / parts) float32 of a part, padding MASKED, and where they are the targets'."""
    logits = constrain((hidden @ rows.T).astype(jnp.float32), "batch", None, "vocab")
    names = jnp.arange(len(rows)) * parts + number
    return jnp.where(names < vocabulary, logits, MASKED), names == targets[..., None]
