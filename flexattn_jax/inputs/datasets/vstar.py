"""V* Bench (arXiv 2312.14135): questions about small things in large photographs, read from the published folder.

    data_dir/direct_attributes/NAME.jpg    data_dir/direct_attributes/NAME.json
    data_dir/relative_position/NAME.jpg    data_dir/relative_position/NAME.json

A JSON holds `question`, `options` (the first is correct), `target_object` (names) and `bbox` (x, y, width, height in
pixels, one a target). The files are treated as hostile: whatever is wrong with one of them is an entry in the list of
errors, and the others are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexattn_jax.files import FileError, leaves_folder, read_json
from flexattn_jax.inputs.datasets.questions import (
    COPY,
    DatasetError,
    EntryError,
    Question,
    QuestionError,
    Source,
    field,
    finite_numbers,
    text,
    texts,
)

SOURCE = Source(
    name="V* Bench",
    home="https://huggingface.co/datasets/craigwu/vstar_bench",
    layout="direct_attributes and relative_position, each with NAME.jpg and NAME.json side by side",
)
SPLITS = ("direct_attributes", "relative_position")
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

_MAX_JSON_BYTES = 1 << 20


def read_vstar(data_dir: str | Path) -> tuple[list[Question], list[QuestionError]]:
    """The questions of a folder in V* Bench's layout, ordered by split and name, and what could not be read.

    Raises:
        DatasetError: no such folder, or neither split in it.
    """
    root = SOURCE.root(data_dir)
    if not any((root / split).is_dir() for split in SPLITS):
        raise DatasetError(f"the data folder {root} has neither {' nor '.join(SPLITS)} in it. {SOURCE}")
    questions: list[Question] = []
    errors: list[QuestionError] = []
    for split in SPLITS:
        if not (root / split).is_dir():
            errors.append(QuestionError(split, f"the folder {root / split} is missing, so this split was not asked"))
            continue
        for stem, files in sorted(_files_by_stem(root / split).items()):
            try:
                questions.append(_read_question(root, split, stem, files))
            except EntryError as error:
                errors.append(QuestionError(f"{split}/{stem}", str(error)))
    return questions, errors


def _files_by_stem(folder: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        known = path.suffix.lower() in (*PICTURE_SUFFIXES, ".json")
        if known and not path.name.startswith("."):  # desktops leave files such as ._NAME.jpg behind
            files.setdefault(path.stem, []).append(path)
    return files


def _read_question(root: Path, split: str, stem: str, files: list[Path]) -> Question:
    folder = root / split
    annotations = [path for path in files if path.suffix.lower() == ".json"]
    pictures = sorted(path for path in files if path.suffix.lower() != ".json")
    if not annotations:
        raise EntryError(f"{pictures[0]} has no {stem}.json beside it")
    if not pictures:
        raise EntryError(f"{annotations[0]} has no picture {stem} ({', '.join(PICTURE_SUFFIXES)}) beside it")
    if len(pictures) > 1 or len(annotations) > 1:
        names = ", ".join(sorted(path.name for path in files))
        raise EntryError(f"{folder} has several files for one question: {names}; keep one picture and one JSON")
    for path in (annotations[0], pictures[0]):
        if leaves_folder(path, root):
            raise EntryError(f"{path} is a link that leaves the data folder; {COPY}")
    fields = _load_json(annotations[0])
    try:
        return Question(
            id=f"{split}/{stem}",
            split=split,
            image=pictures[0],
            question=text(fields, "question"),
            options=_options(fields),
            target=0,  # the first option is the correct one in every file
            target_object=texts(fields, "target_object"),
            bbox=_boxes(fields),
        )
    except EntryError as error:
        raise EntryError(f"{annotations[0]}: {error}") from None


def _load_json(path: Path) -> dict[str, Any]:
    try:
        fields = read_json(path, _MAX_JSON_BYTES)
    except FileNotFoundError as error:
        raise EntryError(f"{path} is missing") from error
    except FileError as error:
        raise EntryError(f"{path} {error}") from error
    if not isinstance(fields, dict):
        raise EntryError(f"{path} must hold an object with question, options, target_object and bbox")
    return fields


def _options(fields: dict[str, Any]) -> tuple[str, ...]:
    options = texts(fields, "options")
    if not 2 <= len(options) <= 26:
        raise EntryError(f"'options' has {len(options)} entries; a choice needs 2 to 26, the first being correct")
    return options


def _boxes(fields: dict[str, Any]) -> tuple[tuple[float, float, float, float], ...]:
    boxes = field(fields, "bbox")
    if not isinstance(boxes, list) or not all(finite_numbers(box, 4) and min(box[2:]) >= 0 for box in boxes):
        raise EntryError("'bbox' must be a list of [x, y, width, height], finite numbers in pixels")
    return tuple(tuple(float(value) for value in box) for box in boxes)
