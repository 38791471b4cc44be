"""What the benchmarks' readers share: a question, its picture, what is wrong with a file, and careful reading.

Files are treated as hostile: whatever is wrong with one entry becomes a `QuestionError` that names the file and the
entry, and the others are read. Only a folder that cannot be used at all is a `DatasetError`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from flexattn_jax.files import DATA_BYTES, FileError, leaves_folder, parse_json, read_bytes
from flexattn_jax.inputs.prompts import IMAGE_TAG

_NAMED_PICTURES = 3
COPY = "copy what it leads to into the folder (hard links take no room: cp -rl)"


class DatasetError(ValueError):
    """A data folder that cannot be used at all; the message says what is expected there."""


class EntryError(ValueError):
    """What is wrong with one question; a reader turns it into a `QuestionError`."""


@dataclasses.dataclass(frozen=True)
class QuestionError:
    """A question that could not be asked, by name."""

    id: str
    reason: str  # one sentence that names the file


class Picture(Protocol):
    """A picture that lies inside another file. One that is a file of its own is simply a `Path`."""

    def read(self) -> bytes:
        """The bytes of the picture's file. Raises `ImageError`."""

    def mark(self) -> int:
        """A number that changes with the picture, found without decoding it."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One question about one picture."""

    id: str  # unique in its benchmark
    split: str  # the row of the report's table that it counts in
    image: Path | Picture
    question: str
    options: tuple[str, ...] = ()
    target: int | None = None  # the correct option
    answers: tuple[str, ...] = ()  # what people answered, where there are no options
    unit: str = ""  # questions of the same unit are also judged together
    stretched: bool = False  # the picture is stretched to a square, where it is padded to one otherwise
    target_object: tuple[str, ...] = ()
    bbox: tuple[tuple[float, float, float, float], ...] = ()  # x, y, width, height in pixels of what it is about


Reading = tuple[list[Question], list[QuestionError]]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a benchmark is published, and the layout expected, for messages."""

    name: str
    home: str  # the public address
    layout: str  # what the data folder must hold

    def __str__(self) -> str:
        return f"{self.name} is published at {self.home}; give the folder that holds {self.layout}"

    def root(self, data_dir: str | os.PathLike) -> Path:
        """The data folder. Raises DatasetError where there is none."""
        if not str(data_dir):
            raise DatasetError(f"no data folder is given (eval.py: --config.data_dir=DIR). {self}")
        root = Path(data_dir)
        if not root.is_dir():
            raise DatasetError(f"the data folder {str(data_dir)!r} does not exist. {self}")
        return root

    def find(self, root: Path, *names: str) -> Path:
        """The first of `names`, paths below `root`, that exists. Raises DatasetError, also for a link out of `root`."""
        for name in names:
            if (root / name).exists():
                if leaves_folder(root / name, root):
                    raise DatasetError(f"{root / name} is a link that leaves the data folder; {COPY}")
                return root / name
        raise DatasetError(f"the data folder {root} has no {' and no '.join(names)}. {self}")

    def load(self, path: Path) -> Any:
        """The content of a JSON file. Raises DatasetError."""
        return _read(path, parse_json, self)

    def load_lines(self, path: Path) -> list[Any]:
        """The content of a file with a JSON value on each line (or of one JSON list). Raises DatasetError."""

        def parse(data: bytes) -> list[Any]:
            if data.lstrip()[:1] == b"[":
                return parse_json(data)
            return [parse_json(line) for line in data.splitlines() if line.strip()]

        return _read(path, parse, self)

    def entries(self, path: Path, name: str) -> list[Any]:
        """The list under `name` in a JSON object. Raises DatasetError."""
        content = self.load(path)
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise DatasetError(f"{path} holds no list {name!r}, so it is not {self.name}'s file. {self}")
        return entries

    def collect(self, root: Path, where: Path, entries: Iterable[tuple[str, Callable[[], Question]]]) -> Reading:
        """The questions that can be made of `entries` (name and maker) of `where`, and what is wrong with the others.

        Pictures in files of their own must be there, and no link may take them out of `root`. Raises DatasetError if no
        picture is there, or nothing is a question.
        """
        questions: list[Question] = []
        errors: list[QuestionError] = []
        seen: set[str] = set()
        for name, make in entries:
            try:
                question = make()
                if question.id in seen:
                    raise EntryError("its name was used before")
            except EntryError as error:
                errors.append(QuestionError(name, f"{where}, {name}: {error}"))
                continue
            seen.add(question.id)
            questions.append(question)
        if not questions:
            reason = f" ({errors[0].reason})" if errors else ""
            raise DatasetError(f"{where} holds no question that can be read{reason}. {self}")
        kept, faults = _split_by_picture(root, questions)
        if not kept:
            reasons = "; ".join(fault.reason for fault in faults[:_NAMED_PICTURES])
            raise DatasetError(f"none of the {len(faults)} pictures is there: {reasons}. {self}")
        return kept, errors + faults


def _split_by_picture(root: Path, questions: Sequence[Question]) -> Reading:
    """The questions whose picture is there, inside `root`, and what is wrong with the others."""
    listings: dict[Path, dict[str, bool]] = {}  # folder -> name -> whether the picture leaves the root
    here, faults = [], []
    for question in questions:
        path = question.image
        if not isinstance(path, Path):
            here.append(question)
            continue
        if path.parent not in listings:  # listed once: a file system answers thousands of single questions slowly
            listings[path.parent] = _listing(root, path.parent)
        leaves = listings[path.parent].get(path.name)
        if leaves is None:
            faults.append(QuestionError(question.id, f"the picture {path} is missing; get it again"))
        elif leaves:
            faults.append(QuestionError(question.id, f"the picture {path} is a link out of the data folder; {COPY}"))
        else:
            here.append(question)
    return here, faults


def _listing(root: Path, folder: Path) -> dict[str, bool]:
    try:
        outside = leaves_folder(folder, root)
        with os.scandir(folder) as entries:
            return {e.name: outside or (e.is_symlink() and leaves_folder(Path(e.path), root)) for e in entries}
    except (OSError, ValueError):  # half a character, which JSON can hold, is part of no file's name
        return {}


def _read(path: Path, parse: Callable[[bytes], Any], source: Source) -> Any:
    try:
        return parse(read_bytes(path, DATA_BYTES))
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is missing. {source}") from error
    except FileError as error:
        raise DatasetError(f"{path} {error}; download it again from {source.home}") from error


def by_number(entries: Iterable[Any], name: str) -> dict[int, dict | None]:
    """Objects by the whole number under `name`; None where several have the same, so that it is open which counts."""
    found: dict[int, dict | None] = {}
    for entry in entries:
        if isinstance(entry, dict) and type(entry.get(name)) is int:
            found[entry[name]] = None if entry[name] in found else entry
    return found


def field(entry: Any, name: str) -> Any:
    """`entry[name]`. Raises EntryError."""
    if not isinstance(entry, dict):
        raise EntryError(f"it must be an object, not {type(entry).__name__}")
    if name not in entry:
        raise EntryError(f"{name!r} is missing")
    return entry[name]


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def text(entry: Any, name: str) -> str:
    """A text that is not empty, without a picture's place-holder in it. Raises EntryError."""
    value = field(entry, name)
    if not is_text(value):
        raise EntryError(f"{name!r} must be a text that is not empty")
    return without_tag(value, name)


