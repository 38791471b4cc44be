"""Weights and tokenisers of strangers at the import's and the loader's door: one sentence, and nothing stays behind."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from checkpoints import published
from conftest import FIXTURES
from hostile.checks import contents, full_disk, in_time, one_sentence

from flexattn_jax.checkpoints import export_weights, import_weights, store
from flexattn_jax.checkpoints.errors import CheckpointError
from flexattn_jax.checkpoints.safetensors_io import INDEX_NAME
from flexattn_jax.config import ConfigError, override, preset
from flexattn_jax.files import packaged
from flexattn_jax.inputs.tokenizer import TokenizerError, load_tokenizer

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A small checkpoint in three shards, as FlexAttention's authors publish theirs."""
    return published.flexattn(tmp_path_factory.mktemp("whole") / "s").folder.parent


@pytest.fixture
def source(whole, tmp_path) -> Path:
    """A copy to be damaged; its tower's config.json lies inside."""
    shutil.copytree(whole / "s", tmp_path / "s")
    shutil.copytree(whole / "s_tower", tmp_path / "s" / "vision_tower")
    return tmp_path / "s"


def header(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(path: Path, values: dict | bytes, body: bytes) -> None:
    text = values if isinstance(values, bytes) else json.dumps(values).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def entry_changed(**changes):
    """Damage: changes the header's entry of a shard's first tensor."""

    def damage(folder: Path) -> None:
        values, body = header(folder / SHARD)
        values[next(name for name in values if name != "__metadata__")] |= changes
        write_header(folder / SHARD, values, body)

    return damage


def on_shard(change):
    """Damage: makes other bytes of a shard's."""

    def damage(folder: Path) -> None:
        (folder / SHARD).write_bytes(change((folder / SHARD).read_bytes()))

    return damage


def on_json(name: str, change):
    """Damage: changes the values of a JSON file in place, or replaces them by what is returned."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        changed = change(values)
        (folder / name).write_text(json.dumps(values if changed is None else changed))

    return damage


def replaced(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def pipe(name: str):
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def extra_tensors(count: int):
    def damage(folder: Path) -> None:
        values, body = header(folder / SHARD)
        end = len(body)
        names = [f"model.extra.{i}" for i in range(count)]
        values |= {n: {"dtype": "F32", "shape": [], "data_offsets": [end + 4 * i, end + 4 * i + 4]} for i, n in
                   enumerate(names)}  # fmt: skip
        write_header(folder / SHARD, values, body + bytes(4 * count))
        index = json.loads((folder / INDEX_NAME).read_text())
        index["weight_map"] |= dict.fromkeys(names, SHARD)
        (folder / INDEX_NAME).write_text(json.dumps(index))

    return damage


def only_pickles(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX_NAME]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb()))


class _Bomb:
    def __reduce__(self):
        return os._exit, (9,)


def _set(*path_and_value):
    """A change: values[path...] = value."""
    *path, last, value = path_and_value

    def change(values):
        for key in path:
            values = values[key]
        values[last] = value

    return change


def _index(value):
    return on_json(INDEX_NAME, lambda values: values["weight_map"].update(dict.fromkeys(values["weight_map"], value)))


DAMAGE = {
    "empty shard": (on_shard(lambda data: b""), "is no safetensors file or was cut short"),
    "cut shard": (on_shard(lambda data: data[:-100]), "was cut short"),
    "longer shard": (on_shard(lambda data: data + b"x"), "bytes that belong to no tensor"),
    "header length of 2**63": (on_shard(lambda data: struct.pack("<Q", 2**63) + data[8:]), "announces a header"),
    "header length too short": (on_shard(lambda data: struct.pack("<Q", 9) + data[8:]), "is damaged"),
    "a pickle by that name": (on_shard(lambda data: pickle.dumps(_Bomb())), "is no safetensors|is damaged"),
    "header of NaN": (on_shard(lambda data: struct.pack("<Q", 10) + b'{"a": NaN}'), "holds NaN"),
    "header of nesting": (
        on_shard(lambda data: struct.pack("<Q", 200_000) + b'{"":' * 50_000),
        "nested too deeply",
    ),
    "unknown type": (entry_changed(dtype="F99"), "'F99', which is not known"),
    "type that is none": (entry_changed(dtype=["F16"]), "which is not known"),
    "wrong shape": (entry_changed(shape=[3]), "needs 6 bytes"),
    "negative shape": (entry_changed(shape=[-1]), "malformed"),
    "endless shape": (entry_changed(shape=[2**62] * 30_000), "malformed"),
    "endless number": (entry_changed(shape=[10**39]), "malformed"),
    "offsets backwards": (entry_changed(data_offsets=[64, 0]), "is damaged"),
    "overlap": (entry_changed(data_offsets=[0, 2**40]), "is damaged"),
    "extra key": (entry_changed(more=1), "malformed"),
    "index out of the folder": (_index("../secret.safetensors"), "refusing to leave"),
    "index to the root": (_index("/etc/passwd"), "refusing to leave"),
    "index to nothing": (_index("gone.safetensors"), "not in"),
    "index of numbers": (_index(3), "is damaged"),
    "index that is a list": (on_json(INDEX_NAME, lambda _: [1]), "table is expected"),
    "index twice": (replaced(INDEX_NAME, b'{"weight_map": {"a": "x", "a": "y"}}'), "'a' twice"),
    "index pipe": (pipe(INDEX_NAME), "holds no weights|no model|3 safetensors files"),
    "shard pipe": (pipe(SHARD), "not in"),
    "config pipe": (pipe("config.json"), "pipe or device"),
    "tensors too many": (extra_tensors(5000), "and 4980 more"),
    "pickles": (only_pickles, "only as pickles"),
    "config cut": (replaced("config.json", b'{"model_type": "lla'), "not valid JSON"),
    "config of another model": (on_json("config.json", _set("model_type", "mistral")), "describes a model of type"),
    "config of NaN": (replaced("config.json", b'{"model_type": "llava", "rope_theta": NaN}'), "holds NaN"),
    "layers beyond all": (on_json("config.json", _set("num_hidden_layers", 10**9)), "num_layers is 1000000000"),
    "width 0": (on_json("config.json", _set("hidden_size", 0)), "hidden_size is 0"),
    "width of text": (on_json("config.json", _set("hidden_size", "4096")), "an integer is expected"),
    "vocabulary beyond all": (on_json("config.json", _set("vocab_size", 10**12)), "vocab_size is 1000000000000"),
    "positions beyond all": (on_json("config.json", _set("max_position_embeddings", 10**15)), "max_positions"),
    "end of sequence beyond all": (on_json("config.json", _set("eos_token_id", 10**30)), "eos_token_id"),
    "zoom beyond all": (on_json("config.json", _set("extra", "zoom_ratio", "1000000000")), "zoom_ratio"),
    "warm-up without end": (on_json("config.json", _set("extra", "warmup", "inf")), "warmup"),
    "deviation 0": (on_json("config.json", _set("image_std", [0, 0, 0])), "image_std"),
    "mean of two": (on_json("config.json", _set("image_mean", [0.5, 0.5])), "image_mean"),
    "tower that is a list": (on_json("config.json", _set("mm_hidden_size", [3])), "mm_hidden_size"),
    "extra that is a number": (on_json("config.json", _set("extra", 3)), "extra"),
    "settings that are a number": (on_json("config.json", _set("flexattention", 3)), "flexattention"),
    "tower of no blocks": (on_json("vision_tower/config.json", _set("num_hidden_layers", -4)), "num_hidden_layers"),
    "tower patch 0": (on_json("vision_tower/config.json", _set("patch_size", 0)), "patch_size"),
    "tower that is a list too": (on_json("vision_tower/config.json", lambda _: []), "table is expected"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_refused_in_time(source, tmp_path, capsys, name):
    damage, message = DAMAGE[name]
    damage(source)
    (tmp_path / "out").mkdir()
    assert in_time(import_weights.main, ["--source", str(source), "--out", str(tmp_path / "out" / "x")]) == 1
    error = capsys.readouterr().err
    assert any(part in error for part in message.split("|")), error
    assert str(tmp_path) in error and "Traceback" not in error and len(error) < 7000 and error.count("\n") < 60
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(CheckpointError):
        in_time(store.open_checkpoint, source)


def test_names_of_strangers_do_not_reach_the_terminal_as_they_are(source, tmp_path, capsys):
    def rename(values):
        values["weight_map"]["evil\x1b[2J\r"] = SHARD

    on_json(INDEX_NAME, rename)(source)
    assert import_weights.main(["--source", str(source), "--out", str(tmp_path / "x")]) == 1
    error = capsys.readouterr().err
    assert "evil" in error and "\x1b" not in error and "\r" not in error


def test_fifty_thousand_names_of_which_two_are_the_same(source):
    values, body = header(source / SHARD)
    text = json.dumps(values | {f"n{i}": 0 for i in range(50_000)})
    write_header(source / SHARD, (text[:-1] + ', "n5": 0}').encode(), body)
    with pytest.raises(CheckpointError, match="'n5' twice"):
        in_time(store.open_checkpoint, source, seconds=30)


def test_parameters_that_no_memory_holds(source, tmp_path, monkeypatch):
    """A sparse file of any size weighs nothing on the disk; what it would take in memory is said before it is taken."""
    import_weights.import_weights(source, tmp_path / "native")
    monkeypatch.setattr(os, "sysconf", lambda name: 100)  # 100 pages of 100 bytes
    for folder in (source, tmp_path / "native"):
        with pytest.raises(CheckpointError, match=r"GiB in float32, and this machine's memory has 0\.0"):
            store.open_checkpoint(folder).params(dtype="float32")


def test_an_import_on_a_full_disk_leaves_what_was_there(source, tmp_path, capsys):
    out = tmp_path / "native"
    assert import_weights.main(["--source", str(source), "--out", str(out)]) == 0
    before = contents(out)
    with full_disk(2000):
        assert import_weights.main(["--source", str(source), "--out", str(out)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be written" in error or "could not be written" in error
    assert contents(out) == before and not [p for p in tmp_path.iterdir() if p.name.startswith(".native")]
    with full_disk(2000):
        assert export_weights.main(["--source", str(out), "--out", str(tmp_path / "e"), "--layout", "llava"]) == 1
    assert not (tmp_path / "e").exists()
    for target in (tmp_path / "a file" / "x", Path("/proc/x"), tmp_path / "a\0b"):
        (tmp_path / "a file").touch()
        assert import_weights.main(["--source", str(source), "--out", str(target)]) == 1
        assert one_sentence(capsys.readouterr().err.splitlines()[-1])


NATIVE = {
    "another layout": on_json("source.json", _set("layout", "decoder", "a(b")),
    "a layout of one connector": on_json("source.json", _set("layout", "connector", ["x"])),
    "files of no kind": on_json("parameters.json", _set("files", [])),
    "no files": on_json("parameters.json", lambda values: {"leaves": values["leaves"]}),
    "a group out of the folder": on_json("parameters.json", _set("leaves", "decoder/embedding", "group", "../../x")),
    "another shape": on_json("parameters.json", _set("leaves", "decoder/embedding", "shape", [10**9, 10**9])),
    "another type": on_json("parameters.json", _set("leaves", "decoder/embedding", "dtype", "object")),
    "layers beyond all": on_json("config.json", _set("config", "decoder", "num_layers", 10**9)),
    "a setting too much": on_json("config.json", _set("config", "more", 1)),
    "a config of nothing": on_json("config.json", _set("config", None)),
    "a version to come": on_json("config.json", _set("version", 99)),
    "a group gone": lambda folder: shutil.rmtree(folder / "params" / "0"),
}


def test_a_damaged_native_checkpoint(source, tmp_path, capsys):
    import_weights.main(["--source", str(source), "--out", str(tmp_path / "native")])
    for name, damage in NATIVE.items():
        folder = tmp_path / name
        shutil.copytree(tmp_path / "native", folder)
        damage(folder)
        capsys.readouterr()
        arguments = ["--source", str(folder), "--out", str(tmp_path / "out"), "--layout", "llava"]
        assert in_time(export_weights.main, arguments) == 1, name
        error = capsys.readouterr().err
        assert str(folder) in error and one_sentence(error), name
        assert not (tmp_path / "out").exists()


# Settings of a model: each of these is refused, and says which setting it is.
SETTINGS = [
    {"decoder.num_layers": 0}, {"decoder.num_layers": 10**9}, {"decoder.width": -5}, {"decoder.head_dim": 0},
    {"decoder.vocab_size": 2**40}, {"decoder.norm_eps": float("nan")}, {"decoder.rope_theta": float("inf")},
    {"decoder.rope_theta": 0.0}, {"decoder.num_kv_heads": 0}, {"vision.patch_size": 0}, {"vision.num_layers": 10**6},
    {"vision.width": 0}, {"flexattention.zoom_ratio": 10**6}, {"flexattention.cell_grid": 0},
    {"flexattention.threshold": float("nan")}, {"flexattention.capacity": 0}, {"flexattention.ablation_share": 2.0},
    {"image_size": 10**9}, {"image_std": [0.0, 0.0, 0.0]}, {"image_mean": [0.5]}, {"lowres_size": 0},
    {"image_mean": [float("nan")] * 3}, {"dtype": "int8"}, {"dtype": 3}, {"scan_layers": "yes"}, {"nosuch": 1},
    {"decoder.nosuch": 1}, {"": 1}, {"decoder": 3}, {3: 4}, {"decoder.num_layers": True}, {"eos_token_id": 10**40},
    {"dense.tiles": 0}, {"reduction.tokens": 0}, {"grouping.groups": 0}, {"crossattention.num_heads": 0},
    {"flexattention.seed": 10**30}, {"decoder.num_layers": 2.5},
]  # fmt: skip


@pytest.mark.parametrize("overrides", SETTINGS, ids=str)
def test_impossible_settings_are_named(overrides):
    with pytest.raises(ConfigError) as caught:
        in_time(override, preset("tiny"), overrides)
    assert one_sentence(str(caught.value))


# Tokenisers: the files of a folder that works, each replaced.
GOOD = FIXTURES / "inputs" / "huggingface"
SLOW = FIXTURES / "inputs" / "sentencepiece"


def _tokenizer(**changes) -> bytes:
    return json.dumps(json.loads((GOOD / "tokenizer.json").read_text()) | changes).encode()


TOKENIZERS = {
    "empty": ("tokenizer.json", lambda: b""),
    "text": ("tokenizer.json", lambda: b"once upon a time"),
    "cut": ("tokenizer.json", lambda: (GOOD / "tokenizer.json").read_bytes()[:-50]),
    "another kind": ("tokenizer.json", lambda: b'{"version": "1.0"}'),
    "no model": ("tokenizer.json", lambda: _tokenizer(model=None)),
    "an odd model": ("tokenizer.json", lambda: _tokenizer(model={"type": "BPE", "vocab": {"a": -1}, "merges": ["x"]})),
    "binary": ("tokenizer.json", lambda: bytes(range(256))),
    "nested": ("tokenizer.json", lambda: b"[" * 100_000),
    "settings cut": ("tokenizer_config.json", lambda: b'{"eos_token": '),
    "settings of a list": ("tokenizer_config.json", lambda: b"[]"),
    "end that is a number": ("tokenizer_config.json", lambda: b'{"eos_token": 7}'),
    "end that is a list": ("tokenizer_config.json", lambda: b'{"eos_token": ["</s>"]}'),
    "end without content": ("tokenizer_config.json", lambda: b'{"eos_token": {"lstrip": true}}'),
    "end that is unknown": ("tokenizer_config.json", lambda: b'{"eos_token": "<nosuch>"}'),
    "beginning that is a number": ("special_tokens_map.json", lambda: b'{"bos_token": 7}'),
    "added ids of text": ("added_tokens.json", lambda: b'{"<x>": "7"}'),
    "added ids below 0": ("added_tokens.json", lambda: b'{"<x>": -7}'),
    "added ids beyond all": ("added_tokens.json", lambda: b'{"<x>": 1000000000000}'),
    "an added token of nothing": ("added_tokens.json", lambda: b'{"": 7}'),
    "settings twice": ("tokenizer_config.json", lambda: b'{"eos_token": "</s>", "eos_token": "<s>"}'),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_damaged_tokeniser_is_refused(tmp_path, name):
    file, content = TOKENIZERS[name]
    shutil.copytree(GOOD, tmp_path / "t")
    (tmp_path / "t" / "tokenizer_config.json").unlink(missing_ok=True)
    (tmp_path / "t" / file).write_bytes(content())
    with pytest.raises(TokenizerError) as caught:
        in_time(load_tokenizer, tmp_path / "t")
    assert str(tmp_path / "t") in str(caught.value) and one_sentence(str(caught.value))


def test_a_damaged_sentencepiece_model_is_refused(tmp_path):
    whole = next(SLOW.rglob("tokenizer.model")).read_bytes()
    for data in (b"", b"x" * 99, whole[: len(whole) // 2], bytes(1000), b"\x0a\xff\xff\xff\xff\x0f" + whole):
        (tmp_path / "tokenizer.model").write_bytes(data)
        with pytest.raises(TokenizerError) as caught:
            in_time(load_tokenizer, tmp_path)
        assert str(tmp_path) in str(caught.value) and one_sentence(str(caught.value))


def test_texts_on_which_a_tokeniser_fails(tmp_path):
    """The first raises an Exception, the second panics, which is none."""
    words = json.loads((packaged("mini") / "flex" / "tokenizer.json").read_text())
    known = words["model"]["vocab"] | {"a": len(words["model"]["vocab"])}  # what is tried when it is loaded
    for change in (
        {"model": words["model"] | {"vocab": known, "unk_token": "nosuch"}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}},
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(words | change))
        tokenizer = load_tokenizer(tmp_path)
        with pytest.raises(TokenizerError, match="cannot take the text 'xxxx") as caught:
            in_time(tokenizer.encode, "x" * 60)
        assert one_sentence(str(caught.value))


def test_an_interrupt_is_no_fault_of_the_tokeniser(monkeypatch):
    tokenizer = load_tokenizer(GOOD)

    def raising(error):
        def act(*_):
            raise error

        return act

    for error, expected in ((KeyboardInterrupt(), KeyboardInterrupt), (RuntimeError("no such id"), TokenizerError)):
        monkeypatch.setattr(tokenizer, "_decode", raising(error))
        with pytest.raises(expected):
            tokenizer.decode([3, 4])


def test_texts_that_no_model_takes(tmp_path):
    tokenizer = load_tokenizer(GOOD)
    for text in ("x" * (1 << 21), 3, None, b"bytes"):
        with pytest.raises(TokenizerError):
            in_time(tokenizer.encode, text)
    assert np.isfinite(tokenizer.encode("\ud800 \x00 ﷽ </s>")).all()
