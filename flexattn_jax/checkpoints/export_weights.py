"""Export an imported or trained checkpoint to safetensors, by the import's rules read backwards.

    python -m flexattn_jax.checkpoints.export_weights --source DIR --out DIR --layout llava|hf

The layout of the import comes back bit by bit, unread tensors included; the other layout gets every tensor that has a
place in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from flexattn_jax.checkpoints import export_config, layouts, source_config, store
from flexattn_jax.checkpoints.errors import CheckpointError
from flexattn_jax.checkpoints.folders import replacing, write_json
from flexattn_jax.checkpoints.import_weights import ProgressBar
from flexattn_jax.checkpoints.layouts import TOWER_FOLDER, Layout
from flexattn_jax.checkpoints.safetensors_io import DTYPE_NAMES, Tensor, TensorInfo, read_file, write_folder
from flexattn_jax.checkpoints.source import TIED_HEAD, TOKENIZER_FILES, config_of_folder
from flexattn_jax.command_line import exit_code
from flexattn_jax.config import ConvVisionConfig, VLMConfig

MAX_SHARD_BYTES = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was exported."""

    layout: str
    num_tensors: int
    num_parameters: int
    files: tuple[str, ...]
    dropped: tuple[str, ...]  # our names of unread tensors that the layout has no place for

    def __str__(self) -> str:
        text = (
            f"layout      {self.layout}\ntensors     {self.num_tensors} with {self.num_parameters:,} values in "
            f"{len(self.files)} file{'s' * (len(self.files) != 1)}"
        )
        if self.dropped:
            text += f"\nleft out    {len(self.dropped)} tensors that this layout has no place for"
        return text


