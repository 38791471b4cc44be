import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoints import published

from flexattn_jax.checkpoints import export_weights as export_module
from flexattn_jax.checkpoints import import_weights as import_module
from flexattn_jax.checkpoints.errors import CheckpointError
from flexattn_jax.checkpoints.export_weights import export_weights
from flexattn_jax.checkpoints.import_weights import import_weights
from flexattn_jax.checkpoints.safetensors_io import read_file, read_folder
from flexattn_jax.checkpoints.source import open_source
from flexattn_jax.checkpoints.store import load_params, open_checkpoint, open_native
from flexattn_jax.checkpoints.trees import flatten


def assert_bit_equal(folder, expected):
    found = read_folder(folder)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        array = found[name].array()
        assert (array.dtype, array.shape, array.tobytes()) == (value.dtype, value.shape, value.tobytes()), name


def assert_trees_equal(first, second):
    first, second = flatten(first), flatten(second)
    assert first.keys() == second.keys()
    for path in first:
        np.testing.assert_array_equal(first[path], second[path], err_msg=path)


BUILDERS = {
    "llava15": published.llava15,
    "flexattn": published.flexattn,
    "transformers4": published.llava_hf,
    "transformers5": lambda folder, dtype: published.llava_hf(folder, dtype, names="transformers5"),
    "transformers5_modules": lambda folder, dtype: published.llava_hf(folder, dtype, names="transformers5_modules"),
    "tied": lambda folder, dtype: published.llava_hf(folder, dtype, tied=True),
}


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("llava15", "float16"), ("llava15", "bfloat16"), ("flexattn", "float16"), ("flexattn", "float32"),
        ("transformers4", "bfloat16"), ("transformers5", "float32"), ("transformers5_modules", "float16"),
        ("tied", "float32"),
    ],
)  # fmt: skip
def test_round_trip_is_bit_equal(tmp_path, layout, dtype):
    source = BUILDERS[layout](tmp_path / "source", dtype)
    tower = source.tower if source.tower_config is not None else None
    import_weights(source.folder, tmp_path / "native", vision_tower=tower)
    family = "hf" if source.config.get("text_config") else "llava"
    export_weights(tmp_path / "native", tmp_path / "out", family)
    assert_bit_equal(tmp_path / "out", source.tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == source.config
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"model_max_length": 256}'
    if source.tower_tensors:
        assert_bit_equal(tmp_path / "out" / "vision_tower", source.tower_tensors)
    elif tower:
        assert not (tmp_path / "out" / "vision_tower" / "model.safetensors").exists()
    again = open_checkpoint(tmp_path / "out")  # finds a tower of its own by itself
    assert again.config == open_native(tmp_path / "native").config


def test_values_land_where_their_names_say(tmp_path):
    source = published.flexattn(tmp_path / "s", dtype="float32")
    import_weights(source.folder, tmp_path / "native", vision_tower=source.tower)
    params = load_params(tmp_path / "native")
    decoder, vision = params["decoder"], params["vision"]
    tensors = source.tensors

    def check(leaf, name):
        np.testing.assert_array_equal(leaf, tensors[name], err_msg=name)

    check(decoder["embedding"], "model.embed_tokens.weight")
    check(decoder["lm_head"]["kernel"], "lm_head.weight")
    check(decoder["layers"]["mlp"]["gate_proj"]["kernel"][7], "model.layers.7.mlp.gate_proj.weight")
    check(decoder["layers"]["mlp"]["gate_proj"]["kernel"][8], "model.layers.8.mlp.gate_proj.weight")
    check(decoder["highres"]["v_proj_hd"]["kernel"][1], "model.layers.9.self_attn.v_proj_hd.weight")
    check(decoder["layers"]["post_attention_norm"]["scale"][2], "model.layers.2.post_attention_layernorm.weight")
    check(params["connector"]["fc2"]["bias"], "model.mm_projector.2.bias")
    tower = "model.vision_tower.vision_tower.vision_model."
    check(vision["blocks"]["self_attn"]["out_proj"]["bias"][1], tower + "encoder.layers.1.self_attn.out_proj.bias")
    check(vision["pre_norm"]["scale"], tower + "pre_layrnorm.weight")
    patch = tensors[tower + "embeddings.patch_embedding.weight"]
    np.testing.assert_array_equal(vision["patch_embedding"]["kernel"], patch.reshape(8, 3 * 14 * 14))
    assert vision["blocks"]["norm1"]["scale"].shape == (2, 8)
    assert "k_proj_hd" not in decoder["layers"]["self_attn"]


