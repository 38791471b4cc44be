"""The two interpolations of the reference, equal to PyTorch's: pictures down, rotary tables up. Both can be jitted."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def downscale(pixels: jax.Array, side: int) -> jax.Array:
    """Antialiased bilinear resize, as `torch.nn.functional.interpolate(antialias=True, align_corners=False)`.

    This is how the released code makes the low-resolution picture from the high-resolution one.

    Args:
        pixels: (..., S, S), any float type.
        side: of the result; equal to S it changes nothing.

    Returns:
        (..., side, side) float32.
    """
    pixels = pixels.astype(jnp.float32)
    shape = (*pixels.shape[:-2], side, side)
    if pixels.shape == shape:
        return pixels
    return jax.image.resize(pixels, shape, jax.image.ResizeMethod.LINEAR, precision=jax.lax.Precision.HIGHEST)


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
