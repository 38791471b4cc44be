"""The convolutional tower: against its float64 restatement, in checkpoints, and settings that make none."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import restatement
from conftest import random_params
from mini_search import compute, mini_config

from flexattn_jax.api import VisionLanguageModel
from flexattn_jax.checkpoints.errors import CheckpointError
from flexattn_jax.checkpoints.export_weights import export_weights, main
from flexattn_jax.checkpoints.layouts import leaf_shapes
from flexattn_jax.checkpoints.store import open_checkpoint, save_model
from flexattn_jax.checkpoints.trees import flatten, nest, unstack_layers
from flexattn_jax.config import ConfigError, from_dict, override, preset, to_dict
from flexattn_jax.inputs.batching import Buckets, Sample, make_batch
from flexattn_jax.models.vision import build_tower
from flexattn_jax.models.vlm import VLM

TOWERS = {
    "small": {},
    "no blocks, no places": {"vision.num_layers": 0, "vision.position_dims": 0},
    "three blocks, scanned": {"vision.num_layers": 3, "scan_layers": True, "vision.position_dims": 8},
    "one stride": {"vision.stem_widths": (10,), "vision.stem_strides": (8,)},
}


@pytest.fixture(scope="module")
def mini():
    config = mini_config()
    return config, random_params(config)


@pytest.mark.parametrize("name", TOWERS)
def test_the_tower_is_the_restated_one(name):
    config = mini_config(TOWERS[name])
    params = random_params(config)["vision"]
    pixels = np.random.default_rng(0).standard_normal((2, 3, 48, 48)).astype(np.float32)
    read = params if config.scan_layers else unstack_layers({"vision": params})["vision"]
    found = compute(build_tower(config.vision, np.float32, config.scan_layers).apply, {"params": read}, pixels)
    assert found.shape == (2, 36, config.vision.width)
    for features, picture in zip(found, pixels, strict=True):
        expected = restatement.conv_tower(params, config.vision, picture.astype(np.float64))
        np.testing.assert_allclose(features, expected, atol=1e-4)


def test_both_resolutions_are_the_restated_ones(mini):
    """The large picture is read whole, not in tiles."""
    config, params = mini
    pixels = np.random.default_rng(1).standard_normal((2, 3, 96, 96)).astype(np.float32)
    _, named = compute(
        lambda *args: VLM(config).apply({"params": args[0]}, args[1], method="encode"), unstack_layers(params), pixels
    )
    for b in range(2):
        lowres, highres = restatement.encode(params, config, pixels[b].astype(np.float64))
        np.testing.assert_allclose(named["lowres"][b], lowres, atol=1e-4)
        np.testing.assert_allclose(named["highres"][b], highres, atol=1e-4)


@pytest.mark.slow
def test_the_whole_model_is_the_restated_one(mini):
    config, params = mini
    rng = np.random.default_rng(1)
    ids = [rng.integers(3, 128, n) for n in (9, 12)]
    ids[0][2] = ids[1][4] = -200
    pixels = rng.standard_normal((2, 3, 96, 96)).astype(np.float32)
    sizes = [(96, 96), (96, 40)]
    logits, named = VisionLanguageModel(config, params).logits(pixels, ids, sizes, capture=["cells"])
    for b, prompt in enumerate(ids):
        expected, cells = restatement.model(params, config, prompt, pixels[b], sizes[b])
        np.testing.assert_allclose(np.asarray(logits)[b, : len(expected)], expected, atol=1e-4)
        for made, kept in zip(np.asarray(named["cells"])[:, b, 0], cells.values(), strict=True):
            np.testing.assert_array_equal(made, kept[len(expected) - 1])
            assert made.sum() == 3


@pytest.mark.parametrize("scan", [True, False])
def test_shapes_of_checkpoints_are_those_of_the_model(scan):
    config = mini_config({"scan_layers": scan, "vision.num_layers": 2})
    pixels = np.zeros((3, config.image_size, config.image_size), np.float32)
    batch = make_batch([Sample([1, -200, 5], pixels)], config, Buckets())
    made = jax.eval_shape(lambda: VLM(config).init(jax.random.key(0), batch))["params"]
    listed = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in leaf_shapes(config).items()}
    if not scan:
        zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), nest(listed))  # noqa: E731
        listed = flatten(jax.eval_shape(lambda: unstack_layers(zeros())))
    assert {path: leaf.shape for path, leaf in flatten(made).items()} == {p: leaf.shape for p, leaf in listed.items()}


@pytest.fixture(scope="module")
def checkpoint(mini, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini") / "checkpoint"
    save_model(folder, *mini)
    return folder


def test_a_checkpoint_gives_the_tower_back(mini, checkpoint):
    config, params = mini
    stored = open_checkpoint(checkpoint)
    assert stored.config == config
    for scan, expected in ((True, params), (False, unstack_layers(params))):
        read = flatten(stored.params(override(config, {"scan_layers": scan})))
        expected = flatten(expected)
        assert read.keys() == expected.keys()
        for path in expected:
            np.testing.assert_array_equal(read[path], expected[path], err_msg=path)


@pytest.mark.parametrize("layout", ["llava", "hf"])
def test_no_published_layout_has_a_place_for_it(checkpoint, tmp_path, layout, capsys):
    with pytest.raises(CheckpointError, match=rf"{checkpoint} has a convolutional tower, .* the {layout} layout"):
        export_weights(checkpoint, tmp_path / "out", layout)
    assert main(["--source", str(checkpoint), "--out", str(tmp_path / "out"), "--layout", layout]) == 1
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [preset("mini"), mini_config(), preset("tiny"), preset("7b")])
def test_both_kinds_of_tower_survive_json(config):
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision.stem_widths": (8, 12, 16)}, "must be as many numbers"),
        ({"vision.stem_widths": (), "vision.stem_strides": ()}, "at least one"),
        ({"vision.stem_widths": (0, 12)}, "widths lie in 1"),
        ({"vision.stem_strides": (4, 3)}, r"stem_strides \(4, 3\) must be even"),
        ({"vision.stem_strides": (4, 0)}, "must be even"),
        ({"vision.stem_strides": (4, 2.0)}, "vision.stem_strides must be a list of whole numbers"),
        ({"vision.position_dims": 6}, "position_dims 6 is no multiple of 4"),
        ({"vision.position_dims": -4}, "position_dims -4"),
        ({"vision.num_layers": -1}, "vision.num_layers is -1; it must lie in 0"),
        ({"vision.mlp_dim": 0}, "vision.mlp_dim is 0; it must lie in 1"),
        ({"lowres_size": 36, "image_size": 108}, "lowres_size 36 is no multiple of the patch size 8"),
        ({"vision.select_layer": -2}, "'vision.select_layer'; known there: stem_widths"),
        ({"vision.patch_size": 14}, "'vision.patch_size'; known there: stem_widths"),
    ],
)
def test_settings_that_make_no_tower_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        mini_config(change)
