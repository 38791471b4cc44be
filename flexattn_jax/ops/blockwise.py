"""Attention by blocks of rows: as `attention.attend`, with a backward pass of its own.

What is kept for the backward pass is the output and its log-sum-exp, not the map; the map of a block is computed again
from them. In a causal map, what lies above a block of rows is not computed. With dO, dL the gradients of both:

    P  = exp(q k^T / sqrt(d) - lse)
    dS = P * (dO v^T - rowsum(dO * O) + dL) / sqrt(d)
    dq = dS k     dk = dS^T q     dv = P^T dO

Large maps are computed one sample's one key head at a time on TPU and CPU: what one head needs stays on the chip or in
the cache, whereas the maps of all heads would go through memory several times.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flexattn_jax.partitioning import per_head

KEPT = "attention"  # name of the output and its log-sum-exp, for policies of rematerialisation
ROWS_AT_ONCE, CAUSAL_ROWS_ON_CPU = 512, 160
# Of one head. Where there are fewer, a loop over heads costs more than it saves; no more are made at once on TPU.
FEW_LOGITS, FEW_LOGITS_ON_CPU, LOGITS_AT_ONCE = 1 << 20, 1 << 12, 1 << 23
LANES = 128  # of a TPU's registers: heads of such a width are cut out of an array without moving anything else
# Logit of a key that may not be read. Finite, so that a row with no key at all stays free of NaN: its part then
# weighs exp(-1e30 - lse) = 0 in a merge with any other part.
MASKED = -1e30


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend_by_rows(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, causal: bool, turns: str = "none"
) -> tuple[jax.Array, jax.Array]:
    """`attention.attend`; the mask (1 or B, 1 or T, 1 or X) is read where it is not causal.

    Args:
      turns: large maps head by head, cut out where they lie ("slices", for TPU) or copied together before ("copies",
        for CPU); "none": all heads together.
    """
    return _forward(query, key, value, mask, causal, turns)


def _forward(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, causal: bool, turns: str
) -> tuple[jax.Array, jax.Array]:
    turns = _turns(turns, query, key)
    attend = partial(_attend, total=_total_by_product if turns == "slices" else _total)
    out, lse = _run(attend, mask, query, key, value, causal=causal, turns=turns)
    return out.reshape(query.shape), lse


def _keep(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, causal: bool, turns: str
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    out, lse = (checkpoint_name(part, KEPT) for part in _forward(query, key, value, mask, causal, turns))
    return (out, lse), (query, key, value, mask, out, lse)


def _backward(causal: bool, turns: str, kept: tuple[jax.Array, ...], gradients: tuple[jax.Array, jax.Array]) -> tuple:
    query, key, value, mask, out, lse = kept
    of_out, of_lse = gradients
    share = (of_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1) - of_lse  # (B, T, H)
    lse = jnp.maximum(lse, MASKED / 2)  # a row with no key has no weights
    arrays = query, key, value, lse, share, _flat(of_out.astype(value.dtype))
    turns = _turns(turns, query, key)
    slopes = partial(_slopes, to_keys=_to_keys_as_it_lies if turns == "copies" else _to_keys)
    found = _run(slopes, mask, *arrays, causal=causal, turns=turns)
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
    parts = []
    for rows, seen in _blocks(query.shape[1], rows_at_once, causal):
        own_query, own_key, own_value = _grouped(query, key, value, rows, seen, width)
        logits = _logits(own_query, own_key, mask, rows, causal)
        top = logits.max(axis=-1, keepdims=True)
        weights = jnp.exp(logits - top).astype(value.dtype)
        sums = total(weights)
        out = jnp.einsum("bjgtx,bjxd->bjgtd", weights, own_value, preferred_element_type=jnp.float32) / sums
        parts.append((_rows_first(out.astype(value.dtype)), _rows_first(top + jnp.log(sums))))
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
    to_keys: Callable[[jax.Array, jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of queries (B, T, H*d), keys and values (B, X, J*d); `to_keys` brings rows to keys through a map.

    Args:
      lse: (B, T, H), at least MASKED / 2; share: (B, T, H), rowsum(dO * O) - dL; of_out: dO (B, T, H*d).
    """
    of_query, of_key, of_value, scale = [], 0.0, 0.0, width**-0.5
    for rows, seen in _blocks(query.shape[1], rows_at_once, causal):
        own_query, own_key, own_value = _grouped(query, key, value, rows, seen, width)
        own_out = _heads_first(of_out[:, rows], own_query)
        weights = jnp.exp(_logits(own_query, own_key, mask, rows, causal) - _heads_first(lse[:, rows], own_query))
        of_weights = jnp.einsum("bjgtd,bjxd->bjgtx", own_out, own_value, preferred_element_type=jnp.float32)
        of_logits = (weights * (of_weights - _heads_first(share[:, rows], own_query)) * scale).astype(query.dtype)
        of_query.append(
            _rows_first(jnp.einsum("bjgtx,bjxd->bjgtd", of_logits, own_key, preferred_element_type=jnp.float32))
        )
        after = ((0, 0), (0, 0), (0, key.shape[1] - own_key.shape[2]), (0, 0))
        of_key += jnp.pad(to_keys(of_logits, own_query), after)
        of_value += jnp.pad(to_keys(weights.astype(value.dtype), own_out), after)
    of_key, of_value = (x.swapaxes(1, 2).reshape(key.shape).astype(key.dtype) for x in (of_key, of_value))
    return jnp.concatenate(of_query, axis=1).astype(query.dtype), of_key, of_value


