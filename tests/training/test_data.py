"""The order of samples, the static sizes of batches, and what becomes of samples that cannot be read."""

import os

import numpy as np
import pytest

from flexattn_jax.config import ConfigError
from flexattn_jax.inputs.batching import BatchError, Buckets, Sample
from flexattn_jax.inputs.datasets.llava import read_llava
from flexattn_jax.inputs.images import ImageError
from flexattn_jax.training.data import (
    EMPTY,
    BatchPlan,
    BatchSource,
    ConversationSource,
    Lengths,
    TrainSample,
    collate,
    make_iterator,
    plan_epoch,
    split_off,
)
from flexattn_jax.training.loss import IGNORED


class Numbers:
    """Samples whose ids tell them apart: text of length 4 + i % 9 beginning with i, no picture."""

    def __init__(self, count, broken, config):
        positions = np.array([4 + i % 9 for i in range(count)], np.int32)
        self.lengths, self._broken = Lengths(positions, np.zeros(count, np.int32)), broken
        self._config = config

    def __len__(self):
        return len(self.lengths.positions)

    def __getitem__(self, index):
        if index in self._broken:
            raise ImageError(f"picture {index} is damaged")
        ids = np.full(self.lengths.positions[index], index, np.int32)
        return TrainSample(Sample(ids), np.arange(len(ids)) > 1)

    def name(self, index):
        return f"sample {index}"

    def collate(self, samples, length, readers):
        return collate(samples, self._config, length, readers)


def batches(config, count=50, batch_size=4, total=26, indices=None, broken=(), **plan):
    indices = np.arange(count) if indices is None else indices
    plan = BatchPlan(batch_size, Buckets(text_lengths=(16, 32)), (4,), **plan)
    return BatchSource(Numbers(count, broken, config), indices, config, plan, total, threads=3)


def test_an_epoch_holds_every_sample_once_and_depends_on_seed_and_number():
    lengths = np.arange(50) % 9
    one, again, other = (plan_epoch(lengths, 4, seed, epoch, 3) for seed, epoch in ((1, 0), (1, 0), (1, 1)))
    assert sorted(one[one != EMPTY].tolist()) == list(range(50)) and (one == EMPTY).sum() == 2
    assert one.tolist() == again.tolist() != other.tolist()
    assert one.tolist() != plan_epoch(lengths, 4, 2, 0, 3).tolist()


def test_samples_of_a_batch_have_similar_lengths():
    lengths = np.random.default_rng(0).integers(0, 1000, 512)
    padded = [(lengths[rows].max(axis=1) * 8).sum() for rows in (plan_epoch(lengths, 8, 0, 0, w) for w in (1, 32))]
    assert padded[1] < 1.15 * lengths.sum() < 1.6 * lengths.sum() < padded[0]


def test_held_out_samples_are_not_trained_on():
    train, held_out = split_off(50, 7, seed=3)
    assert len(held_out) == 7 and sorted([*train, *held_out]) == list(range(50))
    assert held_out.tolist() != split_off(50, 7, seed=4)[1].tolist()
    with pytest.raises(ConfigError, match=r"data\.eval_samples"):
        split_off(7, 7, 0)


def test_processes_share_every_batch_whatever_their_number(small_config):
    whole = batches(small_config)
    for processes in (2, 4):
        share = 4 // processes
        places = [tuple(range(p * share, (p + 1) * share)) for p in range(processes)]
        parts = [batches(small_config, places=own) for own in places]
        for number in (0, 7, 13, 25):
            expected, made = whole[number].data.batch, [part[number].data.batch for part in parts]
            for name in ("token_ids", "lengths"):
                together = np.concatenate([getattr(m, name) for m in made])
                np.testing.assert_array_equal(together, getattr(expected, name))


def test_every_batch_has_the_shape_of_a_bucket_and_pixels(small_config):
    made = batches(small_config)[3]
    slots = small_config.num_lowres_tokens
    assert made.data.labels.shape == (4, slots + 16) and made.data.readers.shape == (4, 4)
    assert made.data.batch.pixels.shape == (4, 3, 168, 168) and not made.data.batch.pixels.any()
    for row, sample in enumerate(made.rows):
        length = made.data.batch.lengths[row]
        assert made.data.labels[row, :length].tolist() == [IGNORED, IGNORED] + [sample] * (length - 2)
        assert (made.data.labels[row, length:] == IGNORED).all()
    assert made.tokens == made.data.batch.lengths.sum()


