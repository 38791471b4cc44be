"""Several texts behind one beginning: each is read, and learned from, as if it followed the beginning alone."""

import jax
import numpy as np
import pytest
from conftest import random_params
from mini_search import SELECTIONS, compute, mini_config

from flexattn_jax.checkpoints.trees import flatten, unstack_layers
from flexattn_jax.inputs.batching import BatchError, Buckets, Sample, make_batch, text_places
from flexattn_jax.models.vlm import VLM, block_positions
from flexattn_jax.ops.attention import attend, attend_blocks
from flexattn_jax.training.data import TrainSample, collate
from flexattn_jax.training.loss import next_token_loss

PREFIX = 6  # ids before the texts, the picture's place-holder among them
TEXTS = ((6, 9, 5), (8, 4))  # lengths of the texts of two samples; of each the last three ids are learned
BLOCK = 14  # positions of a text: the bucket of the longest
SPACE = PREFIX - 1 + 3 * BLOCK  # T without the picture's slots


def problem(config):
    """For each of two samples: prefix, texts, pixels, size."""
    rng = np.random.default_rng(4)
    made = []
    for k, lengths in enumerate(TEXTS):
        prefix = rng.integers(3, 128, PREFIX)
        prefix[2 + k] = -200
        pixels = rng.standard_normal((3, config.image_size, config.image_size)).astype(np.float32)
        made.append((prefix, [rng.integers(3, 128, n) for n in lengths], pixels, [(96, 96), (60, 96)][k]))
    return made


def learned(prefix, texts):
    return np.concatenate([np.zeros(len(prefix), bool), *[np.arange(len(t)) >= len(t) - 3 for t in texts]])


def packed(config, made, rows=None):
    """Batch of one row a sample, filled up with empty rows."""
    samples = []
    for prefix, texts, pixels, size in made:
        numbers = np.repeat(np.arange(len(texts) + 1), [len(prefix), *map(len, texts)])
        sample = Sample(np.concatenate([prefix, *texts]), pixels, size, segments=numbers)
        samples.append(TrainSample(sample, learned(prefix, texts)))
    samples += [None] * ((rows or 0) - len(samples))
    return collate(samples, config, config.num_lowres_tokens + SPACE, 12)


def alone(config, made, packed=False):
    """Batch with every text of every sample behind its own prefix, one a row; and where each text begins and ends.

    `packed`: each as the only text behind a beginning, so that the program is that of several.
    """
    samples, spans = [], []
    for prefix, texts, pixels, size in made:
        for text in texts:
            ids = np.concatenate([prefix, text])
            numbers = np.repeat([0, 1], [len(prefix), len(text)]) if packed else None
            sample = Sample(ids, pixels, size, segments=numbers)
            samples.append(TrainSample(sample, learned(prefix, [text])))
            spans.append((len(prefix) + config.num_lowres_tokens - 1, len(text)))
    return collate(samples, config, config.num_lowres_tokens + SPACE, 12), spans


def agree(config, made, whole, singles, spans):
    """Logits and cells of the packed texts are those of the texts alone; each of the two as (logits, cells)."""
    (logits, cells), (expected, expected_cells) = ([np.asarray(x) for x in pair] for pair in (whole, singles))
    row, kept = 0, set()
    for b, (_, texts, _, _) in enumerate(made):
        for number, _ in enumerate(texts):
            first, length = spans[row]
            place = first + number * BLOCK
            np.testing.assert_allclose(logits[b, :first], expected[row, :first], atol=1e-5)
            own = expected[row, first : first + length]
            np.testing.assert_allclose(logits[b, place : place + length], own, atol=1e-5)
            selected = expected_cells[:, row, :3]
            np.testing.assert_array_equal(cells[:, b, 3 * number : 3 * number + 3], selected)
            kept |= {cells.tobytes() for cells in selected.reshape(-1, config.flexattention.num_cells)}
            row += 1
    assert len(kept) > 2  # rows select for themselves


@pytest.mark.slow
def test_packed_texts_are_read_as_alone():
    config = mini_config(SELECTIONS["threshold"])
    params = unstack_layers(random_params(config))
    made = problem(config)

    def read(params, batch):
        logits, named = VLM(config).apply({"params": params}, batch.batch, None, batch.readers)
        return logits, named["cells"]

    singles, spans = alone(config, made)
    assert singles.batch.blocks is None
    agree(config, made, compute(read, params, packed(config, made)), compute(read, params, singles), spans)


