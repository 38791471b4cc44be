"""From samples to the batches of a run: which samples meet in which batch, at which static size, on which process.

The order is a pure function of (seed, epoch, lengths of the samples), so it is the same after a restart and on any
number of processes, and batch k can be made without making the ones before it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import flax.struct
import grain
import numpy as np

from flexattn_jax.config import ConfigError, VLMConfig
from flexattn_jax.files import naming
from flexattn_jax.inputs.batching import Batch, Buckets, Sample, make_batch
from flexattn_jax.inputs.conversations import Conversation, ConversationError, tokenize_conversation, truncate
from flexattn_jax.inputs.datasets.llava import Skipped
from flexattn_jax.inputs.images import ImageError, load_image, preprocess
from flexattn_jax.inputs.tokenizer import Tokenizer
from flexattn_jax.training.loss import IGNORED, answer_rows, expand_labels

EMPTY = -1  # a row of a batch without a sample


@flax.struct.dataclass
class TrainBatch:
    """What one step reads.

    batch: whole conversations; always with pixels, so that a bucket has one shape.
    labels: (B, T) int32, IGNORED where no loss is taken.
    readers: (B, R) int32, rows that predict answers, T where unused.
    asked: (B, R) int32, the image token that shows what each of them is asked about, -1 for none; None: not known.
    """

    batch: Batch
    labels: Any
    readers: Any
    asked: Any = None

    @property
    def learned(self) -> Any:
        """() int, tokens that the loss is the mean of."""
        return (self.labels[:, 1:] != IGNORED).sum()


class TrainSample(NamedTuple):
    """One conversation.

    sample: for `make_batch`.
    learned: (n,) bool for each of its ids, True where the loss is taken.
    asked: (ids,) int, the image token that shows what each id tells of, -1 for none; None: not known.
    """

    sample: Sample
    learned: np.ndarray
    asked: np.ndarray | None = None


class Lengths(NamedTuple):
    """Of every sample of a source, both (n,) int32.

    positions: with the picture's slots.
    readers: rows that read high resolution, one an answer token; 0 without a picture.
    """

    positions: np.ndarray
    readers: np.ndarray


class SampleSource(Protocol):
    """A data set. Its lengths are known before a picture is decoded; `source[i]` raises ImageError for a broken one.

    digest: a name for its content.
    """

    lengths: Lengths
    digest: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """A sample: TrainSample, where `collate` is the one below."""

    def name(self, index: int) -> str:
        """For messages."""

    def collate(self, samples: Sequence[Any], length: int, readers: int) -> Any:
        """A batch of T = `length` and R = `readers`; None stands for a row without a sample."""


class TextSource(SampleSource, Protocol):
    """A data set of conversations, whose text can be had without decoding its picture."""

    def text(self, index: int) -> TrainSample:
        """The sample without its picture, where the prompt may still have a place for one."""


class ConversationSource:
    """Conversations and a folder of pictures as training samples."""

    def __init__(
        self,
        conversations: Sequence[Conversation],
        pictures: Path,
        tokenizer: Tokenizer,
        config: VLMConfig,
        max_length: int,
        index_file: Path | None = None,
        progress: Callable[[Sequence], Iterator] = iter,
    ):
        """
        Args:
          max_length: positions, the picture's slots included, that a conversation is cut to.
          index_file: where lengths are kept, since finding them means to tokenise everything once.
          progress: wraps what takes long.

        `skipped` lists conversations that have nothing to learn from.
        """
        if not 1 <= max_length <= config.decoder.max_positions:
            raise ConfigError(
                f"data.max_length is {max_length}; it must lie in 1..{config.decoder.max_positions}, the positions "
                "that the model is made for"
            )
        self._pictures, self._tokenizer, self._config, self._max_length = pictures, tokenizer, config, max_length
        tokenized = functools.partial(_measure, tokenizer, max_length, config.num_slots)
        digest = _digest(conversations, tokenizer, max_length, config.num_slots)
        table = _read_index(index_file, digest, len(conversations))
        if table is None:
            table = np.array([tokenized(c) for c in progress(conversations)], np.int32).reshape(-1, 2)
            if index_file is not None:
                _write_index(index_file, digest, table)
        usable = table[:, 0] > 0
        self.skipped = [
            Skipped(c.name, _reason(tokenizer, c, max_length, config.num_slots))
            for c, kept in zip(conversations, usable, strict=True)
            if not kept
        ]
        self._conversations = [c for c, kept in zip(conversations, usable, strict=True) if kept]
        self.lengths = Lengths(*table[usable].T)
        self.digest = digest

    def __len__(self) -> int:
        return len(self._conversations)

    def name(self, index: int) -> str:
        """Number and id of a conversation in its file."""
        return self._conversations[index].name

    def text(self, index: int) -> TrainSample:
        """See TextSource."""
        ids, learned = tokenize_conversation(self._tokenizer, self._conversations[index].turns)
        ids, learned = truncate(ids, learned, self._max_length, self._config.num_slots)
        return TrainSample(Sample(ids), learned)

    def __getitem__(self, index: int) -> TrainSample:
        """Raises ImageError when the picture cannot be read."""
        text, picture = self.text(index), self._conversations[index].picture
        if picture is None:
            return text
        image = load_image(self._pictures / picture)
        return text._replace(sample=Sample(text.sample.ids, *preprocess(image, self._config)))

    def collate(self, samples: Sequence[TrainSample | None], length: int, readers: int) -> TrainBatch:
        """See `collate`."""
        return collate(samples, self._config, length, readers)


def plan_epoch(positions: np.ndarray, batch_size: int, seed: int, epoch: int, window: int) -> np.ndarray:
    """Batches of an epoch, of similar lengths (LLaVA's length grouping): shuffle, sort inside windows, cut, shuffle.

    Args:
      positions: (n,) lengths.
      window: batches that are sorted together; 1: no grouping.

    Returns:
      (batches, batch_size) int32, every sample once; the last ones may hold EMPTY rows.
    """
    rng = np.random.default_rng([seed, epoch])
    count = -(-len(positions) // batch_size)
    order = np.full(count * batch_size, EMPTY, np.int32)
    order[: len(positions)] = rng.permutation(len(positions))
    for first in range(0, len(order), window * batch_size):
        part = order[first : first + window * batch_size]
        length = np.where(part == EMPTY, 0, positions[part])
        order[first : first + window * batch_size] = part[np.argsort(length, kind="stable")]
    return rng.permutation(order.reshape(count, batch_size))


def split_off(count: int, held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on and `held_out` ones to evaluate on, drawn by `seed`; both ascending.

    Raises ConfigError when nothing would be left to train on.
    """
    if not 0 <= held_out < count:
        raise ConfigError(
            f"{held_out} samples cannot be held out for evaluation of the {count} there are; lower data.eval_samples"
        )
    order = np.random.default_rng([seed, 1 << 31]).permutation(count)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """How a source becomes batches.

    batch_size: of all processes together.
    buckets: `text_lengths` are the static sizes of T without the picture's slots.
    answer_rows: ascending static sizes R.
    places: of a batch, those whose samples this process makes (`Partition.rows`); None: all.
    """

    batch_size: int
    buckets: Buckets
    answer_rows: tuple[int, ...]
    seed: int = 0
    window: int = 64
    places: tuple[int, ...] | None = None


class MadeBatch(NamedTuple):
    """A batch and what became of its samples.

    data: this process's rows.
    shape: (T, R).
    rows: (B,) int32, samples of all processes, EMPTY where there is none.
    tokens: real positions of all processes' rows.
    skipped: samples whose picture turned out to be broken; their rows are empty.
    """

    data: Any
    shape: tuple[int, int]
    rows: np.ndarray
    tokens: int
    skipped: tuple[Skipped, ...]


class BatchSource:
    """Batches by number, without end in sight: number // per_epoch is the epoch. For grain, which reads ahead."""

    def __init__(
        self,
        source: SampleSource,
        indices: np.ndarray,
        config: VLMConfig,
        plan: BatchPlan,
        count: int | None = None,
        threads: int = 1,
    ):
        """
        Args:
          indices: samples of `source` to use.
          count: number of batches; None: one epoch, in the order of the samples (evaluation).
          threads: that decode the pictures of one batch.
        """
        self.batch_size = plan.batch_size
        self._threads = concurrent.futures.ThreadPoolExecutor(threads, "decode")
        self._source, self._indices, self._config, self._plan = source, np.asarray(indices), config, plan
        self._positions = np.asarray(source.lengths.positions)[self._indices]
        self._readers = np.asarray(source.lengths.readers)[self._indices]
        self.per_epoch = -(-len(self._indices) // plan.batch_size)
        self._shuffled, self._count = count is not None, self.per_epoch if count is None else count
        self._epoch = functools.lru_cache(maxsize=2)(self._plan_epoch)
        longest = int(self._positions.max(initial=1)) - config.num_slots
        plan.buckets.text_length(max(1, longest))  # a BatchError now rather than in a week
        self._reader_bucket(int(self._readers.max(initial=0)))

    def __len__(self) -> int:
        return self._count

    def shapes(self, number: int) -> tuple[int, int]:
        """(T, R) of a batch, the same on every process."""
        rows = self._rows(number)
        rows = rows[rows != EMPTY]
        slots = self._config.num_slots
        needed = max(1, int(self._positions[rows].max(initial=1)) - slots)
        return slots + self._plan.buckets.text_length(needed), self._reader_bucket(
            int(self._readers[rows].max(initial=0))
        )

    def __getitem__(self, number: int) -> MadeBatch:
        """Raises BatchError for samples that do not fit the model."""
        length, readers = self.shapes(number)
        rows = self._rows(number)
        local = rows if self._plan.places is None else rows[list(self._plan.places)]
        made = list(self._threads.map(self._make, local))
        data = self._source.collate([sample for sample, _ in made], length, readers)
        skipped = tuple(fault for _, fault in made if fault is not None)
        tokens = int(self._positions[rows[rows != EMPTY]].sum())
        return MadeBatch(data, (length, readers), np.where(rows == EMPTY, EMPTY, self._indices[rows]), tokens, skipped)

    def _make(self, row: int) -> tuple[Any, Skipped | None]:
        if row == EMPTY:
            return None, None
        index = int(self._indices[row])
        try:
            return self._source[index], None
        except (ImageError, ConversationError) as error:
            return None, Skipped(self._source.name(index), str(error))

    def _rows(self, number: int) -> np.ndarray:
        epoch, place = divmod(number, self.per_epoch)
        return self._epoch(epoch)[place]

    def _plan_epoch(self, epoch: int) -> np.ndarray:
        size = self._plan.batch_size
        if self._shuffled:
            return plan_epoch(self._positions, size, self._plan.seed, epoch, self._plan.window)
        order = np.full(self.per_epoch * size, EMPTY, np.int32)
        order[: len(self._indices)] = np.argsort(self._positions, kind="stable")
        return order.reshape(-1, size)

    def _reader_bucket(self, needed: int) -> int:
        for size in self._plan.answer_rows:
            if size >= needed:
                return size
        raise ConfigError(
            f"a sample about a picture has {needed} answer tokens, but the largest bucket of data.answer_rows is "
            f"{self._plan.answer_rows[-1]}; add a larger one or lower data.max_length"
        )


_NOTHING = TrainSample(Sample(np.zeros(1, np.int32)), np.zeros(1, bool))  # a row of length 1 without a label


def collate(
    samples: Sequence[TrainSample | None], config: VLMConfig, length: int, readers: int, asked: bool = False
) -> TrainBatch:
    """Pads samples to T = `length` and R = `readers`; pixels are there even if no sample has a picture.

    Args:
      asked: whether the samples know of TrainBatch.asked.

    Raises BatchError for samples that do not fit.
    """
    slots = config.num_slots
    samples = [_NOTHING if sample is None else sample for sample in samples]
    pictured = any(s.sample.has_picture for s in samples)
    buckets = Buckets(text_lengths=(length - slots if pictured else length,))
    batch = make_batch([s.sample for s in samples], config, buckets, pad_batch_to=len(samples))
    if not pictured:
        side = config.image_size
        batch = batch.replace(pixels=np.zeros((len(samples), 3, side, side), np.float32))
    segments = [s.sample.segments for s in samples]

    def expand(values):
        return expand_labels(values, batch.image_start, slots, batch.token_ids.shape[1], segments, batch.blocks)

    labels = expand([np.where(s.learned, s.sample.ids, IGNORED) for s in samples])
    labels[:, 0] = IGNORED  # nothing predicts the first token
    rows = answer_rows(labels, batch.image_start, readers)
    if not asked:
        return TrainBatch(batch, labels, rows)
    of_labels = expand([np.full(1, -1) if s is _NOTHING else s.asked for s in samples])
    of_labels = np.pad(of_labels.clip(-1), ((0, 0), (0, 2)), constant_values=-1)  # of unused rows
    return TrainBatch(batch, labels, rows, np.take_along_axis(of_labels, rows + 1, axis=1))


def make_iterator(source: BatchSource, ahead: int) -> Any:
    """Batches in order, made `ahead` of their use; a grain iterator, with `get_state` and `set_state`."""
    options = grain.ReadOptions(num_threads=min(2, ahead), prefetch_buffer_size=ahead)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def _measure(tokenizer: Tokenizer, max_length: int, slots: int, conversation: Conversation) -> tuple[int, int]:
    """(positions, rows that read high resolution); (0, 0) if there is nothing to learn."""
    try:
        ids, learned = truncate(*tokenize_conversation(tokenizer, conversation.turns), max_length, slots)
    except ConversationError:
        return 0, 0
    if conversation.picture is None:
        return len(ids), 0
    return len(ids) + slots - 1, int(learned.sum())


def _reason(tokenizer: Tokenizer, conversation: Conversation, max_length: int, slots: int) -> str:
    try:
        truncate(*tokenize_conversation(tokenizer, conversation.turns), max_length, slots)
    except ConversationError as error:
        return str(error)
    return "the index of lengths says that it has nothing to learn"


def _digest(conversations: Sequence[Conversation], tokenizer: Tokenizer, max_length: int, slots: int) -> str:
    probe = tokenizer.encode("The quick brown fox, 12 km away: \n“Ωß”.")
    digest = hashlib.sha256(f"{max_length} {slots} {tokenizer.vocab_size} {tokenizer.adds_bos} {probe}".encode())
    for c in conversations:
        digest.update(repr((c.name, c.turns, c.picture)).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _read_index(file: Path | None, digest: str, count: int) -> np.ndarray | None:
    try:
        with np.load(file, allow_pickle=False) as stored:
            table = stored["lengths"]
            return table if str(stored["digest"]) == digest and table.shape == (count, 2) else None
    except Exception:  # absent, of other data, or damaged in a way that numpy or zipfile find: it is made again
        return None


def _write_index(file: Path, digest: str, table: np.ndarray) -> None:
    partial = file.with_suffix(f".{os.getpid()}.partial.npz")
    with naming(file):
        np.savez(partial, digest=digest, lengths=table)
    partial.replace(file)
