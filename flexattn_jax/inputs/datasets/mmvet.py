"""MM-Vet (arXiv 2308.02490): open questions whose answers a judge model grades elsewhere.

data_dir/mm-vet.json       {name: {imagename, question, answer, capability: [...]}}
data_dir/images/IMAGENAME
"""

from __future__ import annotations

from pathlib import Path

from flexattn_jax.inputs.datasets import questions as q

SOURCE = q.Source(
    name="MM-Vet",
    home="https://github.com/yuweihao/MM-Vet (mm-vet.zip)",
    layout="mm-vet.json and images/",
)


def read_mmvet(data_dir: str | Path) -> q.Reading:
    """The questions, and what could not be read.

    Raises:
        DatasetError: a file is missing or cannot be read.
    """
    root = SOURCE.root(data_dir)
    where = SOURCE.find(root, "mm-vet.json")
    pictures = SOURCE.find(root, "images")
    entries = SOURCE.load(where)
    if not isinstance(entries, dict):
        raise q.DatasetError(f"{where} must hold an object of questions by name. {SOURCE}")

    def make(name: str, entry: dict) -> q.Question:
        return q.Question(
            id=name,
            split="test",
            image=pictures / q.file_name(entry, "imagename"),
            question=q.text(entry, "question"),
            answers=(entry["answer"],) if q.is_text(entry.get("answer")) else (),  # for the reader; nothing is scored
        )

    return SOURCE.collect(root, where, ((name, lambda n=name, e=entry: make(n, e)) for name, entry in entries.items()))
