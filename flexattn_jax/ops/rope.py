"""Rotary position embeddings, in the half-split form of LLaMA."""

from __future__ import annotations

import jax
import jax.numpy as jnp

SCOPE = "exchange_halves"  # a product that moves numbers and computes none: not among a model's operations


def rope_table(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotation angles, float32.

    Args:
      positions: (...) integer positions in the sequence.
      head_dim: d.
      theta: base of the geometric series of wavelengths.

    Returns:
      cos, sin: (..., d/2). Entry i serves the channel pair (i, i + d/2).
    """
    # The division comes before the power, as in the reference: float32 tables then agree to the last bit or two.
    inverse = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * inverse
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates channel pairs (i, i + d/2) of every head.

    Args:
      x: (..., heads, d).
      cos: (..., d/2), one row for each position of x; sin: likewise. They need not be unit-norm (the tables of
        high-resolution tokens are interpolated).

    Returns:
      (..., heads, d) in the type of x; computed in float32.
    """
    return jax.lax.platform_dependent(x, cos[..., None, :], sin[..., None, :], tpu=by_product, default=by_halves)


def by_halves(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """`apply_rope` with cos and sin (..., 1, d/2)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def by_product(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """The same for TPU, whose registers are 128 numbers wide and slow at exchanging halves: a product does that."""
    half = cos.shape[-1]
    exchange = jnp.eye(2 * half, k=half, dtype=x.dtype) - jnp.eye(2 * half, k=-half, dtype=x.dtype)
    with jax.named_scope(SCOPE):  # (-second, first), exactly
        exchanged = jax.lax.dot_general(x, exchange, (((x.ndim - 1,), (0,)), ((), ())), precision="highest")
    cos, sin = (jnp.concatenate([part, part], axis=-1) for part in (cos, sin))
    return (x.astype(jnp.float32) * cos + exchanged.astype(jnp.float32) * sin).astype(x.dtype)
