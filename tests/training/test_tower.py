"""Training of a tower: labels, crops and changes of pictures against plain loops, and that it learns."""

import jax
import numpy as np
import pytest
from conftest import random_params
from hypothesis import given, settings
from hypothesis import strategies as st
from mini_search import compute, mini_config, search_config

from flexattn_jax.checkpoints.trees import unstack_layers
from flexattn_jax.config import ConfigError, override, preset
from flexattn_jax.inputs.datasets.vsearch import decode_example, load_vsearch
from flexattn_jax.inputs.datasets.vsearch_scenes import CLASSES, COLOURS
from flexattn_jax.models.vlm import VLM
from flexattn_jax.training.optimizer import OptimizerConfig, build_optimizer
from flexattn_jax.training.state import create_state
from flexattn_jax.training.step import make_train_step
from flexattn_jax.training.tower import (
    BACKGROUND,
    TowerConfig,
    TowerSource,
    crop_around_objects,
    label_tokens,
    probe_params,
    tower_loss,
    vary,
)

SIDE = 96
LABEL = jax.jit(label_tokens, static_argnums=(1, 2))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return load_vsearch(tmp_path_factory.mktemp("data"), search_config(), "train", 0, 8)


def restated_labels(objects, grid, side):
    """Token by token: the middle of an object first, else the core of one, the first of several."""
    patch = side / grid
    classes, colours, middles = [], [], []
    for j, i in np.ndindex(grid, grid):
        cores, centres = [], []
        for name, colour, x, y, w, h in objects.tolist():
            if name < 0:
                continue
            across, down = x + w / 2, y + h / 2
            if (across // patch, down // patch) == (i, j):
                centres.append((name, colour))
            if abs((i + 0.5) * patch - across) <= 0.4 * w + 1e-4 and abs((j + 0.5) * patch - down) <= 0.4 * h + 1e-4:
                cores.append((name, colour))
        name, colour = (centres + cores + [(BACKGROUND, -1)])[0]
        classes.append(name)
        colours.append(colour)
        middles.append(bool(centres))
    return classes, colours, middles


OBJECT = st.tuples(st.integers(-1, 39), st.integers(0, 5), *[st.integers(-10, 90)] * 2, *[st.integers(1, 50)] * 2)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(OBJECT, min_size=4, max_size=4), min_size=2, max_size=2), st.sampled_from([0.25, 1.0]))
def test_a_token_is_labelled_with_what_lies_on_it(objects, scale):
    """Also of objects that a crop has cut, and whose sizes are no whole numbers."""
    objects = np.array(objects, np.float32)
    objects[..., 2:] *= scale
    objects[objects[..., 0] < 0] = -1
    found = [np.asarray(part) for part in LABEL(objects, 12, SIDE)]
    for b in range(2):
        for part, expected in zip(found, restated_labels(objects[b], 12, SIDE), strict=True):
            assert part[b].tolist() == expected


def scene(batch=6, seed=0):
    """Pictures of noise in which each object is a block of its own brightness, and one without objects."""
    rng = np.random.default_rng(seed)
    pixels = rng.uniform(0, 0.1, (batch, 3, SIDE, SIDE)).astype(np.float32)
    objects = np.full((batch, 4, 6), -1, np.int32)
    for b in range(batch - 1):
        for k in range(1 + b % 4):
            x, y, w, h = 24 * k + rng.integers(0, 12), rng.integers(0, 80), rng.integers(6, 12), rng.integers(6, 12)
            objects[b, k] = k + 4 * b, k, x, y, w, h
            pixels[b, :, y : y + h, x : x + w] = 2 + k
    return pixels, objects


def block(picture, value):
    """left, top, width, height of the pixels of a brightness."""
    y, x = np.nonzero(np.abs(picture[0] - value) < 1e-3)
    return [x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1]


