"""Attention by blocks of rows, for accelerators: as `attention.attend`, with a backward pass of its own.

What is kept for the backward pass is the output and its log-sum-exp, not the map; the map of a block is computed again
from them. In a causal map, what lies above a block of rows is not computed. With dO, dL the gradients of both:

    P  = exp(q k^T / sqrt(d) - lse)
    dS = P * (dO v^T - rowsum(dO * O) + dL) / sqrt(d)
    dq = dS k     dk = dS^T q     dv = P^T dO

On TPU large maps are computed one sample's one key head at a time: what one head needs stays on the chip, whereas the
maps of all heads would go through HBM several times.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flexattn_jax.partitioning import per_head

KEPT = "attention"  # name of the output and its log-sum-exp, for policies of rematerialisation
ROWS_AT_ONCE = 512
# Of one head. Where there are fewer, a loop over heads costs more than it saves; no more are made at once.
FEW_LOGITS, LOGITS_AT_ONCE = 1 << 20, 1 << 23
LANES = 128  # of a TPU's registers: heads of such a width are cut out of an array without moving anything else
# Logit of a key that may not be read. Finite, so that a row with no key at all stays free of NaN: its part then
# weighs exp(-1e30 - lse) = 0 in a merge with any other part.
MASKED = -1e30


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend_by_rows(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, causal: bool, apart: bool = False
) -> tuple[jax.Array, jax.Array]:
    """`attention.attend`; the mask (1 or B, 1 or T, 1 or X) is read where it is not causal.

    Args:
      apart: large maps head by head, for TPU.
    """
    return _forward(query, key, value, mask, causal, apart)


def _forward(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, causal: bool, apart: bool
) -> tuple[jax.Array, jax.Array]:
    apart = apart and _large(query, key)
    attend = partial(_attend, total=_total_by_product if apart else _total)
    out, lse = _run(attend, mask, query, key, value, causal=causal, apart=apart)
    return out.reshape(query.shape), lse


def _keep(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, causal: bool, apart: bool
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    out, lse = (checkpoint_name(part, KEPT) for part in _forward(query, key, value, mask, causal, apart))
    return (out, lse), (query, key, value, mask, out, lse)


def _backward(causal: bool, apart: bool, kept: tuple[jax.Array, ...], gradients: tuple[jax.Array, jax.Array]) -> tuple:
    query, key, value, mask, out, lse = kept
    of_out, of_lse = gradients
    share = (of_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1) - of_lse  # (B, T, H)
    lse = jnp.maximum(lse, MASKED / 2)  # a row with no key has no weights
    arrays = query, key, value, lse, share, _flat(of_out.astype(value.dtype))
    found = _run(_slopes, mask, *arrays, causal=causal, apart=apart and _large(query, key))
    return found[0].reshape(query.shape), *found[1:], None


attend_by_rows.defvjp(_keep, _backward)


def _attend(
    mask: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    width: int,
    causal: bool,
    rows_at_once: int,
    total: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Output (B, T, H*d) and log-sum-exp (B, T, H) of queries (B, T, H*d), d = width; `total` sums along rows."""
    parts, batch = [], query.shape[0]
    for rows, seen in _blocks(query.shape[1], rows_at_once, causal):
        own_query, own_key, own_value = _grouped(query, key, value, rows, seen, width)
        logits = _logits(own_query, own_key, mask, rows, causal)
        top = logits.max(axis=-1, keepdims=True)
        weights = jnp.exp(logits - top).astype(value.dtype)
        sums = total(weights).transpose(0, 3, 1, 2, 4)  # (B, t, J, G, 1)
        out = jnp.einsum("bjgtx,bxjd->btjgd", weights, own_value, preferred_element_type=jnp.float32) / sums
        lse = top.transpose(0, 3, 1, 2, 4) + jnp.log(sums)
        parts.append((out.astype(value.dtype).reshape(batch, -1, query.shape[2]), lse.reshape(*out.shape[:2], -1)))
    return tuple(jnp.concatenate(part, axis=1) for part in zip(*parts, strict=True))


def _total(weights: jax.Array) -> jax.Array:
    """Sums (..., 1) float32 of weights (..., x)."""
    return weights.sum(axis=-1, keepdims=True, dtype=jnp.float32)


def _total_by_product(weights: jax.Array) -> jax.Array:
    """The same as a product with ones, cheaper on TPU than a sum along the lanes of its registers.

    With a single column of ones the compiler would make it that sum.
    """
    ones = jnp.ones((weights.shape[-1], 8), weights.dtype)
    return jnp.einsum("bjgtx,xd->bjgtd", weights, ones, preferred_element_type=jnp.float32)[..., :1]


