"""LLaVA's v1 conversation, in which every LLaVA-1.5 and FlexAttention checkpoint was trained."""

from __future__ import annotations

import string
from collections.abc import Sequence

IMAGE_TAG = "<image>"  # where the picture goes; once in a prompt
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
END_OF_ANSWER = "</s>"

# Appended to a question to ask for a form of answer (LLaVA-1.5's training prompts).
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."


def build_prompt(question: str, with_image: bool = True) -> str:
    """The conversation up to where the assistant's answer begins; an answer goes on with a space.

    Args:
        question: the user's words, with a suffix such as `SHORT_ANSWER` where wanted.
        with_image: False for a question about no picture.
    """
    image = f"{IMAGE_TAG}\n" if with_image else ""
    return f"{SYSTEM} USER: {image}{question} ASSISTANT:"


def format_options(options: Sequence[str]) -> str:
    """The lettered lines that follow a multiple-choice question: "\\nA. red\\nB. blue".

    Raises:
        ValueError: more options than letters.
    """
    if len(options) > len(string.ascii_uppercase):
        raise ValueError(f"{len(options)} options cannot be lettered; the alphabet has 26 letters")
    return "".join(f"\n{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options, strict=False))