def _to_keys(of_map: jax.Array, rows: jax.Array) -> jax.Array:
    """Map (B, J, G, t, x) transposed, times rows (B, J, G, t, d): (B, J, x, d) float32."""
    return jnp.einsum("bjgtx,bjgtd->bjxd", of_map, rows, preferred_element_type=jnp.float32)


def _to_keys_as_it_lies(of_map: jax.Array, rows: jax.Array) -> jax.Array:
    """The same; only rows and the result are turned, where XLA's CPU code would turn the map, which is larger.

    (64 heads of 24 and 940 causal rows: all gradients in 182 against 247 ms on one core. On TPU it costs a little.)
    """
    turned = jnp.einsum("bjgtd,bjgtx->bjdx", rows, of_map, preferred_element_type=jnp.float32)
    return turned.swapaxes(2, 3)


def _run(
    function: Callable, mask: jax.Array, query: jax.Array, *arrays: jax.Array, causal: bool, turns: str
) -> tuple[jax.Array, ...]:
    """`_attend` or `_slopes` of everything, at once or head by head; query is (B, T, H, d)."""
    width, rows, keys = query.shape[-1], query.shape[1], arrays[0].shape[1]
    function, query = partial(function, width=width, causal=causal), _flat(query)
    if turns == "none":
        return function(mask, query, *arrays, rows_at_once=ROWS_AT_ONCE)
    if turns == "copies":
        by_head, rows_at_once = _copied_heads, CAUSAL_ROWS_ON_CPU if causal else rows
    else:  # short blocks would skip more of a causal map of 2048 rows, and take longer all the same, as it is estimated
        by_head, rows_at_once = _sliced_heads, max(1, LOGITS_AT_ONCE // keys)
    function = partial(function, rows_at_once=rows_at_once)
    kv_heads = arrays[0].shape[-1] // width
    return per_head(partial(by_head, function, width), mask, query, *arrays, heads=kv_heads)


def _turns(turns: str, query: jax.Array, key: jax.Array) -> str:
    """As asked for, where a loop over heads is worth it."""
    logits = query.shape[1] * key.shape[1]
    if turns == "copies":
        return turns if logits >= FEW_LOGITS_ON_CPU else "none"
    return turns if query.shape[-1] % LANES == 0 and logits >= FEW_LOGITS else "none"


def _sliced_heads(
    function: Callable, width: int, mask: jax.Array, query: jax.Array, key: jax.Array, *arrays: jax.Array
) -> tuple[jax.Array, ...]:
    """`function` of one sample's one key head, and the query heads that read it, at a time."""
    arrays, heads = (query, key, *arrays), key.shape[-1] // width

    def turn(number: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        sample, head = number // heads, number % heads

        def place(x: jax.Array) -> tuple:
            return sample, 0, head * (x.shape[2] // heads)

        own = (jax.lax.dynamic_slice(x, place(x), (1, x.shape[1], x.shape[2] // heads)) for x in arrays)
        results = function(_own_mask(mask, sample), *own)
        return tuple(jax.lax.dynamic_update_slice(x, y, place(x)) for x, y in zip(found, results, strict=True))

    found = tuple(jax.lax.empty(x.shape, x.dtype) for x in jax.eval_shape(function, mask, *arrays))
    return jax.lax.fori_loop(0, len(query) * heads, turn, found)


def _copied_heads(
    function: Callable, width: int, mask: jax.Array, query: jax.Array, key: jax.Array, *arrays: jax.Array
) -> tuple[jax.Array, ...]:
    """The same, of arrays that are copied head by head before and after."""
    batch, heads = len(query), key.shape[-1] // width

    def split(x: jax.Array) -> jax.Array:  # (B, T, J*n) -> (B*J, 1, T, n)
        return x.reshape(batch, x.shape[1], heads, -1).swapaxes(1, 2).reshape(batch * heads, 1, x.shape[1], -1)

    def turn(_, operands: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, ...]]:
        number, *own = operands
        return None, function(_own_mask(mask, number // heads), *own)

    _, found = jax.lax.scan(turn, None, (jnp.arange(batch * heads), *map(split, (query, key, *arrays))))
    return tuple(x.reshape(batch, heads, *x.shape[2:]).swapaxes(1, 2).reshape(batch, x.shape[2], -1) for x in found)


def _own_mask(mask: jax.Array, sample: jax.Array) -> jax.Array:
    """One sample's, (1, ., .), of a mask that may be the same for all."""
    return jax.lax.dynamic_slice_in_dim(mask, sample, 1) if len(mask) > 1 else mask


def _blocks(rows: int, at_once: int, causal: bool) -> list[tuple[slice, slice]]:
    """Rows of each block, and the keys that they may read."""
    ends = [min(first + at_once, rows) for first in range(0, rows, at_once)]
    return [(slice(i * at_once, end), slice(end if causal else None)) for i, end in enumerate(ends)]


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:2], -1)


def _grouped(
    query: jax.Array, key: jax.Array, value: jax.Array, rows: slice, seen: slice, width: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A block's query (B, J, G, t, d), keys and values (B, J, x, d): so ordered, XLA's CPU products are fastest."""
    batch, kv_heads = len(query), key.shape[-1] // width
    key, value = (x[:, seen].reshape(batch, -1, kv_heads, width).swapaxes(1, 2) for x in (key, value))
    query = query[:, rows].reshape(batch, -1, kv_heads, query.shape[-1] // width // kv_heads, width)
    return query.transpose(0, 2, 3, 1, 4), key, value


def _heads_first(x: jax.Array, like: jax.Array) -> jax.Array:
    """x (B, t, H*n) beside a block's query: (B, J, G, t, n)."""
    batch, kv_heads, group, rows, _ = like.shape
    return x.reshape(batch, rows, kv_heads, group, -1).transpose(0, 2, 3, 1, 4)


def _rows_first(x: jax.Array) -> jax.Array:
    """x (B, J, G, t, n) -> (B, t, H*n)."""
    return x.transpose(0, 3, 1, 2, 4).reshape(x.shape[0], x.shape[3], -1)


def _logits(query: jax.Array, key: jax.Array, mask: jax.Array, rows: slice, causal: bool) -> jax.Array:
    """(B, J, G, t, x) float32."""
    logits = jnp.einsum("bjgtd,bjxd->bjgtx", query, key, preferred_element_type=jnp.float32)
    if causal:
        mask = (rows.start + jnp.arange(query.shape[3]))[:, None] >= jnp.arange(key.shape[2])
    else:
        mask = (mask[:, rows] if mask.shape[1] > 1 else mask)[:, None, None]
    return jnp.where(mask, logits * query.shape[-1] ** -0.5, MASKED)
