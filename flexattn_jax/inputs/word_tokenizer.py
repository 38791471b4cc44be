"""A tokeniser of whole words for a small model: what vsearch asks and answers is a hundred words."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from flexattn_jax.files import write_whole
from flexattn_jax.inputs.datasets.vsearch_examples import (
    COLUMNS,
    SIDES,
    ask_colour,
    ask_side,
    caption,
    columns,
    sides,
)
from flexattn_jax.inputs.datasets.vsearch_scenes import CLASSES, COLOURS, PlacedObject
from flexattn_jax.inputs.prompts import END_OF_ANSWER, LETTER_ANSWER, SHORT_ANSWER, SYSTEM, build_prompt

SPECIAL = ("<unk>", "<s>", END_OF_ANSWER)  # ids 0, 1 and 2, LLaMA's
# What is said of an object, one token each: it follows the name, so that the name's own row has to see it.
SAID = (*(f"is {colour}" for colour in COLOURS), *(f"is on the {side}" for side in SIDES))


def write_word_tokenizer(folder: str | Path) -> int:
    """Writes tokenizer.json and tokenizer_config.json for vsearch's words.

    What is always the same (the system prompt, LLaVA's demands on the form of an answer, the words between the names in
    a question or an option) is one token each, so that a small model does not spend its time on it; and so is SAID.

    Returns:
        the number of tokens.
    """
    whole = [SYSTEM, SHORT_ANSWER.strip(), LETTER_ANSWER.strip(), "ASSISTANT:", *SAID, *_phrases()]
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *whole, *_words()])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)  # no word has its prefix; it closes the gaps before full stops
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in whole])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"add_bos_token": True, "bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "unk_token": SPECIAL[0]}
    write_whole(folder / "tokenizer_config.json", json.dumps(settings, indent=1) + "\n")
    write_whole(folder / "tokenizer.json", tokenizer.to_str())  # last: what is there is not written again
    return len(vocabulary)


def _words() -> list[str]:
    """Every word that a prompt, a question or an option of vsearch holds, and the letters of lettered options."""
    texts = [build_prompt("", with_image=False).removeprefix(SYSTEM), "A . B . C . D . E . F"]
    for name, other in itertools.pairwise(CLASSES):
        texts += _texts(name, other)
    split = pre_tokenizers.Whitespace().pre_tokenize_str
    return sorted({word for text in texts for word, _ in split(text)})


def _phrases() -> list[str]:
    """What else stands between the names of objects and of columns, where it is several words."""
    varying = re.compile(rf"\b(?:{'|'.join([*SAID, *CLASSES[:2], *COLUMNS])})\b")
    parts = {part.strip() for text in _texts(*CLASSES[:2]) for part in varying.split(text)}
    return sorted(part for part in parts if " " in part)


def _texts(name: str, other: str) -> list[str]:
    """Every question that can be asked of two objects, and its options."""
    places = (0, 0, 1, 1), (9, 0, 1, 1)
    objects = [PlacedObject(n, next(iter(COLOURS)), box, "") for n, box in zip((name, other), places, strict=True)]
    asked = ask_colour(objects, 0, list(COLOURS)), ask_side(objects, 0, 1, SIDES)
    told = [*caption(objects), *columns(objects, 10), *sides(objects), " ".join(COLUMNS)]
    return [text for each in asked for text in (each.question, *each.options)] + told
