"""Every way to read a picture against its float64 restatement: at once, cached, decoding, and in continuations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import restated_systems
from conftest import random_params
from systems import PLAIN, batch_of, problem

from flexattn_jax.checkpoints.trees import unstack_layers
from flexattn_jax.config import override, preset
from flexattn_jax.models.vlm import VLM

SYSTEMS = {
    "dense, as large as low resolution": {"dense.tiles": 3, "image_size": 168},
    "dense, smaller tiles": {"dense.tiles": 2, "image_size": 84},
    "dense, fewer with FastV": {"dense.tiles": 2, "image_size": 84, "reduction.tokens": 11},
    "cross-attention to the tower": {"crossattention.width": 24, "crossattention.num_heads": 3, "image_size": 168},
    "cross-attention to the connector": {
        **{"crossattention.width": 48, "crossattention.num_heads": 4, "crossattention.source": "connector"},
        **{"crossattention.tiles": 2, "image_size": 84},
    },
    "VisToG": {"grouping.groups": 6},
    "FastV": {"reduction.tokens": 5},
    "FastV after one layer": {"reduction.tokens": 9, "reduction.layers": (1,)},
    "PyramidDrop": {"reduction.method": "pyramiddrop", "reduction.tokens": 3},
    "VisionZip": {"reduction.method": "visionzip", "reduction.tokens": 13},
    "VisionZip without contextual tokens": {"reduction.method": "visionzip", "reduction.tokens": 4},
    "ToMe": {"reduction.method": "tome", "reduction.tokens": 5},
    "random": {"reduction.method": "random", "reduction.tokens": 7, "reduction.seed": 3},
    "down-sampling": {"reduction.method": "downsample", "reduction.tokens": 6},
}
OPTIONS = np.array([[[5, 9, 17], [40, 3, 0]]], np.int32)
OPTION_LENGTHS = np.array([[3, 2]], np.int32)
TAIL = [11, 62]
QUICKLY = {"xla_backend_optimization_level": 0}  # of compile and run, the former takes nearly all
SHALLOW = {"decoder.num_layers": 3, "vision.num_layers": 2}
DEFAULT = ("dense, fewer with FastV", "cross-attention to the connector", "VisToG")


def config_of(name, **changes):
    return override(preset("tiny"), PLAIN | SYSTEMS[name] | changes)


def run_everything(config, params, batch):
    """Logits at once; after the prompt; of two decoding steps; inside two continuations of the prompt."""
    apply = partial(VLM(config).apply, {"params": params})
    rows = len(batch.lengths)
    features, _ = apply(batch.pixels, method=VLM.encode)
    at_once, named = apply(batch, features)
    first, memory, _ = apply(batch, batch.token_ids.shape[1] + len(TAIL), features, method=VLM.prefill)
    inside, _, _ = apply(
        memory, np.repeat(OPTIONS, rows, axis=0), np.repeat(OPTION_LENGTHS, rows, axis=0), method=VLM.continuations
    )

    def decode(memory, token):
        logits, memory, _ = apply(memory, jnp.full(rows, token), method=VLM.decode)
        return memory, logits

    _, later = jax.lax.scan(decode, memory, jnp.array(TAIL))
    return at_once, named.get("kept_rows"), jnp.concatenate([first[None], later]), inside


def check(config, lengths, places):
    stacked = override(config, {"scan_layers": True})
    params = random_params(stacked)
    ids, pixels = problem(config, lengths, places)
    batch = batch_of(config, ids, pixels)
    read = params if config.scan_layers else unstack_layers(params)
    with jax.default_matmul_precision("highest"):
        compiled = jax.jit(partial(run_everything, config)).lower(read, batch).compile(QUICKLY)
    at_once, kept, steps, inside = compiled(read, batch)
    for b, prompt in enumerate(ids):
        length = int(batch.lengths[b])
        restate = partial(restated_systems.model, params, stacked, pixels=pixels[b], ranker=length - 1)
        expected, left = restate(prompt)
        read_rows = ~np.isnan(expected).any(axis=1)
        np.testing.assert_allclose(at_once[b, :length][read_rows], expected[read_rows], atol=1e-4)
        for cut, rows in enumerate(left):
            assert set(np.flatnonzero(kept[cut, b, :length])) == rows
        for n in range(len(TAIL) + 1):
            expected, _ = restate([*prompt, *TAIL[:n]])
            np.testing.assert_allclose(steps[n][b], expected[-1], atol=1e-4)
        for o, count in enumerate(OPTION_LENGTHS[0]):
            expected, _ = restate([*prompt, *OPTIONS[0, o, :count]])
            np.testing.assert_allclose(inside[b, o, :count], expected[length:], atol=1e-4)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in DEFAULT else pytest.mark.slow) for name in SYSTEMS]
)
def test_three_prompts_of_different_lengths(name):
    check(config_of(name), lengths=(9, 15, 12), places=(2, None, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense, fewer with FastV", "PyramidDrop", "down-sampling", "VisToG"])
def test_one_prompt_with_unrolled_layers(name):
    check(config_of(name, scan_layers=False), lengths=(10,), places=(3,))


def test_one_prompt_with_unrolled_layers_that_renumbers_positions():
    changes = SHALLOW | {"scan_layers": False, "reduction.layers": (1, 2)}
    check(config_of("PyramidDrop", **changes), lengths=(10,), places=(3,))


@pytest.mark.slow
def test_a_prompt_that_ends_with_its_picture_keeps_the_row_that_answers():
    check(config_of("FastV", **SHALLOW), lengths=(4, 6), places=(3, 0))


@pytest.mark.parametrize(
    ("name", "tower"),
    [(name, tower) for name in ("ToMe", "random", "down-sampling") for tower in ("tiny", "mini")]
    + [("VisionZip", "tiny"), ("VisionZip without contextual tokens", "tiny")],
)
def test_fewer_features_of_either_tower(name, tower):
    small = {"vision.stem_widths": (4, 8, 8, 8), "vision.mlp_dim": 8, "vision.num_layers": 1}
    size = {"image_size": 64, "lowres_size": 64} if tower == "mini" else PLAIN
    changes = {"flexattention": None, "scan_layers": True} | (small if tower == "mini" else {}) | size | SYSTEMS[name]
    config = override(preset(tower), changes)
    params = random_params(config)
    _, pixels = problem(config, (5, 5), (2, 2))
    with jax.default_matmul_precision("highest"):
        see = jax.jit(partial(VLM(config).apply, method=VLM.see))
        views = see({"params": params}, pixels)
    restate = restated_systems.REDUCTIONS[config.reduction.method]
    for found, image in zip(views.lowres, pixels, strict=True):
        np.testing.assert_allclose(found, restate(params, config, image.astype(np.float64)), atol=1e-4)
