"""Cross-attention begins as the model without it, learns, and says what a checkpoint lacks; sizes of its caches."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params
from systems import PLAIN, batch_of, problem

from flexattn_jax.checkpoints import layouts
from flexattn_jax.checkpoints.errors import CheckpointError
from flexattn_jax.checkpoints.store import load_params, save_model
from flexattn_jax.checkpoints.trees import flatten, nest
from flexattn_jax.config import override, preset
from flexattn_jax.highres.crossattention import CrossAttention, Source
from flexattn_jax.highres.step import Carry
from flexattn_jax.models.vlm import VLM
from flexattn_jax.ops.cache import new_cache
from flexattn_jax.training.state import draw_params

LLAVA = override(preset("tiny"), PLAIN | {"vision.num_layers": 2})
CROSS = override(LLAVA, {"crossattention": {"width": 24, "num_heads": 3, "tiles": 1}})


def test_it_begins_as_llava_to_the_bit():
    llava = random_params(LLAVA)
    begins = nest(flatten(draw_params(CROSS, 0)) | flatten(llava))
    ids, pixels = problem(CROSS, (9, 14), (2, 4))
    batch = batch_of(CROSS, ids, pixels)
    features = jax.jit(partial(VLM(CROSS).apply, method=VLM.encode))({"params": begins}, pixels)[0]

    def logits_of(config, params, features):
        return jax.jit(lambda p, f: VLM(config).apply({"params": p}, batch, f)[0])(params, features)

    found = logits_of(CROSS, begins, features)
    np.testing.assert_array_equal(found, logits_of(LLAVA, llava, features.replace(highres=None)))


def test_what_begins_at_zero_gets_a_gradient():
    module, rng = CrossAttention(CROSS), np.random.default_rng(0)
    hidden, tokens = rng.standard_normal((2, 1, 7, 48), np.float32), rng.standard_normal((1, 5, 48), np.float32)
    carry, source = Carry(jnp.array(hidden[0]), None, None), Source(jnp.array(tokens), jnp.array([True]))
    variables = jax.jit(lambda: module.init(jax.random.key(0), carry, 0, source))()

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient_of(variables):
        found = module.apply(variables, carry, 0, source).hidden
        return (found * hidden[1]).sum(), found

    gradient, found = gradient_of(variables)
    gradient = gradient["params"]
    np.testing.assert_array_equal(found, hidden[0])
    assert np.abs(gradient["o_proj"]["kernel"]).max() > 0
    assert not np.any(gradient["k_proj"]["kernel"])  # which the output projection hides until it has moved


@pytest.mark.parametrize("source", ["tower", "connector"])
def test_the_layout_names_the_parameters_that_the_model_makes(source):
    config = override(CROSS, {"crossattention.source": source})
    params = random_params(config)
    assert {path: leaf.shape for path, leaf in flatten(params).items()} == layouts.leaf_shapes(config)


def test_published_shapes():
    config = override(preset("7b"), {"flexattention": None, "image_size": 1120, "crossattention.tiles": 4})
    shapes = layouts.tensor_shapes(config)
    assert shapes["highres/positions"] == (6400, 1024)
    layer = {name: shapes[f"decoder/layers/31/cross_attn/{name}_proj/kernel"] for name in "qkvo"}
    assert layer == {"q": (1024, 4096), "k": (1024, 1024), "v": (1024, 1024), "o": (4096, 1024)}
    wide = {"crossattention.width": 4096, "crossattention.source": "connector"}
    shapes = layouts.tensor_shapes(override(config, wide))
    assert shapes["decoder/layers/0/cross_attn/k_proj/kernel"] == (4096, 4096)
    cache = jax.eval_shape(lambda: new_cache(override(config, {"dtype": "bfloat16"}), 2, 100, True))["layers"]
    assert cache.key_hd.shape == (32, 2, 6400, 1024)
    assert new_cache(CROSS, 1, 30, False)["layers"].key_hd is None


def test_a_checkpoint_without_its_weights_says_which_are_missing(tmp_path):
    save_model(tmp_path / "llava", LLAVA, random_params(LLAVA))
    with pytest.raises(CheckpointError, match=r"not stored: decoder/layers/cross_attn/norm/scale, .*highres/positions"):
        load_params(tmp_path / "llava", CROSS)


def test_a_stored_model_is_read_back_and_its_decoder_cut_for_token_dropping(tmp_path):
    params = random_params(CROSS)
    save_model(tmp_path / "cross", CROSS, params)
    back = load_params(tmp_path / "cross")
    jax.tree.map(np.testing.assert_array_equal, back, params)
    staged = override(LLAVA, {"crossattention": None, "reduction": {"method": "pyramiddrop", "tokens": 2}})
    cut = load_params(tmp_path / "cross", staged)["decoder"]
    whole = params["decoder"]["layers"]["mlp"]["up_proj"]["kernel"]
    pieces = [cut[s.name]["mlp"]["up_proj"]["kernel"] for s in staged.segments]
    assert [len(piece) for piece in pieces] == [1, 1, 1, 2]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
