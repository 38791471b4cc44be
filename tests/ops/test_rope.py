"""Rotary embeddings against their definition."""

import numpy as np

from flexattn_jax.ops.rope import apply_rope, rope_table


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