def test_a_broken_sample_leaves_an_empty_row_and_the_order_as_it_was(small_config):
    whole, broken = batches(small_config), batches(small_config, broken=range(0, 50, 3))
    reported = []
    for number in range(13):
        good, bad = whole[number], broken[number]
        np.testing.assert_array_equal(good.rows, bad.rows)
        gone = (bad.rows % 3 == 0) | (bad.rows == EMPTY)
        assert (bad.data.labels[gone] == IGNORED).all() and (bad.data.batch.lengths[gone] == 1).all()
        np.testing.assert_array_equal(good.data.labels[~gone], bad.data.labels[~gone])
        reported += bad.skipped
    assert sorted(entry.name for entry in reported) == sorted(f"sample {i}" for i in range(0, 50, 3))
    assert all("is damaged" in entry.reason for entry in reported)


def test_an_iterator_goes_on_where_its_state_says(small_config):
    first = make_iterator(batches(small_config), ahead=3)
    rows = [next(first).rows.tolist() for _ in range(5)]
    state = first.get_state()
    rest = [made.rows.tolist() for made in first]
    again = make_iterator(batches(small_config), ahead=3)
    again.set_state(state)
    assert [made.rows.tolist() for made in again] == rest
    assert len(rows) + len(rest) == 26 and rows[0] != rest[8]  # two epochs, each in its own order


def test_samples_beyond_the_largest_bucket_are_refused_before_training(small_config):
    plan = BatchPlan(4, Buckets(text_lengths=(16,)), (4,))
    source = Numbers(8, (), small_config)
    source.lengths = Lengths(np.full(8, 64, np.int32), np.zeros(8, np.int32))
    with pytest.raises(BatchError, match="the limit is 16"):
        BatchSource(source, np.arange(8), small_config, plan, 2)
    source.lengths = Lengths(np.full(8, 5, np.int32), np.full(8, 5, np.int32))
    with pytest.raises(ConfigError, match=r"data\.answer_rows"):
        BatchSource(source, np.arange(8), small_config, plan, 2)


def test_conversations_become_samples_and_their_lengths_are_remembered(llava_data, tokenizer, small_config, tmp_path):
    conversations, skipped = read_llava(llava_data / "conversations.json", llava_data / "pictures")
    assert [entry.name for entry in skipped] == ["30:gone"]
    counted = []

    def make(file, config=small_config, max_length=160):
        def progress(items):
            counted.append(len(items))
            return iter(items)

        return ConversationSource(conversations, llava_data / "pictures", tokenizer, config, max_length, file, progress)

    source = make(tmp_path / "lengths.npz")
    for index in (0, 4, 13):
        sample, learned, _ = source[index]
        positions = len(sample.ids) + (15 if sample.pixels is not None else 0)
        rows = learned.sum() if sample.pixels is not None else 0
        assert (positions, rows) == (source.lengths.positions[index], source.lengths.readers[index])
    assert source[4].sample.pixels is None and source[0].sample.size == (30, 24)
    with pytest.raises(ImageError, match=r"10\.jpg"):
        source[10]

    again = make(tmp_path / "lengths.npz")
    assert counted == [30] and again.digest == source.digest
    np.testing.assert_array_equal(again.lengths.positions, source.lengths.positions)
    shorter = make(tmp_path / "lengths.npz", max_length=115)  # text of 103 ids fits, two turns about a picture do not
    assert counted == [30, 30] and shorter.digest != source.digest
    assert shorter.lengths.positions.max() == 115 and not shorter.skipped
    os.truncate(tmp_path / "lengths.npz", 100)
    make(tmp_path / "lengths.npz")
    assert len(counted) == 3
    none = make(None, max_length=60)
    assert len(none) == 0 and len(none.skipped) == 30 and "longest length" in none.skipped[0].reason
    for length in (5000, 0, -5):
        with pytest.raises(ConfigError, match=rf"data\.max_length is {length}; it must lie in 1\.\."):
            make(None, max_length=length)
