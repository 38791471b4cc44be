"""Other ways to rank what a row reads, to find out what ranking cells costs beside them.

Each does what flexattention.keep_cells does, in the same program, but ranks all C x P tokens of the high-resolution
grid, as a selection token by token would; a cell is kept if one of its tokens is. Only the ranking differs, so a
difference in cost is the ranking's. None of these is meant to be used in a model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from flexattn_jax.config import ConfigError
from flexattn_jax.highres import flexattention
from flexattn_jax.ops.selection import Selection, keep_cells

RANKINGS = {
    "cells": "top_k over the C cells: what the model does",
    "tokens": "top_k over all C x P tokens",
    "approximate": "approx_max_k over all tokens",
    "sort": "all tokens sorted, the last that fits gives the bar",
    "mask": "none: every cell over the threshold, without a capacity",
}


@contextlib.contextmanager
def ranked_by(name: str, tokens_a_cell: int) -> Iterator[None]:
    """While it is open, FlexAttention that is traced ranks in this way.

    Args:
      name: of RANKINGS.
      tokens_a_cell: P.

    Raises:
      ConfigError: no such ranking.
    """
    if name not in RANKINGS:
        raise ConfigError(f"rankings has {name!r}; known: {', '.join(RANKINGS)}")
    original = flexattention.keep_cells
    if name not in ("cells", "mask"):
        flexattention.keep_cells = partial(keep_by_tokens, ranking=name, tokens_a_cell=tokens_a_cell)
    try:
        yield
    finally:
        flexattention.keep_cells = original


def keep_by_tokens(
    scores: jax.Array, candidate: jax.Array, capacity: int, *, ranking: str, tokens_a_cell: int
) -> Selection:
    """`keep_cells`, whose arguments these are, by a ranking of tokens; a token's score is its cell's."""
    if capacity >= scores.shape[-1]:
        return keep_cells(scores, candidate, capacity)
    tokens = jnp.repeat(jnp.where(candidate, scores, -1.0), tokens_a_cell, axis=-1)  # (B, Q, C * P)
    wanted = capacity * tokens_a_cell
    if ranking == "sort":
        bar = jnp.sort(tokens, axis=-1)[..., -wanted, None]
        chosen = (tokens >= bar).reshape(*scores.shape, tokens_a_cell).any(axis=-1)
    else:
        rank = jax.lax.top_k if ranking == "tokens" else jax.lax.approx_max_k
        _, best = rank(tokens, wanted)
        chosen = (best[..., None] // tokens_a_cell == jnp.arange(scores.shape[-1])).any(axis=-2)
    keep = candidate & chosen
    overflow = candidate.sum(axis=-1, dtype=jnp.int32) - keep.sum(axis=-1, dtype=jnp.int32)
    return Selection(keep=keep, strength=jnp.where(keep, scores, -1.0), overflow=overflow)
