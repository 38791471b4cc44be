"""What may be asked: checks of a call's arguments, and how scorers put a question."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from flexattn_jax.config import LARGEST_FLOAT
from flexattn_jax.inference.generation import Sampling
from flexattn_jax.inputs import prompts as prompt_text
from flexattn_jax.inputs.batching import BatchError

NEW_TOKENS = (16, 64, 256, 1024)  # static rooms for generated tokens
SCORERS = ("released", "official")
_NO_LISTS = (str, bytes, bytearray, memoryview, deque)  # sequences, but of letters, or without parts


def scorer_question(scorer: str, question: str) -> str:
    """The question as a scorer of V* Bench puts it."""
    if scorer not in SCORERS:
        raise BatchError(f"scorer is {scorer!r}; it must be one of {', '.join(SCORERS)}")
    return question + prompt_text.SHORT_ANSWER if scorer == "released" else question


def scorer_continuation(scorer: str, option: str) -> str:
    """What a scorer of V* Bench appends to the prompt for an option, and takes the loss on."""
    return f" {option}" if scorer == "released" else f" {option}{prompt_text.END_OF_ANSWER}"


def is_list(values: Any) -> bool:
    """Whether there are entries in an order: a list, a tuple or an array, but no text, set, table or single number."""
    return (isinstance(values, Sequence) and not isinstance(values, _NO_LISTS)) or getattr(values, "ndim", 0) > 0


def check_texts(name: str, texts: Sequence[Any]) -> None:
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise BatchError(f"{name}[{number}] is {text!r}; it must be a text that is not empty")


def check_options(options: Sequence[Sequence[str]]) -> None:
    for number, sample in enumerate(options):
        if not is_list(sample):
            raise BatchError(
                'options must be a list of texts for each question, e.g. [["red", "blue"]] for one question'
            )
        check_texts(f"options[{number}]", sample)


def check_lists(**lists: Sequence[Any]) -> None:
    for name, values in lists.items():
        if not is_list(values):
            raise BatchError(f"{name} must be a list with an entry for each question, not {type(values).__name__}")
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise BatchError("lists differ in length: " + ", ".join(f"{n} {name}" for name, n in lengths.items()))


def check_ids(input_ids: Any) -> list[np.ndarray]:
    """The ids of each sample, each as an array."""
    check_lists(input_ids=input_ids)
    try:
        return [np.asarray(row) for row in input_ids]
    except ValueError as error:
        raise BatchError("input_ids must be a list of whole numbers for each sample, e.g. [[1, -200, 7]]") from error


def check_pixels(pixels: Any) -> np.ndarray:
    """Normalised pixels as float32."""
    given = np.asarray(pixels)
    if np.can_cast(given.dtype, np.float32, "same_kind"):
        values = given.astype(np.float32)
        if np.isfinite(values).all():
            return values
    raise BatchError("images_or_pixels holds pixels that are no numbers, NaN or infinite; normalise whole pictures")


def check_capture(capture: Any) -> None:
    if not is_list(capture) or not all(isinstance(name, str) for name in capture):
        raise BatchError(f'capture is {capture!r}; it must be a list of names of intermediates, e.g. ["cells"]')


def check_new_tokens(count: Any) -> int:
    """The static room for `count` new tokens."""
    if type(count) is not int or not 1 <= count <= NEW_TOKENS[-1]:
        raise BatchError(f"max_new_tokens is {count!r}; it must be a whole number in 1..{NEW_TOKENS[-1]}")
    return next(size for size in NEW_TOKENS if size >= count)


def check_sampling(temperature: Any, top_p: Any, seed: Any, count: int) -> Sampling:
    """How tokens of `count` samples are chosen, from what a caller gave."""
    for name, value, holds, range_ in (
        ("temperature", temperature, lambda x: 0 <= x <= LARGEST_FLOAT, "from 0 to 3.4e38; 0: the likeliest token"),
        ("top_p", top_p, lambda x: 0 < x <= 1, "above 0 and at most 1"),
    ):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not holds(value):
            raise BatchError(f"{name} is {value!r}; it must be a number {range_}")
    seeds = [seed] * count if type(seed) is int else seed
    if not is_list(seeds) or len(seeds) != count:
        raise BatchError(f"seed is {seed!r}; it must be a whole number, or a list of one for each of {count} questions")
    if not all(isinstance(s, (int, np.integer)) and not isinstance(s, bool) and 0 <= s < 2**32 for s in seeds):
        raise BatchError(f"seed is {seed!r}; seeds are whole numbers in 0..{2**32 - 1}")
    return Sampling(np.float32(temperature), np.float32(top_p), np.asarray(seeds, np.uint32))
