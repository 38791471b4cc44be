"""vsearch: asks a model all questions about every picture, and finds out what its selection is worth.

A picture is encoded once, and all options of all its questions are scored in one pass behind the prefix that they
share (Batch.blocks): the losses are those of scoring each option alone. Beside the answers it counts how often the
cells that a row reads hold the object that it is asked about, and other objects; and it asks again with other cells in
place of the selected ones (`SWAPS`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flexattn_jax.api import VisionLanguageModel
from flexattn_jax.config import VLMConfig
from flexattn_jax.inputs.batching import Batch, Buckets, Sample, make_batch
from flexattn_jax.inputs.conversations import Turn, pack_turns
from flexattn_jax.inputs.datasets.vsearch_examples import Example
from flexattn_jax.inputs.images import preprocess
from flexattn_jax.inputs.prompts import IMAGE_TAG
from flexattn_jax.inputs.tokenizer import Tokenizer
from flexattn_jax.models.vision import Views
from flexattn_jax.models.vlm import VLM

# What a row reads in place of the cells that it selected, as many of them: those that the row of another question about
# the same picture selected, random ones, or those with objects on them (filled up at random).
SWAPS = ("other_question", "random", "objects")
_ROUND = 64  # T and R are rounded up to a multiple of this, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Answer:
    """What became of one question."""

    id: str  # "test-000012/3"
    form: str
    correct: bool
    losses: tuple[float, ...]  # of the options
    answer: int
    size: int  # longer side of the smallest object asked about, pixels
    # Where the model reads high resolution, by layer that reads; of the row that decides between the options:
    kept: np.ndarray | None = None  # (layers, C) bool, the cells read
    hit_asked: tuple[bool, ...] = ()  # whether they hold the middle of an object asked about
    hit_others: tuple[float, ...] = ()  # share of the other objects whose middle they hold
    hit_others_any: float = 0.0  # share of the other objects held by the cells of some layer
    # Of the last row of the prompt and those of the right answer, in all layers together:
    distinct: int = 0  # cells that some row reads, which are projected
    reads: int = 0  # cells that rows read, summed over rows


@dataclasses.dataclass(frozen=True)
class _Option:
    question: int
    option: int
    first: int  # place of its first own token in the sequence, picture slots included
    prompt: int  # how many of its tokens are the question's
    length: int
    decisive: int  # place of the row that predicts the first token that differs between the options


@dataclasses.dataclass(frozen=True)
class Packed:
    """What `pack_options` makes of a picture's questions."""

    sample: Sample
    options: tuple[_Option, ...]
    block: int  # n, see Batch.blocks
    learned: np.ndarray  # (T,) bool, tokens of the options
    length: int
    answer_lengths: list[tuple[int, int]]  # of each question: prompt with its right answer, and the answer alone


def ask_all(
    vlm: VisionLanguageModel,
    examples: Sequence[Example],
    swap: str | None = None,
    seed: int = 0,
    batch_size: int = 4,
    views: Sequence[Views] | None = None,
) -> Iterator[list[Answer]]:
    """Asks all questions about all pictures; the option with the lowest mean loss is the model's choice.

    Args:
      swap: of SWAPS; None: the model reads what it selects.
      seed: of what a swap draws.
      batch_size: pictures at once; changes no answer.
      views: what the tower saw of each picture, such as `keep_views` kept (in float16); None: it looks at them now.

    Yields:
      the answers to all questions about a batch of pictures.

    Raises:
      ValueError: an unknown swap, or one for a model that reads no high resolution.
    """
    if swap is not None and (swap not in SWAPS or not vlm.config.reads_highres):
        raise ValueError(f"swap is {swap!r}; it must be one of {', '.join(SWAPS)}, of a model that reads cells")
    forward = functools.partial(_forward, VLM(vlm.config))
    packed = [pack_options(vlm.tokenizer, example, vlm.config) for example in examples]
    block = max(p.block for p in packed)  # the same in every batch
    packed = [
        p if p.block == block else pack_options(vlm.tokenizer, example, vlm.config, block)
        for p, example in zip(packed, examples, strict=True)
    ]
    length = _rounded(max(p.length for p in packed)) - vlm.config.num_slots
    readers = _rounded(max(int(p.learned.sum()) for p in packed))
    buckets = Buckets(text_lengths=(length,), block_lengths=(block,))
    rng = np.random.default_rng(seed)
    for first in range(0, len(examples), batch_size):
        group = packed[first : first + batch_size]
        shown = examples[first : first + batch_size]
        samples = [
            _show(p.sample, e, vlm.config, None if views is None else views[first + k])
            for k, (p, e) in enumerate(zip(group, shown, strict=True))
        ]
        batch = make_batch(samples, vlm.config, buckets, pad_batch_to=batch_size)
        rows = np.full((batch_size, readers), batch.token_ids.shape[1], np.int32)
        for line, p in zip(rows, group, strict=False):
            reading = np.flatnonzero(p.learned) - 1
            line[: len(reading)] = reading
        losses, cells, seen = forward(vlm.params, batch, rows, None)
        if swap is not None:
            given = _swapped(swap, np.asarray(cells), rows, group, shown, vlm.config, rng)
            losses, _, _ = forward(vlm.params, batch.replace(pixels=None, views=seen), rows, given)
            cells = given[1:]  # what was read, not what was selected
        losses, cells = np.asarray(losses), None if cells is None else np.asarray(cells)
        answers: list[Answer] = []
        for k, (p, example) in enumerate(zip(group, shown, strict=True)):
            read = None if cells is None else (cells[:, k], rows[k])
            answers += _judge(example, p, losses[k], read, vlm.config)
        yield answers


