"""Entries of an array of cells, read by a gather or by a slice each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexattn_jax.ops import cache


@pytest.mark.parametrize("layered", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (3, 5)])
def test_slices_are_the_gather(layered, shape):
    rng = np.random.default_rng(0)
    array = jnp.asarray(rng.normal(size=(4, *shape)[not layered :]), jnp.float32)
    places, at = jnp.asarray(rng.integers(0, 7, (shape[0], 6)), jnp.int32), (jnp.int32(2),) if layered else ()
    assert (places > 4).any()  # outside: the last entry
    expected = np.asarray(array)[2] if layered else np.asarray(array)
    expected = np.stack([rows[np.minimum(own, 4)] for rows, own in zip(expected, np.asarray(places), strict=True)])
    for read in (cache.gather_rows, cache.cut_rows, cache.read_rows):
        np.testing.assert_array_equal(jax.jit(read)(array, at, places), expected)


@pytest.mark.parametrize(("width", "count", "cut"), [(64, 4, False), (4096, 4, True), (4096, 65, False)])
def test_large_entries_are_cut_out_on_tpu_alone(width, count, cut):
    array, places = jax.ShapeDtypeStruct((1, 81, 121, width), jnp.bfloat16), jax.ShapeDtypeStruct((1, count), jnp.int32)

    def lowered(platform):
        read = jax.jit(lambda array, places: cache.read_rows(array, (), places))
        return read.trace(array, places).lower(lowering_platforms=(platform,)).as_text()

    assert ("stablehlo.gather" in lowered("tpu")) == (not cut)
    assert "stablehlo.gather" in lowered("cpu")
