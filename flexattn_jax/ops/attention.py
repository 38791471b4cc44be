"""Attention over several key sets, each computed on its own and merged exactly by log-sum-exp."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from flexattn_jax.ops.blockwise import MASKED, attend_by_rows


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None, causal: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention that also returns the log-sum-exp of its logits, differentiable through both.

    Keys and values have their heads side by side in one axis, as projections give them and caches store them.
    Grouped-query: query head h reads key head h // (H // J). Logits and softmax are float32 whatever the input type.
    (`jax.nn.dot_product_attention` stops the gradient of its log-sum-exp, which a merge in training needs.)

    Args:
      query: (B, T, H, d).
      key: (B, X, J*d), X keys.
      value: (B, X, J*d).
      mask: bool, broadcastable to (B, T, X), True where the row may read the key; None: everywhere.
      causal: instead of a mask: row t reads keys 0..t.

    Returns:
      The output (B, T, H, d) in the type of `value` and the log-sum-exp (B, T, H) in float32.
    """
    rows = query.shape[1]
    if causal:
        mask = jnp.tril(jnp.ones((1, rows, rows), bool))
    elif mask is None:
        mask = jnp.ones((1, 1, 1), bool)
    if _of_several_samples(query, key):
        return jax.lax.platform_dependent(query, key, value, mask, cpu=_values_by_element, default=_all_heads)
    if rows == 1:
        return _all_heads(query, key, value, mask)
    by_rows = partial(attend_by_rows, causal=causal)
    cpu, tpu = (partial(by_rows, turns=turns) for turns in ("copies", "slices"))
    return jax.lax.platform_dependent(query, key, value, mask, cpu=cpu, tpu=tpu, default=by_rows)


def attend_blocks(
    query: jax.Array, key: jax.Array, value: jax.Array, beginning: int, block: int
) -> tuple[jax.Array, jax.Array]:
    """Causal attention of a beginning and of equal blocks behind it, each of which reads the beginning and itself.

    Args:
      query: (B, T, H, d), T = beginning + Q * block; key, value: (B, T, J*d).
      beginning, block: positions, static.

    Returns:
      As `attend`.
    """
    batch, _, heads, width = query.shape
    head = tuple(x[:, :beginning] for x in (query, key, value))
    tail = tuple(x[:, beginning:] for x in (query, key, value))
    own_out, own_lse = attend(*(x.reshape(-1, block, *x.shape[2:]) for x in tail), causal=True)
    own = own_out.reshape(batch, -1, heads, width), own_lse.reshape(batch, -1, heads)
    parts = attend(*head, causal=True), merge(attend(tail[0], *head[1:]), own)
    return tuple(jnp.concatenate(part, axis=1) for part in zip(*parts, strict=True))