def test_varied_pictures_still_show_their_objects_in_their_boxes():
    pixels, objects = scene(12)
    changed, moved = compute(lambda *scene: vary(jax.random.key(1), *scene), pixels, objects)
    changed, moved = np.asarray(changed), np.asarray(moved)
    mirrored = []
    for b in range(12):
        candidates = [pixels[b], pixels[b, ..., ::-1]]
        fits = [np.polyfit(c.ravel(), changed[b].ravel(), 1, full=True) for c in candidates]
        flip = int(fits[1][1][0] < fits[0][1][0])
        (gain, shift), residual = fits[flip][0], fits[flip][1][0]
        assert residual < 1e-5 and abs(gain - 1) <= 0.2 and abs(shift) <= 0.2
        mirrored.append(flip)
        for k in np.flatnonzero(objects[b, :, 0] >= 0):
            assert block((changed[b] - shift) / gain, 2 + k) == moved[b, k, 2:].tolist()
        np.testing.assert_array_equal(moved[b, :, [0, 1, 3, 4, 5]], objects[b, :, [0, 1, 3, 4, 5]])
    assert 0 < sum(mirrored) < 12


def test_crops_hold_the_middle_of_an_object_and_know_where_all_are():
    pixels, objects = scene()
    crops, moved = compute(lambda *scene: crop_around_objects(jax.random.key(0), *scene, 40, 30), pixels, objects)
    crops, moved = np.asarray(crops), np.asarray(moved)
    assert crops.shape == (180, 3, 40, 40) and moved.shape == (180, 4, 6)
    seen, corners = [set() for _ in range(5)], set()
    for place in range(180):
        b, there = place % 6, objects[place % 6, :, 0] >= 0
        np.testing.assert_array_equal(moved[place, :, 0], objects[b, :, 0])
        np.testing.assert_array_equal(moved[place, there][:, [1, 4, 5]], objects[b, there][:, [1, 4, 5]])
        if b == 5:
            assert np.isfinite(crops[place]).all()
            continue
        x, y = (objects[b, 0, 2:4] - moved[place, 0, 2:4]).astype(int)
        np.testing.assert_array_equal(crops[place], pixels[b, :, y : y + 40, x : x + 40])
        np.testing.assert_array_equal(objects[b, there, 2:4] - moved[place, there, 2:4], [[x, y]] * there.sum())
        corners.add((x, y))
        middles = moved[place, there, 2:4] + moved[place, there, 4:6] // 2
        inside = ((middles >= 0) & (middles < 40)).all(axis=1)
        assert inside.any()
        seen[b] |= set(np.flatnonzero(inside).tolist())
    # The first and the fourth object never fit into one crop.
    assert [len(objects) for objects in seen] == [1, 2, 3, 4, 1] and len(corners) > 60


def test_samples_are_pictures_with_their_boxes_in_the_models_pixels(rows):
    source = TowerSource(rows, mini_config(), 7, "eight")
    larger = TowerSource(rows, mini_config({"lowres_size": 64, "image_size": 192}), 7, "eight")
    assert len(source) == 8 and source.lengths.positions.tolist() == [16] * 8
    for k in range(8):
        example = decode_example(rows[k])
        (pixels, objects), (large_pixels, large) = source[k], larger[k]
        assert pixels.shape == (3, 96, 96) and large_pixels.shape == (3, 192, 192)
        expected = [[CLASSES.index(o.name), list(COLOURS).index(o.colour), *o.box] for o in example.objects]
        assert objects.tolist() == expected + [[-1] * 6] * (7 - len(expected))
        there = objects[:, 0] >= 0
        np.testing.assert_array_equal(large[there, 2:], 2 * objects[there, 2:])
        np.testing.assert_array_equal(large[:, :2], objects[:, :2])
    batch = source.collate([source[3], None], 16, 1)
    assert batch.pixels.shape == (2, 3, 96, 96) and not batch.pixels[1].any() and (batch.objects[1] == -1).all()
    assert batch.learned == len(decode_example(rows[3]).objects)


