"""What a frozen tower sees of a data set's pictures, kept on disk: it is the same in every epoch and every run."""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import track

from flexattn_jax.checkpoints.trees import flatten
from flexattn_jax.config import ConfigError, VisionConfig, VLMConfig
from flexattn_jax.files import lock_file
from flexattn_jax.inputs.images import ImageError
from flexattn_jax.models.vision import Views
from flexattn_jax.models.vlm import VLM
from flexattn_jax.training.data import SampleSource, TextSource, TrainSample
from flexattn_jax.training.loop import TrainingFault

VIEWS = "views"  # where they are kept, below the folder of the data sets

_AT_ONCE = 16  # pictures
_DTYPE = np.float16


class ViewedSource:
    """A source whose samples come with the tower's views of their pictures in place of pixels."""

    def __init__(self, source: TextSource, sizes: np.ndarray, views: Views):
        """
        Args:
          sizes: (n, 2) int32, width and height of each picture before padding; 0 where it filled the square, -1
            without a picture, -2 for one that cannot be read.
          views: of all samples, float16 arrays with n in front.
        """
        self._source, self._sizes, self._views = source, sizes, views
        self.lengths, self.digest = source.lengths, source.digest
        self.collate, self.name = source.collate, source.name

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> TrainSample:
        """Raises ImageError when the picture could not be read."""
        width, height = (int(v) for v in self._sizes[index])
        if width == -2:
            _ = self._source[index]  # tells why
            raise ImageError(
                f"{self.name(index)} could not be read when all pictures were seen; remove the kept views to see it now"
            )
        text = self._source.text(index)
        if width == -1:
            return text
        views = jax.tree.map(lambda kept: np.asarray(kept[index]), self._views)
        return text._replace(sample=text.sample._replace(size=(width, height) if width else None, views=views))


def keep_views(
    source: TextSource, pictures: str, config: VLMConfig, vision_params: dict, folder: str | Path
) -> ViewedSource:
    """Sees every picture once, if `folder` does not hold it yet, and gives the source with what was seen.

    Args:
      pictures: a name for the pictures' content and order; what is asked about them does not matter.
      vision_params: of the tower, stacked over layers as `config.scan_layers` says.
      folder: shared by all runs; files are named after the data and the tower. A picture takes 2 bytes a number,
        (N + M) * Dv numbers: 270 KB in the `mini` preset, 12 MB in a 7B model.

    Raises:
      ConfigError: the model trains what runs through the tower.
      TrainingFault: the folder cannot be written, or has no room.
    """
    if config.trains_in_tower:
        raise ConfigError(
            "what the tower sees cannot be kept: grouping's semantic tokens run through it and are trained; set "
            "data.keep_views to False"
        )
    folder = Path(folder)
    stem = f"{hashlib.sha256(pictures.encode()).hexdigest()[:16]}-{_digest(config, vision_params)}"
    shapes = {"lowres": (len(source), config.num_lowres_views, config.vision.width)}
    if config.tiles:
        shapes["highres"] = (len(source), config.highres_grid**2, config.vision.width)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Of two runs that begin together one sees, and the other waits for it.
        with lock_file(folder / f".{stem}.lock", wait=True):
            kept = _read(folder, stem, shapes)
            if kept is None:
                _see_all(source, config, vision_params, folder, stem, shapes)
                kept = _read(folder, stem, shapes)
    except OSError as error:
        size = sum(2 * math.prod(shape) for shape in shapes.values())
        raise TrainingFault(
            f"what the tower sees cannot be kept in {folder} ({error.strerror or error}); it takes {size / 1e9:.2f} "
            "GB: give another data.data_dir, or set data.keep_views to False"
        ) from error
    sizes, views = kept
    return ViewedSource(source, sizes, Views(**views))


