"""Selector "random": what its draws depend on, and what they do not."""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import random_params
from hypothesis import given, settings
from hypothesis import strategies as st
from mini_search import mini_config

from flexattn_jax.checkpoints.trees import unstack_layers
from flexattn_jax.config import FlexAttentionConfig
from flexattn_jax.highres import flexattention
from flexattn_jax.highres.flexattention import sample_keys, select
from flexattn_jax.inputs.batching import Sample
from flexattn_jax.models.vlm import VLM
from flexattn_jax.training.data import TrainSample, collate
from flexattn_jax.training.step import vlm_loss

CONFIG = FlexAttentionConfig(selector="random", selection="top_k", capacity=3, cell_grid=4, seed=5)


def kept(positions, layer=2, config=CONFIG, key=None, candidate=None):
    """(B, Q, C) bool."""
    positions = np.asarray(positions, np.int32)
    nothing = np.zeros((*positions.shape, 16), np.float32)
    content = np.ones((len(positions), 16), bool)
    candidate = np.ones(positions.shape, bool) if candidate is None else candidate
    keys = sample_keys(config, len(positions), key)
    return np.asarray(select(config, nothing, content, candidate, positions, keys, None, jnp.int32(layer)).keep)


@settings(deadline=None, max_examples=6)
@given(st.lists(st.integers(0, 4000), min_size=12, max_size=12), st.integers(0, 31), st.integers(0, 3))
def test_without_a_key_a_row_keeps_the_strongest_of_its_seed_layer_and_position(positions, layer, seed):
    rows = np.array(positions).reshape(3, 4)
    config = FlexAttentionConfig(selector="random", selection="top_k", capacity=3, cell_grid=4, seed=seed)
    found = kept(rows, layer, config)
    for b, q in np.ndindex(rows.shape):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), layer), rows[b, q])
        scores = jax.random.uniform(key, (16,))
        assert np.flatnonzero(found[b, q]).tolist() == sorted(np.argsort(-scores)[:3].tolist())


def test_without_a_key_a_sample_does_not_depend_on_its_batch():
    rows = np.arange(12).reshape(3, 4)
    whole = kept(rows)
    for order in ([2, 1, 0], [1, 1, 1], [0, 2, 2]):
        np.testing.assert_array_equal(kept(rows[order]), whole[order])
    assert len({cells.tobytes() for cells in whole.reshape(-1, 16)}) > 6
    assert not np.array_equal(kept(rows, layer=3), whole)


def test_a_row_that_may_not_select_keeps_nothing():
    candidate = np.arange(12).reshape(3, 4) % 3 == 0
    assert (kept(np.full((3, 4), 9), candidate=candidate).sum(axis=-1) == 3 * candidate).all()


def test_with_a_key_every_step_and_sample_draws_other_cells():
    rows = np.full((3, 4), 9)
    steps = [kept(rows, key=jax.random.fold_in(jax.random.key(0), step)) for step in range(3)]
    np.testing.assert_array_equal(kept(rows, key=jax.random.fold_in(jax.random.key(0), 1)), steps[1])
    draws = {cells.tobytes() for step in steps for cells in step[:, 0]}
    assert len(draws) > 6  # of nine
    for step in steps:  # within a sample a position still means its cells
        assert (step == step[:, :1]).all() and (step.sum(axis=-1) == 3).all()


def test_training_draws_by_its_key_and_evaluation_by_the_seed(monkeypatch):
    config = mini_config({"flexattention.selector": "random"})
    params = unstack_layers(random_params(config))
    sample = TrainSample(Sample([1, 5, -200, 7, 9, 12, 13], np.zeros((3, 96, 96), np.float32)), np.arange(7) > 4)
    batch = collate([sample, sample], config, 24, 4)
    keys = []
    monkeypatch.setattr(flexattention, "sample_keys", lambda *args: (keys.append(args[-1]), sample_keys(*args))[1])
    for key in (jax.random.key(3), None):
        jax.eval_shape(vlm_loss(VLM(config)), params, batch, jnp.float32(1), key)
    in_layers, without = keys[:2], keys[2:]
    assert [key.dtype == jax.random.key(0).dtype for key in in_layers] == [True, True] and without == [None, None]
