"""Conversations of several turns as training text: LLaVA's v1 form, and which of its tokens are answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flexattn_jax.config import IMAGE_PLACEHOLDER
from flexattn_jax.inputs.prompts import END_OF_ANSWER, IMAGE_TAG, SYSTEM
from flexattn_jax.inputs.tokenizer import MAX_CHARACTERS, Tokenizer


class ConversationError(ValueError):
    """A conversation that cannot be trained on; the message says what is wrong with it."""


class Turn(NamedTuple):
    """A question, which may hold IMAGE_TAG, and its answer."""

    question: str
    answer: str


@dataclasses.dataclass(frozen=True, slots=True)
class Conversation:
    """Turns about at most one picture.

    Attributes:
        name: for messages; unique in its data set.
        turns: at least one.
        picture: path relative to the data set's folder of pictures; None: the conversation is about text alone.
    """

    name: str
    turns: tuple[Turn, ...]
    picture: str | None = None


def rounds(turns: tuple[Turn, ...]) -> list[tuple[str, str]]:
    """The text of a conversation in pieces: for each turn the prompt, and the answer with its end of sequence.

    Joined they are LLaVA's v1 conversation, "SYSTEM USER: q ASSISTANT: a</s>USER: q ASSISTANT: a</s>".
    """
    pieces = []
    for number, turn in enumerate(turns):
        start = f"{SYSTEM} " if number == 0 else ""
        pieces.append((f"{start}USER: {turn.question} ASSISTANT:", f" {turn.answer}{END_OF_ANSWER}"))
    return pieces


def tokenize_conversation(tokenizer: Tokenizer, turns: tuple[Turn, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a conversation and which of them are learned, as LLaVA's `preprocess_v1` masks them.

    Args:
        tokenizer: whose text between special tokens is encoded on its own, so that every turn can be.
        turns: of one conversation, IMAGE_TAG in at most one question.

    Returns:
        ids (n,) int32 with IMAGE_PLACEHOLDER for the picture, and (n,) bool: True on answers and on the end of
        sequence after each.

    Raises:
        ConversationError: an empty answer, a text beyond all measure, or IMAGE_TAG more than once or in an answer.
    """
    tags = sum(turn.question.count(IMAGE_TAG) for turn in turns)
    if tags > 1 or any(IMAGE_TAG in turn.answer for turn in turns):
        raise ConversationError(f"{IMAGE_TAG} may stand in one question, once, and in no answer")
    if not turns or not all(turn.answer.strip() for turn in turns):
        raise ConversationError("it has a question without an answer")
    if any(len(text) > MAX_CHARACTERS for turn in turns for text in turn):
        raise ConversationError(f"a sentence of it has more than {MAX_CHARACTERS:,} characters")
    ids = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    learned = [False] * len(ids)
    for prompt, answer in rounds(turns):
        whole = _encode(tokenizer, prompt + answer)
        prompt_length = len(_encode(tokenizer, prompt))
        ids += whole
        learned += [place >= prompt_length for place in range(len(whole))]
    return np.asarray(ids, np.int32), np.asarray(learned, bool)


def pack_turns(tokenizer: Tokenizer, turns: Sequence[Turn]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The conversations about one picture, a turn each, behind their common beginning.

    Returns:
      ids (n,) int32 with IMAGE_PLACEHOLDER once; segments (n,) int32, see Sample.segments; and (n,) bool, True on
      answers. Cut after the beginning, every segment is the rest of the conversation that `tokenize_conversation`
      makes of its turn alone.
    """
    ids, segments, learned = [], [], []
    for number, turn in enumerate(turns, start=1):
        own, own_learned = tokenize_conversation(tokenizer, (turn,))
        cut = int(np.flatnonzero(own == IMAGE_PLACEHOLDER)[0]) + 1
        if not ids:
            ids, segments, learned = [own[:cut]], [np.zeros(cut, np.int32)], [own_learned[:cut]]
        ids.append(own[cut:])
        segments.append(np.full(len(own) - cut, number, np.int32))
        learned.append(own_learned[cut:])
    return tuple(map(np.concatenate, (ids, segments, learned)))


def truncate(ids: np.ndarray, learned: np.ndarray, max_length: int, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a conversation to `max_length` positions, its picture counting as `slots`, as LLaVA does.

    Raises:
        ConversationError: nothing to learn is left, or the picture would be cut.
    """
    picture = np.flatnonzero(ids == IMAGE_PLACEHOLDER)
    kept = max_length - (slots - 1 if picture.size else 0)
    if picture.size and picture[0] >= kept:
        raise ConversationError(f"its picture begins beyond the longest length, {max_length} positions")
    ids, learned = ids[:kept], learned[:kept]
    if not learned.any():
        raise ConversationError(f"its first answer begins beyond the longest length, {max_length} positions")
    return ids, learned


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    first, *rest = text.split(IMAGE_TAG)
    ids = tokenizer.encode(first)
    for piece in rest:
        ids += [IMAGE_PLACEHOLDER, *tokenizer.encode(piece)]
    return ids
