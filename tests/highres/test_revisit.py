"""`flexattention.revisit` False: what a row has read it does not select again."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params
from hypothesis import given, settings
from hypothesis import strategies as st
from mini_search import compute, mini_config

from flexattn_jax.checkpoints.trees import unstack_layers
from flexattn_jax.config import FlexAttentionConfig
from flexattn_jax.highres.flexattention import sample_keys, select, start_selection
from flexattn_jax.inputs.batching import Sample
from flexattn_jax.models.vlm import VLM
from flexattn_jax.training.data import TrainSample, collate

GRID, CELLS = 4, 16


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    selector=st.sampled_from(["attention", "random", "center"]),
    selection=st.sampled_from(["threshold", "top_k"]),
    capacity=st.integers(1, CELLS),
    levels=st.sampled_from([3, 1000]),
)
def test_each_layer_takes_the_strongest_of_what_is_left(seed, selector, selection, capacity, levels):
    shared = {"selector": selector, "cell_grid": GRID, "threshold": 80.0}
    config = FlexAttentionConfig(selection=selection, capacity=capacity, revisit=False, **shared)
    # What ranks all cells that may be kept; other selectors than the map have no threshold, but a share.
    ranking = selection if selector == "attention" else "top_k"
    free = FlexAttentionConfig(selection=ranking, capacity=CELLS, **shared)
    limit = capacity if selection == ranking else round(config.ablation_share * CELLS)
    rng = np.random.default_rng(seed)
    content, candidate = jnp.ones((2, CELLS), bool), jnp.array([[True, True, False]] * 2)
    positions, keys = jnp.array([[5, 6, 7]] * 2), sample_keys(config, 2, None)
    seen = np.asarray(start_selection(config, 2, 3).seen)
    for layer in range(3):
        maps = jnp.asarray(rng.integers(0, levels, (2, 3, CELLS)), jnp.float32)
        arguments = maps, content, candidate, positions, keys
        kept = np.asarray(select(config, *arguments, jnp.asarray(seen), jnp.int32(layer)).keep)
        strength = np.where(seen, -1, np.asarray(select(free, *arguments, None, jnp.int32(layer)).strength))
        expected = np.zeros_like(kept)
        for row in np.ndindex(2, 3):
            strongest = np.argsort(-strength[row], kind="stable")[:limit]
            expected[row][strongest] = strength[row][strongest] >= 0
        np.testing.assert_array_equal(kept, expected)
        assert not expected[:, 2].any()
        seen = seen | kept


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("revisit", [False, True])
def test_the_layers_of_a_model_read_other_cells_each(revisit, scanned):
    changes = {"decoder.num_layers": 4, "flexattention.first_layer": 0, "scan_layers": scanned}
    config = mini_config(changes | {"flexattention.revisit": revisit})
    params = random_params(config, seed=3)
    sample = Sample([1, 5, -200, 7, 9, 12, 13], np.full((3, 96, 96), 0.5, np.float32))
    batch = collate([TrainSample(sample, np.arange(7) > 4)], config, 24, 4)

    def cells_read(params, batch):
        return VLM(config).apply({"params": params}, batch.batch, None, batch.readers)[1]["cells"]

    cells = np.asarray(compute(cells_read, params if scanned else unstack_layers(params), batch))[:3, 0, :2]
    assert (cells.sum(axis=-1) == 3).all()
    assert (cells.sum(axis=0).max() == 1) == (not revisit)  # three times three of nine cells
