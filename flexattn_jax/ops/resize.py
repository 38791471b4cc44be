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
    weights, first, total = _triangle(pixels.shape[-1], side)
    zoom, end = pixels.shape[-1] // side, first + len(weights)

    def mean(parts):
        return sum(weight * part for weight, part in zip(weights, parts, strict=True)) / total[:, None]

    rows = jnp.pad(pixels, [(0, 0)] * (pixels.ndim - 2) + [(-first, end - zoom), (0, 0)])
    last = zoom * (side - 1) + 1
    rows = mean(jax.lax.slice_in_dim(rows, i, i + last, zoom, -2) for i in range(len(weights)))
    # Slices of columns would be a longer program than all else here: the columns go in front, `zoom` to a group.
    before, after = -(first // zoom), (end - 1) // zoom
    groups = jnp.pad(rows.reshape(-1, rows.shape[-1]).T, [(before * zoom, after * zoom), (0, 0)])
    groups = groups.reshape(-1, zoom, groups.shape[-1])
    places = (divmod(before * zoom + first + i, zoom) for i in range(len(weights)))
    columns = mean(jax.lax.slice_in_dim(groups, group, group + side)[:, column] for group, column in places)
    return columns.T.reshape(*rows.shape[:-1], side)


def _triangle(length: int, count: int) -> tuple[np.ndarray, int, np.ndarray]:
    """Weights of a triangle of half-width z = length / count around each of `count` entries.

    Returns:
      float32 weights; the place of the first one's pixel for the first entry, negative where it lies beyond the border;
      and the sum (count,) float32 of those that do not, for each entry.
    """
    zoom = length // count
    middle = (zoom - 1) / 2  # of the first entry's pixels
    first = math.floor(middle - zoom) + 1
    weights = 1 - np.abs(np.arange(first, math.ceil(middle + zoom)) - middle) / zoom
    seen = np.arange(count)[:, None] * zoom + first + np.arange(len(weights))
    total = (weights * ((seen >= 0) & (seen < length))).sum(axis=1)
    return weights.astype(np.float32), first, total.astype(np.float32)


def resize_rope(table: jax.Array, zoom: int) -> jax.Array:
    """Bicubic resize of rotary cosines or sines, as `torch.nn.functional.interpolate(mode="bicubic")`.

    PyTorch's kernel (a = -0.75), clamped at the border, without antialiasing. The released code gives high-resolution
    tokens their positions in this way: the tables themselves are interpolated, so they are not of unit norm. Sums of
    slices: a product with a matrix in full precision is a program several times as long to TPU's compiler.

    Args:
        table: (B, g, g, d), the table at the positions of the low-resolution tokens, row-major.
        zoom: a whole number.

    Returns:
        (B, g * zoom, g * zoom, d) float32.
    """
    return _cubic(_cubic(table.astype(jnp.float32), zoom, 1), zoom, 2)


def _cubic(table: jax.Array, zoom: int, axis: int) -> jax.Array:
    """Along an axis: `zoom` entries in place of one, each made of the four around it."""
    size = table.shape[axis]
    padded = jnp.pad(table, [(2, 2) if i == axis else (0, 0) for i in range(table.ndim)], mode="edge")
    phases = []
    for phase in range(zoom):
        place = (phase + 0.5) / zoom - 0.5  # of the new entry, from the old one
        first = math.floor(place) - 1
        taps = ((_cubic_weight(place - tap), 2 + tap) for tap in range(first, first + 4))
        phases.append(sum(weight * jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for weight, i in taps))
    shape = (*table.shape[:axis], size * zoom, *table.shape[axis + 1 :])
    return jnp.stack(phases, axis + 1).reshape(shape)


def _cubic_weight(distance: float) -> np.float32:
    """Keys' cubic convolution with a = -0.75."""
    x, a = abs(distance), -0.75
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.float32(near if x <= 1 else far if x < 2 else 0)
