"""Safetensors files, read through memory maps and written in place.

The format: eight bytes of header length (little endian), a JSON header {name: {"dtype", "shape", "data_offsets"}},
then the tensors' bytes, row-major and without holes. A file comes from elsewhere, so nothing in it is believed: every
length is checked against the file before a byte is read. bfloat16 arrays use the `ml_dtypes` type.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from flexattn_jax.checkpoints.errors import CheckpointError
from flexattn_jax.files import SETTINGS_BYTES, FileError, parse_json, read_bytes

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = SETTINGS_BYTES  # the reference implementation allows 100 MB; a 13B model's shards have 0.1 MB
MAX_AXES = 32  # of a tensor

# Bytes of one element of every type of the format; only those of _NUMPY become arrays, the others are copied as bytes.
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip
_NUMPY = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16, "F16": np.float16,
    "BF16": ml_dtypes.bfloat16, "I32": np.int32, "U32": np.uint32, "F32": np.float32, "F64": np.float64,
    "I64": np.int64, "U64": np.uint64, "C64": np.complex64,
}  # fmt: skip
DTYPE_NAMES = {np.dtype(kind): name for name, kind in _NUMPY.items()}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Type (in the format's spelling, e.g. "BF16") and shape of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file; nothing but the header has been read."""

    name: str
    info: TensorInfo
    path: pathlib.Path
    offset: int  # of the first byte, from the beginning of the file

    def bytes(self) -> np.ndarray:
        """The tensor's bytes as a read-only map of the file, uint8."""
        if self.info.num_bytes == 0:
            return np.zeros(0, np.uint8)
        return np.memmap(self.path, np.uint8, "r", self.offset, (self.info.num_bytes,))

    def array(self) -> np.ndarray:
        """The tensor as a read-only map of the file, in its stored type."""
        return self.bytes().view(np.dtype(_NUMPY[self.info.dtype])).reshape(self.info.shape)


def read_file(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of one file by name, in the file's order of bytes. Raises CheckpointError for a damaged file."""
    if not path.is_file():  # a pipe would hang
        raise CheckpointError(f"{path} is no file; give a safetensors file.")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path} is no safetensors file or was cut short: it announces a header of {length} bytes and has "
                    f"{size} bytes in all. Fetch it again."
                )
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    entries = _parse_json(path, header)
    entries.pop("__metadata__", None)
    start = 8 + length
    tensors = [_check_entry(path, name, entry, start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.info.num_bytes))
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            raise CheckpointError(
                f"{path} is damaged: tensor {tensor.name!r} begins at byte {tensor.offset}, where {end} is expected "
                "(tensors must neither overlap nor leave holes). Fetch it again."
            )
        end += tensor.info.num_bytes
    if end != size:
        what = "was cut short" if end > size else "has bytes that belong to no tensor"
        raise CheckpointError(f"{path} {what}: its header describes {end} bytes, it has {size}. Fetch it again.")
    return {tensor.name: tensor for tensor in tensors}


def read_folder(folder: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint folder: sharded with an index, or one file.

    Raises CheckpointError for a damaged or missing shard, an index that names anything outside the folder, a tensor
    that is in two shards or in none, and for a folder that has only pickles.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the checkpoint's own folder.")
    index = folder / INDEX_NAME
    if index.is_file():
        return _read_shards(folder, index)
    if (folder / SINGLE_NAME).is_file():
        return read_file(folder / SINGLE_NAME)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return read_file(files[0])
    if files:
        raise CheckpointError(f"{folder} has {len(files)} safetensors files but no {INDEX_NAME}; fetch the index too.")
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} has its weights only as pickles ({', '.join(pickles[:3])}), which run code when they are "
            "opened and are never read here. Convert them once to safetensors with the few lines of "
            'docs/checkpoints.md, "From .bin to safetensors", and import the result.'
        )
    raise CheckpointError(f"{folder} holds no weights: neither {SINGLE_NAME} nor {INDEX_NAME} is there.")


def _read_shards(folder: pathlib.Path, index: pathlib.Path) -> dict[str, Tensor]:
    try:
        weight_map = _parse_json(index, read_bytes(index)).get("weight_map")
    except FileError as error:
        raise CheckpointError(f"{index} {error}. Fetch it again.") from None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f'{index} is damaged: its "weight_map" must map tensor names to file names.')
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        # Names only: a cache of downloads legitimately makes the files themselves links to elsewhere.
        if shard != pathlib.PurePosixPath(shard).name or "\\" in shard or shard in ("", ".", ".."):
            raise CheckpointError(
                f"{index} names {shard!r}, which is not a plain file name; refusing to leave {folder}."
            )
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise CheckpointError(f"{index} names files that are not in {folder}: {', '.join(absent)}. Fetch them.")
    tensors: dict[str, Tensor] = {}
    problems = []
    for shard in shards:
        for name, tensor in read_file(folder / shard).items():
            if name in tensors:
                problems.append(f"{name} is in both {tensors[name].path.name} and {shard}")
            elif name not in weight_map:
                problems.append(f"{name} is in {shard} but not in the index")
            elif weight_map[name] != shard:
                problems.append(f"{name} is in {shard}, the index says {weight_map[name]}")
            tensors[name] = tensor
    problems += [
        f"{name} is in no file, the index says {weight_map[name]}" for name in weight_map.keys() - tensors.keys()
    ]
    if problems:
        raise CheckpointError(f"{index} and its files disagree: " + "; ".join(first_few(sorted(problems))) + ".")
    return tensors


