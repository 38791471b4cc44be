"""The answers of one evaluation on disk, written so that a kill at any moment loses at most the batch in work.

workdir/run.json            what the answers depend on: scorer, checkpoint, overrides, ...
workdir/predictions.jsonl   one line a finished question
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexattn_jax.config import from_dict
from flexattn_jax.files import DATA_BYTES, FileError, lock_file, naming, parse_json, read_bytes, read_json, write_whole
from flexattn_jax.inputs.datasets.questions import Question

PREDICTIONS = "predictions.jsonl"
RUN = "run.json"
FORMAT = 2  # of a line in predictions.jsonl
_MOST_SECONDS = 1e9  # of a question


class WorkdirError(ValueError):
    """A workdir that this run must not write to; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class CellSelection:
    """The cells that the last prompt row kept in each layer that reads high resolution."""

    layers: tuple[int, ...]
    cells: tuple[str, ...]  # of each layer, C bits row-major, written in hexadecimal
    cell_grid: int  # cells a side; C is its square
    grid: int  # G, tokens a side, which settles the cells' borders
    overflow: tuple[int, ...]  # of each layer, cells over the threshold that the static capacity dropped
    cells_read: int  # cells whose high-resolution tokens were projected, over all layers and rows


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What became of one question, with all that is needed to score it again."""

    id: str
    split: str
    digest: str  # of the question and its picture
    question: str
    options: tuple[str, ...]  # as in the file
    target: int | None  # the correct option
    answers: tuple[str, ...]  # what people answered, where there are no options
    unit: str  # questions of the same unit are also judged together
    losses: tuple[float, ...] | None  # of the options, where losses are compared
    output: str | None  # what the model wrote, where it writes
    order: tuple[int, ...] | None  # which option was shown in the k-th place; None: the file's order
    seconds: float  # the batch's wall time, divided by its questions
    compiled: bool  # whether XLA compiled something in that time
    device: str
    selection: CellSelection | None
    score: float | None = None  # 0..1; None: somebody else must judge it
    choice: int | None = None  # index into options
    reason: str | None = None  # why there is no choice or answer: "tie", "not finite", "unparsed"
    detail: str | None = None


def question_digest(question: Question) -> str:
    """A name for exactly this question, its answers and its picture, so that answers are not mixed up."""
    if not isinstance(question.image, Path):
        picture = question.image.mark()
    else:
        picture = question.image.stat().st_size if question.image.is_file() else -1
    asked = dataclasses.replace(question, image=None, bbox=(), target_object=())
    parts = [list(dataclasses.asdict(asked).values()), picture]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class PredictionLog:
    """The predictions in a workdir. Use it in a `with` statement: it holds the workdir's lock.

    Args:
        workdir: made when missing.
        settings: what the answers depend on, as JSON types; a workdir with other settings is refused.
        questions: all questions of the benchmark; answers to others than these are refused.

    Raises:
        WorkdirError: the workdir belongs to another run, is in use, or holds damaged predictions.
    """

    def __init__(self, workdir: str | Path, settings: dict[str, Any], questions: Sequence[Question]):
        self.workdir = Path(workdir)
        self._settings = {"format": FORMAT, **json.loads(json.dumps(settings))}
        self._digests = {question.id: question_digest(question) for question in questions}
        self.finished: dict[str, Prediction] = {}
        self.torn = False  # whether a half-written line was found and removed

    def __enter__(self) -> PredictionLog:
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
            self._lock = lock_file(self.workdir / ".lock")
        except BlockingIOError:
            raise WorkdirError(
                f"another evaluation is writing to the workdir {self.workdir}; wait for it or choose another --workdir"
            ) from None
        except OSError as error:
            raise WorkdirError(f"the workdir {self.workdir} cannot be written ({error.strerror})") from error
        try:
            self._check_settings()
            self._read()
            self._file = open(self.workdir / PREDICTIONS, "ab")
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        try:
            with naming(self.workdir / PREDICTIONS):  # what a full disk did not take is tried once more
                self._file.close()
        finally:
            self._lock.close()

    def append(self, predictions: Sequence[Prediction]) -> None:
        """Adds finished questions; they are on disk when this returns."""
        lines = "".join(json.dumps(_to_json(p), allow_nan=False) + "\n" for p in predictions)
        with naming(self.workdir / PREDICTIONS):
            self._file.write(lines.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        self.finished.update({prediction.id: prediction for prediction in predictions})

    def digest(self, question: Question) -> str:
        return self._digests[question.id]

    def _check_settings(self) -> None:
        path, predictions = self.workdir / RUN, self.workdir / PREDICTIONS
        empty = not predictions.exists() or predictions.stat().st_size == 0  # no answers that could be mixed up
        try:
            earlier = read_json(path)
        except FileNotFoundError:
            if not empty:
                raise self._foreign(f"it has {PREDICTIONS} and no {RUN}") from None
            earlier = {"format": FORMAT}
        except FileError as error:
            raise self._foreign(f"its {RUN} {error}") from None
        earlier = earlier if isinstance(earlier, dict) else {}
        if "format" not in earlier:
            raise self._foreign(f"its {RUN} is no evaluation's")
        if empty:
            write_whole(path, json.dumps(self._settings, indent=1) + "\n")
        elif earlier != self._settings:
            keys = sorted(k for k in earlier.keys() | self._settings if earlier.get(k) != self._settings.get(k))
            differences = ", ".join(
                f"{key} was {_short(earlier.get(key))} and is now {_short(self._settings.get(key))}" for key in keys
            )
            raise self._foreign(differences)

    def _read(self) -> None:
        path = self.workdir / PREDICTIONS
        if not path.exists():
            return
        try:
            data = read_bytes(path, DATA_BYTES)
        except FileError as error:
            raise WorkdirError(f"{path} {error}; choose another --workdir") from None
        whole = data.rfind(b"\n") + 1
        lines = data[:whole].split(b"\n")[:-1]
        for number, line in enumerate(lines, start=1):
            try:
                prediction = _from_json(line)
                if prediction.id in self.finished:
                    raise ValueError("a second answer")
            except ValueError:
                if number == len(lines) and whole == len(data):
                    whole -= len(line) + 1  # a last line of the right length whose bytes never reached the disk
                    break
                raise WorkdirError(
                    f"line {number} of {path} is damaged; remove that line to ask its question again, "
                    "or choose another --workdir"
                ) from None
            if self._digests.get(prediction.id) != prediction.digest:
                raise self._foreign(f"its answer to {prediction.id} is for another question or picture")
            self.finished[prediction.id] = prediction
        if whole < len(data):
            self.torn = True
            os.truncate(path, whole)

    def _foreign(self, reason: str) -> WorkdirError:
        return WorkdirError(
            f"the workdir {self.workdir} holds another run ({reason}); choose another --workdir, or delete this one "
            "to start over"
        )


def read_predictions(path: str | Path) -> list[Prediction]:
    """The predictions of a file, whatever wrote it last. Raises WorkdirError."""
    path = Path(path)
    try:
        lines = read_bytes(path, DATA_BYTES).splitlines()
    except FileNotFoundError as error:
        raise WorkdirError(f"{path} does not exist; give the {PREDICTIONS} of a run") from error
    except FileError as error:
        raise WorkdirError(f"{path} {error}; give the {PREDICTIONS} of a run") from error
    predictions: dict[str, Prediction] = {}
    for number, line in enumerate(lines, start=1):
        try:
            prediction = _from_json(line)
        except ValueError as error:
            raise WorkdirError(
                f"line {number} of {path} is damaged or was written by another version ({error}); remove that line"
            ) from None
        if prediction.id in predictions:
            raise WorkdirError(f"line {number} of {path} answers {prediction.id} once more; remove that line")
        predictions[prediction.id] = prediction
    return list(predictions.values())


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _to_json(prediction: Prediction) -> dict[str, Any]:
    values = dataclasses.asdict(prediction)
    if prediction.losses is not None:  # JSON has no NaN
        values["losses"] = [loss if math.isfinite(loss) else str(loss) for loss in prediction.losses]
    return values


def _from_json(line: bytes) -> Prediction:
    """Raises ValueError for a line that is no prediction."""
    values = parse_json(line)
    losses = values.pop("losses", None) if isinstance(values, dict) else None
    prediction: Prediction = from_dict(values | {"losses": None} if isinstance(values, dict) else values, Prediction)
    if losses is not None:
        if not isinstance(losses, list) or not all(isinstance(loss, (str, float, int)) for loss in losses):
            raise ValueError("losses must be a list of numbers")
        prediction = dataclasses.replace(prediction, losses=tuple(float(loss) for loss in losses))
    count, chosen = len(prediction.options), prediction.selection
    fits = prediction.losses is None or len(prediction.losses) == count
    fits = fits and (prediction.order is None or sorted(prediction.order) == list(range(count)))
    fits = fits and all(index is None or 0 <= index < count for index in (prediction.target, prediction.choice))
    if chosen is not None:
        digits = 2 * -(-(chosen.cell_grid**2) // 8)
        fits = fits and chosen.cell_grid > 0 and len(chosen.layers) == len(chosen.cells) == len(chosen.overflow) > 0
        fits = fits and all(len(row) == digits and set(row) <= set(string.hexdigits) for row in chosen.cells)
    if not fits:
        raise ValueError("its options, losses, order, choice or cells do not fit each other")
    if not 0 <= prediction.seconds <= _MOST_SECONDS:
        raise ValueError("seconds must be those that a question takes")
    return prediction
