"""Native checkpoints: a folder that holds all that the model needs, with its arrays in orbax's format.

    config.json           {"format", "version", "config": the VLMConfig}
    parameters.json       {"leaves": {leaf: {"shape", "dtype", "group"}}, "files": {file under params/: its size}}
    params/<group>/       one orbax checkpoint for each group of leaves
    unread.safetensors    tensors of the imported checkpoint that the model never reads, kept for export
    source.json, source/  layout and configuration files of the imported checkpoint, for export
    tokenizer.json ...    the tokenizer's files

Leaves are stacked over layers. They are written and read group by group, so that an import or a load holds no more
than one group besides the model itself. A folder is written under another name and renamed when it is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from flexattn_jax import config as configs
from flexattn_jax.checkpoints import layouts, trees
from flexattn_jax.checkpoints.errors import CheckpointError
from flexattn_jax.checkpoints.folders import replacing, write_json
from flexattn_jax.checkpoints.layouts import Layout
from flexattn_jax.checkpoints.source import TOKENIZER_FILES, SourceCheckpoint, open_source
from flexattn_jax.checkpoints.source_config import read_json
from flexattn_jax.checkpoints.trees import restack, stack_layers, unstack_layers
from flexattn_jax.config import VLMConfig
from flexattn_jax.files import first_line

__all__ = [
    "NativeCheckpoint",
    "load_config",
    "load_params",
    "open_checkpoint",
    "restack",
    "save_model",
    "stack_layers",
    "unstack_layers",
]

FORMAT = "flexattn_jax checkpoint"
VERSION = 2
GROUP_BYTES = 1 << 29  # leaves are gathered into groups of about this size; a larger leaf is a group of its own
CHUNK_BYTES = 1 << 26  # of one array's piece on disk, so that a device reads little more than its own shard
UNREAD_FILE = "unread.safetensors"
_DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


@dataclasses.dataclass(frozen=True)
class LeafInfo:
    """A stored leaf: shape, type and the group of leaves it was written with."""

    shape: tuple[int, ...]
    dtype: np.dtype
    group: int


@dataclasses.dataclass(frozen=True)
class SourceRecord:
    """What an import remembers of where it came from."""

    layout: Layout
    repeats_tied_head: bool


@dataclasses.dataclass(frozen=True)
class NativeCheckpoint:
    """A folder of this format, opened; no array is read yet."""

    folder: pathlib.Path
    config: VLMConfig
    leaves: Mapping[str, LeafInfo]
    source: SourceRecord | None  # None: it was not imported

    def params(
        self, config: VLMConfig | None = None, *, dtype: str | None = None, shardings: Any = None
    ) -> dict[str, Any]:
        """The parameter tree; see `load_params`."""
        return load_params(self.folder, config, dtype=dtype, shardings=shardings)

    def read_groups(self, wanted: Container[str]) -> Iterator[dict[str, np.ndarray]]:
        """The stored leaves among `wanted` as numpy arrays in their stored types, one group at a time."""
        for paths in _groups({path: leaf for path, leaf in self.leaves.items() if path in wanted}):
            yield _restore(self.folder, self.leaves, paths, lambda path: ocp.RestoreArgs(restore_type=np.ndarray))


def open_checkpoint(
    path: str | os.PathLike[str], vision_tower: str | os.PathLike[str] | None = None
) -> NativeCheckpoint | SourceCheckpoint:
    """Open a native checkpoint, or a published one in place (`vision_tower`: see `source.open_source`).

    Both kinds have `.config`, `.folder` (with the tokenizer's files) and `.params(config, dtype=..., shardings=...)`.
    """
    try:
        path = pathlib.Path(path)
        exists = path.exists()
    except (OSError, TypeError) as error:  # too long, or of another kind
        raise CheckpointError(
            f"{str(path)[:80]!r} is no path; give the folder of an imported or published checkpoint."
        ) from error
    if not exists:
        raise CheckpointError(f"{path} does not exist; give the folder of an imported or published checkpoint.")
    if not is_native(path):
        return open_source(path, vision_tower)
    if vision_tower is not None:
        raise CheckpointError(f"{path} is an imported checkpoint and holds its vision tower; drop vision_tower.")
    return open_native(path)


def open_native(path: str | os.PathLike[str]) -> NativeCheckpoint:
    """Open a native checkpoint. Raises CheckpointError when it is none, is damaged or of a later version."""
    path = pathlib.Path(path)
    values = read_json(path / "config.json")
    if values.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not an imported checkpoint; make one with "
            f"`python -m flexattn_jax.checkpoints.import_weights --source {path} --out DIR`."
        )
    if values.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {values.get('version')!r}, this library reads {VERSION}; update the library or "
            "import the checkpoint again."
        )
    config = _read_record(path / "config.json", lambda: configs.from_dict(values["config"]))
    stored = read_json(path / "parameters.json")
    leaves = _read_record(
        path / "parameters.json",
        lambda: {
            name: LeafInfo(tuple(v["shape"]), np.dtype(_DTYPES[v["dtype"]]), int(v["group"]))
            for name, v in stored["leaves"].items()
        },
    )
    # Half-copied folders are told apart here: orbax would find out too, but only midway and in its own words.
    found = _file_sizes(path)
    files = _read_record(path / "parameters.json", lambda: {**stored["files"]})
    damaged = [file for file, size in files.items() if found.get(file) != size]
    if damaged:
        raise CheckpointError(
            f"{path} is damaged or incomplete: {', '.join(damaged[:3])} {'and others ' * (len(damaged) > 3)}"
            f"{'are' if len(damaged) > 1 else 'is'} missing or cut short. Copy or import the checkpoint again."
        )
    expected = layouts.leaf_shapes(config)
    if {name: leaf.shape for name, leaf in leaves.items()} != expected:
        raise CheckpointError(
            f"{path}: parameters.json does not list what config.json describes; one of them was changed. Import again."
        )
    source = None
    if (path / "source.json").is_file():
        record = read_json(path / "source.json")
        source = _read_record(
            path / "source.json",
            lambda: configs.from_dict(record, SourceRecord),
        )
    return NativeCheckpoint(path, config, leaves, source)


def is_native(path: pathlib.Path) -> bool:
    """Whether a folder is a checkpoint of this format."""
    try:
        return read_json(path / "config.json").get("format") == FORMAT
    except CheckpointError:
        return False


def load_config(path: str | os.PathLike[str]) -> VLMConfig:
    """The configuration of a native checkpoint."""
    return open_native(path).config


def load_params(
    path: str | os.PathLike[str],
    config: VLMConfig | None = None,
    *,
    dtype: str | None = None,
    shardings: Any = None,
) -> dict[str, Any]:
    """The parameters of a native checkpoint, put straight into their shardings and cast on the way.

    Args:
      path: the folder.
      config: the stored configuration with overrides; None: as stored. Leaves are stacked over layers if its
        `scan_layers`, else every layer has its own entry. A later first FlexAttention layer, or none, is allowed.
      dtype: "float32" or "bfloat16", of all parameters; None: the configuration's.
      shardings: a tree like the parameters', one sharding for all, or None for the default device.

    Raises CheckpointError for a damaged folder or a configuration that needs tensors that are not stored.
    """
    stored = open_native(path)
    config = config or stored.config
    trees.check_convertible(stored.config, config)
    place = trees.sharding_of(shardings)
    trees.check_room(config, dtype or config.dtype, shardings)
    target = np.dtype(_DTYPES[dtype or config.dtype])
    wanted = _stored_shardings(stored.config, config, place)
    flat: dict[str, Any] = {}
    for paths in _groups({path: leaf for path, leaf in stored.leaves.items() if path in wanted}):
        flat |= _restore(
            stored.folder,
            stored.leaves,
            paths,
            lambda path: ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=wanted[path], dtype=target),
        )
    if layouts.leaf_shapes(config) != layouts.leaf_shapes(stored.config):
        flat = trees.restack_flat(flat, stored.config, config)
    if not config.scan_layers:
        flat = trees.unstack_flat(flat)
    return trees.nest({path: jax.device_put(leaf, place(path)) for path, leaf in flat.items()})


def save_model(
    path: str | os.PathLike[str],
    config: VLMConfig,
    params: Mapping[str, Any],
    *,
    like: str | os.PathLike[str] | None = None,
) -> None:
    """Write a native checkpoint.

    Args:
      path: the folder; must be new, empty, or a native checkpoint, which is replaced.
      config: describes `params`.
      params: the tree, stacked over layers or not, of float16, bfloat16 or float32 arrays.
      like: a native checkpoint whose tokenizer, unread tensors and source record come along.
    """
    flat = trees.flatten(stack_layers(params))
    shapes = layouts.leaf_shapes(config)
    if {name: tuple(leaf.shape) for name, leaf in flat.items()} != shapes:
        wrong = sorted(
            n for n in shapes.keys() | flat.keys() if n not in flat or n not in shapes or flat[n].shape != shapes[n]
        )
        raise CheckpointError(f"these parameters are not those that the configuration describes: {', '.join(wrong)}.")
    infos = {name: (shapes[name], np.dtype(flat[name].dtype)) for name in shapes}
    if jax.process_index():  # the first process writes; the others give it what lies on their devices
        for name in infos:
            _whole_array(flat[name])
        return
    with replacing(path, is_native) as folder:
        write_params(folder, infos, lambda name: _whole_array(flat[name]))
        if like is not None:
            _copy_attachments(pathlib.Path(like), folder)
        write_config(folder, config)


def _whole_array(leaf: Any) -> Any:
    """A leaf, brought together on the host where it lies on devices of several processes; all of them must ask."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return multihost_utils.process_allgather(leaf, tiled=True)
    return leaf


def _copy_attachments(source: pathlib.Path, folder: pathlib.Path) -> None:
    for name in (*TOKENIZER_FILES, UNREAD_FILE, "source.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / "source").is_dir():
        shutil.copytree(source / "source", folder / "source")


def write_config(folder: pathlib.Path, config: VLMConfig) -> None:
    """Write config.json."""
    write_json(folder / "config.json", {"format": FORMAT, "version": VERSION, "config": configs.to_dict(config)})


def write_source_record(folder: pathlib.Path, record: SourceRecord) -> None:
    """Write source.json."""
    write_json(folder / "source.json", dataclasses.asdict(record))


def write_params(
    folder: pathlib.Path,
    infos: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    read: Callable[[str], Any],
    on_write: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write parameters.json and params/; `read` is called for one group of leaves at a time."""
    leaves: dict[str, LeafInfo] = {}
    group, filled = 0, 0
    for name, (shape, dtype) in infos.items():
        if dtype.name not in _DTYPES:
            raise CheckpointError(f"parameter {name} has type {dtype}; storable are {', '.join(_DTYPES)}.")
        size = int(np.prod(shape)) * dtype.itemsize
        if filled and filled + size > GROUP_BYTES:
            group, filled = group + 1, 0
        leaves[name] = LeafInfo(shape, dtype, group)
        filled += size
    with _orbax() as checkpointer:
        for paths in _groups(leaves):
            tree = trees.nest({path: read(path) for path in paths})
            save_args = jax.tree.map(lambda leaf: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
            target = folder.absolute() / "params" / str(leaves[paths[0]].group)
            try:
                checkpointer.save(target, args=ocp.args.PyTreeSave(tree, save_args=save_args))
            except (OSError, ValueError, RuntimeError) as error:  # as orbax has it, when a disk is full
                raise CheckpointError(f"{target} cannot be written: {first_line(error, 200)}.") from error
            on_write(sum(int(np.prod(leaves[p].shape)) * leaves[p].dtype.itemsize for p in paths))
    for marker in (folder / "params").rglob("commit_success.txt"):
        marker.write_text("written whole\n")  # orbax names the folder that it wrote in, which is no reader's business
    record = {n: {"shape": list(v.shape), "dtype": v.dtype.name, "group": v.group} for n, v in leaves.items()}
    write_json(folder / "parameters.json", {"leaves": record, "files": _file_sizes(folder)})


def _file_sizes(folder: pathlib.Path) -> dict[str, int]:
    files = sorted(path for path in (folder / "params").rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _read_record(path: pathlib.Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged ({error}). Import the checkpoint again.") from None


def _groups(leaves: Mapping[str, LeafInfo]) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for path, leaf in leaves.items():
        groups.setdefault(leaf.group, []).append(path)
    return list(groups.values())


@contextlib.contextmanager
def _orbax() -> Iterator[ocp.Checkpointer]:
    # Host arrays are fresh already; orbax's own defensive copy would double a group's memory. Compression saves 8 % of
    # half-precision weights and makes them load four times slower.
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    own = jax.process_index()  # no other process is waited for: each reads for itself, and only one writes
    options = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, use_compression=False, multiprocessing_options=options
    )
    checkpointer = ocp.Checkpointer(handler, multiprocessing_options=options)
    try:
        yield checkpointer
    finally:
        checkpointer.close()


def _restore(
    folder: pathlib.Path,
    leaves: Mapping[str, LeafInfo],
    paths: Iterable[str],
    args_of: Callable[[str], ocp.RestoreArgs],
) -> dict[str, Any]:
    """Some leaves of one group."""
    paths = list(paths)
    group = folder.absolute() / "params" / str(leaves[paths[0]].group)
    item = trees.nest({path: jax.ShapeDtypeStruct(leaves[path].shape, leaves[path].dtype) for path in paths})
    restore_args = trees.nest({path: args_of(path) for path in paths})
    try:
        with _orbax() as checkpointer:
            tree = checkpointer.restore(
                group, args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
            )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{group} is damaged or incomplete ({first_line(error, 200)}). Import the checkpoint again."
        ) from None
    flat = trees.flatten(tree)
    wrong = [path for path in paths if tuple(flat[path].shape) != leaves[path].shape]
    if wrong:
        raise CheckpointError(f"{group} does not hold what parameters.json says: {', '.join(wrong)}. Import again.")
    return flat


def _stored_shardings(
    old: VLMConfig, new: VLMConfig, place: Callable[[str], jax.sharding.Sharding]
) -> dict[str, jax.sharding.Sharding]:
    """Shardings of the stored leaves that `new` reads, after those of the leaves their tensors end up in."""
    result: dict[str, jax.sharding.Sharding] = {}
    for path, (names, stacked) in trees.target_leaves(new).items():
        sharding = place(path)
        for name in names:
            leaf, row = layouts.leaf_of(name, old)
            if leaf not in result:
                result[leaf] = _with_layer_axis(sharding, stacked) if row is not None else sharding
    return result


def _with_layer_axis(sharding: jax.sharding.Sharding, stacked: bool) -> jax.sharding.Sharding:
    """The sharding of a stored leaf, its layer axis whole (the segments' lengths may differ from the target's)."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    spec = tuple(sharding.spec)[1:] if stacked else tuple(sharding.spec)
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(None, *spec))