def _show(sample: Sample, example: Example, config: VLMConfig, views: Views | None) -> Sample:
    if views is not None:
        return sample._replace(views=views)  # pictures of vsearch are square: no padding to know of
    pixels, size = preprocess(example.picture(), config)
    return sample._replace(pixels=pixels, size=size)


@functools.partial(jax.jit, static_argnums=0)
def _forward(model: VLM, params: dict, batch: Batch, rows: jax.Array, given: Any) -> tuple[jax.Array, Any, Any]:
    """Losses (B, T) of each token given those before it, the cells read (reading layers, B, R, C), the views."""
    views = batch.views if batch.views is not None else model.apply({"params": params}, batch.pixels, method="see")
    logits, named = model.apply({"params": params}, batch.replace(pixels=None, views=views), None, rows, given=given)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch.token_ids[:, 1:])
    # A layer reads what the one below selected; the last one's selection is read by none.
    cells = named["cells"][:-1] if "cells" in named else None
    return jnp.pad(losses, ((0, 0), (1, 0))), cells, views


def pack_options(tokenizer: Tokenizer, example: Example, config: VLMConfig, block: int | None = None) -> Packed:
    """All options of all questions about a picture behind the common beginning of their prompts.

    Args:
      block: positions of each, see Batch.blocks; None: what the longest needs.
    """
    turns = [Turn(f"{IMAGE_TAG}\n{asked.question}", option) for asked in example.questions for option in asked.options]
    ids, segments, learned = pack_turns(tokenizer, turns)
    cuts = np.flatnonzero(np.diff(segments)) + 1
    (prefix, *texts), (_, *texts_learned) = np.split(ids, cuts), np.split(learned, cuts)
    made: list[tuple[int, int, int, int, int]] = []
    for number, asked in enumerate(example.questions):
        own = slice(len(made), len(made) + len(asked.options))
        same = _common_length(texts[own])
        for k, (text, text_learned) in enumerate(zip(texts[own], texts_learned[own], strict=True)):
            made.append((number, k, int((~text_learned).sum()), len(text), same))
    beginning = len(prefix) - 1 + config.num_slots
    block = block or Buckets().block_length(max(map(len, texts)))
    places = [beginning + block * k for k in range(len(made))]
    options = [
        _Option(number, k, place, prompt, length, place + same - 1)
        for place, (number, k, prompt, length, same) in zip(places, made, strict=True)
    ]
    place = beginning + block * len(made)
    expanded = np.zeros(place, bool)
    for first, own in zip(places, texts_learned, strict=True):
        expanded[first : first + len(own)] = own
    sample = Sample(ids, segments=segments)
    right = [o for o in options if o.option == example.questions[o.question].answer]
    before = options[0].first
    lengths = [(before + option.length, option.length - option.prompt) for option in right]
    return Packed(sample, tuple(options), block, expanded, place, lengths)


