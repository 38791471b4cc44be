"""HR-Bench (arXiv 2408.15556): multiple-choice questions about photographs of 4K and 8K pixels, in four orders each.

data_dir/hr_bench_4k.tsv, hr_bench_8k.tsv
    columns index, question, A, B, C, D, answer, category ("single", "cross"), cycle_category, image (base64)
"""

from __future__ import annotations

from pathlib import Path

from flexattn_jax.inputs.datasets import questions as q
from flexattn_jax.inputs.datasets import tables

SOURCE = q.Source(
    name="HR-Bench",
    home="https://huggingface.co/datasets/DreamMr/HR-Bench",
    layout="hr_bench_4k.tsv and hr_bench_8k.tsv (the .tsv files, not .parquet)",
)
VARIANTS = ("4k", "8k")


def read_hrbench(data_dir: str | Path, variant: str) -> q.Reading:
    """The rows as questions, and what could not be read; `unit` is the same for a question's four orders.

    Raises:
        DatasetError: the table is missing or cannot be read.
    """
    root = SOURCE.root(data_dir)
    where = SOURCE.find(root, f"hr_bench_{variant}.tsv")

    def make(row: tables.Row) -> q.Question:
        index, question, category = (row.text(name) for name in ("index", "question", "category"))
        if index is None or question is None or category is None:
            raise q.EntryError("it has no index, no question or no category")
        options = tables.options(row)
        return q.Question(
            id=index,
            split=category,
            image=row.picture,
            question=q.without_tag(question.strip(), "question"),
            options=tuple(q.without_tag(option, "options") for option in options),
            target=tables.target(row, len(options)),
            unit=f"{row.picture.checksum:08x} {question.strip()}",  # no column says which rows belong together
        )

    entries = []
    for row in tables.read_table(where, SOURCE):
        del row.values["image"]  # up to 15 MB; it is read again when it is asked about
        entries.append((f"row {row.number}", lambda r=row: make(r)))
    return SOURCE.collect(root, where, entries)
