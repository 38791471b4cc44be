"""Answer rows, label expansion and the loss, against literal cases and the float64 restatement."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import restatement
from conftest import random_params

from flexattn_jax.config import override, preset
from flexattn_jax.inputs.batching import Buckets, Sample, make_batch
from flexattn_jax.models.vlm import VLM
from flexattn_jax.training.loss import (
    IGNORED,
    answer_rows,
    cross_entropy,
    expand_labels,
    grounding_loss,
    next_token_loss,
)


def test_answer_rows_precede_each_answer_token():
    labels = np.array([[-100, -100, 7, 8, -100, 9], [-100, 1, 2, 3, 4, 5], [-100, -100, -100, -100, -100, -100]])
    assert answer_rows(labels, [1, -1, 0]).tolist() == [[1, 2, 4], [6, 6, 6], [6, 6, 6]]
    assert answer_rows(labels, [1, -1, 0], capacity=4).tolist()[0] == [1, 2, 4, 6]
    with pytest.raises(ValueError, match="3 rows that predict an answer, but there is room for 2"):
        answer_rows(labels, [1, -1, 0], capacity=2)


def test_labels_make_room_for_the_picture():
    labels = [np.array([-100, -100, 5, 6]), np.array([-100, 7])]
    assert expand_labels(labels, [1, -1], 3, 7).tolist() == [
        [-100, -100, -100, -100, 5, 6, -100],
        [-100, 7, -100, -100, -100, -100, -100],
    ]


def conversation(config, seed=0):
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, 128, 12), rng.integers(3, 128, 9)]
    ids[0][2] = -200
    labels = [np.full(12, IGNORED), np.full(9, IGNORED)]
    labels[0][[5, 6, 9, 10]] = ids[0][[5, 6, 9, 10]]  # two turns
    labels[1][4:7] = ids[1][4:7]
    pixels = rng.standard_normal((3, config.image_size, config.image_size)).astype(np.float32)
    batch = make_batch([Sample(ids[0], pixels, (90, 60)), Sample(ids[1])], config, Buckets())
    expanded = expand_labels(labels, batch.image_start, config.num_lowres_tokens, batch.token_ids.shape[1])
    return ids, pixels, batch, expanded


@pytest.mark.parametrize("alpha", [0.35, 1.0])
def test_the_loss_of_a_mixed_batch_is_the_restated_one(tiny, alpha):
    config, params = tiny
    ids, pixels, batch, labels = conversation(config)
    readers = answer_rows(labels, batch.image_start)
    loss, _ = next_token_loss(VLM(config), params, batch, labels, readers, jnp.float32(alpha))
    total, tokens = 0.0, 0
    for b, prompt in enumerate(ids):
        rows = np.flatnonzero(labels[b][1:] != IGNORED)
        logits, _ = restatement.model(params, config, prompt, pixels, (90, 60), rows if b == 0 else (), alpha)
        logits = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        total -= sum(logits[row, labels[b][row + 1]] for row in rows)
        tokens += len(rows)
    assert float(loss) == pytest.approx(total / tokens, abs=1e-5)


def test_dropped_out_a_sample_reads_low_resolution_alone(tiny):
    """Each sample by itself, others in other steps, and none in evaluation."""
    config, params = tiny
    prompt = np.arange(3, 13)
    prompt[2] = -200
    pixels = np.random.default_rng(0).standard_normal((3, config.image_size, config.image_size)).astype(np.float32)
    batch = make_batch([Sample(prompt, pixels, (90, 60))] * 8, config, Buckets())

    def last_logits(dropout, alpha=None, seed=None):
        model = VLM(override(config, {"flexattention.dropout": dropout}))
        key = None if seed is None else jax.random.key(seed)
        logits, _ = jax.jit(model.apply)({"params": params}, batch, None, None, alpha, key)
        return np.asarray(logits[:, batch.lengths[0] - 1])

    whole, alone = last_logits(0.5)[0], last_logits(0.0, jnp.float32(0))[0]
    assert np.abs(whole - alone).max() > 1e-3
    chosen = []
    for seed in (0, 1):
        logits = last_logits(0.5, jnp.float32(1), seed)
        near = [[np.allclose(row, other, atol=1e-5) for other in (whole, alone)] for row in logits]
        assert all(sum(pair) == 1 for pair in near)
        chosen.append([pair[1] for pair in near])
    assert 0 < sum(chosen[0]) < 8 and chosen[0] != chosen[1]
    np.testing.assert_allclose(last_logits(1.0, None, 0), np.broadcast_to(alone, (8, len(alone))), atol=1e-5)


@pytest.mark.slow
def test_union_capacity_changes_nothing_while_it_is_not_exceeded(tiny):
    config, params = tiny
    few = override(config, {"flexattention.capacity": 1})
    _, _, batch, labels = conversation(config)
    readers = answer_rows(labels, batch.image_start)

    def run(union):
        model = VLM(override(few, {"flexattention.union_capacity": union}))
        return jax.value_and_grad(lambda p: next_token_loss(model, p, batch, labels, readers)[0])(params)

    (loss, gradient), (limited_loss, limited_gradient) = run(None), run(readers.shape[1])
    assert float(loss) == pytest.approx(float(limited_loss), abs=1e-6)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(limited_gradient), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_cells_beyond_the_union_capacity_are_counted(tiny):
    config, params = tiny
    limited = override(config, {"flexattention.union_capacity": 1, "flexattention.threshold": 10.0})
    _, _, batch, labels = conversation(config)
    readers = answer_rows(labels, batch.image_start)
    _, named = next_token_loss(VLM(limited), params, batch, labels, readers)
    used = np.asarray(named["cells"])[:, 0].any(axis=1).sum(axis=-1)
    assert (used <= 1).all() and np.asarray(named["overflow"]).sum() > 0


def test_gradients_do_not_reach_tower_or_unread_projections(tiny):
    config, params = tiny
    _, _, batch, labels = conversation(config)
    readers = answer_rows(labels, batch.image_start)
    gradients = jax.grad(lambda p: next_token_loss(VLM(config), p, batch, labels, readers)[0])(params)
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients["vision"]))
    first, *later = np.asarray(gradients["decoder"]["highres"]["k_proj_hd"]["kernel"])
    assert not first.any() and all(layer.any() for layer in later)


def test_a_preset_of_random_parameters_matters():
    """The restated loss would hold for a model that ignores its picture, were the selection empty."""
    config = preset("tiny")
    _, _, batch, labels = conversation(config)
    readers = answer_rows(labels, batch.image_start)
    params = random_params(config)
    _, named = next_token_loss(VLM(config), params, batch, labels, readers)
    off = next_token_loss(VLM(override(config, {"flexattention.enabled": False})), params, batch, labels, readers)[0]
    on = next_token_loss(VLM(config), params, batch, labels, readers)[0]
    assert np.asarray(named["cells"])[:-1, 0].any() and abs(float(on) - float(off)) > 1e-4


@pytest.mark.parametrize("at_once", [10_000, 101 * 7, 300, 7])  # all at once; one, three, and as many parts as tokens
def test_the_loss_in_parts_of_the_vocabulary_is_that_of_all_logits(at_once):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((2, 7, 16)), jnp.float32)
    head = jnp.asarray(rng.standard_normal((101, 16)), jnp.float32)  # 101 is a multiple of none
    targets, weights = jnp.asarray(rng.integers(0, 101, (2, 7))), jnp.asarray(rng.standard_normal((2, 7)))

    def whole(hidden, head):
        return (optax.softmax_cross_entropy_with_integer_labels(hidden @ head.T, targets) * weights).sum()

    def parts(hidden, head):
        return (cross_entropy(hidden, head, targets, at_once) * weights).sum()

    (want, wanted), (found, gradients) = (jax.value_and_grad(f, (0, 1))(hidden, head) for f in (whole, parts))
    assert float(found) == pytest.approx(float(want), abs=1e-4)
    for one, other in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_step_of_training_has_no_array_of_all_logits():
    hidden, head = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 1024, 64), (60_000, 64)))
    gradient = jax.grad(lambda h, w, t: cross_entropy(h, w, t).sum(), (0, 1))
    text = jax.jit(gradient).lower(hidden, head, jax.ShapeDtypeStruct((2, 1024), np.int32)).as_text()
    assert "2x1024x4000xf32" in text and "2x1024x60000" not in text


def test_grounding_is_the_chance_that_draws_from_all_maps_miss():
    maps = np.random.default_rng(0).uniform(0.01, 1, (4, 2, 3, 9)).astype(np.float32)
    places = np.array([[2, -1, 8], [4, -1, -1]], np.int32)
    losses = []
    for b, row, place in [(0, 0, 2), (0, 2, 8), (1, 0, 4)]:
        missed = np.prod([(1 - m[place] / m.sum()) ** 5 for m in maps[:3, b, row].astype(np.float64)])
        losses.append(-np.log(1 - missed))
    assert float(grounding_loss(maps, places, 5)) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(grounding_loss(maps, np.full((2, 3), -1), 5)) == 0
    sure = np.zeros((2, 1, 1, 4), np.float32)
    sure[..., 1] = 1
    for place, least, most in ((1, 0, 1e-5), (3, 5, np.inf)):
        value, slope = jax.value_and_grad(grounding_loss)(sure, np.array([[place]]), 4)
        assert least <= float(value) < most and np.isfinite(slope).all()


def test_maps_learn_only_where_they_are_grounded(tiny):
    """The maps of `grounded` are those of capture, with a gradient for what made them; a selection never has one."""
    config, params = tiny
    _, _, batch, labels = conversation(config)
    readers = answer_rows(labels, batch.image_start)

    def total(params, **wanted):
        return next_token_loss(VLM(config), params, batch, labels, readers, **wanted)[1]["map"].sum()

    (map_sum, gradient), (captured, none) = (
        jax.value_and_grad(lambda p, wanted=wanted: total(p, **{wanted: True}))(params)
        for wanted in ("grounded", "capture")
    )
    assert float(map_sum) == pytest.approx(float(captured), rel=1e-5)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(none))
    moved = {path[-2].key for path, leaf in jax.tree_util.tree_leaves_with_path(gradient) if np.asarray(leaf).any()}
    assert {"q_proj", "k_proj"} <= moved
    _, named = next_token_loss(VLM(config), params, batch, labels, readers)
    assert "map" not in named
