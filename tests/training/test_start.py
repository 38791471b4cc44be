"""What a run may begin with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FIXTURES

from flexattn_jax.checkpoints import layouts
from flexattn_jax.checkpoints.errors import CheckpointError
from flexattn_jax.checkpoints.store import load_params, save_model
from flexattn_jax.checkpoints.trees import flatten, param_shapes
from flexattn_jax.config import ConfigError, override, preset
from flexattn_jax.training.optimizer import split_params
from flexattn_jax.training.start import StartConfig, open_start
from flexattn_jax.training.state import draw_params

LLAVA = FIXTURES / "hf_llava_tiny"


def test_a_checkpoint_is_read_as_float32_whatever_is_computed(checkpoint):
    start = open_start(StartConfig(checkpoint=str(checkpoint), dtype="bfloat16"), {"remat": "dots"}, seed=0)
    assert (start.config.dtype, start.config.remat, start.tokenizer) == ("bfloat16", "dots", checkpoint)
    jax.tree.map(np.testing.assert_array_equal, start.params(), load_params(checkpoint))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), start.params())
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), param_shapes(start.config))


def test_parts_begin_anew_by_the_seed(checkpoint):
    make = lambda seed: open_start(StartConfig(checkpoint=str(checkpoint), redraw="connector/fc1"), {}, seed)  # noqa: E731
    stored, first, again, other = (
        flatten(p) for p in (load_params(checkpoint), *(make(s).params() for s in (0, 0, 1)))
    )
    for path in stored:
        if path == "connector/fc1/kernel":
            assert np.array_equal(first[path], again[path]) and not np.array_equal(first[path], other[path])
            assert np.std(first[path]) == pytest.approx(0.02, rel=0.1)
        elif path == "connector/fc1/bias":
            assert not np.asarray(first[path]).any()
        else:
            np.testing.assert_array_equal(first[path], stored[path])


def test_a_published_llava_gets_projections_and_keeps_everything_else():
    low = open_start(StartConfig(checkpoint=str(LLAVA), read_highres=False), {"flexattention.warmup": 5.0}, seed=0)
    assert low.config.flexattention is None and not low.config.reads_highres
    high = open_start(StartConfig(checkpoint=str(LLAVA)), {"flexattention.first_layer": 1}, seed=0)
    assert high.config.reads_highres and high.config.image_size == 3 * low.config.image_size
    before, after = low.params()["decoder"], high.params()["decoder"]
    jax.tree.map(np.testing.assert_array_equal, before["layers"], after["layers"])
    drawn = np.asarray(after["highres"]["k_proj_hd"]["kernel"])
    assert drawn.shape[0] == high.config.decoder.num_layers - 1
    assert np.std(drawn) == pytest.approx(0.02, rel=0.1) and drawn.dtype == np.float32


@pytest.mark.parametrize("drawn", [False, True])
def test_copied_projections_are_the_layers_own_in_memory_of_their_own(checkpoint, drawn):
    source = {"preset": "mini", "tokenizer": str(checkpoint)} if drawn else {"checkpoint": str(checkpoint)}
    start = open_start(StartConfig(**source, copy_projections=True), {"scan_layers": True}, seed=0)
    params = start.params()
    for part in "kv":
        own = params["decoder"]["layers"]["self_attn"][f"{part}_proj"]["kernel"]
        copied = params["decoder"]["highres"][f"{part}_proj_hd"]["kernel"]
        np.testing.assert_array_equal(copied, own[start.config.flexattention.first_layer :])
    assert jax.tree.leaves(jax.jit(lambda tree: jax.tree.map(jnp.negative, tree), donate_argnums=0)(params))


def test_vistogs_stages_add_semantic_tokens_to_a_published_llava_and_go_on_with_them(tmp_path):
    draw = lambda seed: open_start(  # noqa: E731
        StartConfig(checkpoint=str(LLAVA), read_highres=False, redraw="connector"), {"grouping.groups": 4}, seed
    )
    first, (params, other) = draw(0), (draw(seed).params() for seed in (0, 1))
    assert first.config.grouping.groups == 4 and params["grouping"]["semantic_tokens"].shape[0] == 4
    assert not np.array_equal(params["grouping"]["semantic_tokens"], other["grouping"]["semantic_tokens"])
    assert not np.array_equal(params["connector"]["fc1"]["kernel"], other["connector"]["fc1"]["kernel"])
    trained, frozen = split_params(params, "grouping,connector")
    assert set(trained) == {"grouping", "connector"} and set(frozen) == {"vision", "decoder"}
    save_model(tmp_path / "aligned", first.config, params, like=LLAVA)
    second = open_start(StartConfig(checkpoint=str(tmp_path / "aligned"), read_highres=False), {}, seed=3)
    jax.tree.map(np.testing.assert_array_equal, second.params(), params)


@pytest.mark.parametrize("added", [{"grouping.groups": 4}, {"crossattention.width": 32, "crossattention.num_heads": 4}])
def test_what_nobody_publishes_is_added_to_a_checkpoint_with_flexattention(checkpoint, added):
    start = open_start(StartConfig(checkpoint=str(checkpoint), read_highres=False), added, seed=0)
    params, stored = (flatten(p) for p in (start.params(), load_params(checkpoint)))
    assert {path: leaf.shape for path, leaf in params.items()} == layouts.leaf_shapes(start.config)
    path = "decoder/layers/mlp/up_proj/kernel"
    np.testing.assert_array_equal(params[path], stored[path])


def test_high_resolution_can_be_left_out_of_a_checkpoint_that_has_it(checkpoint):
    start = open_start(StartConfig(checkpoint=str(checkpoint), read_highres=False), {}, seed=0)
    assert start.config.flexattention is not None and not start.config.reads_highres


def test_a_native_checkpoint_without_projections_says_how_to_get_them(checkpoint, small_config, tmp_path):
    plain = override(small_config, {"flexattention": None, "image_size": 56})
    save_model(tmp_path / "plain", plain, draw_params(plain, 0))
    with pytest.raises(CheckpointError, match="import the published checkpoint again with --flexattention"):
        open_start(StartConfig(checkpoint=str(tmp_path / "plain")), {}, seed=0)


def test_random_parameters_of_a_preset(tmp_path):
    start = open_start(StartConfig(preset="tiny", tokenizer=str(tmp_path)), {"scan_layers": False}, seed=1)
    params = start.params()
    assert start.config == override(preset("tiny"), {"scan_layers": False}) and start.tokenizer == tmp_path
    assert {"layers_0", "highres_0"} <= set(params["decoder"])
    assert np.asarray(params["decoder"]["final_norm"]["scale"] == 1).all()
    with pytest.raises(ConfigError, match=r"--config\.start\.preset and --config\.start\.tokenizer"):
        open_start(StartConfig(preset="tiny"), {}, seed=0)
