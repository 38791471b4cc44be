"""Token merging in the manner of ToMe (arXiv 2210.09461): the most similar tokens become their mean, pair by pair.

One step of bipartite soft matching, as published: tokens are dealt to two sets by turns, each of the first finds the
most similar one of the second, and the r most similar pairs are merged, weighted by how many patches they stand for.
ToMe merges a few tokens in each block of a tower, by the blocks' keys, and makes the tower faster. Here the tower stays
as it is and its output is merged until `count` tokens are left, by the cosine of the features themselves, so that any
tower will do. Tokens stay in raster order; a merged one is where its member of the second set was.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flexattn_jax.highres.pruning import keep_strongest, list_kept, take_rows
from flexattn_jax.highres.visionzip import unit_length


def merge_tokens(features: jax.Array, count: int) -> jax.Array:
    """features (B, N, Dv) -> (B, count, Dv), in as many steps as halving N takes."""
    tokens, sizes = features.astype(jnp.float32), jnp.ones((*features.shape[:2], 1), jnp.float32)
    while tokens.shape[1] > count:
        tokens, sizes = merge_pairs(tokens, sizes, min(tokens.shape[1] // 2, tokens.shape[1] - count))
    return tokens.astype(features.dtype)


def merge_pairs(tokens: jax.Array, sizes: jax.Array, pairs: int) -> tuple[jax.Array, jax.Array]:
    """One step: tokens (B, n, Dv) and sizes (B, n, 1), patches that each stands for -> the same with n - pairs.

    Of equal similarities the first counts.
    """
    directions = unit_length(tokens)
    similarity = jnp.einsum("bid,bjd->bij", directions[:, ::2], directions[:, 1::2])
    merged = keep_strongest(similarity.max(axis=-1), pairs)  # (B, n / 2), those of the first set that go
    into = jax.nn.one_hot(similarity.argmax(axis=-1), similarity.shape[-1]) * merged[..., None]
    weighted = tokens * sizes
    total = weighted[:, 1::2] + jnp.einsum("bij,bid->bjd", into, weighted[:, ::2])
    total_sizes = sizes[:, 1::2] + jnp.einsum("bij,bid->bjd", into, sizes[:, ::2])
    tokens, sizes = tokens.at[:, 1::2].set(total / total_sizes), sizes.at[:, 1::2].set(total_sizes)
    kept = list_kept(jnp.ones(tokens.shape[:2], bool).at[:, ::2].set(~merged), tokens.shape[1] - pairs)
    return take_rows(tokens, kept), take_rows(sizes, kept)
