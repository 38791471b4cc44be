"""Where arrays lie: rules and meshes, and whole programs on 8 simulated devices against one."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexattn_jax.checkpoints.trees import param_shapes
from flexattn_jax.config import ConfigError, preset
from flexattn_jax.partitioning import Partition, PartitionConfig, constrain, make_partition, parse_rules, per_sample

TESTS = Path(__file__).parent
MESHES = ("8x1x1", "1x8x1", "2x2x2")  # data x fsdp x tensor


def described(preset_name="fsdp", count=256, **sizes) -> Partition:
    """A partition of devices that are only described; nothing can be placed on it."""
    config = PartitionConfig(preset_name, **sizes)
    mesh = jax.sharding.AbstractMesh(config.shape(count), ("slice", "data", "fsdp", "tensor"))
    return Partition(mesh, parse_rules(config.rules), config.largest_replicated)


def specs(partition, config):
    shardings = partition.state_shardings({"trained": param_shapes(config)})
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(sharding.spec)
        for path, sharding in jax.tree_util.tree_flatten_with_path(shardings)[0]
    }


def test_a_full_size_models_parameters_are_split_by_their_paths():
    found = specs(described("fsdp_tensor"), preset("7b"))
    fsdp, tensor = "fsdp", "tensor"
    for path, want in {
        "decoder/embedding": (tensor, fsdp),
        "decoder/lm_head/kernel": (tensor, fsdp),
        "decoder/layers/self_attn/q_proj/kernel": (None, tensor, fsdp),
        "decoder/highres/k_proj_hd/kernel": (None, tensor, fsdp),
        "decoder/layers/self_attn/o_proj/kernel": (None, fsdp, tensor),
        "decoder/layers/mlp/up_proj/kernel": (None, tensor, fsdp),
        "decoder/layers/mlp/down_proj/kernel": (None, fsdp, tensor),
        "decoder/layers/input_norm/scale": (None, None),
        "vision/blocks/self_attn/q_proj/kernel": (None, fsdp, None),
        "vision/position_embedding": (None, fsdp),
        "connector/fc1/kernel": (tensor, fsdp),
    }.items():
        assert found[f"trained/{path}"] == want, path
    whole = specs(described("data"), preset("7b"))
    assert not any(any(spec) for spec in whole.values())


@pytest.mark.parametrize("name", ["7b", "13b"])
@pytest.mark.parametrize("sizes", [{"count": 256}, {"count": 64, "tensor": 4}, {"count": 512, "slice": 2}])
def test_no_large_parameter_of_a_full_size_model_is_left_whole(name, sizes):
    found = specs(described(**sizes), preset(name))
    shapes = jax.tree_util.tree_flatten_with_path({"trained": param_shapes(preset(name))})[0]
    large = [
        jax.tree_util.keystr(path, simple=True, separator="/") for path, leaf in shapes if np.prod(leaf.shape) > 1 << 20
    ]
    assert len(large) > 18 and all(any(found[path]) for path in large)


def test_a_large_parameter_that_is_left_whole_is_an_error_that_names_it():
    array = jax.ShapeDtypeStruct
    unknown = {"trained": {"decoder": {"novel_proj": {"kernel": array((4096, 4096), np.float32)}}}}
    with pytest.raises(ConfigError, match=r"trained/decoder/novel_proj/kernel \(4096, 4096\).*no rule"):
        described().state_shardings(unknown)
    odd = {"decoder": {"layers": {"self_attn": {"q_proj": {"kernel": array((4096, 4099), np.float32)}}}}}
    with pytest.raises(ConfigError, match=r"decoder/layers/self_attn/q_proj/kernel.*divides"):
        described().state_shardings(odd)
    described("data").state_shardings(unknown)  # where no parameter is split, none is forgotten


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "ddp"}, "preset is 'ddp'"),
        ({"data": -1}, "partition.data and partition.fsdp are both -1"),
        ({"tensor": 0}, "partition.tensor is 0"),
        ({"rules": ("batch:data",)}, "'batch:data'"),
        ({"rules": ("batch=model",)}, "'batch=model'"),
        ({"largest_replicated": -1}, "largest_replicated is -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        PartitionConfig(**change)


def test_a_mesh_has_as_many_devices_as_there_are():
    assert PartitionConfig(tensor=2).shape(8) == (1, 1, 4, 2)
    assert PartitionConfig("data", slice=2).shape(8) == (2, 4, 1, 1)
    for config in (PartitionConfig(tensor=3), PartitionConfig(fsdp=4)):
        with pytest.raises(ConfigError, match="does not fit the 8 devices"):
            config.shape(8)
    with pytest.raises(ConfigError, match="accumulation is 12, no multiple of the 8 parts"):
        described(count=8).check_batch(12)


def test_heads_are_split_where_a_batch_does_not_divide():
    assert PartitionConfig().suited(256, 384).shape(256) == (1, 1, 128, 2)
    assert PartitionConfig().suited(64, 384).shape(64) == (1, 1, 64, 1)
    assert PartitionConfig(tensor=1).suited(256, 384) == PartitionConfig(tensor=1)  # the user's word
    assert PartitionConfig("data").suited(256, 384) == PartitionConfig("data")
    assert PartitionConfig().suited(7, 384) == PartitionConfig()  # nothing helps; make_partition then says so


def test_squares_are_split_although_they_do_not_divide():
    partition = described("data", count=4, tensor=4)
    assert partition.sharding((10, 577, 1024), ("tiles", None, None)).spec[0] == "tensor"
    assert partition.sharding((10, 577, 1024), ("heads", None, None)).spec[0] is None


def test_on_one_device_a_program_is_what_it_is_without_a_partition():
    partition = make_partition(PartitionConfig(), jax.devices()[:1])

    def double(x):
        return per_sample(jnp.sort, constrain(x + x, "batch", None))

    plain, traced = (jax.jit(f).lower(np.ones((4, 2))).as_text() for f in (double, partition.traced(double)))
    assert plain == traced


def split_over_eight(system, meshes, platform="cpu"):
    """What tests/partitioned.py finds, in a process that has 8 devices."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS))),
    }
    words = [sys.executable, str(TESTS / "partitioned.py"), system, ",".join(meshes), platform]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(found, meshes):
    """Losses and gradients are one device's, constraints are in the programs, which compile once."""
    one = found["one"]
    assert one["constraints"] == [0, 0] and one["compiled"] == 1
    for mesh in meshes:
        other = found["meshes"][mesh]
        for name in ("loss", "eval_loss", "second_loss"):
            assert other[name] == pytest.approx(one[name], rel=1e-5), (mesh, name)
        assert other["gradient_difference"] <= 1e-5 and other["views_difference"] <= 1e-5, mesh
        assert min(other["constraints"]) > 0 and other["compiled"] == 1, mesh
        if "/" not in mesh:  # of parts the mean is taken, whatever rows they have
            assert other["cells"] == pytest.approx(one["cells"], abs=1e-6), mesh
    return found


