"""Rotary embeddings against their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexattn_jax.ops.rope import apply_rope, by_halves, by_product, rope_table


def test_rope_turns_each_channel_pair_by_its_own_angle():
    theta, width = 1000.0, 6
    positions = np.array([[0, 3, 11]])
    cos, sin = rope_table(positions, width, theta)
    x = np.random.default_rng(0).standard_normal((1, 3, 2, width)).astype(np.float32)
    turned = apply_rope(x, cos, sin)
    for i in range(width // 2):
        angle = positions[0] * theta ** (-2 * i / width)
        pair = x[0, :, :, i] + 1j * x[0, :, :, i + width // 2]
        expected = pair * np.exp(1j * angle)[:, None]
        np.testing.assert_allclose(turned[0, :, :, i], expected.real, atol=1e-5)
        np.testing.assert_allclose(turned[0, :, :, i + width // 2], expected.imag, atol=1e-5)


def test_attention_logits_depend_on_distance_alone():
    query, key = np.random.default_rng(1).standard_normal((2, 1, 1, 1, 8)).astype(np.float32)

    def logit(i, j):
        return float(
            (
                apply_rope(query, *rope_table(np.array([[i]]), 8, 1e4))
                * apply_rope(key, *rope_table(np.array([[j]]), 8, 1e4))
            ).sum()
        )

    np.testing.assert_allclose(logit(5, 2), logit(105, 102), atol=1e-4)


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 1e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("heads", [1, 3])
def test_a_product_exchanges_halves_as_exactly_as_cutting_does(dtype, rounding, heads):
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(2, 5, heads, 8)), dtype)
    tables = rope_table(jnp.asarray(rng.integers(0, 4096, (2, 5, 1))), 8, 1e4)
    slope = jnp.asarray(rng.normal(size=x.shape), dtype)
    (ours, our_pull), (theirs, their_pull) = (
        jax.vjp(lambda x, rotate=rotate: rotate(x, *tables), x) for rotate in (by_product, by_halves)
    )
    np.testing.assert_array_equal(ours, theirs)
    ours, theirs = (np.float32(pull(slope)[0]) for pull in (our_pull, their_pull))
    np.testing.assert_allclose(ours, theirs, rtol=rounding, atol=rounding)
