"""VisionZip (arXiv 2412.04467): the tokens that the tower's class token looks at, and means of the others.

Of the tower's last block, whose output the model reads, two things are used: how much attention the class token pays to
each patch, summed over heads, and the patches' keys, averaged over heads. As in the released code:

    dominant    the class token, and the patches with the most attention
    targets     of the patches that are left, every n-th
    contextual  each target, averaged with the patches whose keys are most like its key (cosine)

The published counts are 54 + 10, 108 + 20 and 162 + 30; here a tenth part in 64 is contextual for any number, and the
class token counts as one of the dominant ones.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from flexattn_jax.highres.pruning import keep_strongest, list_kept, take_rows

CONTEXTUAL = 10 / 64


def visionzip(tokens: jax.Array, scores: jax.Array, keys: jax.Array, count: int) -> jax.Array:
    """The picture in `count` tokens: class token, dominant patches in raster order, contextual ones.

    Args:
      tokens: (B, 1 + N, Dv), the class token first.
      scores: (B, N) float32, the class token's attention to each patch; of equal ones the first is stronger.
      keys: (B, N, d), averaged over heads.

    Returns:
      (B, count, Dv).
    """
    contextual = int(count * CONTEXTUAL)
    patches, chosen = tokens[:, 1:], count - contextual - 1
    keep = keep_strongest(scores, chosen)
    dominant = take_rows(patches, list_kept(keep, chosen))
    if not contextual:
        return jnp.concatenate([tokens[:, :1], dominant], axis=1)
    left = list_kept(~keep, scores.shape[1] - chosen)
    means = merge_similar(take_rows(patches, left), take_rows(keys, left), contextual)
    return jnp.concatenate([tokens[:, :1], dominant, means], axis=1)


def merge_similar(tokens: jax.Array, keys: jax.Array, count: int) -> jax.Array:
    """tokens (B, n, Dv) with keys (B, n, d) -> (B, count, Dv): evenly spaced ones, each with those most like it."""
    length = tokens.shape[1]
    targets = np.arange(0, length, max(1, length // count))[:count]
    others = np.setdiff1d(np.arange(length), targets)
    keys = unit_length(keys)
    similarity = jnp.einsum("bnd,bcd->bnc", keys[:, others], keys[:, targets])
    member = jax.nn.one_hot(similarity.argmax(axis=-1), count, dtype=jnp.float32)
    total = jnp.einsum("bnc,bnd->bcd", member, tokens[:, others].astype(jnp.float32))
    means = (tokens[:, targets] + total) / (1 + member.sum(axis=1)[..., None])
    return means.astype(tokens.dtype)


def unit_length(x: jax.Array) -> jax.Array:
    """(..., d) -> the same direction in float32; zero stays zero."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
