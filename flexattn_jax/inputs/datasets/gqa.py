"""GQA (arXiv 1902.09506), balanced test-dev: compositional questions with one answer each.

data_dir/testdev_balanced_questions.json   {name: {imageId, question, answer, types: {structural}}}
data_dir/images/IMAGE_ID.jpg
"""

from __future__ import annotations

from pathlib import Path

from flexattn_jax.inputs.datasets import questions as q

SOURCE = q.Source(
    name="GQA",
    home="https://cs.stanford.edu/people/dorarad/gqa/download.html",
    layout="testdev_balanced_questions.json (also in questions1.2/ or data/) and images/ (also in data/)",
)

_FILE = "testdev_balanced_questions.json"


def read_gqa(data_dir: str | Path) -> q.Reading:
    """The questions, and what could not be read; the splits are the structural types.

    Raises:
        DatasetError: a file is missing or cannot be read.
    """
    root = SOURCE.root(data_dir)
    where = SOURCE.find(root, _FILE, f"data/{_FILE}", f"questions1.2/{_FILE}")
    pictures = SOURCE.find(root, "images", "data/images")
    entries = SOURCE.load(where)
    if not isinstance(entries, dict):
        raise q.DatasetError(f"{where} must hold an object of questions by name. {SOURCE}")

    def make(name: str, entry: dict) -> q.Question:
        return q.Question(
            id=name,
            split=q.text(q.field(entry, "types"), "structural"),
            image=pictures / f"{q.file_name(entry, 'imageId')}.jpg",
            question=q.text(entry, "question"),
            answers=(q.text(entry, "answer"),),
        )

    return SOURCE.collect(root, where, ((name, lambda n=name, e=entry: make(n, e)) for name, entry in entries.items()))
