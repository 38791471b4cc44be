"""Attention with log-sum-exp, and its merge, against straightforward float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexattn_jax.ops import blockwise
from flexattn_jax.ops.attention import _all_heads, attend, merge


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


@settings(max_examples=10, deadline=None)
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


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("turns", ["none", "slices", "copies"])
def test_attention_by_rows_is_that_of_all_heads_and_so_is_its_gradient(monkeypatch, causal, kv_heads, turns):
    sizes = {"ROWS_AT_ONCE": 3, "CAUSAL_ROWS_ON_CPU": 3, "FEW_LOGITS_ON_CPU": 1}
    for name, value in (sizes | {"LANES": 8, "FEW_LOGITS": 1, "LOGITS_AT_ONCE": 21}).items():
        monkeypatch.setattr(blockwise, name, value)
    query, key, value, mask = arrays(5, rows=7, kv_heads=kv_heads)
    mask = np.tril(np.ones((1, 7, 7), bool)) if causal else mask

    def gradients(attention):
        def number(q, k, v):
            out, lse = attention(q, k, v, mask)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

        return jax.value_and_grad(number, (0, 1, 2))(query, key, value)

    by_rows = functools.partial(blockwise.attend_by_rows, causal=causal, turns=turns)
    for one, other in zip(by_rows(query, key, value, mask), _all_heads(query, key, value, mask), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    for one, other in zip(*map(jax.tree.leaves, map(gradients, (by_rows, _all_heads))), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6, rtol=1e-6)


def test_only_large_maps_are_made_head_by_head(monkeypatch):
    def loops(width, rows, turns):
        query, key, value, mask = arrays(8, rows=rows, width=width)
        attend = functools.partial(blockwise.attend_by_rows, causal=False, turns=turns)
        return str(jax.make_jaxpr(attend)(query, key, value, mask)).count("= scan[")

    monkeypatch.setattr(blockwise, "FEW_LOGITS", 40)
    monkeypatch.setattr(blockwise, "FEW_LOGITS_ON_CPU", 20)
    assert [loops(128, 5, "slices"), loops(128, 6, "slices"), loops(64, 6, "slices")] == [0, 1, 0]
    assert [loops(8, 2, "copies"), loops(8, 3, "copies"), loops(8, 6, "none")] == [0, 1, 0]


def test_a_row_by_rows_that_may_read_nothing_has_no_gradient():
    query, key, value, mask = arrays(6)
    mask[:, 2] = False
    out, lse = blockwise.attend_by_rows(query, key, value, mask, False)
    assert np.isfinite(out).all() and (lse[:, 2] < -1e29).all()

    def number(q, k):
        out, lse = blockwise.attend_by_rows(q, k, value, mask, False)
        return jnp.sum(jnp.sin(out[:, 2])) + jnp.sum(lse[:, 2])

    assert not any(np.any(gradient) for gradient in jax.grad(number, (0, 1))(query, key))


def test_what_attention_gives_is_kept_and_not_computed_again():
    query, key, value, mask = arrays(7)

    def layer(q):
        return jnp.sum(jnp.sin(blockwise.attend_by_rows(q, key, value, mask, False)[0]))

    policy = jax.checkpoint_policies.save_only_these_names(blockwise.KEPT)
    kept, again = (
        len(re.findall("= exp ", str(jax.make_jaxpr(jax.grad(jax.checkpoint(layer, policy=p)))(query))))
        for p in (policy, None)
    )
    assert kept == 2 and again == 3  # maps of the forward pass, its repetition, the backward pass
