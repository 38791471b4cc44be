"""vsearch as training samples: all questions about a picture share one prefix, so that it is computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from flexattn_jax.config import IMAGE_PLACEHOLDER, VLMConfig
from flexattn_jax.inputs.batching import Buckets, Sample
from flexattn_jax.inputs.conversations import Turn, tokenize_conversation
from flexattn_jax.inputs.datasets.vsearch import decode_example
from flexattn_jax.inputs.datasets.vsearch_examples import VisualQuestion
from flexattn_jax.inputs.images import preprocess
from flexattn_jax.inputs.prompts import IMAGE_TAG
from flexattn_jax.inputs.tokenizer import Tokenizer
from flexattn_jax.training.data import Lengths, TrainBatch, TrainSample, collate


class SearchSource:
    """A vsearch split; a sample is a picture with all its questions, answered in a sentence (V* Bench's options)."""

    def __init__(self, rows: Sequence[Any], tokenizer: Tokenizer, config: VLMConfig, digest: str):
        """
        Args:
          rows: of `load_vsearch`.
          digest: a name for their content.
        """
        self._rows, self._config = rows, config
        self._texts = [pack_questions(tokenizer, decode_example(row).questions) for row in rows]
        slots = config.num_slots
        self.lengths = Lengths(
            np.array([_positions(segments, slots) for _, segments, _ in self._texts], np.int32),
            np.array([learned.sum() for _, _, learned in self._texts], np.int32),
        )
        self.digest = hashlib.sha256(f"{digest} {[ids.tolist() for ids, _, _ in self._texts]}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """Number of the picture."""
        return f"picture {index}"

    def text(self, index: int) -> TrainSample:
        """See TextSource."""
        ids, segments, learned = self._texts[index]
        return TrainSample(Sample(ids, segments=segments), learned)

    def __getitem__(self, index: int) -> TrainSample:
        """The questions with the picture's pixels."""
        sample, learned = self.text(index)
        pixels, size = preprocess(decode_example(self._rows[index]).picture(), self._config)
        return TrainSample(sample._replace(pixels=pixels, size=size), learned)

    def collate(self, samples: Sequence[TrainSample | None], length: int, readers: int) -> TrainBatch:
        """See `data.collate`."""
        return collate(samples, self._config, length, readers)


def _positions(segments: np.ndarray, slots: int) -> int:
    """Of a sample in a batch: its beginning with the picture, and a block for each question."""
    beginning, *texts = np.bincount(segments)
    return int(beginning) + slots - 1 + len(texts) * Buckets().block_length(int(max(texts, default=1)))


def pack_questions(
    tokenizer: Tokenizer, questions: Sequence[VisualQuestion]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The conversations about one picture, a question each, behind their common beginning.

    Returns:
      ids (n,) int32 with IMAGE_PLACEHOLDER once; segments (n,) int32, see Sample.segments; and (n,) bool, True on
      answers. Cut after the beginning, every segment is the rest of the conversation that `tokenize_conversation`
      makes of its question alone.
    """
    ids, segments, learned = [], [], []
    for number, asked in enumerate(questions, start=1):
        turn = Turn(f"{IMAGE_TAG}\n{asked.question}", asked.options[asked.answer])
        own, own_learned = tokenize_conversation(tokenizer, (turn,))
        cut = int(np.flatnonzero(own == IMAGE_PLACEHOLDER)[0]) + 1
        if not ids:
            ids, segments, learned = [own[:cut]], [np.zeros(cut, np.int32)], [own_learned[:cut]]
        ids.append(own[cut:])
        segments.append(np.full(len(own) - cut, number, np.int32))
        learned.append(own_learned[cut:])
    return tuple(map(np.concatenate, (ids, segments, learned)))