def test_the_spellings_of_transformers_give_the_same_parameters(tmp_path):
    trees = [
        open_source(published.llava_hf(tmp_path / names, names=names).folder).params() for names in published.HF_NAMES
    ]
    assert_trees_equal(trees[0], trees[1])
    assert_trees_equal(trees[0], trees[2])


@pytest.mark.parametrize("layout", ["llava15", "flexattn", "transformers4", "tied"])
def test_conversion_between_layouts_keeps_every_parameter(tmp_path, layout):
    source = BUILDERS[layout](tmp_path / "source", "float16")
    import_weights(source.folder, tmp_path / "native", vision_tower=source.tower if source.tower_config else None)
    other = "llava" if "text_config" in source.config else "hf"
    summary = export_weights(tmp_path / "native", tmp_path / "other", other)
    assert len(summary.dropped) == (3 if layout == "llava15" else 0)  # CLIP's other half
    import_weights(tmp_path / "other", tmp_path / "native2")
    back = "hf" if other == "llava" else "llava"
    export_weights(tmp_path / "native2", tmp_path / "back", back)
    first, second = open_native(tmp_path / "native"), open_native(tmp_path / "native2")
    assert_trees_equal(first.params(dtype="float32"), second.params(dtype="float32"))
    assert (first.config.decoder, first.config.vision, first.config.flexattention) == (
        second.config.decoder, second.config.vision, second.config.flexattention,
    )  # fmt: skip
    if layout != "llava15":
        assert_bit_equal(tmp_path / "back", source.tensors)


def test_direct_loading_equals_importing(tmp_path):
    source = published.flexattn(tmp_path / "s")
    import_weights(source.folder, tmp_path / "native", vision_tower=source.tower)
    direct = open_checkpoint(source.folder, source.tower)
    native = open_checkpoint(tmp_path / "native")
    assert direct.config == native.config
    for dtype in ("float32", "bfloat16"):
        first, second = direct.params(dtype=dtype), native.params(dtype=dtype)
        assert_trees_equal(first, second)
        assert {leaf.dtype.name for leaf in flatten(first).values()} == {dtype}
    assert all(isinstance(leaf, jax.Array) for leaf in flatten(first).values())
    embedding = source.tensors["model.embed_tokens.weight"]
    np.testing.assert_array_equal(first["decoder"]["embedding"], embedding.astype(ml_dtypes.bfloat16))


def test_sharded_export_comes_with_an_index(tmp_path):
    source = published.llava_hf(tmp_path / "s")
    import_weights(source.folder, tmp_path / "native")
    summary = export_weights(tmp_path / "native", tmp_path / "out", "hf", max_shard_bytes=3000)
    assert len(summary.files) > 3
    shards = [read_file(tmp_path / "out" / name).values() for name in summary.files]
    assert all(len(shard) == 1 or sum(tensor.info.num_bytes for tensor in shard) <= 3000 for shard in shards)
    assert_bit_equal(tmp_path / "out", source.tensors)


def test_all_faults_are_in_one_error(tmp_path):
    source = published.llava_hf(tmp_path / "s", dtype="float32")
    del source.tensors["language_model.model.norm.weight"]
    del source.tensors["vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"]
    source.tensors["language_model.model.layers.3.self_attn.q_proj.bias"] = np.zeros(24, np.float32)
    source.tensors["language_model.model.layers.10.input_layernorm.weight"] = np.zeros(16, np.float32)
    source.tensors["model.image_newline"] = np.zeros(16, np.float32)
    source.tensors["multi_modal_projector.linear_1.weight"] = np.zeros((8, 16), np.float32)
    source.tensors["language_model.model.layers.2.mlp.up_proj.weight"] = np.zeros((24, 16), np.float64)
    source.write()
    with pytest.raises(CheckpointError) as caught:
        import_weights(source.folder, tmp_path / "native")
    message = str(caught.value)
    for line in (
        "2 missing:",
        "language_model.model.norm.weight [16]",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias [12]",
        "3 unexpected:",
        "language_model.model.layers.3.self_attn.q_proj.bias [24]",
        "language_model.model.layers.10.input_layernorm.weight [16]",
        "model.image_newline [16]",
        "multi_modal_projector.linear_1.weight: [8, 16], expected [16, 8]",
        "language_model.model.layers.2.mlp.up_proj.weight: type F64, expected F16, BF16, F32",
    ):
        assert line in message
    assert not (tmp_path / "native").exists()