@pytest.mark.slow
def test_a_batch_in_parts_on_eight_devices_is_the_whole_on_one():
    check(split_over_eight("flex:2", ["2x2x2/2"]), ["2x2x2/2"])


@pytest.mark.slow
def test_attention_head_by_head_on_eight_devices_is_attention_on_one():
    check(split_over_eight("flex:2", ["2x2x2"], "tpu"), ["2x2x2"])


@functools.cache
def flexattention():
    return check(split_over_eight("flex:2", ["2x2x2"]), ["2x2x2"])


def test_flexattention_on_eight_devices_is_flexattention_on_one():
    found = flexattention()
    assert found["one"]["cells"] > 0 and found["one"]["loss"] != found["one"]["second_loss"]
    assert found["meshes"]["2x2x2"]["largest_share"] <= 0.5
    instructions, collectives, kinds = found["meshes"]["2x2x2"]["selecting"]
    assert instructions > 20 and kinds > 1 and collectives == 0  # cells are each device's own affair


@pytest.mark.slow
@pytest.mark.parametrize(
    "system",
    [
        "flex",
        "flex:2",
        *(pytest.param(x, marks=pytest.mark.long) for x in ("paper", "dense", "cogagent", "vistog", "fastv")),
    ],
)
def test_every_system_on_eight_devices_is_what_it_is_on_one(system):
    found = check(split_over_eight(system, MESHES), MESHES)
    for mesh in MESHES:
        instructions, collectives, kinds = found["meshes"][mesh]["selecting"]
        assert collectives == 0 and kinds > 0 and (instructions > 5) == system.startswith(("flex", "paper")), mesh
    assert found["meshes"]["8x1x1"]["largest_share"] == 1
    assert found["meshes"]["1x8x1"]["largest_share"] == 1 / 8
    assert found["moved"] == 0  # a checkpoint of 8x1x1 read into 2x2x2