def first_few(faults: list[str], most: int = 20) -> list[str]:
    """The beginning of a list of faults, with the number of the others."""
    return faults[:most] + ([f"and {len(faults) - most} more"] if len(faults) > most else [])


def _parse_json(path: pathlib.Path, text: bytes) -> dict[str, Any]:
    try:
        values = parse_json(text)
    except FileError as error:
        raise CheckpointError(f"{path} is damaged or of another kind: its JSON {error}. Fetch it again.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged: a JSON table is expected.")
    return values


def _check_entry(path: pathlib.Path, name: str, entry: Any, start: int) -> Tensor:
    def is_count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63

    valid = isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}
    shape = entry["shape"] if valid else None
    valid = valid and isinstance(shape, list) and len(shape) <= MAX_AXES and all(map(is_count, shape))
    offsets = entry["data_offsets"] if valid else None
    valid = valid and isinstance(offsets, list) and len(offsets) == 2 and all(map(is_count, offsets))
    if not valid:
        raise CheckpointError(f"{path} is damaged: the header's entry of tensor {name!r} is malformed.")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _ITEM_BYTES:
        raise CheckpointError(f"{path}: tensor {name!r} has the type {entry['dtype']!r}, which is not known here.")
    info = TensorInfo(entry["dtype"], tuple(entry["shape"]))
    if offsets[1] - offsets[0] != info.num_bytes:
        raise CheckpointError(
            f"{path} is damaged: tensor {name!r} of shape {list(info.shape)} and type {info.dtype} needs "
            f"{info.num_bytes} bytes, its entry gives it {offsets[1] - offsets[0]}."
        )
    return Tensor(name, info, path, start + offsets[0])


class Writer:
    """Writes named tensors into one or more files whose layout is fixed beforehand.

    The files are created at full size, so tensors may arrive in whatever order their source hands them out.
    """

    def __init__(self, folder: pathlib.Path, files: Mapping[str, Mapping[str, TensorInfo]]):
        """`files`: {file name: {tensor name: type and shape}}."""
        self._slots: dict[str, tuple[pathlib.Path, int, TensorInfo]] = {}
        for file_name, infos in files.items():
            path = folder / file_name
            header, end = {"__metadata__": {"format": "pt"}}, 0
            # Wide types first, so that every tensor is aligned to its own width.
            for name in sorted(infos, key=lambda n: (-_ITEM_BYTES[infos[n].dtype], n)):
                info = infos[name]
                header[name] = {
                    "dtype": info.dtype,
                    "shape": list(info.shape),
                    "data_offsets": [end, end + info.num_bytes],
                }
                self._slots[name] = (path, end, info)
                end += info.num_bytes
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            with path.open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                file.truncate(8 + len(text) + end)
            for name in infos:
                _, offset, info = self._slots[name]
                self._slots[name] = (path, 8 + len(text) + offset, info)

    def write(self, name: str, value: np.ndarray) -> None:
        """Put `value` (in the type and shape announced, or its raw bytes as uint8) into its place."""
        path, offset, info = self._slots.pop(name)
        raw = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        if raw.size != info.num_bytes:
            raise AssertionError(f"{name}: {raw.size} bytes for {info}")
        with path.open("r+b") as file:
            file.seek(offset)
            raw.tofile(file)

    def close(self) -> None:
        """Check that every announced tensor has come."""
        if self._slots:
            raise AssertionError(f"never written: {sorted(self._slots)}")


def write_folder(
    folder: pathlib.Path,
    infos: Mapping[str, TensorInfo],
    tensors: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int,
    on_write: Callable[[int], None] = lambda num_bytes: None,
) -> list[str]:
    """Write `tensors` (an iterable in any order, of exactly the names of `infos`), sharded with an index when too big.

    Returns the names of the files. A tensor larger than `max_shard_bytes` has a shard of its own.
    """
    shards: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for name in sorted(infos):
        if filled and filled + infos[name].num_bytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = infos[name]
        filled += infos[name].num_bytes
    if len(shards) == 1:
        files = {SINGLE_NAME: shards[0]}
    else:
        files = {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards)}
    writer = Writer(folder, files)
    for name, value in tensors:
        writer.write(name, value)
        on_write(infos[name].num_bytes)
    writer.close()
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(info.num_bytes for info in infos.values())},
            "weight_map": {name: file for file, shard in files.items() for name in shard},
        }
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return list(files)