def test_layers_of_one_parameter_must_have_one_type(tmp_path):
    source = published.llava_hf(tmp_path / "s", dtype="float32")
    name = "language_model.model.layers.4.mlp.up_proj.weight"
    source.tensors[name] = source.tensors[name].astype(np.float16)
    source.write()
    with pytest.raises(CheckpointError, match=r"layers\.4\.mlp\.up_proj\.weight: type F16, but .* has F32"):
        open_source(source.folder)


def test_a_vision_tower_of_another_type_keeps_it(tmp_path):
    source = published.llava15(tmp_path / "s", dtype="bfloat16")
    summary = import_weights(source.folder, tmp_path / "native", vision_tower=source.tower)
    assert summary.dtypes == ("bfloat16", "float32")
    assert summary.config.dtype == "bfloat16"


def test_an_output_layer_that_repeats_a_tied_embedding(tmp_path):
    source = published.llava_hf(tmp_path / "s", tied=True)
    embedding = source.tensors["language_model.model.embed_tokens.weight"]
    source.tensors["language_model.lm_head.weight"] = embedding.copy()
    source.write()
    import_weights(source.folder, tmp_path / "native")
    export_weights(tmp_path / "native", tmp_path / "out", "hf")
    assert_bit_equal(tmp_path / "out", source.tensors)
    source.tensors["language_model.lm_head.weight"] = embedding[::-1].copy()
    source.write()
    with pytest.raises(CheckpointError, match="differs from the embedding"):
        open_source(source.folder)


def test_a_llava_checkpoint_becomes_a_flexattention_one(tmp_path):
    source = published.llava15(tmp_path / "s", dtype="float32")
    with pytest.raises(CheckpointError, match="cell_grid 9 is finer"):  # a 2 x 2 grid tripled has no 9 x 9 cells
        import_weights(source.folder, tmp_path / "native", vision_tower=source.tower, init_seed=0)
    clip = {**published.CLIP, "image_size": 56}
    source.tower_config = clip
    source.tower_tensors["vision_model.embeddings.position_embedding.weight"] = np.ones((17, 8), np.float32)
    source.write()
    with pytest.raises(CheckpointError, match="seed of the projections is -1"):
        import_weights(source.folder, tmp_path / "d", vision_tower=source.tower, init_seed=-1)
    for seed, out in ((0, "a"), (0, "b"), (1, "c")):
        summary = import_weights(source.folder, tmp_path / out, vision_tower=source.tower, init_seed=seed)
    flex = summary.config.flexattention
    assert (flex.zoom_ratio, flex.threshold, flex.warmup, flex.first_layer) == (3, 48, 10, 8)
    assert (summary.config.image_size, summary.num_initialised) == (168, 4)
    first, same, other = (load_params(tmp_path / out)["decoder"]["highres"] for out in "abc")
    key, value = first["k_proj_hd"]["kernel"], first["v_proj_hd"]["kernel"]
    assert key.shape == (2, 12, 16)
    assert 0.015 < np.std(key) < 0.025
    assert abs(np.mean(key)) < 0.005
    assert not np.array_equal(key, value)
    assert not np.array_equal(key[0], key[1])
    np.testing.assert_array_equal(key, same["k_proj_hd"]["kernel"])
    assert not np.array_equal(key, other["k_proj_hd"]["kernel"])
    export_weights(tmp_path / "a", tmp_path / "out", "llava")
    assert "model.layers.8.self_attn.k_proj_hd.weight" in read_folder(tmp_path / "out")
    with pytest.raises(CheckpointError, match="already; import it without --flexattention"):
        open_source(tmp_path / "out", init_seed=0)


def test_missing_projections_come_with_a_hint(tmp_path):
    source = published.flexattn(tmp_path / "s", num_files=1)
    source.tensors = {name: value for name, value in source.tensors.items() if "_hd" not in name}
    source.write()
    with pytest.raises(CheckpointError, match=r"4 missing(.|\n)*--flexattention"):
        open_source(source.folder, source.tower)


def test_projections_without_their_setting_are_kept_unread(tmp_path):
    source = published.flexattn(tmp_path / "s", num_files=1)
    del source.config["extra"]
    source.write()
    summary = import_weights(source.folder, tmp_path / "native", vision_tower=source.tower)
    assert summary.config.flexattention is None
    export_weights(tmp_path / "native", tmp_path / "out", "llava")
    assert_bit_equal(tmp_path / "out", source.tensors)


