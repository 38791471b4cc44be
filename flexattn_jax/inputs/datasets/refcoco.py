"""RefCOCO, RefCOCO+ and RefCOCOg: the box of the thing that a phrase describes, in OFA's tables.

    data_dir/refcoco_val.tsv, refcoco_testA.tsv, refcoco_testB.tsv, refcocoplus_..., refcocog_val.tsv, refcocog_test.tsv
        without a head: unique id, image id, phrase, "x1,y1,x2,y2" in pixels, picture in base64

FlexAttention's script (scripts/evaluation/eval_refcoco.py) reads refcocog_val.tsv, whatever its result is called. Boxes
are shares of the picture's width and height, and the picture is stretched to a square, not padded.
"""

from __future__ import annotations

from pathlib import Path

from flexattn_jax.inputs.datasets import questions as q
from flexattn_jax.inputs.datasets import tables
from flexattn_jax.inputs.images import ImageError, picture_size

SOURCE = q.Source(
    name="RefCOCO",
    home="https://github.com/OFA-Sys/OFA (datasets.md)",
    layout="a table such as refcocog_val.tsv, refcoco_val.tsv or refcocoplus_testA.tsv",
)
VARIANTS = (
    *("refcocog_val", "refcocog_test", "refcoco_val", "refcoco_testA", "refcoco_testB"),
    *("refcocoplus_val", "refcocoplus_testA", "refcocoplus_testB"),
)
SMALL_SHARE = 0.05  # of the picture's area, up to which FlexAttention calls a thing small

_OVERHANG = 2  # pixels that a box may reach beyond its picture, by rounding
_COLUMNS = ("id", "image_id", "phrase", "box", "image")


def read_refcoco(data_dir: str | Path, variant: str) -> q.Reading:
    """The phrases as questions, and what could not be read; the splits are "small" and "large" things.

    The answer is the box as shares, "[x1, y1, x2, y2]". Every picture's head is read for its size.

    Raises:
        DatasetError: the table is missing or cannot be read.
    """
    root = SOURCE.root(data_dir)
    where = SOURCE.find(root, f"{variant}.tsv")

    def make(row: tables.Row, size: tuple[int, int] | str) -> q.Question:
        if isinstance(size, str):
            raise q.EntryError(size)
        name, phrase = row.text("id"), row.text("phrase")
        if name is None or phrase is None:
            raise q.EntryError("it has no id or no phrase")
        width, height = size
        x1, y1, x2, y2 = _box(row.values["box"])
        if min(x1, y1) < -_OVERHANG or x2 > width + _OVERHANG or y2 > height + _OVERHANG:
            raise q.EntryError(f"its box {row.values['box']!r} leaves its picture of {width} x {height} pixels")
        shares = (x1 / width, y1 / height, x2 / width, y2 / height)
        area, side = (shares[2] - shares[0]) * (shares[3] - shares[1]), max(size)
        box = (shares[0] * side, shares[1] * side, (shares[2] - shares[0]) * side, (shares[3] - shares[1]) * side)
        return q.Question(
            id=name,
            split="small" if area <= SMALL_SHARE else "large",
            image=row.picture,
            question=q.without_tag(phrase, "phrase"),
            answers=(str(list(shares)),),
            stretched=True,
            bbox=(box,),
        )

    entries = []
    for row in tables.read_table(where, SOURCE, _COLUMNS):
        size = _size(row.values.pop("image"))
        entries.append((f"row {row.number}", lambda r=row, s=size: make(r, s)))
    return SOURCE.collect(root, where, entries)


def _size(image: str) -> tuple[int, int] | str:
    """(width, height), or what is wrong with the picture."""
    try:
        return picture_size(tables.decode(image), "its picture")
    except ImageError as error:
        return str(error)


def _box(text: str) -> tuple[float, ...]:
    try:
        values = [float(value) for value in text.split(",")]
    except ValueError:
        values = []
    if not q.finite_numbers(values, 4) or values[0] >= values[2] or values[1] >= values[3]:
        raise q.EntryError(f"its box {text!r} is not x1,y1,x2,y2 in pixels")
    return tuple(values)
