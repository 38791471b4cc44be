"""Several texts behind one beginning: each is read, and learned from, as if it followed the beginning alone."""

import jax
import numpy as np
import pytest
from conftest import random_params
from hypothesis import given, settings
from hypothesis import strategies as st
from mini_search import SELECTIONS, compute, mini_config

from flexattn_jax.checkpoints.trees import flatten, unstack_layers
from flexattn_jax.inputs.batching import BatchError, Buckets, Sample, expand_segments, make_batch
from flexattn_jax.models.vlm import VLM, segment_mask, segment_positions
from flexattn_jax.training.data import TrainSample, collate
from flexattn_jax.training.loss import next_token_loss

PREFIX = 5  # ids before the texts, the picture's place-holder among them
TEXTS = ((6, 9, 5), (8, 4))  # lengths of the texts of two samples; of each the last three ids are learned
SPACE = 48  # T without the picture's slots


def problem(config):
    """For each of two samples: prefix, texts, pixels, size."""
    rng = np.random.default_rng(4)
    made = []
    for k, lengths in enumerate(TEXTS):
        prefix = rng.integers(3, 128, PREFIX + k)
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


def alone(config, made, segments=None):
    """Batch with every text of every sample behind its own prefix, one a row; and where each text begins and ends."""
    samples, spans = [], []
    for prefix, texts, pixels, size in made:
        for text in texts:
            ids = np.concatenate([prefix, text])
            sample = Sample(ids, pixels, size, segments=None if segments is None else np.full(len(ids), segments))
            samples.append(TrainSample(sample, learned(prefix, [text])))
            spans.append((len(prefix) + config.num_lowres_tokens - 1, len(text)))
    return collate(samples, config, config.num_lowres_tokens + SPACE, 12), spans


def agree(config, made, whole, singles, spans):
    """Logits and cells of the packed texts are those of the texts alone; each of the two as (logits, cells)."""
    (logits, cells), (expected, expected_cells) = ([np.asarray(x) for x in pair] for pair in (whole, singles))
    row, kept = 0, set()
    for b, (_, texts, _, _) in enumerate(made):
        place = spans[row][0]
        for number, _ in enumerate(texts):
            first, length = spans[row]
            np.testing.assert_allclose(logits[b, :first], expected[row, :first], atol=1e-5)
            own = expected[row, first : first + length]
            np.testing.assert_allclose(logits[b, place : place + length], own, atol=1e-5)
            selected = expected_cells[:, row, :3]
            np.testing.assert_array_equal(cells[:, b, 3 * number : 3 * number + 3], selected)
            kept |= {cells.tobytes() for cells in selected.reshape(-1, config.flexattention.num_cells)}
            place, row = place + length, row + 1
    assert len(kept) > 3  # rows select for themselves


def test_packed_texts_are_read_as_alone():
    config = mini_config(SELECTIONS["threshold"])
    params = unstack_layers(random_params(config))
    made = problem(config)

    def read(params, batch):
        logits, named = VLM(config).apply({"params": params}, batch.batch, None, batch.readers)
        return logits, named["cells"]

    singles, spans = alone(config, made)
    assert singles.batch.segments is None
    agree(config, made, compute(read, params, packed(config, made)), compute(read, params, singles), spans)


def test_packed_texts_are_learned_from_as_alone():
    config = mini_config(SELECTIONS["top_k"])
    params = unstack_layers(random_params(config))
    made = problem(config)
    singles, spans = alone(config, made, segments=0)  # nothing but a beginning: one program for both

    def learn(params, batches):
        def loss_of(params, batch):
            # The loss is a mean over the batch's answers; a sum is what adds up.
            loss, (logits, named) = next_token_loss(VLM(config), params, batch.batch, batch.labels, batch.readers)
            return loss * batch.learned, (logits, named["cells"])

        return jax.lax.map(lambda batch: jax.value_and_grad(loss_of, has_aux=True)(params, batch), batches)

    batches = jax.tree.map(lambda *leaves: np.stack(leaves), packed(config, made, len(spans)), singles)
    (losses, read), gradients = compute(learn, params, batches)
    agree(config, made, *[jax.tree.map(lambda leaf, k=k: leaf[k], read) for k in (0, 1)], spans)
    assert float(losses[0]) == pytest.approx(float(losses[1]), abs=1e-4) and float(losses[0]) > 1
    for path, leaf in flatten(gradients).items():
        leaf = np.asarray(leaf)
        np.testing.assert_allclose(leaf[0], leaf[1], atol=1e-5 * max(1.0, np.abs(leaf).max()), err_msg=path)
    assert np.abs(gradients["decoder"]["flex_1"]["self_attn"]["v_proj_hd"]["kernel"]).max() > 0.01


def loop_positions(segments):
    """A text's first token stands where the beginning ends."""
    count, common = {}, sum(s == 0 for s in segments)
    positions = []
    for s in segments:
        positions.append(count.get(s, 0) + (common if s else 0))
        count[s] = count.get(s, 0) + 1
    return positions


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=2, max_size=2))
def test_positions_and_masks_are_those_of_a_loop(lengths):
    """Rows of a beginning and up to three texts, then padding."""
    numbers = np.full((2, 21), -1, np.int32)
    for line, own in zip(numbers, lengths, strict=True):
        line[: sum(own)] = np.repeat([0, 1, 2, 7], own)
    positions, mask = np.asarray(segment_positions(numbers)), np.asarray(segment_mask(numbers))
    for b, line in enumerate(numbers.tolist()):
        real = sum(s >= 0 for s in line)
        assert positions[b, :real].tolist() == loop_positions(line[:real])
        for i in range(real):
            assert mask[b, i].tolist() == [j <= i and line[j] in (0, line[i]) for j in range(21)]
        assert mask[b].any(axis=1).all()  # padding reads something, so that no softmax is empty


def test_a_picture_in_the_beginning_makes_room_in_segments():
    assert expand_segments(np.array([0, 0, 1, 1, 2]), 1, 3).tolist() == [0, 0, 0, 0, 1, 1, 2]
    assert expand_segments(np.array([0, 1]), -1, 3).tolist() == [0, 1]


@pytest.mark.parametrize("method", [None, "prefill"])
def test_what_would_mix_the_texts_is_refused(method):
    config = mini_config({"flexattention.variant": "paper"} if method is None else None)
    prefix, texts, pixels, size = problem(config)[0]
    numbers = np.repeat([0, 1, 2, 3], [len(prefix), *map(len, texts)])
    batch = make_batch([Sample(np.concatenate([prefix, *texts]), pixels, size, segments=numbers)], config, Buckets())
    arguments = () if method is None else (64,)
    with pytest.raises(BatchError, match="texts that share a beginning"):
        jax.eval_shape(lambda: VLM(config).init(jax.random.key(0), batch, *arguments, method=method))