def texts(entry: Any, name: str) -> tuple[str, ...]:
    """A list of such texts that is not empty. Raises EntryError."""
    values = field(entry, name)
    if not isinstance(values, list) or not values or not all(is_text(value) for value in values):
        raise EntryError(f"{name!r} must be a list of texts that is not empty")
    return tuple(without_tag(value, name) for value in values)


def human_answers(entry: Any, name: str, count: int = 10) -> tuple[str, ...]:
    """What so many people answered, as it is: an empty answer is one too. Raises EntryError."""
    values = field(entry, name)
    if not isinstance(values, list) or len(values) != count or not all(isinstance(value, str) for value in values):
        raise EntryError(f"{name!r} must be a list of {count} texts")
    return tuple(values)


def number_or_text(entry: Any, name: str) -> str:
    """A whole number or a text, as text: what names things in these files. Raises EntryError."""
    value = field(entry, name)
    if isinstance(value, bool) or not (isinstance(value, int) or is_text(value)):
        raise EntryError(f"{name!r} must be a whole number or a text")
    return str(value)


def whole_number(entry: Any, name: str) -> int:
    """A whole number of at least 0. Raises EntryError."""
    value = field(entry, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise EntryError(f"{name!r} must be a whole number")
    return value


def without_tag(value: str, name: str) -> str:
    # A second place-holder would ask the model about a picture that does not exist.
    if IMAGE_TAG in value:
        raise EntryError(f"{name!r} holds the place-holder {IMAGE_TAG}; remove it")
    return value


def file_name(entry: Any, name: str) -> str:
    """The name of a file below a folder; one that leaves the folder is refused. Raises EntryError."""
    value = number_or_text(entry, name)
    path = Path(value)
    if path.is_absolute() or ".." in path.parts or "\0" in value:
        raise EntryError(f"{name!r} is {value!r}, which leaves the data folder")
    return value


def finite_numbers(values: Any, count: int, limit: float = 1e9) -> bool:
    """Whether `values` is a list of so many numbers, none of them NaN, infinite or larger than `limit`."""
    if not isinstance(values, list | tuple) or len(values) != count:
        return False
    # The bound refuses NaN and infinity, and integers of any length that float() could not take.
    return all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < limit for v in values)


def numbered(entries: Iterable[Any], make: Callable[[Any], Question]) -> Iterator[tuple[str, Callable[[], Question]]]:
    """(name, maker) for `Source.collect` of the entries of a list, counted from 1."""
    for number, entry in enumerate(entries, start=1):
        yield f"entry {number}", (lambda entry=entry: make(entry))
