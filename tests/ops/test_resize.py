"""The two resizes against torch's own results and against excerpts of the released code's arrays."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexattn_jax.config import FlexAttentionConfig, VisionConfig, VLMConfig
from flexattn_jax.inputs.images import load_image, preprocess
from flexattn_jax.ops.resize import downscale, resize_rope

FIXTURES = Path(__file__).parents[1] / "fixtures" / "inputs"


def rope_table(start: int, grid: int, head_dim: int, function) -> np.ndarray:
    """(1, grid, grid, head_dim / 2): what a LLaMA with theta 10000 has at the image positions."""
    frequencies = 1 / np.float32(10000) ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    angles = np.outer(np.arange(start, start + grid * grid, dtype=np.float32), frequencies)
    return function(angles).reshape(1, grid, grid, head_dim // 2)


@pytest.mark.parametrize(("full", "side"), [(42, 14), (40, 10)])
def test_downscale_equals_torch(full, side):
    arrays = np.load(FIXTURES / "torch_resize.npz")
    low = jax.jit(downscale, static_argnums=1)(arrays[f"pixels_{full}"], side)
    np.testing.assert_allclose(low, arrays[f"low_{full}_{side}"], rtol=0, atol=5e-7)


@pytest.mark.parametrize("zoom", [2, 3, 4, 5])
def test_downscale_by_slices_is_a_product_with_a_matrix(zoom):
    side, count = 6 * zoom, 6
    centers = (np.arange(count) + 0.5) * zoom - 0.5
    matrix = np.maximum(0, 1 - np.abs(np.arange(side) - centers[:, None]) / zoom)
    matrix /= matrix.sum(axis=1, keepdims=True)
    pixels = np.random.default_rng(zoom).standard_normal((2, 3, side, side)).astype(np.float32)
    np.testing.assert_allclose(downscale(pixels, count), matrix @ pixels @ matrix.T, rtol=0, atol=1e-6)


def test_downscale_by_no_whole_number():
    pixels = np.full((1, 3, 8, 8), 2, np.float32)
    np.testing.assert_allclose(downscale(pixels, 6), np.full((1, 3, 6, 6), 2), rtol=1e-6)


@pytest.mark.parametrize(("grid", "zoom"), [(4, 3), (3, 4)])
def test_resize_rope_equals_torch(grid, zoom):
    arrays = np.load(FIXTURES / "torch_resize.npz")
    high = jax.jit(resize_rope, static_argnums=1)(arrays[f"table_{grid}"], zoom)
    np.testing.assert_allclose(high, arrays[f"high_{grid}_{grid * zoom}"], rtol=2e-6, atol=2e-6)


def test_golden_low_resolution_pixels():
    config = VLMConfig(
        VisionConfig(image_size=168), flexattention=FlexAttentionConfig(), image_size=504, lowres_size=168
    )
    pixels, _ = preprocess(load_image(FIXTURES / "golden.png"), config)
    low = downscale(jnp.asarray(pixels), 168)
    np.testing.assert_allclose(low[:, ::6, ::6], np.load(FIXTURES / "golden.npz")["low"], rtol=0, atol=5e-7)


@pytest.mark.parametrize("function", [np.cos, np.sin])
@pytest.mark.parametrize(("prefix", "grid", "rows"), [("", 12, [0, 1, 17, 35]), ("wide_", 24, [0, 40, 71])])
def test_golden_rotary_tables(function, prefix, grid, rows):
    golden = np.load(FIXTURES / "golden.npz")
    high = resize_rope(rope_table(int(golden[prefix + "start"]), grid, 16, function), 3)
    np.testing.assert_allclose(high[0, np.array(rows)], golden[prefix + function.__name__], rtol=0, atol=8e-6)


def test_equal_side_is_the_identity():
    pixels = np.random.default_rng(0).normal(size=(2, 3, 14, 14)).astype(np.float32)
    np.testing.assert_array_equal(downscale(pixels, 14), pixels)
    table = pixels.reshape(3, 14, 14, 2)
    np.testing.assert_array_equal(resize_rope(table, 1), table)


def test_bfloat16_pixels_are_resized_in_float32():
    pixels = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 12, 12)), jnp.bfloat16)
    low = downscale(pixels, 4)
    assert low.dtype == jnp.float32
    np.testing.assert_array_equal(low, downscale(pixels.astype(jnp.float32), 4))
