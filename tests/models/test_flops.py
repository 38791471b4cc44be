"""The count of operations against XLA's, on a model whose layers are not scanned, so that XLA sees each of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexattn_jax.checkpoints.trees import param_shapes
from flexattn_jax.config import override, preset
from flexattn_jax.inputs.batching import Batch
from flexattn_jax.models.flops import peak_flops, step_flops
from flexattn_jax.models.vlm import VLM
from flexattn_jax.ops import attention
from flexattn_jax.training.data import TrainBatch
from flexattn_jax.training.optimizer import join_params, split_params
from flexattn_jax.training.step import vlm_loss

BATCH, LENGTH, READERS = 2, 256, 8


def xla_flops(config, trainable):
    """Counted on the lowered program, before anything is compiled."""
    trained, frozen = split_params(param_shapes(config), trainable)
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    batch = TrainBatch(
        Batch(
            array(np.int32, BATCH, LENGTH),
            array(np.int32, BATCH),
            array(np.int32, BATCH),
            array(bool, BATCH, config.num_lowres_tokens),
            array(np.float32, BATCH, 3, config.image_size, config.image_size),
        ),
        array(np.int32, BATCH, LENGTH),
        array(np.int32, BATCH, READERS),
    )
    loss_fn, key = vlm_loss(VLM(config)), jax.random.key(0)
    gradient = jax.grad(lambda t, f, b: loss_fn(join_params(t, f), b, jnp.float32(1), key)[0])
    return jax.jit(gradient).lower(trained, frozen, batch).cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("changes", "trainable"),
    [
        ({}, "connector,decoder"),
        ({"flexattention.capacity": 2, "flexattention.union_capacity": 3}, "connector,decoder"),
        ({"flexattention.enabled": False}, "connector"),
        ({"flexattention.enabled": False, "grouping.groups": 48}, "grouping,connector,decoder"),
    ],
)
def test_operations_are_those_that_xla_counts(changes, trainable, monkeypatch):
    # XLA counts the body of a loop once, and attention may be a loop over heads.
    monkeypatch.setattr(attention, "attend_by_rows", lambda *operands, **_: attention._all_heads(*operands))
    wide = {"decoder.width": 256, "decoder.mlp_dim": 512, "decoder.head_dim": 64, "vision.width": 128}
    config = override(preset("tiny"), wide | {"vision.mlp_dim": 512, "scan_layers": False} | changes)
    counted = step_flops(config, BATCH, LENGTH, READERS, trains_decoder="decoder" in trainable)
    assert counted == pytest.approx(xla_flops(config, trainable), rel=0.12)


def test_the_peak_is_known_for_accelerators_and_not_for_this_machine():
    class Device:
        device_kind = "TPU v5 lite"

    assert peak_flops(Device()) == 197e12
    assert peak_flops(jax.devices("cpu")[0]) is None
