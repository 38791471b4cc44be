"""VQAv2 (arXiv 1612.00837): questions about COCO's photographs, each with ten people's answers.

    val        data_dir/v2_OpenEnded_mscoco_val2014_questions.json   {"questions": [{question_id, image_id, question}]}
               data_dir/v2_mscoco_val2014_annotations.json
                   {"annotations": [{question_id, answer_type, answers: [{answer}]}]}
               data_dir/val2014/COCO_val2014_000000000042.jpg
    test-dev   data_dir/v2_OpenEnded_mscoco_test-dev2015_questions.json and _test2015_questions.json
               data_dir/test2015/COCO_test2015_000000000001.jpg

Answers to test-dev are secret: they are exported for the evaluation server, which wants an entry for every question of
test2015.
"""

from __future__ import annotations

from pathlib import Path

from flexattn_jax.inputs.datasets import questions as q

SOURCE = q.Source(
    name="VQAv2",
    home="https://visualqa.org/download.html",
    layout=(
        "v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json and val2014/ (for :test-dev "
        "v2_OpenEnded_mscoco_test-dev2015_questions.json, v2_OpenEnded_mscoco_test2015_questions.json and test2015/)"
    ),
)
VARIANTS = ("val", "test-dev")

_QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"


def read_vqav2(data_dir: str | Path, variant: str) -> q.Reading:
    """The questions, and what could not be read; the splits of val are the types of answers.

    Raises:
        DatasetError: a file is missing or cannot be read.
    """
    root = SOURCE.root(data_dir)
    where = SOURCE.find(root, _QUESTIONS.format("val2014" if variant == "val" else "test-dev2015"))
    images = "val2014" if variant == "val" else "test2015"
    pictures = SOURCE.find(root, images)
    annotations = {}
    if variant == "val":
        listed = SOURCE.entries(SOURCE.find(root, "v2_mscoco_val2014_annotations.json"), "annotations")
        annotations = q.by_number(listed, "question_id")
    else:
        all_test_questions(root)  # a missing file is better known now than after the last question

    def make(entry: dict) -> q.Question:
        name = q.whole_number(entry, "question_id")
        if variant == "val" and annotations.get(name) is None:
            count = "several" if name in annotations else "no"
            raise q.EntryError(f"v2_mscoco_val2014_annotations.json has {count} answers to question {name}")
        given = annotations.get(name, {})
        return q.Question(
            id=str(name),
            split=q.text(given, "answer_type") if variant == "val" else variant,
            image=pictures / f"COCO_{images}_{q.whole_number(entry, 'image_id'):012d}.jpg",
            question=q.text(entry, "question"),
            answers=_answers(given) if variant == "val" else (),
        )

    return SOURCE.collect(root, where, q.numbered(SOURCE.entries(where, "questions"), make))


def all_test_questions(data_dir: str | Path) -> list[int]:
    """Ids of every question of test2015. Raises DatasetError."""
    path = SOURCE.find(Path(data_dir), _QUESTIONS.format("test2015"))
    try:
        return [q.whole_number(entry, "question_id") for entry in SOURCE.entries(path, "questions")]
    except q.EntryError as error:
        raise q.DatasetError(f"{path}: {error}. {SOURCE}") from None


def _answers(annotation: dict) -> tuple[str, ...]:
    answers = q.field(annotation, "answers")
    if not isinstance(answers, list):
        raise q.EntryError("'answers' must be a list")
    return q.human_answers({"answers": [q.field(answer, "answer") for answer in answers]}, "answers")
