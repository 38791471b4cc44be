"""vsearch as training samples: all questions about a picture share one prefix, so that it is computed once."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from flexattn_jax.config import VLMConfig
from flexattn_jax.inputs.batching import Buckets, Sample
from flexattn_jax.inputs.conversations import Turn, pack_turns
from flexattn_jax.inputs.datasets.vsearch import decode_example
from flexattn_jax.inputs.datasets.vsearch_examples import Example, caption, columns, sides
from flexattn_jax.inputs.images import preprocess
from flexattn_jax.inputs.prompts import IMAGE_TAG
from flexattn_jax.inputs.tokenizer import Tokenizer
from flexattn_jax.training.data import Lengths, TrainBatch, TrainSample, collate

_NAMED = 3  # objects in a caption


class SearchSource:
    """A vsearch split; a sample is a picture with all its questions, answered by its option in a sentence."""

    def __init__(
        self,
        rows: Sequence[Any],
        tokenizer: Tokenizer,
        config: VLMConfig,
        digest: str,
        captions: int = 0,
        columns: int = 0,
        sides: int = 0,
        questions: bool = True,
    ):
        """
        Args:
          rows: of `load_vsearch`.
          digest: a name for their content.
          captions: of each picture, beside its questions: objects with their colours. Their loss is taken on colours
            alone, as `_pack` says: nothing tells which objects are named, and in which order.
          columns: captions with the objects' columns in place of their colours.
          sides: captions with the side of each object, seen from the one before.
          questions: whether the data set's are learned.
        """
        self._rows, self._config = rows, config
        counts = captions, columns, sides
        grid = config.lowres_grid
        self._texts = [_pack(tokenizer, decode_example(row), counts, questions, grid) for row in rows]
        slots = config.num_slots
        self.lengths = Lengths(
            np.array([_positions(segments, slots) for _, segments, _, _ in self._texts], np.int32),
            np.array([learned.sum() for _, _, learned, _ in self._texts], np.int32),
        )
        texts = [(ids.tolist(), np.flatnonzero(learned).tolist()) for ids, _, learned, _ in self._texts]
        self.digest = hashlib.sha256(f"{digest} {texts}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """Number of the picture."""
        return f"picture {index}"

    def text(self, index: int) -> TrainSample:
        """See TextSource."""
        ids, segments, learned, asked = self._texts[index]
        return TrainSample(Sample(ids, segments=segments), learned, asked)

    def __getitem__(self, index: int) -> TrainSample:
        """The questions with the picture's pixels."""
        text = self.text(index)
        pixels, size = preprocess(decode_example(self._rows[index]).picture(), self._config)
        return text._replace(sample=text.sample._replace(pixels=pixels, size=size))

    def collate(self, samples: Sequence[TrainSample | None], length: int, readers: int) -> TrainBatch:
        """See `data.collate`."""
        return collate(samples, self._config, length, readers, asked=True)


def _positions(segments: np.ndarray, slots: int) -> int:
    """Of a sample in a batch: its beginning with the picture, and a block for each question."""
    beginning, *texts = np.bincount(segments)
    return int(beginning) + slots - 1 + len(texts) * Buckets().block_length(int(max(texts, default=1)))


def _pack(
    tokenizer: Tokenizer, example: Example, captions: tuple[int, int, int], questions: bool, grid: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Questions with their answers, and captions of colours, columns and sides, drawn by the picture's name.

    As `pack_turns` gives them, and TrainSample.asked, tokens of a grid of `grid` a side. The answer of the first
    question of each form is learned whole; of the others, what follows the name of an object: there the name's row has
    to see the object, or reads where it is for a row behind it. All else stands in the question, and would outweigh it.
    """
    asked = example.questions if questions else ()
    texts = [(q.question, q.options[q.answer]) for q in asked]
    rng = np.random.default_rng(zlib.crc32(example.id.encode()))
    for tell, count in zip((caption, partial(columns, picture_side=example.side), sides), captions, strict=True):
        for _ in range(count):
            texts.append(tell([example.objects[k] for k in rng.permutation(len(example.objects))[:_NAMED]]))
    ids, segments, learned = pack_turns(tokenizer, [Turn(f"{IMAGE_TAG}\n{demand}", answer) for demand, answer in texts])
    forms = [q.form for q in asked]
    whole = np.isin(segments, [1 + forms.index(form) for form in set(forms)])
    shown = np.where(learned, _named_before(tokenizer, example, grid, ids), -1)
    return ids, segments, learned & whole | (shown >= 0), shown


def _named_before(tokenizer: Tokenizer, example: Example, grid: int, ids: np.ndarray) -> np.ndarray:
    """(ids,) int: of each id that follows the name of an object, the token of grid x grid with its middle; else -1."""
    tokens = np.full(len(ids), -1)
    for placed, (x, y) in zip(example.objects, example.middles(grid), strict=True):
        name = tokenizer.encode(placed.name)
        ends = np.flatnonzero(np.all([np.roll(ids, len(name) - k) == word for k, word in enumerate(name)], axis=0))
        tokens[ends[ends >= len(name)]] = y * grid + x
    return tokens
