"""The two interpolations of the reference, equal to PyTorch's: pictures down, rotary tables up. Both can be jitted."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np


def downscale(pixels: jax.Array, side: int) -> jax.Array:
    """Antialiased bilinear resize, as `torch.nn.functional.interpolate(antialias=True, align_corners=False)`.

    This is how the released code makes the low-resolution picture from the high-resolution one. Where `side` divides S
    it is made of slices: products with matrices that are mostly zeros, in full precision, take TPU's compiler five
    times as long, longer than the whole tower.

    Args:
        pixels: (..., S, S), any float type.
        side: of the result; equal to S it changes nothing.

    Returns:
        (..., side, side) float32.
    """
    pixels = pixels.astype(jnp.float32)
    if pixels.shape[-1] == side:
        return pixels
    if pixels.shape[-1] % side:
        shape = (*pixels.shape[:-2], side, side)
        return jax.image.resize(pixels, shape, jax.image.ResizeMethod.LINEAR, precision=jax.lax.Precision.HIGHEST)
    return _average(_average(pixels, side, -2), side, -1)


def _average(x: jax.Array, count: int, axis: int) -> jax.Array:
    """Along an axis of length count * z: means weighed by a triangle of half-width z; beyond the border is nothing."""
    length = x.shape[axis]
    zoom = length // count
    middle = (zoom - 1) / 2  # of the first entry's pixels
    first = math.floor(middle - zoom) + 1
    weights = 1 - np.abs(np.arange(first, math.ceil(middle + zoom)) - middle) / zoom
    seen = np.arange(count)[:, None] * zoom + first + np.arange(len(weights))
    total = (weights * ((seen >= 0) & (seen < length))).sum(axis=1).astype(np.float32)

    around = [(0, 0)] * x.ndim
    around[axis] = (-first, first + len(weights) - zoom)
    padded = jnp.pad(x, around)
    end = zoom * (count - 1) + 1
    parts = (
        np.float32(weight) * jax.lax.slice_in_dim(padded, i, i + end, zoom, axis) for i, weight in enumerate(weights)
    )
    return sum(parts) / total.reshape(-1, *(1,) * (-axis - 1))


def resize_rope(table: jax.Array, side: int) -> jax.Array:
    """Bicubic resize of rotary cosines or sines, as `torch.nn.functional.interpolate(mode="bicubic")`.

    PyTorch's kernel (a = -0.75), clamped at the border, without antialiasing. The released code gives high-resolution
    tokens their positions in this way: the tables themselves are interpolated, so they are not of unit norm.

    Args:
        table: (B, g, g, d), the table at the positions of the low-resolution tokens, row-major.
        side: G.

    Returns:
        (B, G, G, d) float32.
    """
    table = table.astype(jnp.float32)
    shape = (table.shape[0], side, side, table.shape[3])
    return jax.image.resize(
        table, shape, jax.image.ResizeMethod.CUBIC_PYTORCH, antialias=False, precision=jax.lax.Precision.HIGHEST
    )
