"""The answers of one evaluation on disk, written so that a kill at any moment loses at most the batch in work.

workdir/run.json            what the answers depend on: scorer, checkpoint, overrides, ...
workdir/predictions.jsonl   one line a finished question
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexattn_jax.inputs.datasets.vstar import Question

PREDICTIONS = "predictions.jsonl"
RUN = "run.json"


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
    """What became of one question."""

    id: str
    split: str
    digest: str  # of the question and its picture
    options: tuple[str, ...]  # as in the file: the first is correct
    choice: int | None  # index into options
    correct: bool
    reason: str | None  # why there is no choice: "tie", "not finite", "unparsed"
    detail: str | None
    losses: tuple[float, ...] | None  # of the options, for the scorers that compare losses
    output: str | None  # for the scorer that generates
    order: tuple[int, ...] | None  # for the scorer that generates: which option had the k-th letter
    seconds: float  # the batch's wall time, divided by its questions
    compiled: bool  # whether XLA compiled something in that time
    device: str
    selection: CellSelection | None


def question_digest(question: Question) -> str:
    """A name for exactly this question, options and picture (by its size), so that answers are not mixed up."""
    picture = question.image.stat().st_size if question.image.is_file() else -1
    parts = [question.id, question.question, list(question.options), picture]
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
        self._settings = json.loads(json.dumps(settings))
        self._digests = {question.id: question_digest(question) for question in questions}
        self.finished: dict[str, Prediction] = {}
        self.torn = False  # whether a half-written line was found and removed

    def __enter__(self) -> PredictionLog:
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.workdir / ".lock", "w")
        except OSError as error:
            raise WorkdirError(f"the workdir {self.workdir} cannot be written ({error.strerror})") from error
        try:
            # The kernel gives the lock back when the process dies, however it dies.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check_settings()
            self._read()
            self._file = open(self.workdir / PREDICTIONS, "ab")
        except BlockingIOError:
            self._lock.close()
            raise WorkdirError(
                f"another evaluation is writing to the workdir {self.workdir}; wait for it or choose another --workdir"
            ) from None
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        self._lock.close()

    def append(self, predictions: Sequence[Prediction]) -> None:
        """Adds finished questions; they are on disk when this returns."""
        lines = "".join(json.dumps(_to_json(p), allow_nan=False) + "\n" for p in predictions)
        self._file.write(lines.encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.finished.update({prediction.id: prediction for prediction in predictions})

    def digest(self, question: Question) -> str:
        return self._digests[question.id]

    def _check_settings(self) -> None:
        path, predictions = self.workdir / RUN, self.workdir / PREDICTIONS
        if not predictions.exists() or predictions.stat().st_size == 0:  # no answers that could be mixed up
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(self._settings, indent=1) + "\n")
            partial.replace(path)
            return
        if not path.exists():
            raise self._foreign(f"it has {PREDICTIONS} and no {RUN}")
        try:
            earlier = json.loads(path.read_bytes())
        except ValueError:
            raise self._foreign(f"its {RUN} is damaged") from None
        if earlier != self._settings:
            earlier = earlier if isinstance(earlier, dict) else {}
            keys = sorted(k for k in earlier.keys() | self._settings if earlier.get(k) != self._settings.get(k))
            differences = ", ".join(
                f"{key} was {_short(earlier.get(key))} and is now {_short(self._settings.get(key))}" for key in keys
            )
            raise self._foreign(differences or f"its {RUN} is of another kind")

    def _read(self) -> None:
        path = self.workdir / PREDICTIONS
        if not path.exists():
            return
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        lines = data[:whole].split(b"\n")[:-1]
        for number, line in enumerate(lines, start=1):
            try:
                prediction = _from_json(json.loads(line))
            except (ValueError, TypeError, KeyError):
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


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _to_json(prediction: Prediction) -> dict[str, Any]:
    values = dataclasses.asdict(prediction)
    if prediction.losses is not None:  # JSON has no NaN
        values["losses"] = [loss if math.isfinite(loss) else str(loss) for loss in prediction.losses]
    return values


def _from_json(values: dict[str, Any]) -> Prediction:
    values = dict(values)
    if values["losses"] is not None:
        values["losses"] = tuple(float(loss) for loss in values["losses"])
    for key in ("options", "order"):
        values[key] = None if values[key] is None else tuple(values[key])
    if values["selection"] is not None:
        selection = {k: tuple(v) if isinstance(v, list) else v for k, v in values["selection"].items()}
        values["selection"] = CellSelection(**selection)
    return Prediction(**values)
