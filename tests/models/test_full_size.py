"""The published sizes, without a byte of weights: parameter counts of 7B and 13B through jax.eval_shape."""

import math

import jax
import numpy as np
import pytest

from flexattn_jax.config import override, preset
from flexattn_jax.inputs.batching import Batch
from flexattn_jax.models.vlm import VLM

# Vicuna v1.5 (LLaMA-2): embeddings and head, then per layer four attention and three MLP matrices and two norms.
LANGUAGE = {"7b": 6_738_415_616, "13b": 13_015_864_320}
# CLIP ViT-L/14-336 as published holds 303,507,456; of its 24 blocks the last one and the final norm are never read.
BLOCK = 4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
TOWER = 303_507_456 - BLOCK - 2 * 1024


def shapes(config):
    slots = config.num_lowres_tokens
    batch = Batch(
        token_ids=np.zeros((1, slots + 60), np.int32),
        lengths=np.array([slots + 60]),
        image_start=np.array([35]),
        content=np.ones((1, slots), bool),
        pixels=np.zeros((1, 3, config.image_size, config.image_size), np.float32),
    )
    return jax.eval_shape(lambda: VLM(config).init_with_output(jax.random.key(0), batch))


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("name", ["7b", "13b"])
def test_published_parameter_counts(name, scan):
    config = override(preset(name), {"dtype": "bfloat16", "scan_layers": scan})
    (logits, _), variables = shapes(config)
    params = variables["params"]
    assert logits.shape == (1, 636, 32000)
    width, layers = config.decoder.width, config.decoder.num_layers
    assert count(params["vision"]) == TOWER
    assert count(params["connector"]) == 1024 * width + width + width * width + width
    # Of the projections that a FlexAttention checkpoint holds for every layer, those of the first eight are not kept.
    assert count(params["decoder"]) == LANGUAGE[name] + 2 * (layers - 8) * width * width


def test_llava_alone_has_no_projections():
    (_, _), variables = shapes(override(preset("7b"), {"flexattention": None, "image_size": 336}))
    assert count(variables["params"]["decoder"]) == LANGUAGE["7b"]
