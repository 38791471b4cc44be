"""Attention with log-sum-exp, and its merge, against straightforward float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexattn_jax.ops.attention import attend, merge


def reference(query, key, value, mask):
    """Softmax attention in float64, one head at a time."""
    batch, rows, heads, width = query.shape
    key, value = (x.reshape(batch, x.shape[1], -1, width) for x in (key, value))
    share = heads // key.shape[2]
    out, lse = np.zeros(query.shape), np.zeros((batch, rows, heads))
    for b in range(batch):
        for h in range(heads):
            logits = query[b, :, h].astype(np.float64) @ key[b, :, h // share].T.astype(np.float64) / np.sqrt(width)
            logits = np.where(mask[b], logits, -np.inf)
            top = logits.max(axis=-1, keepdims=True)
            weights = np.exp(logits - top)
            out[b, :, h] = weights @ value[b, :, h // share] / weights.sum(axis=-1, keepdims=True)
            lse[b, :, h] = (top + np.log(weights.sum(axis=-1, keepdims=True)))[:, 0]
    return out, lse


def arrays(seed, batch=2, rows=5, keys=7, heads=4, kv_heads=2, width=8):
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((batch, rows, heads, width), np.float32)
    key, value = rng.standard_normal((2, batch, keys, kv_heads * width), np.float32)
    mask = rng.random((batch, rows, keys)) < 0.6
    mask[..., 0] = True
    return query, key, value, mask


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 5])
def test_attend_is_softmax_attention(rows, kv_heads):
    query, key, value, mask = arrays(0, rows=rows, kv_heads=kv_heads)
    out, lse = attend(query, key, value, mask)
    expected_out, expected_lse = reference(query, key, value, mask)
    np.testing.assert_allclose(out, expected_out, atol=1e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 5, 161, 330])
def test_causal_attention_reads_earlier_keys_and_itself(rows):
    query, key, value, _ = arrays(4, batch=1, rows=rows, keys=rows)
    out, lse = attend(query, key, value, causal=True)
    expected_out, expected_lse = reference(query, key, value, np.tril(np.ones((1, rows, rows), bool)))
    np.testing.assert_allclose(out, expected_out, atol=2e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), cuts=st.lists(st.integers(1, 6), min_size=1, max_size=2))
def test_merge_of_parts_is_attention_over_all(seed, cuts):
    query, key, value, _ = arrays(seed)
    whole = attend(query, key, value)
    pieces = zip(np.split(key, sorted(set(cuts)), axis=1), np.split(value, sorted(set(cuts)), axis=1), strict=True)
    merged = merge(*(attend(query, k, v) for k, v in pieces))
    np.testing.assert_allclose(merged[0], whole[0], atol=2e-6)
    np.testing.assert_allclose(merged[1], whole[1], atol=2e-6)


def test_a_part_with_no_key_weighs_exactly_nothing():
    query, key, value, _ = arrays(1)
    one = attend(query, key, value)
    none = attend(query, key * 1e3, value * 1e3, np.zeros((2, 5, 7), bool))
    merged = merge(one, none)
    np.testing.assert_array_equal(merged[0], one[0])
    np.testing.assert_array_equal(merged[1], one[1])


def test_gradient_of_a_merge_is_that_of_attention_over_all():
    query, key, value, _ = arrays(2)

    def together(q, k, v):
        return jnp.sum(jnp.sin(attend(q, k, v)[0]))

    def apart(q, k, v):
        return jnp.sum(jnp.sin(merge(attend(q, k[:, :3], v[:, :3]), attend(q, k[:, 3:], v[:, 3:]))[0]))

    for one, other in zip(
        jax.grad(together, (0, 1, 2))(query, key, value), jax.grad(apart, (0, 1, 2))(query, key, value), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_bfloat16_inputs_keep_a_float32_log_sum_exp():
    query, key, value, mask = arrays(3)
    out, lse = attend(*(jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)), mask)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, reference(query, key, value, mask)[1], atol=0.05)