@pytest.mark.slow
def test_a_tower_learns_eight_pictures(rows):
    config = mini_config()
    source = TowerSource(rows, config, 5, "eight")
    batch = source.collate([source[k] for k in range(8)], 16, 1)
    settings_ = OptimizerConfig(
        trainable="vision,connector,probe", learning_rate=1e-2, warmup_share=0.0, schedule="constant"
    )
    optimizer = build_optimizer(settings_, 20)
    params = unstack_layers(random_params(config)) | probe_params(config, 0)
    state = create_state(params, settings_, optimizer, seed=0)
    before = jax.tree.map(np.asarray, state.params)
    step = make_train_step(tower_loss(VLM(config), TowerConfig(crops=2, crop_side=48)), optimizer, lambda _: 1.0)
    step = step.lower(state, batch).compile({"xla_backend_optimization_level": 0})  # compiles in half the time
    history = []
    for _ in range(20):
        state, metrics = step(state, batch)
        history.append({name: float(value) for name, value in metrics.items()})
    losses = [entry["loss"] for entry in history]
    assert np.mean(losses[-3:]) < 0.75 * np.mean(losses[:3])
    assert history[-1]["answer_tokens"] == batch.learned
    shares = [f"{view}_{what}" for view in ("lowres", "highres") for what in ("class", "colour")]
    assert all(0 <= entry[name] <= 1 for entry in history for name in shares)
    assert np.mean([entry["highres_colour"] for entry in history[-3:]]) > 0.3
    after = state.params
    assert not np.array_equal(after["vision"]["stem_0"]["kernel"], before["vision"]["stem_0"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, after["decoder"], before["decoder"])


@pytest.mark.slow
def test_the_scalars_are_shares_of_objects(rows):
    """A probe that always says the same is right for that share of them."""
    config = mini_config()
    source = TowerSource(rows, config, 5, "eight")
    batch = source.collate([source[k] for k in range(8)], 16, 1)
    params = unstack_layers(random_params(config)) | probe_params(config, 0)
    for probe, favourite in (("class", 3), ("colour", 2)):
        kernel, bias = params["probe"][probe]["kernel"], params["probe"][probe]["bias"]
        params["probe"][probe] = {"kernel": 0 * kernel, "bias": np.where(np.arange(len(bias)) == favourite, 9.0, 0)}
    loss_fn = tower_loss(VLM(config), TowerConfig(crops=1, crop_side=SIDE))
    _, named = compute(lambda params, batch: loss_fn(params, batch, 1.0, None), params, batch)
    places = {(k, *(o[2:4] + o[4:6] / 2) // 8) for k in range(8) for o in batch.objects[k] if o[0] >= 0}
    assert len(places) == batch.learned  # no two objects on one token
    for probe, column, favourite in (("class", 0, 3), ("colour", 1, 2)):
        share = (batch.objects[batch.objects[..., 0] >= 0][:, column] == favourite).mean()
        assert float(named[f"highres_{probe}"]) == pytest.approx(share)


@pytest.mark.parametrize(
    ("changes", "tower", "message"),
    [
        ({}, {"crop_side": 52}, "tower.crop_side 52 is no multiple of the patch size 8"),
        ({}, {"crop_side": 104}, "tower.crop_side 104 is larger than the pictures, 96"),
        ({"crops": 0}, None, "tower.crops 0"),
        ({"crop_side": 0}, None, "tower.crop_side 0"),
    ],
)
def test_crops_that_cannot_be_made_are_refused(changes, tower, message):
    with pytest.raises(ConfigError, match=message):
        tower_loss(VLM(mini_config()), TowerConfig(**(tower or changes)))


def test_crops_larger_than_a_transformer_reads_are_refused():
    config = override(preset("tiny"), {"image_size": 168})
    with pytest.raises(ConfigError, match=r"tower\.crop_side 84 is larger than what the tower reads, 56"):
        tower_loss(VLM(config), TowerConfig(crop_side=84))
