"""MME (arXiv 2306.13394): two questions about each picture, one of which is to be answered yes and one no.

    data_dir/CATEGORY/NAME.jpg and NAME.txt beside it, or
    data_dir/CATEGORY/images/NAME.jpg and data_dir/CATEGORY/questions_answers_YN/NAME.txt

A text holds two lines, question TAB answer. The 14 categories are listed in `CATEGORIES`.
"""

from __future__ import annotations

import os
from pathlib import Path

from flexattn_jax.files import leaves_folder, read_bytes
from flexattn_jax.inputs.datasets import questions as q

SOURCE = q.Source(
    name="MME",
    home="https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation",
    layout="the 14 folders of MME_Benchmark_release_version, such as existence, count and OCR",
)
CATEGORIES = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
    *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
)

_SUFFIXES = (".jpg", ".png", ".jpeg")
_REQUEST = "Please answer yes or no."


def read_mme(data_dir: str | Path) -> q.Reading:
    """The questions, without their request for yes or no, and what could not be read; option 0 is yes.

    The splits are the categories; `unit` is the picture. Missing categories are among the errors.

    Raises:
        DatasetError: no category is there.
    """
    root = SOURCE.root(data_dir)
    if (root / "MME_Benchmark").is_dir():
        root = root / "MME_Benchmark"  # as some copies of the archive unpack
    entries, missing = [], []
    for category in CATEGORIES:
        folder = root / category
        if not folder.is_dir():
            missing.append(q.QuestionError(category, f"the folder {folder} is missing, so this category was not asked"))
            continue
        apart = (folder / "images").is_dir()
        texts, pictures = (folder / "questions_answers_YN", folder / "images") if apart else (folder, folder)
        for path in sorted(texts.glob("*.txt")):
            entries += _entries(root, category, path, pictures)
    if len(missing) == len(CATEGORIES):
        raise q.DatasetError(f"the data folder {root} has none of MME's categories in it. {SOURCE}")
    questions, errors = SOURCE.collect(root, root, entries)
    return questions, missing + errors


def _entries(root: Path, category: str, path: Path, pictures: Path):
    outside = leaves_folder(path, root)
    try:
        lines = [] if outside else [line for line in read_bytes(path).decode("utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError):  # the entries say what is expected
        lines = []
    candidates = [pictures / (path.stem + suffix) for suffix in _SUFFIXES]
    picture = next((candidate for candidate in candidates if os.path.exists(candidate)), candidates[0])

    def make(number: int) -> q.Question:
        if outside:
            raise q.EntryError(f"{path} is a link that leaves the data folder; {q.COPY}")
        if len(lines) != 2:
            raise q.EntryError(f"{path} must hold two lines in UTF-8, question TAB answer")
        question, tab, answer = lines[number].strip().rpartition("\t")
        if not tab or not question.strip() or answer.strip().lower() not in ("yes", "no"):
            raise q.EntryError(f"line {number + 1} of {path} must be question TAB Yes or No")
        return q.Question(
            id=f"{category}/{path.stem}/{number + 1}",
            split=category,
            image=picture,
            question=q.without_tag(question.strip().removesuffix(_REQUEST).strip(), "question"),
            options=("yes", "no"),
            target=0 if answer.strip().lower() == "yes" else 1,
            unit=f"{category}/{path.stem}",
        )

    return [(f"{category}/{path.stem}/{number + 1}", lambda n=number: make(n)) for number in range(2)]
