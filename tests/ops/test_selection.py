"""Cells, their ranking, capacities and lists, against literal cases and plain restatements."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexattn_jax.ops.selection import (
    Selection,
    cell_tokens,
    gather_cells,
    keep_cells,
    list_cells,
    normalise_map,
    pool_cells,
    pool_windows,
    unite_rows,
)


def test_pool_windows_of_the_published_grid():
    windows = pool_windows(24, 9)
    assert windows[:, 0].tolist() == [0, 2, 5, 8, 10, 13, 16, 18, 21]
    assert windows[:, -1].tolist() == [2, 5, 7, 10, 13, 15, 18, 21, 23]


@given(grid=st.integers(1, 40), cells=st.integers(1, 12))
def test_pool_windows_are_those_of_adaptive_pooling(grid, cells):
    windows = pool_windows(grid, cells)
    for i in range(cells):
        start, end = int(np.floor(i * grid / cells)), int(np.ceil((i + 1) * grid / cells))
        assert sorted(set(windows[i].tolist())) == list(range(start, end))


@given(cells=st.integers(1, 9), extra=st.integers(0, 30))
def test_every_token_lies_in_exactly_one_cell(cells, extra):
    grid = cells + extra
    index, valid = cell_tokens(grid, cells)
    assert sorted(index[valid].tolist()) == list(range(grid * grid))
    for cell in range(cells * cells):
        for token in index[cell][valid[cell]]:
            y, x = divmod(int(token), grid)
            assert (y * cells // grid) * cells + x * cells // grid == cell


def test_cells_of_the_published_grid_are_8_by_8_blocks():
    index, valid = cell_tokens(72, 9)
    assert index.shape == (81, 64) and valid.all()
    assert index[1].tolist() == [72 * y + x for y in range(8) for x in range(8, 16)]


@pytest.mark.parametrize("grid, cells", [(6, 3), (6, 6), (7, 3)])
def test_tokens_are_laid_out_cell_by_cell(grid, cells):
    tokens = np.random.default_rng(0).random((2, grid**2, 3)).astype(np.float32)
    np.testing.assert_array_equal(gather_cells(tokens, grid, cells), tokens[:, cell_tokens(grid, cells)[0]])


def test_normalise_map_scales_each_row_and_marks_flat_ones():
    scaled = normalise_map(jnp.array([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
    assert scaled.tolist() == [[0.0, 127.5, 255.0], [-1.0, -1.0, -1.0]]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), grid=st.sampled_from([4, 9, 12, 14, 24]), cells=st.sampled_from([1, 3, 9]))
def test_pool_cells_takes_the_largest_of_each_window(seed, grid, cells):
    scores = np.random.default_rng(seed).random((2, 3, grid, grid)).astype(np.float32)
    pooled = np.asarray(pool_cells(scores.reshape(2, 3, -1), cells)).reshape(2, 3, cells, cells)
    for i in range(cells):
        for j in range(cells):
            rows = slice(i * grid // cells, -(-(i + 1) * grid // cells))
            columns = slice(j * grid // cells, -(-(j + 1) * grid // cells))
            np.testing.assert_array_equal(pooled[..., i, j], scores[..., rows, columns].max(axis=(-1, -2)))


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000), capacity=st.integers(1, 9), ties=st.booleans())
def test_keep_cells_keeps_the_strongest_and_counts_the_rest(seed, capacity, ties):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (2, 3, 9)).astype(np.float32) if ties else rng.random((2, 3, 9), np.float32)
    candidate = rng.random((2, 3, 9)) < 0.7
    kept = keep_cells(scores, candidate, capacity)
    for b in range(2):
        for q in range(3):
            order = [c for c in np.argsort(-scores[b, q], kind="stable") if candidate[b, q, c]]
            assert np.flatnonzero(kept.keep[b, q]).tolist() == sorted(order[:capacity])
            assert int(kept.overflow[b, q]) == len(order[capacity:])
    np.testing.assert_array_equal(kept.strength, np.where(kept.keep, scores, -1))


def test_keep_cells_with_room_for_all_keeps_every_candidate():
    candidate = np.array([[[True, False, True]]])
    kept = keep_cells(np.array([[[0.0, 9.0, 1.0]]], np.float32), candidate, 3)
    np.testing.assert_array_equal(kept.keep, candidate)
    assert kept.overflow.tolist() == [[0]]


def test_rounding_does_not_choose_between_the_strongest_cells_of_two_rows():
    kept = []
    for first, second in ((255.0, 255.0), (255.0, 254.99998), (254.99998, 255.0)):
        scores = np.array([[[0, first, 0], [0, 0, second]]], np.float32)
        rows = keep_cells(scores, scores > 0, 2)
        kept.append(np.asarray(unite_rows(rows, 1)[1]).tolist())
    assert kept == [[[False, True, False]]] * 3


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), capacity=st.integers(1, 9))
def test_unite_rows_stays_within_the_union_and_counts_what_it_drops(seed, capacity):
    rng = np.random.default_rng(seed)
    rows = keep_cells(255 * rng.random((2, 4, 9), np.float32), rng.random((2, 4, 9)) < 0.4, 9)
    united, union = unite_rows(rows, capacity)
    assert (np.asarray(union).sum(axis=-1) <= capacity).all()
    np.testing.assert_array_equal(united.keep, rows.keep & union[:, None])
    np.testing.assert_array_equal(united.overflow, (rows.keep & ~union[:, None]).sum(axis=-1))
    for b in range(2):  # the cells that stay are the strongest anywhere
        strength = np.asarray(rows.strength[b]).max(axis=0)
        dropped = np.asarray(rows.keep[b]).any(axis=0) & ~np.asarray(union[b])
        if dropped.any():
            assert strength[dropped].max() <= strength[np.asarray(union[b])].min() + 1 / 64


@settings(deadline=None, max_examples=50)
@given(keep=st.lists(st.booleans(), min_size=9, max_size=9), spare=st.integers(0, 3))
def test_list_cells_lists_them_in_order(keep, spare):
    length = max(1, sum(keep)) + spare
    cells, count = list_cells(np.array([keep]), length)
    chosen = [c for c, kept in enumerate(keep) if kept]
    assert count.tolist() == [len(chosen)]
    assert cells[0].tolist() == chosen + [9] * (length - len(chosen))


@pytest.mark.parametrize("value", [np.nan, 1.0])
def test_a_map_that_says_nothing_keeps_nothing_even_with_top_k(value):
    scores = pool_cells(normalise_map(np.full((1, 1, 81), value, np.float32)), 9)
    kept: Selection = keep_cells(scores, scores >= 0, 8)
    assert not kept.keep.any()
