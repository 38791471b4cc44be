"""The model against its float64 restatement: logits and cells, for one sample and for mixed batches."""

import numpy as np
import pytest
import restatement
from conftest import random_params

from flexattn_jax.api import VisionLanguageModel
from flexattn_jax.config import override, preset

SIZES = [(100, 100), (160, 90), (70, 150)]


def problem(config, lengths=(9, 14, 11), text_only=(), seed=0):
    """Prompts of several lengths with the picture at different places, pixels and picture sizes."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, config.decoder.vocab_size, n) for n in lengths]
    for b, prompt in enumerate(ids):
        if b not in text_only:
            prompt[2 + b] = -200
    pixels = rng.standard_normal((len(lengths), 3, config.image_size, config.image_size)).astype(np.float32)
    return ids, pixels, SIZES[: len(lengths)]


def agree(config, params, ids, pixels, sizes, expect_reading=True):
    vlm = VisionLanguageModel(config, params)
    logits, named = vlm.logits(pixels, ids, sizes, capture=["cells"] if config.reads_highres else ["hidden"])
    read = 0
    for b, prompt in enumerate(ids):
        last = config.num_lowres_tokens * (-200 in prompt) + len(prompt) - (-200 in prompt) - 1
        shared = last if config.flexattention and config.flexattention.variant == "paper" else None
        expected, cells = restatement.model(params, config, prompt, pixels[b], sizes[b], shared_row=shared)
        np.testing.assert_allclose(np.asarray(logits)[b, : len(expected)], expected, atol=1e-4)
        for i, made in enumerate(cells.values()):
            np.testing.assert_array_equal(np.asarray(named["cells"])[i, b, 0], made[last])
            read += made[last].sum()
    assert (read > 0) == expect_reading


TOP_K = {"flexattention.selection": "top_k", "flexattention.capacity": 3}
VARIANTS = {
    "released": {},
    "low threshold": {"flexattention.threshold": 10.0},
    "capacity": {"flexattention.capacity": 2, "flexattention.threshold": 10.0},
    "top_k": TOP_K,
    "no cell twice": {"flexattention.revisit": False, "flexattention.threshold": 10.0},
    "no cell twice, top_k": TOP_K | {"flexattention.revisit": False, "flexattention.cell_grid": 6},
    "no cell twice, paper": {"flexattention.revisit": False, "flexattention.variant": "paper"},
    "every cell": {"flexattention.selector": "all", "flexattention.revisit": False},
    "zoom 4": {"flexattention.zoom_ratio": 4, "image_size": 224},
    "zoom 1": {"flexattention.zoom_ratio": 1, "image_size": 56},
    "ragged cells": {"flexattention.cell_grid": 5},
    "first layer 0": {"flexattention.first_layer": 0},
    "smaller picture than the tower's": {"lowres_size": 42, "image_size": 126, "flexattention.cell_grid": 2},
    "many heads": {"decoder.num_kv_heads": 4},
    "one key head, odd width": {"decoder.num_kv_heads": 1, "decoder.head_dim": 10},
    "tied head, other theta": {"decoder.tie_embeddings": True, "decoder.rope_theta": 500.0},
    "paper": {"flexattention.variant": "paper", "flexattention.cell_grid": 4},
    "unrolled": {"scan_layers": False},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_mixed_batch_gives_the_restated_logits_and_cells(name):
    config = override(preset("tiny"), VARIANTS[name])
    params = random_params(config)
    agree(config, params, *problem(config, text_only=(1,)))


def test_low_resolution_is_the_same_weights_with_flexattention_off(tiny):
    config, params = tiny
    off = override(config, {"flexattention.enabled": False})
    agree(off, params, *problem(config), expect_reading=False)


def test_llava_without_projections_is_the_same_model():
    config = override(preset("tiny"), {"flexattention": None})
    params = random_params(config)
    assert "highres" not in params["decoder"]
    agree(config, params, *problem(config), expect_reading=False)


def test_text_only_batches_need_no_picture(tiny):
    config, params = tiny
    ids, _, _ = problem(config, text_only=(0, 1, 2))
    logits = VisionLanguageModel(config, params).logits(None, ids)
    for b, prompt in enumerate(ids):
        expected, _ = restatement.model(params, config, prompt)
        np.testing.assert_allclose(np.asarray(logits)[b, : len(expected)], expected, atol=1e-4)
