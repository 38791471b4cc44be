"""A published checkpoint, opened: its configuration, its layout and its tensors as parameters; no array is read yet."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from flexattn_jax.checkpoints import layouts, source_config, trees
from flexattn_jax.checkpoints.errors import CheckpointError
from flexattn_jax.checkpoints.layouts import TOWER_FOLDER, AsIs, Layout
from flexattn_jax.checkpoints.safetensors_io import Tensor, first_few, read_file, read_folder
from flexattn_jax.config import ConfigError, FlexAttentionConfig, VLMConfig

FLOAT_TYPES = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16), "F32": np.dtype(np.float32)}
TIED_HEAD = "decoder/lm_head/kernel"
INIT_DEVIATION = 0.02  # of projections that the checkpoint lacks: the reference's stock initialiser
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json",
)  # fmt: skip
CONFIG_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of a parameter tree, still in its files."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype  # as stored
    names: tuple[str, ...]  # its tensors, one a layer when stacked
    stacked: bool


@dataclasses.dataclass(frozen=True)
class _Matched:
    read: dict[str, tuple[Tensor, AsIs]]  # by our name: what the model reads and the checkpoint has
    unread: dict[str, Tensor]  # by our name: what it has beside; kept for export
    repeats_tied_head: bool  # the output layer is stored although it is the embedding


@dataclasses.dataclass(frozen=True)
class SourceCheckpoint:
    """Published tensors as parameters of `config`; raises CheckpointError, once for all faults, if they do not fit."""

    config: VLMConfig
    layout: Layout
    tensors: Mapping[str, Tensor]  # by published name, those of a tower's own folder with TOWER_FOLDER/ in front
    where: str  # for messages
    folder: pathlib.Path | None = None  # None: a bare file
    tower_folder: pathlib.Path | None = None
    init_seed: int | None = None  # initialises the high-resolution projections that a LLaVA-1.5 checkpoint lacks

    def __post_init__(self):
        self.matched  # noqa: B018  the faults are raised here and not at first use

    @functools.cached_property
    def matched(self) -> _Matched:
        """The tensors by our names. Raises CheckpointError that lists everything that does not fit."""
        return _match(self)

    def leaves(self) -> Iterator[Leaf]:
        """The leaves of the tree, stacked as `config.scan_layers` says."""
        shapes = layouts.tensor_shapes(self.config)
        for path, (names, stacked) in trees.target_leaves(self.config).items():
            shape = (len(names), *shapes[names[0]]) if stacked else shapes[names[0]]
            yield Leaf(path, shape, self._dtype(names[0]), tuple(names), stacked)

    def _dtype(self, name: str) -> np.dtype:
        if name not in self.matched.read:
            name = name.replace("_proj_hd", "_proj")  # initialised projections take the type of their neighbours
        return FLOAT_TYPES[self.matched.read[name][0].info.dtype]

    def _tensor(self, name: str) -> np.ndarray:
        if name in self.matched.read:
            tensor, transform = self.matched.read[name]
            return transform.load(tensor.array())
        shape = layouts.tensor_shapes(self.config)[name]
        key = [self.init_seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")]
        noise = np.random.default_rng(key).standard_normal(shape, np.float32)
        return (INIT_DEVIATION * noise).astype(self._dtype(name))

    def read_leaf(
        self, leaf: Leaf, dtype: np.dtype | None = None, index: tuple[slice, ...] | None = None
    ) -> np.ndarray:
        """The part `index` (None: all) of a leaf, as `dtype` (None: as stored). Only that part is read."""
        index = index or (slice(None),) * len(leaf.shape)
        ranges = [range(size)[part] for size, part in zip(leaf.shape, index, strict=True)]
        out = np.empty([len(r) for r in ranges], dtype or leaf.dtype)
        if leaf.stacked:
            for row, layer in enumerate(ranges[0]):
                out[row] = self._tensor(leaf.names[layer])[index[1:]]
        else:
            out[...] = self._tensor(leaf.names[0])[index]
        return out

    def params(
        self, config: VLMConfig | None = None, *, dtype: str | None = None, shardings: Any = None
    ) -> dict[str, Any]:
        """The parameter tree of `config` (None: this checkpoint's own), stacked if its `scan_layers`.

        Each device's part of each leaf is read and cast by itself; no second copy of the whole is made.

        Args:
          config: this checkpoint's configuration with overrides; None: as it is.
          dtype: of all parameters; None: the configuration's.
          shardings: a tree like the parameters', one sharding for all, or None for the default device.
        """
        if config is not None and config != self.config:
            return dataclasses.replace(self, config=config).params(dtype=dtype, shardings=shardings)
        trees.check_room(self.config, dtype or self.config.dtype, shardings)
        target, place = np.dtype(dtype or self.config.dtype), trees.sharding_of(shardings)
        return trees.nest(
            {
                leaf.path: jax.make_array_from_callback(
                    leaf.shape, place(leaf.path), functools.partial(self.read_leaf, leaf, target)
                )
                for leaf in self.leaves()
            }
        )


def open_source(
    folder: str | pathlib.Path,
    vision_tower: str | pathlib.Path | None = None,
    *,
    init_seed: int | None = None,
) -> SourceCheckpoint:
    """Open a safetensors checkpoint of any supported layout.

    Args:
      folder: has config.json and the weights.
      vision_tower: folder of the CLIP tower, when the checkpoint has none inside. None: `folder`/vision_tower, if any.
        Of a tower that is inside the checkpoint, only config.json is taken from there.
      init_seed: make a LLaVA-1.5 checkpoint a FlexAttention one of the released recipe, whose projections are drawn
        from N(0, 0.02) with this seed.

    Raises CheckpointError for anything that is missing, damaged, unsupported or does not fit.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder that holds config.json and the weights.")
    values = source_config.read_json(folder / "config.json")
    family = source_config.family_of(values, str(folder / "config.json"))
    tensors = read_folder(folder)
    tower = _tower_folder(folder, vision_tower, family)
    if not layouts.has_tower(family, tensors):
        tensors = tensors | _tower_tensors(values, tower, folder)
    layout = layouts.detect_layout(family, tensors)
    config = config_of_folder(folder, tower)
    embedding = layout.source_of("decoder/embedding")[0]
    if embedding in tensors and tensors[embedding].info.dtype == "BF16":
        config = dataclasses.replace(config, dtype="bfloat16")
    if init_seed is not None:
        if init_seed < 0:
            raise CheckpointError(f"the seed of the projections is {init_seed}; it must be a whole number from 0 on.")
        config = _with_flexattention(config, folder)
    return SourceCheckpoint(config, layout, tensors, str(folder), folder, tower, init_seed)


def open_weights(path: str | pathlib.Path, config: VLMConfig, family: str = "llava") -> SourceCheckpoint:
    """A bare safetensors file with published names, for a configuration known otherwise (`config_from_parts`)."""
    tensors = read_file(pathlib.Path(path))
    return SourceCheckpoint(config, layouts.detect_layout(family, tensors), tensors, str(path))


def read_config(folder: str | pathlib.Path, vision_tower: str | pathlib.Path | None = None) -> tuple[VLMConfig, Layout]:
    """Configuration and layout of a published checkpoint; see `open_source`."""
    source = open_source(folder, vision_tower)
    return source.config, source.layout


def config_of_folder(folder: pathlib.Path, tower: pathlib.Path | None = None) -> VLMConfig:
    """The configuration that the JSON files of a published checkpoint describe (float32); see `open_source`."""
    where = str(folder / "config.json")
    values = source_config.read_json(folder / "config.json")
    family = source_config.family_of(values, where)
    if family == "hf":
        return source_config.config_from_hf(values, _processor(folder), where)
    tower = tower or _tower_folder(folder, None, family)
    clip, tower_where = _clip_config(values, tower, where)
    return source_config.config_from_llava(values, clip, _processor(tower) if tower else {}, where, tower_where)


def _with_flexattention(config: VLMConfig, folder: pathlib.Path) -> VLMConfig:
    if config.flexattention is not None:
        raise CheckpointError(f"{folder} is a FlexAttention checkpoint already; import it without --flexattention.")
    flex = FlexAttentionConfig()
    try:
        return dataclasses.replace(config, flexattention=flex, image_size=config.lowres_size * flex.zoom_ratio)
    except ConfigError as error:
        raise CheckpointError(f"{folder} cannot become a FlexAttention checkpoint: {error}.") from None


def _tower_folder(folder: pathlib.Path, given: str | pathlib.Path | None, family: str) -> pathlib.Path | None:
    if given is None:
        inner = folder / TOWER_FOLDER
        return inner if inner.is_dir() else None
    if family == "hf":
        raise CheckpointError(
            f"{folder} is a Hugging Face checkpoint, which holds its vision tower; drop --vision_tower."
        )
    if not isinstance(given, (str, os.PathLike)) or not os.path.isdir(given):
        raise CheckpointError(f"--vision_tower {str(given)[:80]!r} is not a folder.")
    return pathlib.Path(given)


def _tower_tensors(values: dict[str, Any], tower: pathlib.Path | None, folder: pathlib.Path) -> dict[str, Tensor]:
    if tower is None:
        raise CheckpointError(
            f"{folder} has no vision tower inside. Fetch {values.get('mm_vision_tower') or 'its CLIP tower'} and give "
            "its folder with --vision_tower."
        )
    return {f"{TOWER_FOLDER}/{name}": tensor for name, tensor in read_folder(tower).items()}


def _clip_config(values: dict[str, Any], tower: pathlib.Path | None, where: str) -> tuple[dict[str, Any], str]:
    if tower is not None:
        return source_config.read_json(tower / "config.json"), str(tower / "config.json")
    name = source_config.Fields(values, where).text("mm_vision_tower")
    if name not in source_config.KNOWN_TOWERS:
        raise CheckpointError(
            f"{where} names the vision tower {name!r}, whose configuration is not known here. Give a folder with its "
            f"config.json by --vision_tower (known: {', '.join(source_config.KNOWN_TOWERS)})."
        )
    return source_config.KNOWN_TOWERS[name], name


def _processor(folder: pathlib.Path) -> dict[str, Any]:
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            values = source_config.read_json(folder / name)
            if name == "preprocessor_config.json" or "image_processor" in values:
                return values
    return {}


def _match(source: SourceCheckpoint) -> _Matched:
    """Our names for the tensors. Every fault of every tensor goes into one error."""
    config, shapes = source.config, layouts.tensor_shapes(source.config)
    found: dict[str, tuple[Tensor, AsIs]] = {}
    unexpected, faults = [], []
    for published, tensor in source.tensors.items():
        known = source.layout.find(published)
        if known is None or not layouts.is_known(known[0], config):
            unexpected.append(f"  {published} {list(tensor.info.shape)}")
            continue
        name, transform = known
        found[name] = (tensor, transform)
        if name not in shapes:
            continue
        expected = transform.source_shape(shapes[name], config)
        if tensor.info.shape != expected:
            faults.append(f"  {published}: {list(tensor.info.shape)}, expected {list(expected)}")
        if tensor.info.dtype not in FLOAT_TYPES:
            faults.append(f"  {published}: type {tensor.info.dtype}, expected {', '.join(FLOAT_TYPES)}")
    missing = [name for name in shapes if name not in found and not (source.init_seed is not None and "_hd/" in name)]
    places = {name: source.layout.source_of(name) for name in missing}
    absent = [
        f"  {place[0]} {list(place[1].source_shape(shapes[name], config))}" for name, place in places.items() if place
    ]
    # Nobody publishes these, so there is no published name to ask for; once for all layers.
    absent += dict.fromkeys(f"  {layouts.leaf_of(name, config)[0]}" for name, place in places.items() if not place)
    if not faults:
        faults += _mixed_types(config, found)
    repeats = config.decoder.tie_embeddings and TIED_HEAD in found
    if repeats and not _equal(found[TIED_HEAD][0], found.get("decoder/embedding", (None,))[0]):
        faults.append(
            f"  {found[TIED_HEAD][0].name}: differs from the embedding, although the configuration says that they are "
            "one (tie_word_embeddings)"
        )
    groups = (("missing", absent), ("unexpected", unexpected), ("of wrong shape, type or content", faults))
    if any(lines for _, lines in groups):
        parts = [f"{len(lines)} {what}:\n" + "\n".join(first_few(sorted(lines))) for what, lines in groups if lines]
        hint = ""
        if missing and all("_proj_hd" in name for name in missing):
            hint = "\nThese are FlexAttention's projections; import with --flexattention to initialise them."
        if missing and not any(places.values()):
            hint = "\nNobody publishes these; take a checkpoint that was trained with that setting."
        raise CheckpointError(
            f"the tensors of {source.where} are not those that its configuration describes.\n" + "\n".join(parts) + hint
        )
    read = {name: found[name] for name in shapes if name in found}
    unread = {name: tensor for name, (tensor, _) in found.items() if name not in shapes}
    if repeats:
        del unread[TIED_HEAD]
    return _Matched(read, unread, repeats)


def _mixed_types(config: VLMConfig, found: Mapping[str, tuple[Tensor, AsIs]]) -> list[str]:
    """Layers are stored stacked, so a parameter must have one type in all of them."""
    faults = []
    for names in layouts.leaf_tensors(config).values():
        tensors = [found[name][0] for name in names if name in found]
        faults += [
            f"  {t.name}: type {t.info.dtype}, but {tensors[0].name} has {tensors[0].info.dtype}; layers must agree"
            for t in tensors
            if t.info.dtype != tensors[0].info.dtype
        ]
    return faults


def _equal(first: Tensor, second: Tensor | None) -> bool:
    return second is not None and first.info == second.info and np.array_equal(first.bytes(), second.bytes())
