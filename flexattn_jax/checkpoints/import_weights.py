"""Import a published safetensors checkpoint.

    python -m flexattn_jax.checkpoints.import_weights --source DIR --out DIR [--vision_tower DIR]

Layouts: liuhaotian/llava-v1.5-*, senfu/llava-v1.5-7b-flexattn, and Hugging Face's llava-hf with the names of
transformers 4 or 5; which one it is, is found out. Every tensor is kept, in its stored type.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Callable

from tqdm import tqdm

from flexattn_jax.checkpoints import store
from flexattn_jax.checkpoints.errors import CheckpointError
from flexattn_jax.checkpoints.folders import replacing
from flexattn_jax.checkpoints.layouts import TOWER_FOLDER
from flexattn_jax.checkpoints.safetensors_io import SINGLE_NAME, write_folder
from flexattn_jax.checkpoints.source import CONFIG_FILES, TOKENIZER_FILES, SourceCheckpoint, open_source
from flexattn_jax.command_line import exit_code
from flexattn_jax.config import VLMConfig


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was imported."""

    layout: str
    config: VLMConfig
    num_parameters: dict[str, int]  # that the model reads, by part
    dtypes: tuple[str, ...]
    num_unread: int
    num_initialised: int

    def __str__(self) -> str:
        counts = ", ".join(f"{part} {count:,}" for part, count in self.num_parameters.items())
        lines = [
            f"layout      {self.layout}",
            f"parameters  {sum(self.num_parameters.values()):,} ({counts}), stored as {', '.join(self.dtypes)}",
            f"unread      {self.num_unread} tensors that the model does not use, kept for export",
        ]
        flex = self.config.flexattention
        what = "off (LLaVA-1.5)"
        if flex is not None:
            what = f"zoom {flex.zoom_ratio}, threshold {flex.threshold:g}, from layer {flex.first_layer}"
        if self.num_initialised:
            what += f"; {self.num_initialised} projections freshly initialised, to be trained"
        return "\n".join([*lines, f"FlexAttention {what}"])


def import_weights(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    vision_tower: str | os.PathLike[str] | None = None,
    init_seed: int | None = None,
    on_write: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Write the native checkpoint `out` from the published one in `source`.

    The files are mapped and copied group by group of leaves; the whole model is never in memory. `on_write` gets the
    bytes written so far and in all. See `source.open_source` for the other arguments.

    Raises CheckpointError, before anything is written, when the source is at fault; an interrupted import leaves
    nothing under the name `out`.
    """
    checkpoint = open_source(source, vision_tower, init_seed=init_seed)
    leaves = {leaf.path: leaf for leaf in checkpoint.leaves()}
    sizes = {path: math.prod(leaf.shape) for path, leaf in leaves.items()}
    unread = checkpoint.matched.unread
    total = sum(sizes[path] * leaf.dtype.itemsize for path, leaf in leaves.items())
    total += sum(tensor.info.num_bytes for tensor in unread.values())
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        on_write(done, total)

    with replacing(out, store.is_native) as folder:
        infos = {path: (leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
        store.write_params(folder, infos, lambda path: checkpoint.read_leaf(leaves[path]), advance)
        if unread:
            kept = ((name, tensor.bytes()) for name, tensor in unread.items())
            write_folder(folder, {name: t.info for name, t in unread.items()}, kept, sys.maxsize, advance)
            (folder / SINGLE_NAME).rename(folder / store.UNREAD_FILE)
        _copy_files(checkpoint, folder)
        store.write_source_record(folder, store.SourceRecord(checkpoint.layout, checkpoint.matched.repeats_tied_head))
        store.write_config(folder, checkpoint.config)
    parts = {part: sum(n for path, n in sizes.items() if path.startswith(part)) for part in _PARTS}
    where = "own folder" if checkpoint.layout.tower_in_folder else "inside"
    return Summary(
        layout=f"{checkpoint.layout.family} ({checkpoint.layout.decoder}.*, vision tower {where})",
        config=checkpoint.config,
        num_parameters=parts,
        dtypes=tuple(sorted({leaf.dtype.name for leaf in leaves.values()})),
        num_unread=len(unread),
        num_initialised=sum(n not in checkpoint.matched.read for leaf in leaves.values() for n in leaf.names),
    )


_PARTS = ("vision", "connector", "decoder")


def _copy_files(checkpoint: SourceCheckpoint, folder: pathlib.Path) -> None:
    for name in TOKENIZER_FILES:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)
    for origin, target in ((checkpoint.folder, "source"), (checkpoint.tower_folder, f"source/{TOWER_FOLDER}")):
        for name in CONFIG_FILES:
            if origin is not None and (origin / name).is_file():
                (folder / target).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(origin / name, folder / target / name)


@dataclasses.dataclass
class ProgressBar:
    """A bar of bytes on standard error."""

    label: str
    bar: tqdm | None = None

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            self.bar = tqdm(total=total, unit="B", unit_scale=True, desc=self.label, leave=False)
        self.bar.update(done - self.bar.n)
        if done == total:
            self.bar.close()


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m flexattn_jax.checkpoints.import_weights", description="Import a safetensors checkpoint."
    )
    parser.add_argument("--source", required=True, help="folder with config.json and the safetensors files")
    parser.add_argument("--out", required=True, help="folder to write; must be new, empty or an earlier import")
    parser.add_argument("--vision_tower", help="folder of the CLIP tower, when the checkpoint does not hold it")
    parser.add_argument(
        "--flexattention",
        action="store_true",
        help="make a LLaVA-1.5 checkpoint a FlexAttention one (released recipe) to train; its projections are random",
    )
    parser.add_argument("--seed", type=int, default=0, help="of those projections")
    args = parser.parse_args(argv)

    def act() -> None:
        summary = import_weights(
            args.source,
            args.out,
            vision_tower=args.vision_tower,
            init_seed=args.seed if args.flexattention else None,
            on_write=ProgressBar("importing"),
        )
        print(summary)
        print(f"written to {args.out}")

    return exit_code("error", act, (CheckpointError,), failed=1)


if __name__ == "__main__":
    sys.exit(main())
