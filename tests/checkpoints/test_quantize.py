"""int8 weights: what is rounded, by how much, and that the model reads it."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexattn_jax
from flexattn_jax.checkpoints.quantize import quantize
from flexattn_jax.checkpoints.trees import flatten
from flexattn_jax.config import ConfigError
from flexattn_jax.evaluation.demo import write_random_checkpoint
from flexattn_jax.ops.layers import product


def test_a_product_with_int8_rows_is_that_with_the_rounded_matrix():
    pytest.importorskip("qwix")
    rng = np.random.default_rng(0)
    matrix = jnp.asarray(rng.standard_normal((24, 64)) * 10.0 ** rng.integers(-3, 3, (24, 1)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((2, 3, 64)), jnp.float32)
    leaf = flatten(quantize({"decoder": {"lm_head": {"kernel": matrix}}}, "int8"))["decoder/lm_head/kernel"]
    assert leaf.qvalue.dtype == jnp.int8 and leaf.scale.shape == (24, 1)
    rounded = leaf.qvalue * leaf.scale
    assert (jnp.abs(rounded - matrix).max(axis=1) <= 0.51 * leaf.scale[:, 0]).all()  # half a step of its own row
    np.testing.assert_allclose(product(x, leaf), x @ rounded.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_model_in_int8_is_close_to_itself_and_smaller(tmp_path, scan):
    pytest.importorskip("qwix")
    write_random_checkpoint(tmp_path / "checkpoint")
    # Without FlexAttention, where a cell near the threshold may be decided otherwise.
    settings = {"scan_layers": scan, "flexattention.enabled": False, "image_size": 336}
    ids = [[1, 9, -200, 7, 20]]
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    whole, small = (
        flexattn_jax.load(tmp_path / "checkpoint", config_overrides=settings, weights=weights)
        for weights in (None, "int8")
    )
    want, found = (np.asarray(vlm.logits([picture], ids)) for vlm in (whole, small))
    error = np.abs(found - want).max() / want.std()
    assert 1e-4 < error < 0.3
    size = lambda vlm: sum(leaf.nbytes for leaf in jax.tree.leaves(vlm.params["decoder"]))  # noqa: E731
    assert size(small) < 0.8 * size(whole)


def test_what_cannot_be_is_said(monkeypatch):
    with pytest.raises(ConfigError, match="weights is 'int3'; it must be one of int8"):
        quantize({}, "int3")
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(
        ConfigError, match=r'needs the package qwix; install it with pip install --editable "\.\[int8\]"'
    ):
        quantize({}, "int8")
