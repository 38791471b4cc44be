"""The accuracy of short answers against those of ten people: VQA's (arXiv 1505.00468) and TextVQA's.

Two published evaluators, whose rules differ in ways that move a score:

    M4C        TextVQA's (facebookresearch/mmf, pythia/tasks/processors.py; in LLaVA llava/eval/m4c_evaluator.py).
               `normalize` is applied to the prediction and to every person's answer.
    official   VQAv2's (GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py). Punctuation, digits and
               articles are normalised only where the ten answers differ; where all ten agree, letter for letter is
               compared, capitals included.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(value) for value, word in enumerate(_DIGITS)} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = ';/[]"{}()=+\\_->@`,?!<'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the evaluators pass re.UNICODE where re.sub takes a count, and it is 32
# Words that the evaluators put an apostrophe back into. In those with several, exactly one may be missing: "couldntve"
# stays as it is.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the other way round in both evaluators


def normalize(text: str) -> str:
    """M4C's form of an answer: lower case, without articles and punctuation, number words as digits."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _plain_words(_without_punctuation(_on_one_line(text)))


def textvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The M4C score of a prediction, 0..1: `soft_accuracy` of normalised texts."""
    return soft_accuracy(normalize(prediction), [normalize(answer) for answer in answers])


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQAv2's official score, 0..1, of a prediction that M4C's `normalize` prepared, as LLaVA submits it."""
    prediction = _on_one_line(normalize(prediction))
    answers = [_on_one_line(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, *answers = [_plain_words(_without_punctuation(text)) for text in (prediction, *answers)]
    return soft_accuracy(prediction, answers)


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The mean over all choices of all answers but one of min(1, answers equal to the prediction / 3)."""
    equal = [answer == prediction for answer in answers]
    matches = sum(equal)
    return sum(min(1.0, (matches - own) / 3) for own in equal) / len(equal)


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """Removes a mark that stands at the edge of a word anywhere in the text, and makes every other a space."""
    result, number = text, _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        at_an_edge = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if at_an_edge or number else " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)


def _plain_words(text: str) -> str:
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
