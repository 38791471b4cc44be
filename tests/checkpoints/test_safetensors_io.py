import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from flexattn_jax.checkpoints.errors import CheckpointError
from flexattn_jax.checkpoints.safetensors_io import DTYPE_NAMES, TensorInfo, read_file, read_folder, write_folder

SAMPLE = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([1.5, -2], ml_dtypes.bfloat16),
    "c": np.array(3, np.int64),
    "d": np.zeros((0, 4), np.float16),
    "e": np.array([1, 0, 1], np.uint8),
}


def write(folder, tensors, max_shard_bytes=10**9):
    infos = {name: TensorInfo(DTYPE_NAMES[value.dtype], value.shape) for name, value in tensors.items()}
    return write_folder(folder, infos, tensors.items(), max_shard_bytes)


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        array = found[name].array()
        assert (array.dtype, array.shape, array.tobytes()) == (value.dtype, value.shape, value.tobytes()), name


def test_reads_what_the_safetensors_library_writes(tmp_path):
    safetensors.numpy.save_file(SAMPLE, tmp_path / "model.safetensors", metadata={"format": "pt"})
    same(read_folder(tmp_path), SAMPLE)


def test_the_safetensors_library_reads_what_is_written(tmp_path):
    write(tmp_path, SAMPLE)
    found = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    for name, value in SAMPLE.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == value.dtype


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.text("abc.é", min_size=1, max_size=6),
        st.tuples(st.sampled_from(["F16", "BF16", "F32", "I8"]), st.lists(st.integers(0, 3), max_size=3)),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 60),
)
def test_round_trip_at_any_shard_size(tmp_path_factory, kinds, max_shard_bytes):
    folder = tmp_path_factory.mktemp("rt")
    types = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    tensors = {
        name: np.random.default_rng(0).integers(0, 100, shape).astype(types[kind])
        for name, (kind, shape) in kinds.items()
    }
    files = write(folder, tensors, max_shard_bytes)
    same(read_folder(folder), tensors)
    for file in files:
        sizes = [tensor.info.num_bytes for tensor in read_file(folder / file).values()]
        assert sum(sizes) <= max_shard_bytes or sum(size > 0 for size in sizes) == 1


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


HOSTILE = {
    "empty file": (b"", "cut short"),
    "seven bytes": (b"1234567", "cut short"),
    "header longer than the file": (raw(b"{}", length=1 << 40), "cut short"),
    "header of 2**64 - 1": (struct.pack("<Q", 2**64 - 1) + b"{}", "cut short"),
    "not JSON": (raw(b"hello"), "JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "JSON"),
    "a list": (raw(b"[]"), "table"),
    "deep nesting": (raw(b"[" * 100_000), "JSON"),
    "name twice": (raw(b'{"x": 1, "x": 2}'), "holds 'x' twice"),
    "entry no table": (raw({"x": 3}), "'x' is malformed"),
    "entry with more keys": (raw({"x": entry(more=1)}, b"0000"), "'x' is malformed"),
    "entry without shape": (raw({"x": {"dtype": "F32", "data_offsets": [0, 4]}}, b"0000"), "'x' is malformed"),
    "negative size": (raw({"x": entry(shape=[-1])}, b"0000"), "'x' is malformed"),
    "size that is no integer": (raw({"x": entry(shape=[1.0])}, b"0000"), "'x' is malformed"),
    "size true": (raw({"x": entry(shape=[True])}, b"0000"), "'x' is malformed"),
    "negative offset": (raw({"x": entry(offsets=[-4, 0])}, b"0000"), "'x' is malformed"),
    "three offsets": (raw({"x": entry(offsets=[0, 4, 8])}, b"0000"), "'x' is malformed"),
    "unknown type": (raw({"x": entry(dtype="F31")}, b"0000"), "F31"),
    "offsets do not fit the shape": (raw({"x": entry(shape=[2])}, b"0000"), "needs 8 bytes"),
    "overflowing shape": (raw({"x": entry(shape=[2**62, 2**62])}, b"0000"), "needs"),
    "end before begin": (raw({"x": entry(offsets=[4, 0])}, b"0000"), "needs 4 bytes"),
    "data cut short": (raw({"x": entry()}, b"000"), "was cut short"),
    "bytes left over": (raw({"x": entry()}, b"00000"), "belong to no tensor"),
    "overlap": (raw({"x": entry(), "y": entry()}, b"0000"), "overlap"),
    "hole": (raw({"x": entry(), "y": entry(offsets=[8, 12])}, b"0" * 12), "holes"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_damaged_file_is_one_clear_error(tmp_path, case):
    content, message = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_folder(tmp_path)
    assert str(path) in str(caught.value)


def sharded(folder, weight_map, files):
    for name, tensors in files.items():
        safetensors.numpy.save_file(tensors, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


ONE = {"x": np.zeros(1, np.float32)}


@pytest.mark.parametrize(
    ("weight_map", "files", "message"),
    [
        ({"x": "../x.safetensors"}, {}, "plain file name"),
        ({"x": "/etc/passwd"}, {}, "plain file name"),
        ({"x": "sub/x.safetensors"}, {}, "plain file name"),
        ({"x": "..\\x.safetensors"}, {}, "plain file name"),
        ({"x": ".."}, {}, "plain file name"),
        ({"x": ""}, {}, "plain file name"),
        ({"x": "gone.safetensors"}, {}, "not in .*gone.safetensors"),
        ({"x": "a.safetensors", "y": "a.safetensors"}, {"a.safetensors": ONE}, "y is in no file"),
        ({}, {"a.safetensors": ONE}, None),
        ({"y": "a.safetensors"}, {"a.safetensors": ONE}, "x is in a.safetensors but not in the index"),
        ({"x": "a.safetensors", "y": "b.safetensors"}, {"a.safetensors": ONE, "b.safetensors": ONE}, "in both"),
        (3, {}, "weight_map"),
        ({"x": 3}, {}, "weight_map"),
    ],
)
def test_an_index_is_not_believed(tmp_path, weight_map, files, message):
    sharded(tmp_path, weight_map, files)
    if message is None:
        assert read_folder(tmp_path) == {}
        return
    with pytest.raises(CheckpointError, match=message):
        read_folder(tmp_path)


def test_links_of_a_download_cache_are_followed(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    safetensors.numpy.save_file(ONE, tmp_path / "blobs" / "0a1b")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blobs" / "0a1b")
    same(read_folder(tmp_path / "snapshot"), ONE)


def test_pickles_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pickles.*docs/checkpoints\.md"):
        read_folder(tmp_path)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_folder(tmp_path)
    with pytest.raises(CheckpointError, match="not a folder"):
        read_folder(tmp_path / "nowhere")
    safetensors.numpy.save_file(ONE, tmp_path / "only-this.safetensors")
    same(read_folder(tmp_path), ONE)
    safetensors.numpy.save_file(ONE, tmp_path / "and-that.safetensors")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index\.json"):
        read_folder(tmp_path)