def export_weights(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    layout: str,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_write: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Write the native checkpoint `source` to the folder `out` as safetensors in `layout` ("llava" or "hf").

    A FlexAttention checkpoint keeps its projections and settings in either layout; Hugging Face's own code ignores
    them and runs the LLaVA-1.5 that is left. One group of leaves is in memory at a time.

    Raises CheckpointError for an unknown layout, a damaged source, a model that the layout cannot hold or
    a folder that is taken.
    """
    checkpoint = store.open_native(source)
    target = layouts.export_layout(layout, checkpoint.source and checkpoint.source.layout)
    for name in ("crossattention", "dense", "grouping", "reduction"):
        if getattr(checkpoint.config, name) is not None:
            raise CheckpointError(
                f"{source} reads pictures with {name!r}, which the {layout} layout cannot say, so that its "
                "loaders would run another model; load it with flexattn_jax.load as it is."
            )
    if isinstance(checkpoint.config.vision, ConvVisionConfig):
        raise CheckpointError(
            f"{source} has a convolutional tower, which has no place in the {layout} layout: nobody publishes such "
            "models; load it with flexattn_jax.load as it is."
        )
    plan = _Plan.of(checkpoint, target)
    total = sum(info.num_bytes for info in plan.infos.values())
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        on_write(done, total)

    with replacing(out) as folder:
        tower = {name: info for name, info in plan.infos.items() if name.startswith(TOWER_FOLDER + "/")}
        main = {name: info for name, info in plan.infos.items() if name not in tower}
        _write_configs(checkpoint, target, folder)
        files = write_folder(folder, main, plan.tensors(main), max_shard_bytes, advance)
        if tower:
            short = {name.removeprefix(TOWER_FOLDER + "/"): info for name, info in tower.items()}
            values = ((name.removeprefix(TOWER_FOLDER + "/"), value) for name, value in plan.tensors(tower))
            inner = write_folder(folder / TOWER_FOLDER, short, values, max_shard_bytes, advance)
            files += [f"{TOWER_FOLDER}/{name}" for name in inner]
        for name in TOKENIZER_FILES:
            if (checkpoint.folder / name).is_file():
                shutil.copyfile(checkpoint.folder / name, folder / name)
    return Summary(
        layout=layout,
        num_tensors=len(plan.infos),
        num_parameters=sum(int(np.prod(info.shape)) for info in plan.infos.values()),
        files=tuple(files),
        dropped=plan.dropped,
    )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Which tensor goes out under which name."""

    checkpoint: store.NativeCheckpoint
    infos: dict[str, TensorInfo]  # by published name
    published: dict[str, str]  # our name -> published name, of what the model reads
    unread: dict[str, Tensor]  # published name -> tensor
    head: str | None  # published name of a tied output layer that the source repeated
    dropped: tuple[str, ...]

    @classmethod
    def of(cls, checkpoint: store.NativeCheckpoint, target: Layout) -> _Plan:
        config = checkpoint.config
        infos, published, unread, dropped = {}, {}, {}, []
        for name, shape in layouts.tensor_shapes(config).items():
            published[name], transform = target.source_of(name)
            dtype = checkpoint.leaves[layouts.leaf_of(name, config)[0]].dtype
            infos[published[name]] = TensorInfo(DTYPE_NAMES[dtype], transform.source_shape(shape, config))
        path = checkpoint.folder / store.UNREAD_FILE
        for name, tensor in (read_file(path) if path.is_file() else {}).items():
            place = target.source_of(name)
            if place is None:
                dropped.append(name)
            elif place[0] not in infos:  # what the model reads is newer than what was kept
                unread[place[0]] = tensor
                infos[place[0]] = tensor.info
        head = None
        if checkpoint.source is not None and checkpoint.source.repeats_tied_head and TIED_HEAD not in published:
            head = target.source_of(TIED_HEAD)[0]
            infos[head] = infos[published["decoder/embedding"]]
        return cls(checkpoint, infos, published, unread, head, tuple(dropped))

    def tensors(self, wanted: dict[str, TensorInfo]) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors of the published names `wanted`, in the order in which they are stored."""
        leaves = layouts.leaf_tensors(self.checkpoint.config)
        needed = {leaf for leaf, names in leaves.items() if any(self.published[name] in wanted for name in names)}
        for group in self.checkpoint.read_groups(needed):
            for leaf, value in group.items():
                for name in leaves[leaf]:
                    row = layouts.leaf_of(name, self.checkpoint.config)[1]
                    yield self.published[name], value if row is None else value[row]
                if leaf == "decoder/embedding" and self.head in wanted:
                    yield self.head, value
        for name, tensor in self.unread.items():
            if name in wanted:
                yield name, tensor.bytes()


def _write_configs(checkpoint: store.NativeCheckpoint, target: Layout, folder: pathlib.Path) -> None:
    """config.json and the image processor's: the import's own while they still say the same, else written anew."""
    kept = checkpoint.folder / "source"
    base: dict[str, Any] = {}
    if checkpoint.source is not None and checkpoint.source.layout.family == target.family:
        for path in kept.rglob("*.json"):
            place = folder / path.relative_to(kept)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, place)
        base = source_config.read_json(folder / "config.json")
    if target.tower_in_folder:
        (folder / TOWER_FOLDER).mkdir(exist_ok=True)
    if base and not _differences(checkpoint.config, folder):
        return
    processor = folder
    if target.family == "hf":
        values = export_config.to_hf(checkpoint.config, base)
    else:
        values = export_config.to_llava(checkpoint.config, base)
        processor = folder / TOWER_FOLDER
        processor.mkdir(exist_ok=True)
        write_json(processor / "config.json", export_config.to_clip(checkpoint.config))
    write_json(processor / "preprocessor_config.json", export_config.to_processor(checkpoint.config))
    write_json(folder / "config.json", {"torch_dtype": checkpoint.leaves["decoder/embedding"].dtype.name, **values})
    lost = _differences(checkpoint.config, folder)
    if lost:
        raise CheckpointError(f"the {target.family} layout cannot express this configuration: {', '.join(lost)}.")


def _differences(config: VLMConfig, folder: pathlib.Path) -> list[str]:
    """Fields that an import of `folder` would read otherwise; how the model is run is no part of a checkpoint."""
    expected = dataclasses.asdict(config)
    read = dataclasses.asdict(config_of_folder(folder))
    runtime = {"dtype", "scan_layers"} | ({"image_token_id"} if config.image_token_id is None else set())
    return [name for name in expected if name not in runtime and read[name] != expected[name]]


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m flexattn_jax.checkpoints.export_weights", description="Export a checkpoint to safetensors."
    )
    parser.add_argument("--source", required=True, help="folder of an imported or trained checkpoint")
    parser.add_argument("--out", required=True, help="folder to write; must be new or empty")
    parser.add_argument(
        "--layout", required=True, choices=sorted(layouts.EXPORTS), help="names and config.json to write"
    )
    args = parser.parse_args(argv)

    def act() -> None:
        summary = export_weights(args.source, args.out, args.layout, on_write=ProgressBar("exporting"))
        print(summary)
        print(f"written to {args.out}")

    return exit_code("error", act, (CheckpointError,), failed=1)


if __name__ == "__main__":
    sys.exit(main())
