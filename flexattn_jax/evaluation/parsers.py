"""What a model's words mean: which option, yes or no, which box. The published rules, and strict ones beside them."""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Sequence

from flexattn_jax.inputs.datasets.questions import finite_numbers

_LETTER = re.compile(r"\(?([A-Z])(?:$|[.:)]+\s*(.*)$)")
_SENTENCE = re.compile(r"(?:the )?(?:correct )?(?:answer|option)(?: is)?:?\s+\(?([A-Z])\)?\.?$", re.IGNORECASE)
_THE_ANSWER_IS = re.compile(r"The answer is ([A-D])")
_AROUND_LETTERS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LONGEST_BOX = 200  # characters
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def strict_letter(text: str, options: Sequence[str]) -> int | None:
    """Which lettered option a model's answer names, read strictly.

    Accepted are a capital letter alone or in brackets ("B", "B.", "(B)"), the same followed by that option's own text
    ("B. The hat is red."), an option's text alone, and "The answer is B". Everything else ("Blue", "A or B", a letter
    with another option's text, a letter that was not offered) is not an answer, so that a wordy answer cannot be right
    by accident.

    Args:
        text: what the model wrote; its first line is read.
        options: texts in the order of their letters.

    Returns:
        the place in `options`, or None.
    """
    line = text.strip().split("\n")[0].strip()
    named = [index for index, option in enumerate(options) if _plain(option) == _plain(line)]
    if len(named) == 1:
        return named[0]
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
            return index
    return None


def first_letter(text: str, options: Sequence[str] = ()) -> int | None:
    """MagnifierBench's rule (FlexAttention scripts/evaluation/eval_magnifier.py; Otter, with the options' texts).

    "The answer is X"; else the first of A, B, C, D, in this order, that the answer holds anywhere, so that "D or A" is
    A and "A dog" is A; else the first option whose text the answer holds, capitals or not; else the first of a, b, c, d
    likewise. FlexAttention's script breaks the options into lines before it looks for them in one, so that it never
    finds an option's text: give it no `options`.
    """
    match = _THE_ANSWER_IS.search(text)
    if match:
        return "ABCD".index(match.group(1))
    for index, letter in enumerate("ABCD"):
        if letter in text:
            return index
    for index, option in enumerate(options):
        stripped = option.strip()
        if stripped[-1:] in (".", ",", "?"):
            stripped = stripped[:-1]
        if stripped.upper() in text.upper():
            return index
    for index, letter in enumerate("ABCD"):
        if letter in text.upper():
            return index
    return None


def inferred_option(text: str, options: Sequence[str]) -> int | None:
    """VLMEvalKit's `can_infer` (vlmeval/utils/matching_util.py), as HR-Bench and lmms-eval use it, without its judge.

    The one letter of the options that stands alone as a word, else the one option whose text the answer holds. An
    article at the beginning is taken for option A ("A dog"). Published figures ask a judge model where this rule finds
    nothing; here that counts as wrong.
    """
    if any(refusal in text for refusal in _REFUSALS):
        return None
    words = text.translate(_AROUND_LETTERS).split()
    letters = [index for index in range(len(options)) if string.ascii_uppercase[index] in words]
    if len(letters) == 1:
        return letters[0]
    if not letters and "Z" in words:  # what the judge model writes for "none of them"
        return None
    held = [index for index, option in enumerate(options) if option.lower() in text.lower()]
    return held[0] if len(held) == 1 else None


def says_no(text: str) -> bool:
    """POPE's rule (AoiDragon/POPE evaluate.py): "no", "No" or "not" as a word of the first sentence; all else is yes.

    So "NO" and "Nope" are yes, and so is an empty answer.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return any(word in words for word in ("No", "no", "not"))


def yes_or_no(text: str) -> str | None:
    """MME's rule (its eval_tool/calculation.py): "yes" or "no" within the first four characters, capitals or not."""
    beginning = text.lower()[:4]
    return "yes" if "yes" in beginning else "no" if "no" in beginning else None


def box(text: str) -> tuple[float, float, float, float] | None:
    """Four numbers, "[0.1, 0.2, 0.3, 0.4]", and nothing else: x1, y1, x2, y2 as shares of the picture.

    The released script hands the model's words to Python's `eval`; here they are only read.
    """
    if len(text) > _LONGEST_BOX:
        return None
    try:
        values = ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    return tuple(float(value) for value in values) if finite_numbers(values, 4) else None


def overlap(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes x1, y1, x2, y2, as in the released RefCOCO script; 0 for an empty union."""
    width = max(0.0, min(first[2], second[2]) - max(first[0], second[0]))
    height = max(0.0, min(first[3], second[3]) - max(first[1], second[1]))
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (first, second)]
    union = sum(areas) - width * height
    return width * height / union if union > 0 else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().strip().rstrip(".").split())
