"""vsearch in V* Bench's folder layout, for `read_vstar` and for other people's evaluators.

python -m flexattn_jax.inputs.datasets.vsearch_export --out=DIR [--preset=standard] [--split=test] [--seed=0]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from flexattn_jax.inputs.datasets.vsearch_examples import FORMS, PRESETS, SPLITS, Example, VisualQuestion, VSearchError
from flexattn_jax.inputs.datasets.vsearch_scenes import AssetError


def write_vstar_layout(examples: Iterable[Example], folder: str | os.PathLike) -> dict[str, int]:
    """Writes `folder`/FORM/ID-NUMBER.jpg and .json, one pair a question, the correct option first.

    Questions about one picture share its bytes on disk where the file system can do that.

    Args:
        examples: e.g. map(decode_example, load_vsearch(...)).
        folder: that does not exist yet, or is empty.

    Returns:
        form -> number of questions.

    Raises:
        VSearchError: the folder holds something, or cannot be written.
    """
    root = Path(folder)
    counts = dict.fromkeys(FORMS, 0)
    try:
        root.mkdir(parents=True, exist_ok=True)
        if any(root.iterdir()):
            raise VSearchError(f"{root} is not empty; give a folder that does not exist, so that no old question stays")
        for form in FORMS:
            (root / form).mkdir()
        for example in examples:
            picture = None
            for number, asked in enumerate(example.questions):
                path = root / asked.form / f"{example.id}-{number:02d}.jpg"
                picture = _write_picture(path, example.image, picture)
                path.with_suffix(".json").write_text(json.dumps(_annotation(example, asked)) + "\n")
                counts[asked.form] += 1
    except OSError as error:
        raise VSearchError(f"{root} cannot be written ({error.strerror}); give another folder") from error
    return counts


def _annotation(example: Example, asked: VisualQuestion) -> dict:
    targets = [example.objects[target] for target in asked.targets]
    wrong = [option for k, option in enumerate(asked.options) if k != asked.answer]
    return {
        "target_object": [target.name for target in targets],
        "bbox": [list(target.box) for target in targets],
        "question": asked.question,
        "options": [asked.options[asked.answer], *wrong],
    }


def _write_picture(path: Path, image: bytes, same: Path | None) -> Path:
    if same is not None:
        try:
            os.link(same, path)
            return same
        except OSError:  # no links here, or too many of this file
            pass
    path.write_bytes(image)
    return path


def main(arguments: list[str]) -> int:
    """Draws a split where needed and writes it out."""
    parser = argparse.ArgumentParser(prog="vsearch_export", description="Writes vsearch in V* Bench's folder layout.")
    parser.add_argument("--out", required=True, help="folder to write, which does not exist yet")
    parser.add_argument("--preset", default="standard", choices=PRESETS)
    parser.add_argument("--split", default="test", choices=SPLITS)
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--pictures", default=None, type=int, help="of the split; default: as many as the preset has")
    parser.add_argument("--data_dir", default=None, help="folder of data sets; default: the user's data folder")
    given = parser.parse_args(arguments)
    from flexattn_jax.inputs.datasets.vsearch import decode_example, load_vsearch  # tfds, which takes a second

    try:
        source = load_vsearch(given.data_dir, given.preset, given.split, given.seed, given.pictures)
        rows = (source[k] for k in range(len(source)))
        counts = write_vstar_layout(map(decode_example, rows), given.out)
    except (VSearchError, AssetError) as error:
        print(f"vsearch_export: {error}", file=sys.stderr)
        return 2
    print(f"wrote {', '.join(f'{count} questions of {form}' for form, count in counts.items())} to {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
