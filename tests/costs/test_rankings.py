"""Rankings by tokens keep what the ranking of cells keeps, so that only their cost differs."""

import jax
import numpy as np
import pytest

from flexattn_jax.config import ConfigError
from flexattn_jax.costs.rankings import keep_by_tokens, ranked_by
from flexattn_jax.highres import flexattention
from flexattn_jax.ops.selection import keep_cells


@pytest.mark.parametrize("ranking", ["tokens", "sort", "approximate"])
@pytest.mark.parametrize("capacity", [3, 9])
def test_the_same_cells_are_kept(ranking, capacity):
    rng = np.random.default_rng(0)
    scores = rng.permutation(255.0 * np.arange(36, dtype=np.float32) / 36).reshape(2, 2, 9)
    candidate = rng.random((2, 2, 9)) < 0.7
    want = keep_cells(scores, candidate, capacity)
    found = keep_by_tokens(scores, candidate, capacity, ranking=ranking, tokens_a_cell=4)
    jax.tree.map(np.testing.assert_array_equal, found, want)


def test_the_models_own_ranking_comes_back():
    with ranked_by("tokens", 4):
        assert flexattention.keep_cells is not keep_cells
    assert flexattention.keep_cells is keep_cells
    with pytest.raises(ZeroDivisionError), ranked_by("sort", 4):
        raise ZeroDivisionError
    assert flexattention.keep_cells is keep_cells
    with ranked_by("mask", 4):
        assert flexattention.keep_cells is keep_cells


def test_an_unknown_ranking_is_named():
    with pytest.raises(ConfigError, match="'best'; known: cells"), ranked_by("best", 4):
        pass
