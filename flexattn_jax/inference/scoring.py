"""Scoring answer options: a question is read once and all its options against that one cache."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import optax

from flexattn_jax.inference.generation import cells_projected, selected
from flexattn_jax.inference.reading import Prompts, read_prompts
from flexattn_jax.inputs.batching import OptionBatch
from flexattn_jax.models.vlm import VLM


@flax.struct.dataclass
class Scored:
    """What `score` returns.

    losses: (B, O) float32, mean cross-entropy over an option's tokens; lower is likelier. Infinite where
      a sample has fewer options than the batch makes room for.
    cells: (layers, B, C) bool, cells selected by the last prompt token, or None without high resolution.
    overflow: (layers, B) int32 over the last prompt token and all option tokens together, or None.
    cells_read: (B,) int32, cells projected in all layers together, for the prompt and all options, or None.
    """

    losses: jax.Array
    cells: jax.Array | None
    overflow: jax.Array | None
    cells_read: jax.Array | None


def score(model: VLM, params: dict, prompts: Prompts, options: OptionBatch) -> Scored:
    """Mean loss of each option after its prompt.

    The row before an option and every row inside it read high resolution, each by its own selection: the path that the
    released code takes in training, where answers are known. It is also what decoding the option would do.

    Args:
      params: of the model.
      options: token_ids (B, O, n), lengths (B, O).
    """
    first, memory, named = read_prompts(model, params, prompts, 0)
    later, inside, memory = model.apply(
        {"params": params}, memory, options.token_ids, options.lengths, method=VLM.continuations
    )
    first = jnp.broadcast_to(first[:, None, None], (*options.token_ids.shape[:2], 1, first.shape[-1]))
    logits = jnp.concatenate([first, later[:, :, :-1]], axis=2)  # entry j predicts token j
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, options.token_ids)
    counted = jnp.arange(options.token_ids.shape[2]) < options.lengths[..., None]
    total = jnp.where(counted, losses, 0).sum(axis=-1)
    mean = jnp.where(options.lengths > 0, total / jnp.maximum(options.lengths, 1), jnp.inf)
    cells, overflow = selected(named)
    if overflow is not None:
        overflow = overflow + inside["overflow"][:-1].sum(axis=-1)
    return Scored(mean, cells, overflow, cells_projected(memory))
