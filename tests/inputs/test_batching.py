"""Expansion of the picture, static buckets, and what padding looks like."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexattn_jax.config import IMAGE_PLACEHOLDER, ConfigError, preset
from flexattn_jax.inputs.batching import BatchError, Buckets, Sample, expand_image_tokens, make_batch, make_options

TINY = dataclasses.replace(preset("tiny"), image_token_id=99)  # N = 16, S = 168, 128 ids
N, S = 16, 168
BUCKETS = Buckets(text_lengths=(8, 16, 32), batch_sizes=(1, 2, 4), option_lengths=(2, 4), option_counts=(2, 4))
PIXELS = np.full((3, S, S), 0.5, np.float32)

text_ids = st.lists(st.integers(0, 98), max_size=12)


def test_expansion_of_the_placeholder():
    ids, start = expand_image_tokens([1, 5, IMAGE_PLACEHOLDER, 7], TINY)
    assert (ids.tolist(), start, ids.dtype) == ([1, 5] + [0] * N + [7], 2, np.int32)


def test_expansion_of_a_text():
    ids, start = expand_image_tokens([1, 5, 7], TINY)
    assert (ids.tolist(), start) == ([1, 5, 7], -1)


@settings(max_examples=60, deadline=None)
@given(text_ids, text_ids)
def test_both_forms_of_the_picture_expand_alike(before, after):
    short, start = expand_image_tokens([*before, IMAGE_PLACEHOLDER, *after], TINY)
    long, long_start = expand_image_tokens([*before, *[99] * N, *after], TINY)
    assert short.tolist() == long.tolist() == [*before, *[0] * N, *after]
    assert start == long_start == len(before)


def test_placeholder_of_a_model_without_an_image_token():
    config = dataclasses.replace(TINY, image_token_id=None)
    assert expand_image_tokens([IMAGE_PLACEHOLDER], config)[1] == 0
    assert expand_image_tokens([99] * N, config)[1] == -1  # an ordinary word there


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "non-empty list"),
        ([[1, 2]], "non-empty list"),
        ([1.5], "non-empty list"),
        ([1, IMAGE_PLACEHOLDER, 2, IMAGE_PLACEHOLDER], "2 place-holders"),
        ([IMAGE_PLACEHOLDER, *[99] * N], "one of the two forms"),
        ([1, 99, 2], r"1 image tokens.*run of 16"),
        ([99] * (N + 1), "17 image tokens"),
        ([99] * 8 + [1] + [99] * 8, "single run"),
        ([1, 128], r"hold 128.*0\.\.127"),
        ([1, -1], "hold -1"),
    ],
)
def test_ids_that_cannot_be_expanded(ids, message):
    with pytest.raises(BatchError, match=message):
        expand_image_tokens(ids, TINY)


def test_mixed_batch():
    samples = [
        Sample([1, IMAGE_PLACEHOLDER, 5, 6], PIXELS, (100, 40)),
        ([1, 2, 3], None, (-1, -1)),  # the size of no picture is not read
        ([1, 2, IMAGE_PLACEHOLDER], PIXELS, None),
    ]
    batch = make_batch(samples, TINY, BUCKETS)
    assert batch.token_ids.shape == (4, N + 8)
    assert batch.token_ids[0].tolist() == [1] + [0] * N + [5, 6] + [0] * 5
    assert batch.token_ids[1].tolist() == [1, 2, 3] + [0] * (N + 5)
    assert batch.lengths.tolist() == [N + 3, 3, N + 2, 1]
    assert batch.image_start.tolist() == [1, -1, 2, -1]
    # 100 x 40 on a 4 x 4 grid: 30 of 100 pixels are padding above, 1 whole row
    assert batch.content[0].reshape(4, 4).all(axis=1).tolist() == [False, True, True, False]
    assert batch.content[1:].all()
    assert batch.pixels.shape == (4, 3, S, S)
    np.testing.assert_array_equal(batch.pixels[[0, 2]], np.stack([PIXELS] * 2))
    assert not batch.pixels[[1, 3]].any()
    assert [a.dtype for a in jax.tree.leaves(batch)] == [np.int32, np.int32, np.int32, bool, np.float32]


def test_all_text_batch_has_no_pixels():
    batch = make_batch([([1, 2],), ([1],)], TINY, BUCKETS, pad_batch_to=3)
    assert batch.pixels is None
    assert batch.token_ids.shape == (3, 8)
    assert batch.lengths.tolist() == [2, 1, 1]
    assert batch.content.shape == (3, N)


def test_long_text_beside_a_picture_fits_the_same_sequence():
    batch = make_batch([([1, IMAGE_PLACEHOLDER], PIXELS), ([5] * (N + 8),)], TINY, BUCKETS)
    assert batch.token_ids.shape == (2, N + 8)
    batch = make_batch([([1, IMAGE_PLACEHOLDER], PIXELS), ([5] * (N + 9),)], TINY, BUCKETS)
    assert batch.token_ids.shape == (2, N + 16)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(text_ids, text_ids, st.booleans()), min_size=1, max_size=4))
def test_batching_keeps_order_and_content(parts):
    samples = [
        Sample([*before, IMAGE_PLACEHOLDER, *after], PIXELS) if picture else Sample([1, *before, *after])
        for before, after, picture in parts
    ]
    batch = make_batch(samples, TINY, BUCKETS)
    for row, sample in enumerate(samples):
        alone = make_batch([sample], TINY, BUCKETS)
        length = alone.lengths[0]
        assert batch.lengths[row] == length
        assert batch.image_start[row] == alone.image_start[0]
        np.testing.assert_array_equal(batch.token_ids[row, :length], alone.token_ids[0, :length])
        assert not batch.token_ids[row, length:].any()


def test_batches_of_a_bucket_share_one_compile():
    traces = []
    count = jax.jit(lambda batch: traces.append(1) or batch.lengths.sum())
    for prompt, size in (([1, IMAGE_PLACEHOLDER], (50, 90)), ([1, 2, 3, IMAGE_PLACEHOLDER, 4], (7, 7))):
        for number in (3, 4):
            count(make_batch([(prompt, PIXELS, size)] * number, TINY, BUCKETS))
    assert len(traces) == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(-5, 32), st.integers(0, 10))
def test_buckets_are_monotone_and_large_enough(needed, more):
    bucket = BUCKETS.text_length(needed)
    assert needed <= bucket
    assert bucket in BUCKETS.text_lengths
    if needed + more <= 32:
        assert bucket <= BUCKETS.text_length(needed + more)


@pytest.mark.parametrize("sizes", [(), (0, 1), (2, 1), (1, 1)])
def test_buckets_must_ascend(sizes):
    with pytest.raises(ConfigError, match=r"buckets\.text_lengths"):
        Buckets(text_lengths=sizes)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "at least one sample"),
        ([([1],)] * 5, "5 samples, the limit is 4"),
        ([([1] * 33,)], "33 tokens.*the limit is 32"),
        ([([1] * 33 + [IMAGE_PLACEHOLDER], PIXELS)], "33 tokens beside its picture, the limit is 32"),
        ([([1],), ([1], PIXELS)], "sample 1 has a picture but no place"),
        ([([1, IMAGE_PLACEHOLDER],)], "sample 0 has <image> in its prompt but no picture"),
        ([([1, IMAGE_PLACEHOLDER], PIXELS[:, 1:])], r"\(3, 167, 168\); this model reads \(3, 168, 168\)"),
        ([([1, IMAGE_PLACEHOLDER], PIXELS, (0, 4))], "width and height"),
        ([([1],), ([500],)], "sample 1: prompt ids hold 500"),
    ],
)
def test_batches_that_are_refused(samples, message):
    with pytest.raises(BatchError, match=message):
        make_batch(samples, TINY, BUCKETS)


def test_longer_than_the_model_was_trained_for():
    config = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, max_positions=20))
    assert make_batch([([1] * 4 + [IMAGE_PLACEHOLDER], PIXELS)], config, BUCKETS).lengths.tolist() == [20]
    with pytest.raises(BatchError, match=r"21 positions.*trained for 20"):
        make_batch([([1] * 5 + [IMAGE_PLACEHOLDER], PIXELS)], config, BUCKETS)


def test_pad_batch_to_less_than_the_samples():
    with pytest.raises(BatchError, match="2 samples do not fit a batch padded to 1"):
        make_batch([([1],)] * 2, TINY, BUCKETS, pad_batch_to=1)


def test_options_are_padded_to_static_sizes():
    batch = make_options([[[5], [6, 7, 8]], [[9, 2]], [[3], [3], [3]]], TINY, BUCKETS)
    assert batch.token_ids.shape == (4, 4, 4)
    assert batch.lengths.tolist() == [[1, 3, 0, 0], [2, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert batch.token_ids[0].tolist() == [[5, 0, 0, 0], [6, 7, 8, 0], [0] * 4, [0] * 4]
    assert batch.token_ids[1, 0].tolist() == [9, 2, 0, 0]
    assert make_options([[[5]]], TINY, BUCKETS, pad_batch_to=2).lengths.tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "at least one option"),
        ([[]], "at least one option"),
        ([[[1], []]], "at least one token"),
        ([[[1] * 5]], "an option has 5 tokens, the limit is 4"),
        ([[[1]] * 5], "a sample has 5 options, the limit is 4"),
        ([[[128]]], "hold 128"),
        ([[[IMAGE_PLACEHOLDER]]], "an option holds a picture"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(BatchError, match=message):
        make_options(options, TINY, BUCKETS)
