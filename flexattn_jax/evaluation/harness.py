"""Asks a model every question of a multiple-choice benchmark, in batches, and counts the right answers.

The three scorers (which one a published figure used decides whether it can be compared):

    released   question + "\\nAnswer the question using a single word or phrase."; each option after a space; the mean
               loss of its tokens without an end-of-sequence token; the lowest wins (FlexAttention's released script)
    official   the question alone; each option after a space and followed by </s>, which is part of the mean; the
               lowest wins (V* Bench's own script)
    generate   the options under letters in an order of `metrics.presentation_order`; the model writes a letter, which
               `metrics.parse_letter` reads strictly
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from PIL import Image

from flexattn_jax.api import scorer_continuation, scorer_question
from flexattn_jax.evaluation import metrics
from flexattn_jax.evaluation.predictions import CellSelection, Prediction, PredictionLog
from flexattn_jax.inputs.batching import BatchError
from flexattn_jax.inputs.datasets.vstar import Question, QuestionError
from flexattn_jax.inputs.images import ImageError, load_image
from flexattn_jax.inputs.prompts import LETTER_ANSWER, build_prompt, format_options
from flexattn_jax.inputs.tokenizer import TokenizerError

SCORERS = ("released", "official", "generate")

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class HarnessError(ValueError):
    """An evaluation that cannot be run as asked."""


@dataclasses.dataclass(frozen=True)
class _Loaded:
    question: Question
    picture: Image.Image


def check_request(scorer: str, batch_size: int, max_new_tokens: int) -> None:
    """Raises HarnessError for an unknown scorer or an impossible size."""
    if scorer not in SCORERS:
        raise HarnessError(f"scorer is {scorer!r}; it must be one of {', '.join(SCORERS)}")
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise HarnessError(f"{name} is {value}; it must be at least 1")


def evaluate(
    open_vlm: Callable[[], Any],
    questions: Sequence[Question],
    log: PredictionLog,
    scorer: str = "released",
    batch_size: int = 8,
    max_new_tokens: int = 16,
    show_progress: bool = True,
) -> list[QuestionError]:
    """Answers the questions that `log` has no answer to yet, and adds the answers to it.

    Args:
        open_vlm: gives the model (`flexattn_jax.api.VLM`); not called when nothing is left to ask.
        questions: what to ask.
        log: open; `log.finished` holds every answer afterwards, earlier ones included.
        scorer: one of `SCORERS`.
        batch_size: questions asked at once.
        max_new_tokens: of scorer "generate".
        show_progress: whether to draw a bar with the time left.

    Returns:
        the questions that could not be asked (a broken picture, a prompt longer than the model takes), by name. They
        are neither right nor wrong and are tried again by the next run.

    Raises:
        HarnessError: see `check_request`.
    """
    check_request(scorer, batch_size, max_new_tokens)
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
            loaded.append(_Loaded(question, load_image(question.image)))
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

    def __init__(self, vlm: Any, scorer: str, max_new_tokens: int, digest: Callable[[Question], str]):
        self._vlm = vlm
        self._scorer = scorer
        self._max_new_tokens = max_new_tokens
        self._digest = digest
        device = jax.devices()[0]
        self._device = device.device_kind if device.platform != "cpu" else "cpu"

    def __call__(self, batch: Sequence[_Loaded], started: float) -> list[Prediction]:
        """Predictions for pictures that were opened from `started` (time.perf_counter) on."""
        with _CompileCounter() as compiles:
            answers = self._generate(batch) if self._scorer == "generate" else self._score(batch)
        seconds = (time.perf_counter() - started) / len(batch)
        return [
            Prediction(
                id=one.question.id,
                split=one.question.split,
                digest=self._digest(one.question),
                options=one.question.options,
                seconds=seconds,
                compiled=compiles.count > 0,
                device=self._device,
                **answer,
            )
            for one, answer in zip(batch, answers, strict=True)
        ]

    def _score(self, batch: Sequence[_Loaded]) -> list[dict[str, Any]]:
        prompts = [prompt(one.question, self._scorer) for one in batch]
        continuations = [[scorer_continuation(self._scorer, o) for o in one.question.options] for one in batch]
        scores = self._vlm.score_prompts([one.picture for one in batch], prompts, continuations)
        answers = []
        for one, score in zip(batch, scores, strict=True):
            losses = tuple(float(loss) for loss in score.losses)
            if len(losses) != len(one.question.options):
                raise RuntimeError(f"{len(losses)} losses for {len(one.question.options)} options of {one.question.id}")
            choice = metrics.choose(losses)
            answers.append(self._answer(choice, choice.index, score.selection, losses=losses))
        return answers

    def _generate(self, batch: Sequence[_Loaded]) -> list[dict[str, Any]]:
        orders = [metrics.presentation_order(one.question.id, one.question.options) for one in batch]
        prompts = [prompt(one.question, self._scorer) for one in batch]
        texts = self._vlm.generate_prompts([one.picture for one in batch], prompts, self._max_new_tokens)
        answers = []
        for one, order, generation in zip(batch, orders, texts, strict=True):
            choice = metrics.parse_letter(generation.text, [one.question.options[k] for k in order])
            index = None if choice.index is None else order[choice.index]
            answers.append(self._answer(choice, index, generation.selection, output=generation.text, order=order))
        return answers

    def _answer(self, choice, index, selection, losses=None, output=None, order=None) -> dict[str, Any]:
        return {
            "choice": index,
            "correct": index == 0,
            "reason": choice.reason,
            "detail": choice.detail,
            "losses": losses,
            "output": output,
            "order": order,
            "selection": self._pack(selection),
        }

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


def prompt(question: Question, scorer: str) -> str:
    """The whole prompt of a question under one of `SCORERS`."""
    if scorer != "generate":
        return build_prompt(scorer_question(scorer, question.question))
    order = metrics.presentation_order(question.id, question.options)
    return build_prompt(question.question + format_options([question.options[k] for k in order]) + LETTER_ANSWER)


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