def test_the_vision_tower_is_asked_for(tmp_path):
    source = published.llava15(tmp_path / "s")
    with pytest.raises(CheckpointError, match=r"no vision tower inside\. Fetch somewhere/else .*--vision_tower"):
        open_source(source.folder)
    for nowhere in (tmp_path / "nowhere", "n" * 5000, 5):
        with pytest.raises(CheckpointError, match="not a folder"):
            open_source(source.folder, nowhere)
    inside = published.flexattn(tmp_path / "inside")
    with pytest.raises(CheckpointError, match="'somewhere/else', whose configuration is not known"):
        open_source(inside.folder)
    with pytest.raises(CheckpointError, match="drop --vision_tower"):
        open_source(published.llava_hf(tmp_path / "hf").folder, source.tower)


def test_a_known_tower_needs_no_folder(tmp_path):
    source = published.flexattn(tmp_path / "s")
    source.config["mm_vision_tower"] = "openai/clip-vit-large-patch14-336"
    (source.folder / "config.json").write_text(json.dumps(source.config))
    with pytest.raises(CheckpointError, match="mm_hidden_size is 8, but the vision tower is 1024 wide"):
        open_source(source.folder)


def test_damaged_json(tmp_path):
    source = published.llava_hf(tmp_path / "s")
    (source.folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON.*Fetch it again"):
        open_checkpoint(source.folder)
    (source.folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(source.folder)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")


def test_a_taken_folder_is_left_alone_and_an_import_is_replaced(tmp_path):
    source = published.llava_hf(tmp_path / "s")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("the only copy")
    for write in (
        lambda: import_weights(source.folder, taken),
        lambda: import_weights(source.folder, source.folder),
        lambda: import_weights(source.folder, taken / "thesis.txt"),
    ):
        with pytest.raises(CheckpointError, match="give another folder"):
            write()
    assert (taken / "thesis.txt").read_text() == "the only copy"
    (tmp_path / "out").mkdir()
    import_weights(source.folder, tmp_path / "out")
    (tmp_path / "out" / "stale").write_text("")
    import_weights(source.folder, tmp_path / "out")
    assert not (tmp_path / "out" / "stale").exists()
    with pytest.raises(CheckpointError, match="give another folder"):
        export_weights(tmp_path / "out", source.folder, "hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "s", "taken"]


def test_a_failed_import_leaves_nothing(tmp_path, monkeypatch):
    source = published.llava_hf(tmp_path / "s")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(import_module, "write_folder", fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        import_weights(source.folder, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


KILLED = """
import sys, time
from flexattn_jax.checkpoints import import_weights
def stall(done, total):
    print("writing", flush=True)
    time.sleep(60)
import_weights.import_weights(sys.argv[1], sys.argv[2], on_write=stall)
"""


def test_a_killed_import_never_looks_whole_and_is_cleared_away(tmp_path):
    source = published.llava_hf(tmp_path / "s")
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(source.folder), str(out)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert len(list(tmp_path.glob(".out.incomplete-*"))) == 1
    import_weights(source.folder, out)
    assert not list(tmp_path.glob(".out.incomplete-*"))
    open_native(out)


def test_export_of_what_is_no_import(tmp_path):
    source = published.llava_hf(tmp_path / "s")
    with pytest.raises(CheckpointError, match="import_weights --source"):
        export_weights(source.folder, tmp_path / "out", "hf")
    import_weights(source.folder, tmp_path / "native")
    with pytest.raises(CheckpointError, match="must be one of llava, hf"):
        export_weights(tmp_path / "native", tmp_path / "out", "gguf")
    shutil.rmtree(tmp_path / "native" / "params")
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        export_weights(tmp_path / "native", tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


def test_commands(tmp_path, capsys):
    source = published.flexattn(tmp_path / "s")
    arguments = ["--source", str(source.folder), "--out", str(tmp_path / "native")]
    assert import_module.main(arguments) == 1
    assert "whose configuration is not known" in capsys.readouterr().err
    assert import_module.main([*arguments, "--vision_tower", str(source.tower)]) == 0
    printed = capsys.readouterr().out
    for part in ("llava (model.*, vision tower inside)", "float16", "from layer 8", "34 tensors", "parameters  "):
        assert part in printed
    arguments = ["--source", str(tmp_path / "native"), "--out", str(tmp_path / "out")]
    assert export_module.main([*arguments, "--layout", "llava"]) == 0
    assert "1 file" in capsys.readouterr().out
    assert export_module.main([*arguments, "--layout", "llava"]) == 1
    assert "give another folder" in capsys.readouterr().err
    assert_bit_equal(tmp_path / "out", source.tensors)
