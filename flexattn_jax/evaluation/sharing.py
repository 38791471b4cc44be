"""An evaluation by several processes, each of which has the whole model: every question is asked by exactly one.

workdir/predictions.jsonl          the first process's answers, and in the end all
workdir/process-N/                 those of process N, until they are brought together
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from flexattn_jax.evaluation.harness import HarnessError
from flexattn_jax.evaluation.predictions import PREDICTIONS, PredictionLog
from flexattn_jax.files import DATA_BYTES, read_json, write_whole
from flexattn_jax.inputs.datasets.questions import Question, QuestionError
from flexattn_jax.partitioning import Partition, PartitionConfig, make_partition
from flexattn_jax.processes import check_shared, is_first, on_first

_PART, _ERRORS = "process-{}", "errors.json"


def own_devices(tensor: int) -> Partition | None:
    """This process's devices, of which `tensor` share the weights and the others take samples; None: it has one.

    Raises HarnessError for a number that they do not divide by.
    """
    devices = jax.local_devices()
    if tensor < 1 or len(devices) % tensor:
        raise HarnessError(f"tensor is {tensor}; it must divide the {len(devices)} devices of a process")
    return None if len(devices) == 1 else make_partition(PartitionConfig("data", tensor=tensor), devices)


class SharedLog:
    """The predictions of all processes. Use it in a `with` statement, on all of them.

    Args: those of PredictionLog.

    Raises:
        WorkdirError, ProcessFault: see PredictionLog; the workdir is not shared.
    """

    def __init__(self, workdir: str | Path, settings: dict[str, Any], questions: Sequence[Question]):
        self._workdir, self._settings, self._questions = Path(workdir), settings, questions
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> SharedLog:
        with contextlib.ExitStack() as closing:
            self._finished = set(on_first(lambda: self._open_first(closing)))
            check_shared(self._workdir, PREDICTIONS)
            if not is_first():
                own = self._workdir / _PART.format(jax.process_index())
                self.log = closing.enter_context(PredictionLog(own, self._settings, self._questions))
            self._closing = closing.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._closing.__exit__(*exception)

    def own(self, asked: Sequence[Question]) -> Sequence[Question]:
        """The questions that this process is to ask; alone, it is given the finished ones, too, which it then skips."""
        if jax.process_count() == 1:
            return asked
        left = [question for question in asked if question.id not in self._finished]
        return left[jax.process_index() :: jax.process_count()]

    def bring_together(self, errors: Sequence[QuestionError]) -> list[QuestionError]:
        """Adds all processes' answers to the first one's log; gives it all processes' errors, the others their own.

        The others' logs are closed by it: the first process takes their locks.
        """
        if not is_first():
            rows = [dataclasses.asdict(error) for error in errors]
            write_whole(self.log.workdir / _ERRORS, json.dumps(rows))
            self._closing.close()
        on_first(lambda: None)  # all have asked
        return [*errors, *(self._absorb() if is_first() else ())]

    def _open_first(self, closing: contextlib.ExitStack) -> list[str]:
        self.log = closing.enter_context(PredictionLog(self._workdir, self._settings, self._questions))
        self._absorb()  # of a run that was stopped
        return list(self.log.finished)

    def _absorb(self) -> list[QuestionError]:
        """Takes the other processes' answers over; their errors."""
        errors: list[QuestionError] = []
        known = {question.id: self.log.digest(question) for question in self._questions}
        for folder in sorted(self._workdir.glob(_PART.format("*"))):
            # Opened as a log, it refuses what is of another run and drops a line that was half written.
            with PredictionLog(folder, self._settings, self._questions) as part:
                found = list(part.finished.values())
            new = [p for p in found if p.id not in self.log.finished and known[p.id] == p.digest]
            self.log.append(new)
            with contextlib.suppress(FileNotFoundError):
                errors += [QuestionError(**row) for row in read_json(folder / _ERRORS, DATA_BYTES)]
            shutil.rmtree(folder)
        return errors
