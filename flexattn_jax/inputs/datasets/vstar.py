"""V* Bench (arXiv 2312.14135): questions about small things in large photographs, read from the published folder.

    data_dir/direct_attributes/NAME.jpg    data_dir/direct_attributes/NAME.json
    data_dir/relative_position/NAME.jpg    data_dir/relative_position/NAME.json

A JSON holds `question`, `options` (the first is correct), `target_object` (names) and `bbox` (x, y, width, height in
pixels, one a target). The files are treated as hostile: whatever is wrong with one of them is an entry in the list of
errors, and the others are read.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from flexattn_jax.inputs.prompts import IMAGE_TAG

NAME = "V* Bench"
SPLITS = ("direct_attributes", "relative_position")
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

_MAX_JSON_BYTES = 1 << 20


class DatasetError(ValueError):
    """A data folder that cannot be used at all; the message says what is expected there."""


class _QuestionError(ValueError):
    """What is wrong with one question's files."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One multiple-choice question about one picture."""

    id: str  # "split/stem"
    split: str
    image: Path
    question: str
    options: tuple[str, ...]  # the first is correct
    target_object: tuple[str, ...]
    bbox: tuple[tuple[float, float, float, float], ...]  # x, y, width, height in pixels of the picture


@dataclasses.dataclass(frozen=True)
class QuestionError:
    """A question that could not be asked, by name."""

    id: str
    reason: str  # one sentence that names the file


def read_vstar(data_dir: str | Path) -> tuple[list[Question], list[QuestionError]]:
    """The questions of a folder in V* Bench's layout, ordered by split and name, and what could not be read.

    Raises:
        DatasetError: no such folder, or neither split in it.
    """
    root = Path(data_dir)
    if not str(data_dir):
        raise DatasetError(f"no data folder is given (eval.py: --config.data_dir=DIR). {_where_to_get_it()}")
    if not root.is_dir():
        raise DatasetError(f"the data folder {str(data_dir)!r} does not exist. {_where_to_get_it()}")
    if not any((root / split).is_dir() for split in SPLITS):
        raise DatasetError(f"the data folder {root} has neither {' nor '.join(SPLITS)} in it. {_where_to_get_it()}")
    questions: list[Question] = []
    errors: list[QuestionError] = []
    for split in SPLITS:
        if not (root / split).is_dir():
            errors.append(QuestionError(split, f"the folder {root / split} is missing, so this split was not asked"))
            continue
        for stem, files in sorted(_files_by_stem(root / split).items()):
            try:
                questions.append(_read_question(root, split, stem, files))
            except _QuestionError as error:
                errors.append(QuestionError(f"{split}/{stem}", str(error)))
    return questions, errors


def _where_to_get_it() -> str:
    return (
        f"{NAME} is the dataset craigwu/vstar_bench on the Hugging Face hub "
        "(https://huggingface.co/datasets/craigwu/vstar_bench): download it and give the folder that holds "
        f"{' and '.join(SPLITS)}, each with NAME.jpg and NAME.json side by side"
    )


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
        raise _QuestionError(f"{pictures[0]} has no {stem}.json beside it")
    if not pictures:
        raise _QuestionError(f"{annotations[0]} has no picture {stem} ({', '.join(PICTURE_SUFFIXES)}) beside it")
    if len(pictures) > 1 or len(annotations) > 1:
        names = ", ".join(sorted(path.name for path in files))
        raise _QuestionError(f"{folder} has several files for one question: {names}; keep one picture and one JSON")
    for path in (annotations[0], pictures[0]):
        if not path.resolve().is_relative_to(root.resolve()):
            raise _QuestionError(f"{path} is a link that leaves the data folder; copy the file in")
    fields = _load_json(annotations[0])
    try:
        return Question(
            id=f"{split}/{stem}",
            split=split,
            image=pictures[0],
            question=_text(fields, "question"),
            options=_options(fields),
            target_object=_names(fields, "target_object"),
            bbox=_boxes(fields),
        )
    except _QuestionError as error:
        raise _QuestionError(f"{annotations[0]}: {error}") from None


def _load_json(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise _QuestionError(f"{path} is no file")
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise _QuestionError(f"{path} is larger than {_MAX_JSON_BYTES} bytes, which no question is")
        fields = json.loads(path.read_bytes())
    except OSError as error:
        raise _QuestionError(f"{path} cannot be read ({error.strerror})") from error
    except _QuestionError:
        raise
    except (ValueError, RecursionError) as error:
        raise _QuestionError(f"{path} is not valid JSON") from error
    if not isinstance(fields, dict):
        raise _QuestionError(f"{path} must hold an object with question, options, target_object and bbox")
    return fields


def _field(fields: dict[str, Any], name: str) -> Any:
    if name not in fields:
        raise _QuestionError(f"{name!r} is missing")
    return fields[name]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _text(fields: dict[str, Any], name: str) -> str:
    value = _field(fields, name)
    if not _is_text(value):
        raise _QuestionError(f"{name!r} must be a text that is not empty")
    return _without_tag(value, name)


def _without_tag(text: str, name: str) -> str:
    # A second place-holder would ask the model about a picture that does not exist.
    if IMAGE_TAG in text:
        raise _QuestionError(f"{name!r} holds the place-holder {IMAGE_TAG}; remove it")
    return text


def _names(fields: dict[str, Any], name: str) -> tuple[str, ...]:
    values = _field(fields, name)
    if not isinstance(values, list) or not values or not all(_is_text(value) for value in values):
        raise _QuestionError(f"{name!r} must be a list of texts that is not empty")
    return tuple(_without_tag(value, name) for value in values)


def _options(fields: dict[str, Any]) -> tuple[str, ...]:
    options = _names(fields, "options")
    if not 2 <= len(options) <= 26:
        raise _QuestionError(f"'options' has {len(options)} entries; a choice needs 2 to 26, the first being correct")
    return options


def _boxes(fields: dict[str, Any]) -> tuple[tuple[float, float, float, float], ...]:
    boxes = _field(fields, "bbox")
    if not isinstance(boxes, list) or not all(_is_box(box) for box in boxes):
        raise _QuestionError("'bbox' must be a list of [x, y, width, height], finite numbers in pixels")
    return tuple(tuple(float(value) for value in box) for box in boxes)


def _is_box(box: Any) -> bool:
    if not isinstance(box, list) or len(box) != 4:
        return False
    # The bound refuses NaN and infinity, and integers of any length that float() could not take.
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e9 for v in box)
    return numbers and box[2] >= 0 and box[3] >= 0