def test_packed_texts_are_learned_from_as_alone():
    config = mini_config(SELECTIONS["top_k"])
    params = unstack_layers(random_params(config))
    made = problem(config)
    singles, spans = alone(config, made, packed=True)

    def learn(params, batches):
        def loss_of(params, batch):
            # The loss is a mean over the batch's answers; a sum is what adds up.
            arguments = batch.batch, batch.labels, batch.readers
            loss, named = next_token_loss(VLM(config), params, *arguments, capture=True)
            return loss * batch.learned, (named["logits"], named["cells"])

        return jax.lax.map(lambda batch: jax.value_and_grad(loss_of, has_aux=True)(params, batch), batches)

    batches = jax.tree.map(lambda *leaves: np.stack(leaves), packed(config, made, len(spans)), singles)
    (losses, read), gradients = compute(learn, params, batches)
    agree(config, made, *[jax.tree.map(lambda leaf, k=k: leaf[k], read) for k in (0, 1)], spans)
    assert float(losses[0]) == pytest.approx(float(losses[1]), abs=1e-4) and float(losses[0]) > 1
    for path, leaf in flatten(gradients).items():
        leaf = np.asarray(leaf)
        np.testing.assert_allclose(leaf[0], leaf[1], atol=1e-5 * max(1.0, np.abs(leaf).max()), err_msg=path)
    assert np.abs(gradients["decoder"]["highres_1"]["v_proj_hd"]["kernel"]).max() > 0.01


@pytest.mark.parametrize(("beginning", "block", "texts"), [(1, 1, 1), (3, 4, 1), (5, 1, 4), (4, 3, 3)])
def test_blocks_are_read_as_a_mask_of_the_same_says(beginning, block, texts):
    length = beginning + block * texts
    rng = np.random.default_rng(length)
    query, key, value = (rng.standard_normal(shape) for shape in ((2, length, 4, 2), (2, length, 4), (2, length, 4)))
    number = np.concatenate([np.zeros(beginning, int), np.repeat(np.arange(1, texts + 1), block)])
    positions = np.asarray(block_positions(length, beginning, block))
    for i in range(length):
        assert positions[i] == (i if i < beginning else beginning + sum(number[:i] == number[i]))
    mask = np.array([[j <= i and number[j] in (0, number[i]) for j in range(length)] for i in range(length)])
    query, key, value = (x.astype(np.float32) for x in (query, key, value))
    for mine, expected in zip(
        attend_blocks(query, key, value, beginning, block), attend(query, key, value, mask[None]), strict=True
    ):
        np.testing.assert_allclose(mine, expected, atol=1e-5)


def test_places_leave_room_for_the_picture_and_pad_every_text():
    segments = np.array([0, 0, 1, 1, 2])
    assert text_places(segments, 7, 1, 3, (4, 3)).tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert text_places(segments, 5, -1, 3, (2, 2)).tolist() == [0, 1, 2, 3, 4]
    assert text_places(None, 3, -1, 3, None).tolist() == [0, 1, 2]


def test_beginnings_of_different_lengths_are_refused():
    config = mini_config()
    samples = [Sample(np.arange(3, 8 + k), segments=np.array([0] * (3 + k) + [1, 1])) for k in (0, 1)]
    with pytest.raises(BatchError, match=r"beginnings of \[3, 4\] positions"):
        make_batch(samples, config, Buckets())


def test_a_longer_sample_of_one_text_does_not_go_with_them():
    """It would be read as blocks."""
    config = mini_config()
    several = Sample(np.arange(3, 8), segments=np.array([0, 0, 0, 1, 2]))
    assert make_batch([several, Sample(np.arange(3, 6))], config, Buckets()).blocks == (3, 8)
    with pytest.raises(BatchError, match="sample 1 is one text of 4 positions in a batch of texts that share a beg"):
        make_batch([several, Sample(np.arange(3, 7))], config, Buckets())


@pytest.mark.parametrize("method", [None, "prefill"])
def test_what_would_mix_the_texts_is_refused(method):
    config = mini_config({"flexattention.variant": "paper"} if method is None else None)
    prefix, texts, pixels, size = problem(config)[0]
    numbers = np.repeat([0, 1, 2, 3], [len(prefix), *map(len, texts)])
    batch = make_batch([Sample(np.concatenate([prefix, *texts]), pixels, size, segments=numbers)], config, Buckets())
    arguments = () if method is None else (64,)
    with pytest.raises(BatchError, match="texts that share a beginning"):
        jax.eval_shape(lambda: VLM(config).init(jax.random.key(0), batch, *arguments, method=method))