def _common_length(texts: Sequence[np.ndarray]) -> int:
    shortest = min(map(len, texts))
    differs = np.flatnonzero([len({int(text[i]) for text in texts}) > 1 for i in range(shortest)])
    return int(differs[0]) if differs.size else shortest


def _judge(
    example: Example, packed: Packed, losses: np.ndarray, read: tuple[np.ndarray, np.ndarray] | None, config: VLMConfig
) -> Iterator[Answer]:
    owner = _object_cells(example, config) if read is not None else None
    for number, asked in enumerate(example.questions):
        own = [option for option in packed.options if option.question == number]
        values = tuple(float(losses[o.first + o.prompt : o.first + o.length].mean()) for o in own)
        best = int(np.argmin(values))
        right = own[asked.answer]
        # A tie or a loss that is not finite is no answer.
        chosen = best if np.isfinite(values).all() and values.count(values[best]) == 1 else -1
        answer = Answer(
            id=f"{example.id}/{number}",
            form=asked.form,
            correct=chosen == asked.answer,
            losses=values,
            answer=asked.answer,
            size=min(max(example.objects[t].box[2:]) for t in asked.targets),
        )
        if read is not None:
            cells, rows = read
            decisive = cells[:, int(np.flatnonzero(rows == right.decisive)[0])]
            all_rows = (rows >= right.first + right.prompt - 1) & (rows < right.first + right.length - 1)
            others = [i for i in range(len(owner)) if i not in asked.targets]
            answer = dataclasses.replace(
                answer,
                kept=decisive,
                hit_asked=tuple(bool(v) for v in decisive[:, owner[list(asked.targets)]].any(axis=-1)),
                hit_others=tuple(float(v) for v in decisive[:, owner[others]].mean(axis=-1)),
                hit_others_any=float(decisive[:, owner[others]].any(axis=0).mean()),
                distinct=int(cells[:, all_rows].any(axis=1).sum()),
                reads=int(cells[:, all_rows].sum()),
            )
        yield answer


def _object_cells(example: Example, config: VLMConfig) -> np.ndarray:
    """(objects,) int, the cell that holds the middle of each object; the picture may be shown at another size."""
    side = config.flexattention.cell_grid
    x, y = example.middles(config.highres_grid).T * side // config.highres_grid
    return y * side + x


def _swapped(
    swap: str,
    cells: np.ndarray,
    rows: np.ndarray,
    group: Sequence[Packed],
    shown: Sequence[Example],
    config: VLMConfig,
    rng: np.random.Generator,
) -> np.ndarray:
    """Cells for every layer of the second segment and row, (layers, B, R, C) bool, as many as were selected."""
    layers, _, _, count = cells.shape
    given = np.zeros((layers + 1, *cells.shape[1:]), bool)
    for k, (packed, example) in enumerate(zip(group, shown, strict=True)):
        place = {int(row): i for i, row in enumerate(rows[k]) if row < packed.length}
        with_object = np.zeros(count, bool)
        with_object[_object_cells(example, config)] = True
        for option in packed.options:
            partner = _partner(option, packed.options)
            for row in range(option.first + option.prompt - 1, option.first + option.length - 1):
                own = place[row]
                if swap == "other_question":
                    # The same place counted from the answer's begin, or its last one where that answer is shorter.
                    offset = min(row - option.first - option.prompt, partner.length - partner.prompt - 2)
                    given[1:, k, own] = cells[:, k, place[partner.first + partner.prompt + offset]]
                    continue
                for layer in range(layers):
                    scores = rng.random(count) + (with_object if swap == "objects" else 0)
                    if not config.flexattention.revisit:
                        scores -= 2 * given[:, k, own].any(axis=0)
                    kept = np.argsort(-scores)[: cells[layer, k, own].sum()]
                    given[layer + 1, k, own, kept] = True
    return given


def _partner(option: _Option, options: Sequence[_Option]) -> _Option:
    """The first option of the next question about the picture, of the same form where there is one."""
    last = options[-1].question
    firsts = {o.question: o for o in reversed(options)}
    counts = {q: sum(o.question == q for o in options) for q in firsts}
    order = [(option.question + 1 + i) % (last + 1) for i in range(last)]
    alike = [q for q in order if counts[q] == counts[option.question]]
    return firsts[(alike or order)[0]]


def _rounded(count: int) -> int:
    return -(-count // _ROUND) * _ROUND
