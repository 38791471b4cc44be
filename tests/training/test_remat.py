"""Rematerialisation changes what is kept for the backward pass, and no number."""

import jax
import numpy as np
import pytest
from conftest import random_params
from platforms import attend_as

from flexattn_jax.checkpoints.trees import unstack_layers
from flexattn_jax.config import override, preset
from flexattn_jax.inputs.batching import Buckets, Sample, make_batch
from flexattn_jax.models.vlm import VLM
from flexattn_jax.training.loss import next_token_loss


def trace(config, params):
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 128, 10)
    ids[1] = -200
    pixels = rng.standard_normal((3, config.image_size, config.image_size)).astype(np.float32)
    batch = make_batch([Sample(ids, pixels)], config, Buckets(text_lengths=(16,)))
    labels = np.where(np.arange(batch.token_ids.shape[1]) == 22, 5, -100)[None]
    loss = jax.value_and_grad(lambda p: next_token_loss(VLM(config), p, batch, labels, np.array([[21]]))[0])
    return jax.jit(loss).trace(params)


def run(traced, params):
    return traced.lower().compile({"xla_backend_optimization_level": 0})(params)  # compiles in half the time


def marks(traced):
    return str(traced.jaxpr).count("prevent_cse")


def test_gradients_do_not_depend_on_remat():
    config = override(preset("tiny"), {"flexattention.threshold": 30.0, "decoder.num_layers": 3})
    params = random_params(config)
    kept, again = trace(config, params), trace(override(config, {"remat": "dots"}), params)
    assert (marks(kept), marks(again)) == (0, 1)  # a mark for the one body of all layers
    for one, other in zip(jax.tree.leaves(run(kept, params)), jax.tree.leaves(run(again, params)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_layers_that_are_not_scanned_are_recomputed_one_by_one():
    config = override(preset("tiny"), {"remat": "full", "scan_layers": False, "decoder.num_layers": 3})
    assert marks(trace(config, unstack_layers(random_params(config)))) == 3


@pytest.mark.parametrize("platform", ["default", pytest.param("tpu", marks=pytest.mark.slow)])
def test_gradients_do_not_depend_on_the_platforms_way_of_attention(monkeypatch, platform):
    """What accelerators run instead of the loop over heads, on CPU."""
    config = override(preset("tiny"), {"flexattention.threshold": 30.0, "decoder.num_layers": 3, "remat": "dots"})
    params = random_params(config)
    here = trace(config, params)
    attend_as(platform, monkeypatch)
    there = trace(config, params)
    assert "cond" in str(here.jaxpr) and "platform_index" not in str(there.jaxpr)
    for one, other in zip(jax.tree.leaves(run(here, params)), jax.tree.leaves(run(there, params)), strict=True):
        np.testing.assert_allclose(one, other, atol=3e-6, rtol=1e-5)
