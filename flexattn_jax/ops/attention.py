"""Attention over several key sets, each computed on its own and merged exactly by log-sum-exp."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Logit of a key that may not be read. Finite, so that a row with no key at all stays free of NaN: its part then
# weighs exp(-1e30 - lse) = 0 in a merge with any other part.
MASKED = -1e30


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention that also returns the log-sum-exp of its logits, differentiable through both.

    Grouped-query: query head h reads key head h // (H // J). Logits and softmax are float32 whatever the input type.
    (`jax.nn.dot_product_attention` stops the gradient of its log-sum-exp, which a merge in training needs.)

    Args:
      query: (B, T, H, d).
      key: (B, X, J, d), X keys.
      value: (B, X, J, d).
      mask: bool, broadcastable to (B, T, X), True where the row may read the key; None: everywhere.

    Returns:
      The output (B, T, H, d) in the type of `value` and the log-sum-exp (B, T, H) in float32.
    """
    batch, rows, heads, width = query.shape
    kv_heads = key.shape[2]
    query = query.reshape(batch, rows, kv_heads, heads // kv_heads, width)
    logits = jnp.einsum("btjgd,bxjd->bjgtx", query, key, preferred_element_type=jnp.float32) * width**-0.5
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, MASKED)
    top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum("bjgtx,bxjd->btjgd", (weights / total).astype(value.dtype), value)
    lse = (top + jnp.log(total))[..., 0]  # (B, J, H/J, T)
    return out.reshape(batch, rows, heads, width), lse.transpose(0, 3, 1, 2).reshape(batch, rows, heads)


def merge(*parts: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of disjoint key sets from the attention over each.

    Args:
      *parts: pairs (output (..., H, d), log-sum-exp (..., H)) as `attend` returns them.

    Returns:
      The pair that `attend` would give for all keys together: softmax over the union is the mean of the parts'
      outputs weighted by their share of the total mass, exp(lse_part - lse_all).
    """
    if len(parts) == 1:
        return parts[0]
    lse = jax.nn.logsumexp(jnp.stack([part_lse for _, part_lse in parts]), axis=0)
    out = sum(part.astype(jnp.float32) * jnp.exp(part_lse - lse)[..., None] for part, part_lse in parts)
    return out.astype(parts[0][0].dtype), lse
