"""RSVQA-HR, test set 2 (Philadelphia; arXiv 2003.07333), known as HRBEN: questions about aerial photographs.

    data_dir/USGS_split_test_phili_questions.json   {"questions": [{id, img_id, type, question, answers_ids, active}]}
    data_dir/USGS_split_test_phili_answers.json     {"answers": [{id, question_id, answer, active}]}
    data_dir/USGS_split_test_phili_images.json      {"images": [{id, active}]}
    data_dir/Data/IMG_ID.tif

Kept are active questions of the types "presence" and "comp", as GeoChat evaluates (arXiv 2311.15826; docs/Evaluation.md
of mbzuai-oryx/GeoChat). An answer is found by the question's `answers_ids`, as the authors' loader does (syvlo/RSVQA,
VQA_model/VQALoader.py): an answer's own `id` is not its question's.
"""

from __future__ import annotations

from pathlib import Path

from flexattn_jax.inputs.datasets import questions as q

SOURCE = q.Source(
    name="RSVQA-HR",
    home="https://zenodo.org/records/6344367",
    layout="USGS_split_test_phili_questions.json, _answers.json and _images.json and, from Images.tar, Data/*.tif",
)
TYPES = ("presence", "comp")

_FILE = "USGS_split_test_phili_{}.json"


def read_rsvqa(data_dir: str | Path) -> q.Reading:
    """The questions, and what could not be read.

    Raises:
        DatasetError: a file is missing or cannot be read.
    """
    root = SOURCE.root(data_dir)
    where, *others = [SOURCE.find(root, _FILE.format(name)) for name in ("questions", "answers", "images")]
    pictures = SOURCE.find(root, "Data")
    answers, images = [
        q.by_number(filter(_active, SOURCE.entries(path, name)), "id")
        for path, name in zip(others, ("answers", "images"), strict=True)
    ]

    def make(entry: dict) -> q.Question:
        if q.field(entry, "active") is not True:
            raise q.EntryError("'active' must be true or false")
        image = q.whole_number(entry, "img_id")
        if image not in images:
            raise q.EntryError(f"picture {image} is not among the active ones of {_FILE.format('images')}")
        ids = q.field(entry, "answers_ids")
        if not isinstance(ids, list) or len(ids) != 1 or type(ids[0]) is not int:
            raise q.EntryError("'answers_ids' must be a list of one whole number")
        answer = answers.get(ids[0])
        if answer is None or answer.get("question_id") != q.whole_number(entry, "id"):
            raise q.EntryError(f"{_FILE.format('answers')} has no active answer to it, or several")
        return q.Question(
            id=q.number_or_text(entry, "id"),
            split=q.text(entry, "type"),
            image=pictures / f"{image}.tif",
            question=q.text(entry, "question"),
            answers=(q.text(answer, "answer"),),
        )

    entries = SOURCE.entries(where, "questions")
    named = zip(entries, q.numbered(entries, make), strict=True)
    return SOURCE.collect(root, where, (one for entry, one in named if not _of_no_concern(entry)))


def _of_no_concern(entry: object) -> bool:
    """Whether it is a question of another split or type, as most are."""
    if not isinstance(entry, dict):
        return False
    return entry.get("active") is False or (q.is_text(entry.get("type")) and entry["type"] not in TYPES)


def _active(entry: object) -> bool:
    return isinstance(entry, dict) and entry.get("active") is True and isinstance(entry.get("id"), int)
