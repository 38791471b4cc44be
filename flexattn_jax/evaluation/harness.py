"""Asks a model every question of a benchmark, in batches, by the benchmark's way of asking (`benchmark.Scorer`)."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from PIL import Image

from flexattn_jax.evaluation.benchmark import Ask, Scorer
from flexattn_jax.evaluation.predictions import CellSelection, Prediction, PredictionLog
from flexattn_jax.inputs.batching import BatchError
from flexattn_jax.inputs.datasets.questions import Question, QuestionError
from flexattn_jax.inputs.images import ImageError, load_image, stretch_to_square
from flexattn_jax.inputs.prompts import build_prompt
from flexattn_jax.inputs.tokenizer import TokenizerError
from flexattn_jax.requests import NEW_TOKENS

MAX_BATCH = 256  # questions, whose pictures are in memory together
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class HarnessError(ValueError):
    """An evaluation that cannot be run as asked."""


@dataclasses.dataclass(frozen=True)
class _Loaded:
    question: Question
    picture: Image.Image


def check_sizes(batch_size: int, max_new_tokens: int) -> None:
    """Raises HarnessError for an impossible size."""
    for name, value, most in (
        ("batch_size", batch_size, MAX_BATCH),
        ("max_new_tokens", max_new_tokens, NEW_TOKENS[-1]),
    ):
        if not 1 <= value <= most:
            raise HarnessError(f"{name} is {value}; it must lie in 1..{most}")


def open_picture(question: Question) -> Image.Image:
    """The picture as the model is shown it, before padding. Raises ImageError."""
    source = question.image
    if isinstance(source, Path):
        picture = load_image(source)
    else:
        try:
            picture = load_image(source.read())
        except ImageError as error:
            raise ImageError(f"{source}: {error}") from error
    return stretch_to_square(picture) if question.stretched else picture


def evaluate(
    open_vlm: Callable[[], Any],
    questions: Sequence[Question],
    log: PredictionLog,
    scorer: Scorer,
    batch_size: int = 8,
    max_new_tokens: int = 16,
    show_progress: bool = True,
) -> list[QuestionError]:
    """Answers the questions that `log` has no answer to yet, and adds the answers to it.

    Args:
        open_vlm: gives the model (`flexattn_jax.api.VisionLanguageModel`); not called when nothing is left to ask.
        questions: what to ask.
        log: open; `log.finished` holds every answer afterwards, earlier ones included.
        scorer: how to ask, and what the answers are worth.
        batch_size: questions asked at once.
        max_new_tokens: where the model writes its answer.
        show_progress: whether to draw a bar with the time left.

    Returns:
        the questions that could not be asked (a broken picture, a prompt longer than the model takes), by name. They
        are neither right nor wrong and are tried again by the next run.

    Raises:
        HarnessError: see `check_sizes`.
    """
    check_sizes(batch_size, max_new_tokens)
    todo = [question for question in questions if question.id not in log.finished]
    if not todo:
        return []
    vlm = open_vlm()
    ask = Asker(vlm, scorer, max_new_tokens, log.digest)
    errors: list[QuestionError] = []
    bar = tqdm.tqdm(
        total=len(questions),
        initial=len(questions) - len(todo),
        unit="question",
        disable=not show_progress,
        mininterval=0.1 if sys.stderr.isatty() else 10,
    )
    with bar:
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            for outcome in _ask_batch(ask, batch):
                if isinstance(outcome, QuestionError):
                    errors.append(outcome)
                else:
                    log.append(outcome)
            bar.update(len(batch))
    return errors


def _ask_batch(ask: Asker, batch: Sequence[Question]) -> Iterator[QuestionError | list[Prediction]]:
    """The outcome of a batch. What one question breaks does not touch the others."""
    started = time.perf_counter()
    loaded = []
    for question in batch:
        try:
            loaded.append(_Loaded(question, open_picture(question)))
        except ImageError as error:
            yield QuestionError(question.id, str(error))
    if not loaded:
        return
    try:
        yield ask(loaded, started)
    except (ImageError, BatchError, TokenizerError) as error:
        if len(loaded) == 1:
            yield QuestionError(loaded[0].question.id, f"{loaded[0].question.image}: {error}")
            return
        for question in (one.question for one in loaded):
            yield from _ask_batch(ask, [question])


class Asker:
    """Puts batches of questions to a model in the way of one scorer."""

    def __init__(self, vlm: Any, scorer: Scorer, max_new_tokens: int, digest: Callable[[Question], str]):
        self._vlm = vlm
        self._scorer = scorer
        self._max_new_tokens = max_new_tokens
        self._digest = digest
        device = jax.devices()[0]
        self._device = device.device_kind if device.platform != "cpu" else "cpu"

    def __call__(self, batch: Sequence[_Loaded], started: float) -> list[Prediction]:
        """Predictions for pictures that were opened from `started` (time.perf_counter) on."""
        ask = self._scorer.ask
        prompts = [prompt(one.question, ask) for one in batch]
        pictures = [one.picture for one in batch]
        with _CompileCounter() as compiles:
            if ask.continuation is None:
                answers = self._write(ask, batch, pictures, prompts)
            else:
                answers = self._compare(ask.continuation, batch, pictures, prompts)
        seconds = (time.perf_counter() - started) / len(batch)
        return [
            self._scorer.score(
                Prediction(
                    id=one.question.id,
                    split=one.question.split,
                    digest=self._digest(one.question),
                    question=one.question.question,
                    options=one.question.options,
                    target=one.question.target,
                    answers=one.question.answers,
                    unit=one.question.unit,
                    seconds=seconds,
                    compiled=compiles.count > 0,
                    device=self._device,
                    **answer,
                )
            )
            for one, answer in zip(batch, answers, strict=True)
        ]

    def _compare(
        self,
        continuation: Callable[[str], str],
        batch: Sequence[_Loaded],
        pictures: Sequence[Image.Image],
        prompts: Sequence[str],
    ) -> list[dict[str, Any]]:
        continuations = [[continuation(option) for option in one.question.options] for one in batch]
        scores = self._vlm.score_prompts(pictures, prompts, continuations)
        answers = []
        for one, score in zip(batch, scores, strict=True):
            losses = tuple(float(loss) for loss in score.losses)
            if len(losses) != len(one.question.options):
                raise RuntimeError(f"{len(losses)} losses for {len(one.question.options)} options of {one.question.id}")
            answers.append({"losses": losses, "output": None, "order": None, "selection": self._pack(score.selection)})
        return answers

    def _write(
        self, ask: Ask, batch: Sequence[_Loaded], pictures: Sequence[Image.Image], prompts: Sequence[str]
    ) -> list[dict[str, Any]]:
        written = self._vlm.generate_prompts(pictures, prompts, self._max_new_tokens)
        return [
            {
                "losses": None,
                "output": generation.text,
                "order": ask.order(one.question) if ask.order else None,
                "selection": self._pack(generation.selection),
            }
            for one, generation in zip(batch, written, strict=True)
        ]

    def _pack(self, selection: Any) -> CellSelection | None:
        if selection is None:
            return None
        config = self._vlm.config
        return CellSelection(
            layers=tuple(int(layer) for layer in selection.layers),
            cells=tuple(np.packbits(np.asarray(cells, bool)).tobytes().hex() for cells in selection.cells),
            cell_grid=config.flexattention.cell_grid,
            grid=config.highres_grid,
            overflow=tuple(int(count) for count in selection.overflow),
            cells_read=int(selection.cells_read),
        )


def shown_order(question: Question, ask: Ask) -> tuple[int, ...]:
    """Indices of the options in the order in which they are shown."""
    return ask.order(question) if ask.order else tuple(range(len(question.options)))


def prompt(question: Question, ask: Ask) -> str:
    """The whole prompt of a question."""
    return build_prompt(ask.words(question, shown_order(question, ask)))


def unpack_cells(selection: CellSelection) -> np.ndarray:
    """The kept cells of a stored selection, (layers, C) bool."""
    count = selection.cell_grid**2
    rows = [np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8), count=count) for bits in selection.cells]
    return np.array(rows, bool).reshape(len(rows), count)


class _CompileCounter:
    """Counts XLA compilations while it is active."""

    def __enter__(self) -> _CompileCounter:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def __exit__(self, *_) -> None:
        jax.monitoring.unregister_event_duration_listener(self._heard)

    def _heard(self, event: str, *_, **__) -> None:
        self.count += event == _COMPILE_EVENT
