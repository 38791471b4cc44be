"""POPE (arXiv 2305.10355): is there a such-and-such in this photograph of COCO's?

data_dir/coco/coco_pope_{random,popular,adversarial}.json   lines of {question_id, image, text, label}
data_dir/val2014/COCO_val2014_000000000042.jpg
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from flexattn_jax.inputs.datasets import questions as q

SOURCE = q.Source(
    name="POPE",
    home="https://github.com/AoiDragon/POPE (output/coco; the photographs are COCO's val2014, https://cocodataset.org)",
    layout="coco/coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json and val2014/",
)
KINDS = ("random", "popular", "adversarial")


def read_pope(data_dir: str | Path) -> q.Reading:
    """The questions, and what could not be read; option 0 is yes. Names repeat across the files, so the kind is added.

    Raises:
        DatasetError: a file is missing or cannot be read.
    """
    root = SOURCE.root(data_dir)
    folder = SOURCE.find(root, "coco", "output/coco")
    pictures = SOURCE.find(root, "val2014")

    def make(kind: str, entry: dict) -> q.Question:
        label = q.text(entry, "label")
        if label not in ("yes", "no"):
            raise q.EntryError(f"'label' is {label!r}; it must be yes or no")
        return q.Question(
            id=f"{kind}/{q.number_or_text(entry, 'question_id')}",
            split=kind,
            image=pictures / q.file_name(entry, "image"),
            question=q.text(entry, "text"),
            options=("yes", "no"),
            target=0 if label == "yes" else 1,
        )

    entries = []
    for kind in KINDS:
        lines = SOURCE.load_lines(SOURCE.find(folder, f"coco_pope_{kind}.json"))
        entries += [(f"{kind}, {name}", maker) for name, maker in q.numbered(lines, partial(make, kind))]
    return SOURCE.collect(root, folder, entries)
