import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from checkpoints import published
from jax.sharding import SingleDeviceSharding

from flexattn_jax.checkpoints import store
from flexattn_jax.checkpoints.errors import CheckpointError
from flexattn_jax.checkpoints.export_weights import export_weights
from flexattn_jax.checkpoints.import_weights import import_weights
from flexattn_jax.checkpoints.safetensors_io import read_folder
from flexattn_jax.checkpoints.source import open_source
from flexattn_jax.checkpoints.trees import (
    flatten,
    nest,
    restack,
    stack_layers,
    unstack_layers,
)
from flexattn_jax.config import override


def assert_trees_equal(first, second):
    first, second = flatten(first), flatten(second)
    assert first.keys() == second.keys()
    for path in first:
        np.testing.assert_array_equal(first[path], second[path], err_msg=path)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A FlexAttention checkpoint, published and imported; nothing writes to it."""
    folder = tmp_path_factory.mktemp("store")
    source = published.flexattn(folder / "source", dtype="float32")
    import_weights(source.folder, folder / "native", vision_tower=source.tower)
    return open_source(source.folder, source.tower), folder / "native"


def test_flatten_and_nest():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(tree) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert nest(flatten(tree)) == tree


def test_unstack_and_stack():
    tree = {
        "decoder": {"layers": {"norm": {"scale": np.arange(6.0).reshape(2, 3)}}, "embedding": np.ones((4, 3))},
        "vision": {"blocks": {"bias": np.arange(12.0).reshape(12, 1)}},
    }
    parts = unstack_layers(tree)
    assert sorted(parts["decoder"]) == ["embedding", "layers_0", "layers_1"]
    np.testing.assert_array_equal(parts["decoder"]["layers_1"]["norm"]["scale"], [3, 4, 5])
    assert len(parts["vision"]) == 12
    np.testing.assert_array_equal(parts["vision"]["blocks_11"]["bias"], [11])
    assert_trees_equal(stack_layers(parts), tree)
    assert_trees_equal(stack_layers(tree), tree)
    assert_trees_equal(unstack_layers(parts), parts)


CHANGES = [
    {"scan_layers": False},
    {"flexattention.first_layer": 9},
    {"flexattention.first_layer": 10, "scan_layers": False},
    {"flexattention": None, "image_size": 28},
    {"flexattention.threshold": 72.0, "decoder.rope_theta": 5e4},
    {"vision.select_layer": -3},
]


@pytest.mark.parametrize("changes", CHANGES)
def test_loading_with_overrides_is_reading_the_source_with_them(imported, changes):
    source, native = imported
    config = override(source.config, changes)
    assert_trees_equal(store.load_params(native, config), source.params(config))


@pytest.mark.parametrize("changes", CHANGES[1:2] + CHANGES[3:4])
def test_restack(imported, changes):
    source, _ = imported
    config = override(source.config, changes)
    assert_trees_equal(restack(source.params(), source.config, config), source.params(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flexattention.first_layer": 7}, "first_layer 7 asks for .* begins at layer 8"),
        ({"vision.select_layer": -1}, "not stored: vision/blocks/norm1/scale"),
        ({"decoder.head_dim": 8}, r"decoder/layers/self_attn/q_proj/kernel \[24, 16\] -> \[32, 16\]"),
        ({"decoder.num_layers": 11}, "not stored"),
    ],
)
def test_overrides_that_need_what_is_not_stored(imported, changes, message):
    source, native = imported
    with pytest.raises(CheckpointError, match=message):
        store.load_params(native, override(source.config, changes))


def test_the_source_itself_has_earlier_projections(imported):
    source, _ = imported
    params = source.params(override(source.config, {"flexattention.first_layer": 3}))
    assert params["decoder"]["highres"]["k_proj_hd"]["kernel"].shape == (7, 12, 16)


def test_without_flexattention_there_is_nothing_to_switch_on(tmp_path):
    source = published.llava_hf(tmp_path / "s")
    import_weights(source.folder, tmp_path / "native")
    config = override(store.load_config(tmp_path / "native"), {})
    flex = {"zoom_ratio": 5, "first_layer": 4}
    with pytest.raises(CheckpointError, match="its FlexAttention is absent"):
        store.load_params(tmp_path / "native", override(config, {"flexattention": flex, "image_size": 140}))


def test_types_and_shardings(imported):
    source, native = imported
    device = SingleDeviceSharding(jax.devices()[0])
    params = store.load_params(native, dtype="bfloat16", shardings=device)
    expected = source.params(dtype="bfloat16", shardings=jax.tree.map(lambda leaf: device, params))
    assert_trees_equal(params, expected)
    assert {leaf.dtype.name for leaf in flatten(params).values()} == {"bfloat16"}
    lacking = {"decoder": {"embedding": device}}
    for load in (lambda: store.load_params(native, shardings=lacking), lambda: source.params(shardings=lacking)):
        with pytest.raises(CheckpointError, match="no entry for parameter"):
            load()


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from flexattn_jax.checkpoints import store, trees
from flexattn_jax.checkpoints.source import open_source
from flexattn_jax.config import override
native, source, tower = sys.argv[1:]
mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
stored = store.open_checkpoint(native)
whole = trees.flatten(stored.params())
for scan in (True, False):
    config = override(stored.config, {"scan_layers": scan, "flexattention.first_layer": 9})
    flat = trees.flatten(stored.params(config))
    shardings = trees.nest({
        path: NamedSharding(mesh, P(*[None] * (leaf.ndim - 1), "model") if leaf.shape[-1] % 4 == 0 else P())
        for path, leaf in flat.items()
    })
    for checkpoint in (stored, open_source(source, tower)):
        found = trees.flatten(checkpoint.params(config, shardings=shardings))
        for path, sharding in trees.flatten(shardings).items():
            assert found[path].sharding.is_equivalent_to(sharding, found[path].ndim), path
            assert len(found[path].addressable_shards) == 4
            np.testing.assert_array_equal(found[path], flat[path])
    assert any(not leaf.sharding.is_fully_replicated for leaf in found.values())
print("sharded")
"""