def _slopes(
    mask: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lse: jax.Array,
    share: jax.Array,
    of_out: jax.Array,
    width: int,
    causal: bool,
    rows_at_once: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of queries (B, T, H*d), keys and values (B, X, J*d).

    Args:
      lse: (B, T, H), at least MASKED / 2; share: (B, T, H), rowsum(dO * O) - dL; of_out: dO (B, T, H*d).
    """
    of_query, of_key, of_value, scale = [], 0.0, 0.0, width**-0.5
    for rows, seen in _blocks(query.shape[1], rows_at_once, causal):
        own_query, own_key, own_value = _grouped(query, key, value, rows, seen, width)
        own_out = of_out[:, rows].reshape(own_query.shape)
        weights = jnp.exp(_logits(own_query, own_key, mask, rows, causal) - _by_row(lse[:, rows], own_query))
        of_weights = jnp.einsum("btjgd,bxjd->bjgtx", own_out, own_value, preferred_element_type=jnp.float32)
        of_logits = (weights * (of_weights - _by_row(share[:, rows], own_query)) * scale).astype(query.dtype)
        of_query.append(jnp.einsum("bjgtx,bxjd->btjgd", of_logits, own_key, preferred_element_type=jnp.float32))
        after = ((0, 0), (0, key.shape[1] - own_key.shape[1]), (0, 0), (0, 0))
        of_key += jnp.pad(
            jnp.einsum("bjgtx,btjgd->bxjd", of_logits, own_query, preferred_element_type=jnp.float32), after
        )
        weights = weights.astype(value.dtype)
        of_value += jnp.pad(
            jnp.einsum("bjgtx,btjgd->bxjd", weights, own_out, preferred_element_type=jnp.float32), after
        )
    found = zip((jnp.concatenate(of_query, axis=1), of_key, of_value), (query, key, value), strict=True)
    return tuple(x.reshape(like.shape).astype(like.dtype) for x, like in found)


def _run(
    function: Callable, mask: jax.Array, query: jax.Array, *arrays: jax.Array, causal: bool, apart: bool
) -> tuple[jax.Array, ...]:
    """`_attend` or `_slopes` of everything, at once or head by head; query is (B, T, H, d)."""
    width, keys = query.shape[-1], arrays[0].shape[1]
    function, query = partial(function, width=width, causal=causal), _flat(query)
    if not apart:
        return function(mask, query, *arrays, rows_at_once=ROWS_AT_ONCE)
    # Short blocks would skip more of a causal map of 2048 rows, and take longer all the same, as it is estimated.
    function = partial(function, rows_at_once=max(1, LOGITS_AT_ONCE // keys))
    kv_heads = arrays[0].shape[-1] // width
    return per_head(partial(_head_by_head, function, width), mask, query, *arrays, heads=kv_heads)


def _large(query: jax.Array, key: jax.Array) -> bool:
    """Whether a loop over heads is worth it."""
    return query.shape[-1] % LANES == 0 and query.shape[1] * key.shape[1] >= FEW_LOGITS


def _head_by_head(
    function: Callable, width: int, mask: jax.Array, query: jax.Array, key: jax.Array, *arrays: jax.Array
) -> tuple[jax.Array, ...]:
    """`function` of one sample's one key head, and the query heads that read it, at a time."""
    arrays, heads = (query, key, *arrays), key.shape[-1] // width

    def turn(number: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        sample, head = number // heads, number % heads

        def place(x: jax.Array) -> tuple:
            return sample, 0, head * (x.shape[2] // heads)

        own_mask = jax.lax.dynamic_slice_in_dim(mask, sample, 1) if len(mask) > 1 else mask
        own = (jax.lax.dynamic_slice(x, place(x), (1, x.shape[1], x.shape[2] // heads)) for x in arrays)
        results = function(own_mask, *own)
        return tuple(jax.lax.dynamic_update_slice(x, y, place(x)) for x, y in zip(found, results, strict=True))

    found = tuple(jax.lax.empty(x.shape, x.dtype) for x in jax.eval_shape(function, mask, *arrays))
    return jax.lax.fori_loop(0, len(query) * heads, turn, found)


def _blocks(rows: int, at_once: int, causal: bool) -> list[tuple[slice, slice]]:
    """Rows of each block, and the keys that they may read."""
    ends = [min(first + at_once, rows) for first in range(0, rows, at_once)]
    return [(slice(i * at_once, end), slice(end if causal else None)) for i, end in enumerate(ends)]


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:2], -1)


def _grouped(
    query: jax.Array, key: jax.Array, value: jax.Array, rows: slice, seen: slice, width: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A block's query (B, t, J, G, d), keys and values (B, x, J, d)."""
    batch, kv_heads = len(query), key.shape[-1] // width
    key, value = (x[:, seen].reshape(batch, -1, kv_heads, width) for x in (key, value))
    return query[:, rows].reshape(batch, -1, kv_heads, query.shape[-1] // width // kv_heads, width), key, value


def _by_row(x: jax.Array, query: jax.Array) -> jax.Array:
    """x (B, t, H) beside a block's map: (B, J, G, t, 1)."""
    return x.reshape(query.shape[:4]).transpose(0, 2, 3, 1)[..., None]


def _logits(query: jax.Array, key: jax.Array, mask: jax.Array, rows: slice, causal: bool) -> jax.Array:
    """(B, J, G, t, x) float32."""
    logits = jnp.einsum("btjgd,bxjd->bjgtx", query, key, preferred_element_type=jnp.float32)
    if causal:
        mask = (rows.start + jnp.arange(query.shape[1]))[:, None] >= jnp.arange(key.shape[1])
    else:
        mask = (mask[:, rows] if mask.shape[1] > 1 else mask)[:, None, None]
    return jnp.where(mask, logits * query.shape[-1] ** -0.5, MASKED)