def _read(folder: Path, stem: str, shapes: dict[str, tuple[int, ...]]) -> tuple[np.ndarray, dict] | None:
    """Sizes and views, None where a file is missing or cut short."""
    try:
        sizes = np.load(folder / f"{stem}-sizes.npy", allow_pickle=False)
        views = {name: np.load(folder / f"{stem}-{name}.npy", mmap_mode="r", allow_pickle=False) for name in shapes}
    except (FileNotFoundError, ValueError, EOFError):
        return None
    return (sizes, views) if all(views[name].shape == shape for name, shape in shapes.items()) else None


def _see_all(
    source: TextSource,
    config: VLMConfig,
    vision_params: dict,
    folder: Path,
    stem: str,
    shapes: dict[str, tuple[int, ...]],
) -> None:
    for stopped in folder.glob(f"{stem}-*.partial"):  # of a run that was killed; the lock is ours
        stopped.unlink()
    partial = {name: folder / f"{stem}-{name}.partial" for name in [*shapes, "sizes"]}
    arrays = {name: _room(partial[name], shape) for name, shape in shapes.items()}
    sizes = np.full((len(source), 2), -1, np.int32)
    for first in track(range(0, len(source), _AT_ONCE), f"seeing {len(source)} pictures once"):
        rows = range(first, min(first + _AT_ONCE, len(source)))
        pixels = np.zeros((_AT_ONCE, 3, config.image_size, config.image_size), np.float32)
        for place, row in enumerate(rows):
            try:
                sample = source[row].sample
            except ImageError:
                sizes[row] = -2
                continue
            if sample.pixels is not None:
                pixels[place], sizes[row] = sample.pixels, sample.size or (0, 0)
        views = _see(config, vision_params, pixels)
        for name, array in arrays.items():
            array[first : rows.stop] = np.asarray(getattr(views, name))[: len(rows)]
    for array in arrays.values():
        array.flush()
    with partial["sizes"].open("wb") as file:
        np.save(file, sizes)
    for name, file in partial.items():
        file.replace(folder / f"{stem}-{name}.npy")


@functools.partial(jax.jit, static_argnums=0)
def _see(config: VLMConfig, vision_params: dict, pixels: jax.Array) -> Views:
    return VLM(config).apply({"params": {"vision": vision_params}}, pixels, method="see")


def _room(file: Path, shape: tuple[int, ...]) -> np.memmap:
    array = np.lib.format.open_memmap(file, "w+", _DTYPE, shape)
    with file.open("r+b") as opened:  # a full disk is found out now, as an error, and not while the array is filled
        os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    return array


def _digest(config: VLMConfig, vision_params: dict) -> str:
    settings = config.vision, config.lowres_size, config.image_size, config.image_mean, config.image_std, config.dtype
    # The others cut their pictures in one way; a tower that reads the whole picture sees the same of it in all.
    tiled = (config.dense or config.crossattention) and isinstance(config.vision, VisionConfig)
    if tiled or config.reduction:
        settings = *settings, config.tiles, config.reduction
    digest = hashlib.sha256(repr(settings).encode())
    for path, leaf in sorted(flatten(vision_params).items()):
        digest.update(path.encode() + np.asarray(leaf, np.float32).tobytes())
    return digest.hexdigest()[:16]


def joined(sources: Sequence[SampleSource]) -> SampleSource:
    """Several sources of one kind as one, in order."""
    return sources[0] if len(sources) == 1 else _Joined(sources)


class _Joined:
    def __init__(self, sources: Sequence[Any]):
        self._sources = list(sources)
        self._ends = np.cumsum([len(source) for source in sources])
        self.lengths = type(sources[0].lengths)(*map(np.concatenate, zip(*(s.lengths for s in sources), strict=True)))
        self.digest = hashlib.sha256("".join(source.digest for source in sources).encode()).hexdigest()
        self.collate: Callable = sources[0].collate

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, index: int) -> tuple[Any, int]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self._sources[which], index - (int(self._ends[which - 1]) if which else 0)

    def __getitem__(self, index: int) -> Any:
        source, place = self._find(index)
        return source[place]

    def name(self, index: int) -> str:
        source, place = self._find(index)
        return source.name(place)
