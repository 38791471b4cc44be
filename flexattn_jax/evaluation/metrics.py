"""Accuracy with an interval, the choice between option losses, and the letter that a model wrote."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import string
from collections.abc import Sequence

_Z95 = 1.959963984540054  # the normal distribution's 97.5 % point


@dataclasses.dataclass(frozen=True)
class Choice:
    """The option that was chosen, or why none was."""

    index: int | None
    reason: str | None = None  # "tie", "not finite", "unparsed"; None when an option was chosen
    detail: str | None = None


def wilson_interval(correct: int, n: int) -> tuple[float, float] | None:
    """The 95 % Wilson score interval of a proportion; None without a question.

    It stays inside 0..1 and is sensible for few questions and for accuracies near 0 and 1 (Wilson 1927).
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


def accuracy(correct: Sequence[bool]) -> dict[str, float | int | list[float] | None]:
    """{"n", "correct", "accuracy", "ci95"} of a list of right and wrong answers; shares between 0 and 1."""
    n, right = len(correct), sum(map(bool, correct))
    interval = wilson_interval(right, n)
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


_LETTER = re.compile(r"\(?([A-Z])(?:$|[.:)]+\s*(.*)$)")
_SENTENCE = re.compile(r"(?:the )?(?:correct )?(?:answer|option)(?: is)?:?\s+\(?([A-Z])\)?\.?$", re.IGNORECASE)


def parse_letter(text: str, options: Sequence[str]) -> Choice:
    """Which lettered option a model's answer names, read strictly.

    Accepted are a capital letter alone or in brackets ("B", "B.", "(B)"), the same followed by that option's own text
    ("B. The hat is red."), an option's text alone, and "The answer is B". Everything else ("Blue", "A or B", a letter
    with another option's text, a letter that was not offered) is not an answer, so that a wordy answer cannot be right
    by accident.

    Args:
        text: what the model wrote; its first line is read.
        options: texts in the order of their letters.

    Returns:
        the place in `options`, or no choice with reason "unparsed".
    """
    line = text.strip().split("\n")[0].strip()
    named = [index for index, option in enumerate(options) if _plain(option) == _plain(line)]
    if len(named) == 1:
        return Choice(named[0])
    match = _LETTER.match(line)
    rest = match.group(2) if match else None
    if match is None:
        match = _SENTENCE.match(line)
        # The pattern ignores case for its words; a letter must still be a capital, or "an answer: a ..." would count.
        if match and not match.group(1).isupper():
            match = None
    if match:
        index = string.ascii_uppercase.index(match.group(1))
        if index < len(options) and (not rest or _plain(rest) == _plain(options[index])):
            return Choice(index)
    return Choice(None, "unparsed", f"the answer {line[:80]!r} names no single option")


def _plain(text: str) -> str:
    return " ".join(text.lower().strip().rstrip(".").split())