def _all_heads(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`attend` as products batched over heads."""
    weights, lse = softmax(jnp.where(mask[:, None], scaled_logits(query, key), MASKED))
    return weighted_values(weights.astype(value.dtype), value, query.shape[-1]), lse.swapaxes(1, 2)


def _values_by_element(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`attend` of one row a sample, as many key heads as query heads, values weighed without products: XLA's CPU code
    for those of several samples is slower (5.0 against 2.9 ms for 8 samples of 16 heads x 64 and 700 keys on 2 cores).
    Heads stay last, as values have them: with keys last it takes as long as products."""
    logits = jnp.where(mask.swapaxes(1, 2), _logits_of_one_row(query, key), MASKED)  # (B, X, H)
    weights, lse = softmax(logits, axis=1)
    products = weights[..., None] * value.reshape(*logits.shape, -1).astype(jnp.float32)
    return products.sum(axis=1, keepdims=True).astype(value.dtype), lse[:, None]


def _of_several_samples(query: jax.Array, key: jax.Array) -> bool:
    """Whether a row a sample of several is asked for, with as many key heads as query heads."""
    return query.shape[0] > 1 and query.shape[1] == 1 and key.shape[-1] == query.shape[2] * query.shape[3]


def softmax(logits: jax.Array, axis: int = -1) -> tuple[jax.Array, jax.Array]:
    """Weights, as logits (..., X, ...) float32 with X at the axis, and log-sum-exp, without it."""
    top = jax.lax.stop_gradient(logits.max(axis=axis, keepdims=True))
    weights = jnp.exp(logits - top)
    total = weights.sum(axis=axis, keepdims=True)
    return weights / total, (top + jnp.log(total)).squeeze(axis)


def scaled_logits(query: jax.Array, key: jax.Array) -> jax.Array:
    """query (B, T, H, d), key (B, X, J*d) -> q k^T / sqrt(d), (B, H, T, X) float32."""
    batch, rows, heads, width = query.shape
    kv_heads = key.shape[-1] // width

    def grouped(query, key):
        query = query.reshape(batch, rows, kv_heads, heads // kv_heads, width)
        key = key.reshape(batch, -1, kv_heads, width)
        logits = jnp.einsum("btjgd,bxjd->bjgtx", query, key, preferred_element_type=jnp.float32)
        return logits.reshape(batch, heads, rows, -1) * width**-0.5

    def one_product(query, key):
        return _logits_of_one_row(query, key).swapaxes(1, 2)[:, :, None]

    return _for_few_rows(rows, one_product, grouped)(query, key)


def _logits_of_one_row(query: jax.Array, key: jax.Array) -> jax.Array:
    """query (B, 1, H, d), key (B, X, J*d) -> q k^T / sqrt(d), (B, X, H) float32: one product, the query spread to a
    matrix that is mostly zeros."""
    batch, _, heads, width = query.shape
    own = _own_head(heads, key.shape[-1] // width, query.dtype)
    spread = (query[:, 0, :, None] * own[..., None]).reshape(batch, heads, -1)
    return jnp.einsum("bxk,bhk->bxh", key, spread, preferred_element_type=jnp.float32) * width**-0.5


def row_probabilities(query: jax.Array, key: jax.Array, lse: jax.Array) -> jax.Array:
    """The probabilities that a few rows of fused attention gave to keys, summed over heads.

    Args:
      query: (B, Q, H, d); key: (B, X, J*d); lse: (B, Q, H), as `attend` returned it for these rows.

    Returns:
      (B, Q, X) float32; meaningless at keys that the row did not read.
    """

    def heads_first(query, key, lse):
        return jnp.exp(scaled_logits(query, key) - lse.swapaxes(1, 2)[..., None]).sum(axis=1)

    def heads_last(query, key, lse):  # the product that `attend` makes: it is made once
        return jnp.exp(_logits_of_one_row(query, key) - lse).sum(axis=-1)[:, None]

    if not _of_several_samples(query, key):
        return heads_first(query, key, lse)
    return jax.lax.platform_dependent(query, key, lse, cpu=heads_last, default=heads_first)


def weighted_values(weights: jax.Array, value: jax.Array, width: int) -> jax.Array:
    """weights (B, H, T, X), value (B, X, J*d) with d = width -> (B, T, H, d)."""
    batch, heads, rows, _ = weights.shape
    kv_heads = value.shape[-1] // width

    def grouped(weights, value):
        weights = weights.reshape(batch, kv_heads, heads // kv_heads, rows, -1)
        value = value.reshape(batch, -1, kv_heads, width)
        return jnp.einsum("bjgtx,bxjd->btjgd", weights, value).reshape(batch, rows, heads, width)

    def one_product(weights, value):
        every = jnp.einsum("bhx,bxk->bhk", weights[:, :, 0], value).reshape(batch, heads, kv_heads, width)
        return (every * _own_head(heads, kv_heads, value.dtype)[..., None]).sum(axis=2)[:, None]

    return _for_few_rows(rows, one_product, grouped)(weights, value)


def weighted_blocks(weights: jax.Array, blocks: jax.Array) -> jax.Array:
    """weights (B, H, T, n, P), blocks of n x P entries (B, n, P, D) that all heads share -> (B, T, H, D) float32."""

    def one_product(weights, blocks):
        return jnp.einsum("bhtnp,bnpd->bthd", weights, blocks, preferred_element_type=jnp.float32)

    def block_by_block(weights, blocks):
        parts = jnp.einsum("bhnp,bnpd->bnhd", weights[:, :, 0], blocks, preferred_element_type=jnp.float32)
        return parts.sum(axis=1)[:, None]

    if weights.shape[2] > 1:
        return one_product(weights, blocks)
    # On CPU 5 against 9 ms for 16 heads and 81 blocks of 64 x 1024 on one core: short products are not repacked.
    return jax.lax.platform_dependent(weights, blocks, cpu=block_by_block, default=one_product)


def _for_few_rows(rows: int, one_product, grouped):
    """Which way to multiply. XLA's CPU code for a product batched over heads walks a single row's keys about 5 x slower
    than memory gives them; one product of all heads' keys with a block-diagonal query does not, though most of what it
    multiplies is zero. (8 against 42 ms for 16 layers of 16 heads x 64 and 676 keys on 2 cores.)
    """
    if rows > 1:
        return grouped
    return lambda *operands: jax.lax.platform_dependent(*operands, cpu=one_product, default=grouped)


def _own_head(heads: int, kv_heads: int, dtype: jnp.dtype) -> jax.Array:
    """(H, J), 1 where query head h reads key head j."""
    return jnp.repeat(jnp.eye(kv_heads, dtype=dtype), heads // kv_heads, axis=0)


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
