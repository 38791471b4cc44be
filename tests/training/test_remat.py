"""Rematerialisation changes what is kept for the backward pass, and no number."""

import jax
import numpy as np
from conftest import random_params

from flexattn_jax.checkpoints.trees import stack_layers, unstack_layers
from flexattn_jax.config import override, preset
from flexattn_jax.inputs.batching import Buckets, Sample, make_batch
from flexattn_jax.models.vlm import VLM
from flexattn_jax.training.loss import next_token_loss


def gradients(config, params):
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 128, 10)
    ids[1] = -200
    pixels = rng.standard_normal((3, config.image_size, config.image_size)).astype(np.float32)
    batch = make_batch([Sample(ids, pixels)], config, Buckets(text_lengths=(16,)))
    labels = np.where(np.arange(batch.token_ids.shape[1]) == 22, 5, -100)[None]
    loss = jax.value_and_grad(lambda p: next_token_loss(VLM(config), p, batch, labels, np.array([[21]]))[0])
    traced = jax.jit(loss).trace(params)
    return *traced.lower().compile()(params), str(traced.jaxpr).count("prevent_cse")


def test_gradients_do_not_depend_on_remat():
    config = override(preset("tiny"), {"flexattention.threshold": 30.0, "decoder.num_layers": 3})
    params = random_params(config)
    loss, expected, marks = gradients(config, params)
    assert marks == 0
    scanned = gradients(override(config, {"remat": "dots"}), params)
    loops = gradients(override(config, {"remat": "full", "scan_layers": False}), unstack_layers(params))
    assert (scanned[2], loops[2]) == (2, 3)  # a mark for each segment; for each layer
    for found in (scanned, (loops[0], stack_layers(loops[1]))):
        np.testing.assert_allclose(found[0], loss, rtol=1e-6)
        for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found[1]), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)