def test_leaves_go_straight_into_their_shards(imported):
    source, native = imported
    result = subprocess.run(
        [sys.executable, "-c", SHARDED, str(native), str(source.folder), str(source.tower_folder)],
        capture_output=True,
        text=True,
        env={
            "PYTHONPATH": ":".join(sys.path),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        },
    )
    assert result.stdout.endswith("sharded\n"), result.stderr[-2000:]


def test_a_saved_model_is_the_model(imported, tmp_path):
    source, native = imported
    trained = jax.tree.map(lambda leaf: leaf + 1, source.params())
    store.save_model(tmp_path / "a", source.config, trained, like=native)
    assert_trees_equal(store.load_params(tmp_path / "a"), trained)
    assert (tmp_path / "a" / "tokenizer_config.json").is_file()
    files = [path for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert not [path for path in files if bytes(tmp_path) in path.read_bytes()]  # no folder of this machine is named
    config = override(source.config, {"scan_layers": False, "flexattention.first_layer": 9})
    store.save_model(tmp_path / "b", config, source.params(config))
    assert store.load_config(tmp_path / "b") == config
    assert_trees_equal(store.load_params(tmp_path / "b"), source.params(config))


def test_a_trained_model_exports_what_was_trained_and_what_was_never_read(imported, tmp_path):
    source, native = imported
    trained = jax.tree.map(lambda leaf: leaf + 1, source.params())
    store.save_model(tmp_path / "trained", source.config, trained, like=native)
    export_weights(tmp_path / "trained", tmp_path / "out", "llava")
    before = {name: tensor.array() for name, tensor in read_folder(source.folder).items()}
    after = {name: tensor.array() for name, tensor in read_folder(tmp_path / "out").items()}
    assert before.keys() == after.keys()
    unread = "model.layers.7.self_attn.k_proj_hd.weight"
    np.testing.assert_array_equal(after[unread], before[unread])
    for name in ("model.layers.8.self_attn.k_proj_hd.weight", "lm_head.weight"):
        np.testing.assert_array_equal(after[name], before[name] + 1)


def test_changed_settings_are_exported(imported, tmp_path):
    source, native = imported
    config = override(source.config, {"flexattention.threshold": 72.0, "flexattention.capacity": 5})
    store.save_model(tmp_path / "trained", config, source.params(), like=native)
    export_weights(tmp_path / "trained", tmp_path / "out", "llava")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["extra"]["threshold"] == "72"
    assert values["mm_vision_tower"] == "somewhere/else"
    assert open_source(tmp_path / "out").config == config


def test_what_cannot_be_saved(imported, tmp_path):
    source, _ = imported
    params = source.params()
    wrong = override(source.config, {"decoder.vocab_size": 21})
    with pytest.raises(CheckpointError, match="decoder/embedding, decoder/lm_head/kernel"):
        store.save_model(tmp_path / "x", wrong, params)
    with pytest.raises(CheckpointError, match="int32"):
        store.save_model(tmp_path / "x", source.config, jax.tree.map(lambda leaf: leaf.astype("int32"), params))
    assert not (tmp_path / "x").exists()


def test_several_groups(imported, tmp_path, monkeypatch):
    source, _ = imported
    monkeypatch.setattr(store, "GROUP_BYTES", 3000)
    store.save_model(tmp_path / "x", source.config, source.params())
    assert len(list((tmp_path / "x" / "params").iterdir())) > 5
    assert_trees_equal(store.load_params(tmp_path / "x"), source.params())
    config = override(source.config, {"flexattention.first_layer": 9})
    assert_trees_equal(store.load_params(tmp_path / "x", config), source.params(config))


def damage_version(values):
    values["version"] = 1


def damage_config(values):
    values["config"]["decoder"]["vocab_size"] = 21


def damage_key(values):
    values["config"]["decoder"]["vocabulary"] = 21


def damage_absent(values):
    del values["config"]


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("config.json", damage_version, "format version 1"),
        ("config.json", damage_config, "does not list what config.json describes"),
        ("config.json", damage_key, r"config\.json is damaged \(unknown keys decoder\.vocabulary"),
        ("config.json", damage_absent, r"config\.json is damaged"),
        ("parameters.json", lambda values: values["leaves"].popitem(), "does not list what config.json describes"),
        (
            "parameters.json",
            lambda values: values["leaves"]["decoder/embedding"].pop("group"),
            r"parameters\.json is damaged",
        ),
        ("source.json", lambda values: values.pop("layout"), r"source\.json is damaged"),
    ],
)
def test_a_damaged_folder_is_one_clear_error(tmp_path, file, damage, message):
    import_weights(published.llava_hf(tmp_path / "s").folder, tmp_path / "native")
    path = tmp_path / "native" / file
    values = json.loads(path.read_text())
    damage(values)
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        store.open_native(tmp_path / "native")


def test_a_half_copied_folder_is_one_clear_error(tmp_path):
    import_weights(published.llava_hf(tmp_path / "s").folder, tmp_path / "native")
    (path,) = (tmp_path / "native" / "params" / "0" / "d").iterdir()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=f"params/0/d/{path.name} is missing or cut short"):
        store.load_params(tmp_path / "native")
    path.unlink()
    with pytest.raises(CheckpointError, match=f"params/0/d/{path.name} is missing or cut short"):
        store.open_checkpoint(tmp_path / "native")


def test_a_native_checkpoint_takes_no_tower(imported):
    _, native = imported
    with pytest.raises(CheckpointError, match="drop vision_tower"):
        store.open_checkpoint(native, native)
