"""MMBench (arXiv 2307.06281), dev: multiple-choice questions, each in several orders of its options.

    data_dir/mmbench_dev_20230712.tsv   columns index, question, hint, A, B, C, D, answer, category, image (base64)

Rows whose index is 1,000,000 or more are the question `index % 1,000,000` with its options in another order. Where a
row holds a short number for a picture, the picture is that of the row of this index (as in VLMEvalKit's tables).
"""

from __future__ import annotations

from pathlib import Path

from flexattn_jax.inputs.datasets import questions as q
from flexattn_jax.inputs.datasets import tables

SOURCE = q.Source(
    name="MMBench",
    home="https://github.com/open-compass/MMBench",
    layout="mmbench_dev_20230712.tsv, mmbench_dev_en_20231003.tsv or MMBench_DEV_EN.tsv",
)

_ORDERS = 1_000_000
_LONGEST_REFERENCE = 64  # characters of an index


def read_mmbench(data_dir: str | Path) -> q.Reading:
    """The rows as questions (hint and question on lines of their own), and what could not be read.

    The splits are the categories; `unit` is the index without its order.

    Raises:
        DatasetError: the table is missing or cannot be read.
    """
    root = SOURCE.root(data_dir)
    where = SOURCE.find(root, "mmbench_dev_20230712.tsv", "mmbench_dev_en_20231003.tsv", "MMBench_DEV_EN.tsv")
    pictures: dict[str, tables.TablePicture] = {}

    def make(row: tables.Row, image: str) -> q.Question:
        index, question = row.text("index"), row.text("question")
        if index is None or not index.isdecimal() or len(index) > _LONGEST_REFERENCE or question is None:
            raise q.EntryError("it has no index or no question")
        options = tables.options(row)
        picture = pictures.get(image) if len(image) <= _LONGEST_REFERENCE else row.picture
        if picture is None:
            raise q.EntryError(f"its picture is that of row {image!r}, which is not there")
        hint = row.text("hint")
        return q.Question(
            id=index,
            split=row.text("category") or "no category",
            image=picture,
            question=q.without_tag(question if hint is None else f"{hint}\n{question}", "question"),
            options=tuple(q.without_tag(option, "options") for option in options),
            target=tables.target(row, len(options)),
            unit=str(int(index) % _ORDERS),
        )

    entries = []
    for row in tables.read_table(where, SOURCE):
        image = row.values.pop("image")
        if len(image) > _LONGEST_REFERENCE:
            pictures[row.values.get("index", "")] = row.picture
            image = image[: _LONGEST_REFERENCE + 1]  # the picture itself is read again when it is asked about
        entries.append((f"row {row.number}", lambda r=row, i=image: make(r, i)))
    return SOURCE.collect(root, where, entries)
