"""Accuracies and other figures with their intervals, the choice between option losses, and the order of options."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence

_Z95 = 1.959963984540054  # the normal distribution's 97.5 % point


@dataclasses.dataclass(frozen=True)
class Choice:
    """The option that was chosen, or why none was."""

    index: int | None
    reason: str | None = None  # "tie", "not finite", "unparsed"; None when an option was chosen
    detail: str | None = None


def wilson_interval(correct: float, n: int) -> tuple[float, float] | None:
    """The 95 % Wilson score interval of a proportion; None without a question.

    It stays inside 0..1 and is sensible for few questions and for accuracies near 0 and 1 (Wilson 1927). For scores
    between right and wrong, `correct` is their sum; the interval is then too wide rather than too narrow, since no
    scores in 0..1 of the same mean vary more than ones that are either 0 or 1.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"{correct} correct answers out of {n} is impossible")
    if n == 0:
        return None
    share, square = correct / n, _Z95**2
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = _Z95 / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    # At the ends the formula gives 0 and 1 up to rounding.
    return 0.0 if correct == 0 else centre - half, 1.0 if correct == n else centre + half


def accuracy(scores: Sequence[float | bool]) -> dict[str, float | int | list[float] | None]:
    """{"n", "correct", "accuracy", "ci95"} of a list of scores in 0..1; "correct" is their sum."""
    n, right = len(scores), math.fsum(scores)
    right = int(right) if right == int(right) else right
    interval = wilson_interval(min(right, n), n)
    return {
        "n": n,
        "correct": right,
        "accuracy": right / n if n else None,
        "ci95": list(interval) if interval else None,
    }


def choose(losses: Sequence[float]) -> Choice:
    """The option with the lowest loss.

    A tie for the lowest place and any loss that is not finite choose nothing: which option a sort would put first says
    something about the file and nothing about the model.
    """
    if not losses:
        raise ValueError("there is no option to choose from")
    broken = [f"option {index + 1}: {loss}" for index, loss in enumerate(losses) if not math.isfinite(loss)]
    if broken:
        return Choice(None, "not finite", f"the loss is not finite ({', '.join(broken)})")
    lowest = min(losses)
    winners = [index for index, loss in enumerate(losses) if loss == lowest]
    if len(winners) > 1:
        places = " and ".join(str(index + 1) for index in winners)
        return Choice(None, "tie", f"options {places} have the same loss {lowest:.6g}")
    return Choice(winners[0])


def presentation_order(question_id: str, options: Sequence[str]) -> tuple[int, ...]:
    """In which order lettered options are shown: entry k is the index of the option that gets the k-th letter.

    The order depends on the question's name and the options' texts alone. It does not depend on the order in the file,
    where the first is correct, and is the same in every run.
    """

    def key(index: int) -> tuple[str, int]:
        text = f"{question_id}\0{options[index]}"
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(), index

    return tuple(sorted(range(len(options)), key=key))
