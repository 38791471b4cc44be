"""What a benchmark is: a reader of its files, ways to ask and to score, and figures beside the accuracy. Only data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexattn_jax.evaluation.predictions import Prediction
from flexattn_jax.inputs.datasets.questions import Question, Reading, Source


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What an answer is worth."""

    score: float | None  # 0..1; None: somebody else must judge it
    choice: int | None = None  # the option that was chosen
    reason: str | None = None  # why nothing was: "tie", "not finite", "unparsed"
    detail: str | None = None  # the same as a sentence


@dataclasses.dataclass(frozen=True)
class Ask:
    """How a question is put to the model.

    Args:
        words: the user's words of a prompt, given the question and the order in which its options are shown.
        continuation: what is appended to the prompt for an option, where the options' losses are compared; None: the
            model writes its answer.
        order: indices of the options in the order shown; None: the file's order.
    """

    words: Callable[[Question, Sequence[int]], str]
    continuation: Callable[[str], str] | None = None
    order: Callable[[Question], tuple[int, ...]] | None = None


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A way to ask, and what the answers are worth. Scorers with the same `ask` can score each other's predictions."""

    ask: Ask
    judge: Callable[[Prediction], Verdict]

    def score(self, prediction: Prediction) -> Prediction:
        """The prediction with its verdict filled in."""
        return dataclasses.replace(prediction, **dataclasses.asdict(self.judge(prediction)))


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure beside the accuracy."""

    name: str
    value: float
    n: int  # what it was computed from, in questions
    ci95: tuple[float, float] | None = None
    points: bool = False  # a sum of points, where it is a share otherwise


@dataclasses.dataclass(frozen=True)
class Export:
    """Answers for somebody else's judge: the file's name in the workdir, and its content.

    `content` is given the data folder, the variant and the predictions by the question's name.
    """

    file_name: str
    judge: str  # who judges, for the report
    content: Callable[[Path, str, Mapping[str, Prediction]], Any]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Args:
        read: the questions of a data folder, given the folder and one of `variants`.
        scorers: by name; the first is the default.
        variants: parts or forms of the data that are never mixed; the first is the default.
        max_new_tokens: default of the setting, the published script's where there is one.
        figures: of all predictions, beside the accuracy.
        exports: by variant, where answers are judged elsewhere.
    """

    source: Source
    read: Callable[[str | Path, str], Reading]
    scorers: Mapping[str, Scorer]
    max_new_tokens: int
    variants: tuple[str, ...] = ("",)
    figures: Callable[[Sequence[Prediction]], list[Figure]] | None = None
    exports: Mapping[str, Export] = dataclasses.field(default_factory=dict)
