"""The parts of token reduction on literal cases: ranks and ties, areas, pairs, and the room that a batch makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexattn_jax.config import ConfigError, override, preset
from flexattn_jax.highres.controls import downsampling, random_places
from flexattn_jax.highres.pruning import keep_strongest, list_kept
from flexattn_jax.highres.tome import merge_tokens
from flexattn_jax.highres.visionzip import visionzip
from flexattn_jax.inputs.batching import BatchError, Buckets, make_batch
from flexattn_jax.models.vlm import VLM
from flexattn_jax.ops.cache import new_cache

PLAIN = override(preset("tiny"), {"flexattention": None, "image_size": 56})
BASE = override(preset("7b"), {"flexattention": None, "image_size": 336})


def test_of_equal_scores_the_first_is_kept():
    keep = keep_strongest(jnp.array([[1.0, 3, 3, 0, 3, 2], [0, 0, 0, 0, 0, 0]]), 3)
    np.testing.assert_array_equal(keep, [[0, 1, 1, 0, 1, 0], [1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(list_kept(keep, 3), [[1, 2, 4], [0, 1, 2]])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=9, max_size=9), st.data())
def test_exactly_the_strongest_are_kept_whatever_the_ties(scores, data):
    count = data.draw(st.integers(1, len(scores)))
    keep = np.asarray(keep_strongest(jnp.array([scores], jnp.float32), count))[0]
    assert set(np.flatnonzero(keep)) == set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def test_down_sampling_by_a_whole_factor_is_the_mean_of_blocks():
    weights = downsampling(24, 64)
    picture = np.random.default_rng(0).standard_normal((24, 24))
    blocks = picture.reshape(8, 3, 8, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(weights @ picture.ravel(), blocks.ravel(), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.data())
def test_down_sampling_gives_any_number_of_means_that_cover_the_picture(grid, data):
    count = data.draw(st.integers(1, grid**2))
    weights = downsampling(grid, count)
    assert weights.shape == (count, grid**2) and (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)
    assert (weights.sum(axis=0) > 0).all()
    if count == grid**2:
        np.testing.assert_allclose(weights, np.eye(count), atol=1e-6)


def test_a_random_subset_is_a_function_of_the_seed():
    first, other = random_places(576, 64, 0), random_places(576, 64, 1)
    assert len(set(first)) == 64 and (np.diff(first) > 0).all() and first.max() < 576
    np.testing.assert_array_equal(first, random_places(576, 64, 0))
    assert set(first) != set(other)


def test_merging_takes_the_most_similar_pairs_and_counts_their_patches():
    merge = jax.jit(merge_tokens, static_argnums=1)
    up, right = np.array([0.0, 1]), np.array([1.0, 0])
    # Tokens 0 and 2 may go into 1 or 3. Token 2 is exactly like 3; token 0 is closer to 1 than to 3, but less so.
    tokens = np.stack([up + 0.2 * right, up, 3 * right, right])[None]
    np.testing.assert_allclose(merge(tokens, 3)[0], [tokens[0, 0], up, 2 * right], atol=1e-6)
    merged = merge(tokens, 2)[0]
    np.testing.assert_allclose(merged, [up + 0.1 * right, 2 * right], atol=1e-6)
    # One token is the mean of all four patches, not of two means.
    uneven = np.stack([up, up, up, right])[None]
    np.testing.assert_allclose(merge(uneven, 1)[0], uneven[0].mean(axis=0)[None], atol=1e-6)


def test_visionzip_keeps_the_class_token_the_dominant_and_means_of_the_rest():
    count, patches = 13, 20  # 10 / 64 of 13 tokens are contextual: 2
    tokens = np.arange(21.0)[None, :, None] * np.ones(4)
    scores = np.zeros((1, patches), np.float32)
    dominant = [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]
    scores[0, dominant] = 1
    # Left are patches 0, 2, .. 18; the targets are 0 and 10. Keys of 0 .. 8 are alike, and those of 10 .. 18.
    keys = np.where(np.arange(patches)[None, :, None] < 10, [1.0, 0.1], [0.1, 1.0])
    found = np.asarray(jax.jit(visionzip, static_argnums=3)(tokens, scores, keys, count))[0, :, 0]
    np.testing.assert_allclose(found, [0, *(i + 1 for i in dominant), 5, 15], atol=1e-5)


@pytest.mark.parametrize(("tokens", "contextual"), [(64, 10), (128, 20), (192, 30)])
def test_visionzip_divides_its_tokens_as_published(tokens, contextual):
    scores = jnp.zeros((1, 576)).at[0, : tokens - contextual - 1].set(1.0)
    marked = jnp.concatenate([jnp.full((1, 1, 1), -1.0), 10.0 + jnp.arange(576.0)[None, :, None]], axis=1)
    found = np.asarray(jax.jit(visionzip, static_argnums=3)(marked, scores, jnp.ones((1, 576, 2)), tokens))[0, :, 0]
    assert len(found) == tokens
    np.testing.assert_array_equal(found[: tokens - contextual], [-1, *(10 + np.arange(tokens - contextual - 1))])


def test_pyramiddrop_halves_at_each_quarter_as_published():
    config = override(BASE, {"reduction": {"method": "pyramiddrop", "tokens": 72}})
    assert [(s.first_layer, s.num_slots) for s in config.segments] == [(0, 576), (8, 288), (16, 144), (24, 72)]


@pytest.mark.parametrize("tokens", [192, 128, 64])
@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "visionzip", "tome", "random", "downsample"])
def test_the_published_numbers_of_tokens_reach_the_last_layer(method, tokens):
    config = override(BASE, {"reduction.method": method, "reduction.tokens": tokens})
    assert config.segments[-1].num_slots == tokens
    assert config.num_slots == (576 if method in ("fastv", "pyramiddrop") else tokens)


def test_caches_have_room_for_what_is_kept_only():
    config = override(PLAIN, {"reduction": {"method": "pyramiddrop", "tokens": 2}})
    rooms = {s.name: s.num_slots for s in config.segments}
    assert list(rooms.values()) == [16, 8, 4, 2]
    for name, cache in new_cache(config, 3, 16 + 20, True).items():
        assert cache.key.shape[2] == rooms[name] + 20
    for cache in new_cache(config, 3, 16 + 20, False).values():  # no picture, so nothing is dropped
        assert cache.key.shape[2] == 36


def test_a_long_text_beside_a_picture_fits_where_tokens_were_dropped():
    config = override(PLAIN, {"reduction.tokens": 5})
    image = np.zeros((3, 56, 56), np.float32)
    batch = make_batch([([1, -200, 5], image), ([1] * 26,)], config, Buckets(text_lengths=(8, 16, 32)))
    assert batch.token_ids.shape[1] == 16 + 32  # 26 - 5 tokens need the bucket of 32, although 26 - 16 would fit 16
    assert make_batch([([1] * 26,)], config, Buckets(text_lengths=(8, 16, 32))).token_ids.shape[1] == 32


def test_answers_of_many_texts_in_one_sample_are_refused_where_one_row_decides():
    config = override(PLAIN, {"reduction.tokens": 5})
    sample = ([1, -200, 5, 6, 7], np.zeros((3, 56, 56), np.float32), None, None, np.array([0, 0, 0, 1, 2]))
    batch = make_batch([sample], config, Buckets(text_lengths=(32,)))
    with pytest.raises(BatchError, match=r"last row of a prompt decides .*fastv"):
        jax.eval_shape(lambda: VLM(config).init_with_output(jax.random.key(0), batch))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reduction.method": "fastvv"}, "must be one of fastv, pyramiddrop, visionzip, tome, random, downsample"),
        ({"reduction.tokens": 0}, "reduction.tokens 0 must be at least 1"),
        ({"reduction.tokens": 577}, "577 is above the 576 tokens"),
        ({"reduction.layers": (0,)}, "must be ascending numbers from 1 on"),
        ({"reduction.layers": (2, 4)}, "fastv drops tokens once"),
        ({"reduction.layers": (32,)}, "the decoder has 32"),
        ({"reduction.method": "tome", "reduction.layers": (2,)}, 'is for fastv and pyramiddrop; "tome" has none'),
        ({"reduction.method": "visionzip", "reduction.tokens": 1}, "too few"),
        ({"reduction.method": "tome", "dense.tiles": 1}, "cannot be combined with dense; fastv and pyramiddrop can"),
        ({"reduction.tokens": 64, "crossattention.tiles": 1}, "cannot be combined with crossattention"),
        ({"dense.tiles": 1, "crossattention.tiles": 1}, "crossattention and dense are both on"),
        ({"dense.tiles": 5}, "336 is no multiple of dense.tiles 5"),
        ({"dense.tiles": 2, "image_size": 1008}, "above the tower's native size 336; take more tiles"),
        ({"crossattention.num_heads": 33}, "1024 is no multiple of crossattention.num_heads 33"),
        ({"crossattention.source": "decoder"}, "must be one of tower, connector"),
        ({"dense.tile": 2}, "known there: tiles"),
    ],
)
def test_settings_that_do_not_go_together_say_so(changes, message):
    with pytest.raises(ConfigError, match=message):
        override(BASE, changes)


def test_flexattention_must_be_off_beside_another_way_to_read():
    with pytest.raises(ConfigError, match="crossattention and flexattention are both on"):
        override(preset("7b"), {"crossattention.tiles": 3})
    with pytest.raises(ConfigError, match='"fastv" cannot be combined with flexattention'):
        override(preset("7b"), {"reduction.tokens": 64})
    off = override(preset("7b"), {"flexattention.enabled": False, "reduction.tokens": 64})
    assert [s.name for s in off.segments] == ["layers", "stage1"]


def test_a_convolutional_tower_has_no_class_token():
    with pytest.raises(ConfigError, match="class token; this model has another tower"):
        override(preset("mini"), {"flexattention": None, "reduction": {"method": "visionzip", "tokens": 16}})
