"""Semantic tokens leave the picture's own features as they are, gather patches, and learn through the hard choice."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import restated_systems
from conftest import random_params
from PIL import Image
from systems import PLAIN, batch_of, problem

from flexattn_jax.checkpoints import layouts
from flexattn_jax.checkpoints.errors import CheckpointError
from flexattn_jax.checkpoints.store import load_params, save_model
from flexattn_jax.checkpoints.trees import flatten
from flexattn_jax.config import ConfigError, GroupingConfig, override, preset
from flexattn_jax.evaluation.pictures import draw_groups
from flexattn_jax.highres.grouping import Grouping, assign
from flexattn_jax.models.vlm import VLM
from flexattn_jax.training.state import draw_params
from flexattn_jax.training.views import keep_views

LLAVA = override(preset("tiny"), PLAIN)
GROUPED = override(LLAVA, {"grouping.groups": 6})


def see(config, params, pixels):
    return jax.jit(partial(VLM(config).apply, method=VLM.see))({"params": params}, pixels)


@pytest.fixture(scope="module")
def seen():
    """Parameters, pictures, and what a model with semantic tokens sees of them."""
    params = random_params(GROUPED)
    _, pixels = problem(GROUPED, (9, 12), (2, 4))
    return params, pixels, see(GROUPED, params, pixels)


def test_the_towers_features_are_the_same_to_the_bit(seen):
    params, pixels, views = seen
    without = see(LLAVA, params, pixels)
    np.testing.assert_array_equal(views.lowres, without.lowres)
    assert views.semantic.shape == (2, 6, 32) and without.semantic is None


def test_drawn_by_width_a_group_begins_as_its_token_and_the_mean_of_its_patches():
    config = override(preset("mini"), PLAIN | {"grouping.groups": 6})
    drawn, rng = draw_params(config, 3, by_width=True)["grouping"], np.random.default_rng(0)
    patches = rng.standard_normal((2, 36, config.vision.width)).astype(np.float32)
    layer = Grouping(config.grouping, config.vision.width, jnp.float32)
    tokens = layer.apply({"params": drawn}, 2, method=Grouping.tokens)
    groups, member = layer.apply({"params": drawn}, patches, tokens, None)
    for b in range(2):
        assert len(set(np.asarray(member[b]).tolist())) > 1
        for i in range(6):
            own = patches[b, np.asarray(member[b]) == i]
            expected = drawn["semantic_tokens"][i] + own.sum(axis=0) / (1 + len(own))
            np.testing.assert_allclose(groups[b, i], expected, atol=1e-5)


@pytest.mark.slow
def test_they_are_in_bfloat16_too(seen):
    params, pixels, _ = seen
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    views = [see(override(config, {"dtype": "bfloat16"}), params, pixels) for config in (GROUPED, LLAVA)]
    np.testing.assert_array_equal(views[0].lowres, views[1].lowres)


def check_groups(config, params, pixels, views):
    features, named = jax.jit(partial(VLM(config).apply, method=VLM.connect))({"params": params}, views)
    for tokens, groups, image in zip(features.lowres, named["groups"], pixels, strict=True):
        expected_tokens, expected = restated_systems.grouped(params, config, image.astype(np.float64))
        np.testing.assert_array_equal(groups, expected)
        assert len(set(expected.tolist())) > 1
        np.testing.assert_allclose(tokens, restated_systems.plain.connect(params, expected_tokens), atol=1e-4)


def test_groups_are_those_of_the_restatement(seen):
    check_groups(GROUPED, *seen)


def test_a_tower_without_attention_leaves_semantic_tokens_as_they_are():
    tower = {"vision.stem_widths": (4, 8, 8, 8), "vision.mlp_dim": 8, "vision.num_layers": 1, "lowres_size": 64}
    config = override(preset("mini"), tower | PLAIN | {"image_size": 64, "scan_layers": True, "grouping.groups": 5})
    params = random_params(config)
    _, pixels = problem(config, (5, 5), (2, 2))
    views = see(config, params, pixels)
    assert views.semantic is None  # what is seen is constant and may be kept
    check_groups(config, params, pixels, views)


def test_a_patch_belongs_to_one_group_and_the_gradient_is_the_softmax_s():
    raw = jnp.array([[[2.0, 0, 1], [1, 0, 3]]])
    np.testing.assert_array_equal(assign(raw, None, 1.0), [[[1, 1, 0], [0, 0, 1]]])  # of equal ones the first
    weights = jnp.array([[[1.0, 2, 3], [-1, 0.5, 2]]])
    hard, soft = (
        jax.grad(lambda x, f=f: (f(x) * weights).sum())(raw)
        for f in (lambda x: assign(x, None, 1.0), lambda x: jax.nn.softmax(x, axis=1))
    )
    np.testing.assert_allclose(hard, soft, atol=1e-6)


def test_noise_is_drawn_in_training_only_and_follows_the_probabilities():
    raw = jnp.broadcast_to(jnp.log(jnp.array([0.7, 0.2, 0.1]))[None, :, None], (1, 3, 4000))
    shares = assign(raw, jax.random.key(0), 1.0)[0].mean(axis=1)
    np.testing.assert_allclose(shares, [0.7, 0.2, 0.1], atol=0.03)
    np.testing.assert_array_equal(assign(raw, None, 1.0)[0].mean(axis=1), [1, 0, 0])


def test_a_lone_group_is_the_mean_of_its_patches_and_one_more():
    module = Grouping(GroupingConfig(groups=2), 4, jnp.float32)
    eye = {"kernel": jnp.eye(4)}
    params = {"semantic_tokens": jnp.zeros((2, 4)), "q_proj": eye, "k_proj": eye, "v_proj": eye, "o_proj": eye}
    patches = jnp.array([[[1.0, 0, 0, 0], [3, 0, 0, 0], [0, 8, 0, 0]]])
    semantic = jnp.array([[[1.0, 0, 0, 0], [0, 1, 0, 0]]])
    out, groups = module.apply({"params": params}, patches, semantic, None)
    np.testing.assert_array_equal(groups, [[0, 0, 1]])
    np.testing.assert_allclose(out, [[[1 + 4 / 3, 0, 0, 0], [0, 1 + 8 / 2, 0, 0]]], rtol=1e-6)


@pytest.mark.slow
def test_semantic_tokens_learn_through_the_frozen_tower():
    params = random_params(GROUPED)
    ids, pixels = problem(GROUPED, (9,), (2,))
    batch = batch_of(GROUPED, ids, pixels)

    def loss(grouping, key):
        return VLM(GROUPED).apply({"params": params | {"grouping": grouping}}, batch, key=key)[0][0, 8].std()

    gradient = jax.jit(jax.grad(loss))(params["grouping"], jax.random.key(1))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_names_shapes_and_what_a_checkpoint_lacks(tmp_path):
    params = random_params(GROUPED)
    assert {path: leaf.shape for path, leaf in flatten(params).items()} == layouts.leaf_shapes(GROUPED)
    assert [override(LLAVA, {"grouping.groups": n}).num_slots for n in (64, 144, 256)] == [64, 144, 256]
    save_model(tmp_path / "llava", LLAVA, {name: part for name, part in params.items() if name != "grouping"})
    with pytest.raises(CheckpointError, match=r"not stored: grouping/semantic_tokens, grouping/q_proj/kernel"):
        load_params(tmp_path / "llava", GROUPED)


def test_what_does_not_go_together_says_so():
    with pytest.raises(ConfigError, match="grouping and flexattention are both on"):
        override(preset("7b"), {"grouping.groups": 64})
    with pytest.raises(ConfigError, match='"fastv" cannot be combined with grouping'):
        override(GROUPED, {"reduction.tokens": 4})


def test_what_the_tower_sees_is_not_kept_where_semantic_tokens_run_through_it(tmp_path):
    with pytest.raises(ConfigError, match="semantic tokens run through it and are trained"):
        keep_views(None, "pictures", GROUPED, {}, tmp_path)


def test_groups_are_drawn_as_regions_of_the_photograph_without_its_padding():
    # Twice as wide as high: the second and third row of patches are on it.
    groups = np.ravel([[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 1, 1], [3, 3, 3, 3]])
    drawn = np.asarray(draw_groups(Image.new("RGB", (80, 40), (128, 128, 128)), groups), int)
    height, width, _ = drawn.shape
    assert width == 2 * height
    above, right, left = drawn[10, 10], drawn[-10, -10], drawn[-10, 10]
    np.testing.assert_array_equal(above, right)
    assert np.abs(above - left).sum() > 60
