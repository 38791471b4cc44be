"""Pictures encoded once: the same answers, scores and logits as from the pictures themselves."""

import numpy as np
import pytest
from conftest import FIXTURES, random_params

from flexattn_jax.api import VisionLanguageModel
from flexattn_jax.config import override, preset
from flexattn_jax.inference.reading import can_share
from flexattn_jax.inputs.batching import BatchError, Buckets
from flexattn_jax.inputs.tokenizer import load_tokenizer

QUESTIONS = ["What is it?", "What colour is the small object on the left?", "Where?"]
OPTIONS = [["red", "dark blue"], ["left", "right of it"], ["yes", "no"]]


def build(changes):
    tokenizer = load_tokenizer(FIXTURES / "inputs" / "huggingface")
    fixed = {"decoder.vocab_size": tokenizer.vocab_size, "flexattention.threshold": 30.0}
    config = override(preset("tiny"), fixed | changes)
    buckets = Buckets(batch_sizes=(4,), text_lengths=(160,))
    return VisionLanguageModel(config, random_params(config, seed=3), tokenizer, buckets)


@pytest.fixture(scope="module")
def pictures():
    return [np.random.default_rng(i).integers(0, 255, (90 + 40 * i, 120, 3), np.uint8) for i in range(2)]


CHANGES = [
    {},
    pytest.param({"scan_layers": False}, marks=pytest.mark.slow),
    pytest.param({"flexattention.enabled": False}, marks=pytest.mark.slow),
    pytest.param({"flexattention.variant": "paper"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("changes", CHANGES)
def test_answers_and_scores_are_those_of_the_pictures(pictures, changes):
    vlm = build(changes)
    asked = [pictures[0], pictures[1], pictures[0]]
    encoded = vlm.encode(pictures)
    again = [encoded[0], encoded[1], encoded[0]]
    assert [e.size for e in encoded] == [(120, 90), (120, 130)]
    prompts = [f"A chat. USER: <image>\n{question} ASSISTANT:" for question in QUESTIONS]
    want, found = (vlm.generate_prompts(images, prompts, max_new_tokens=5) for images in (asked, again))
    for one, other in zip(want, found, strict=True):
        assert one.token_ids == other.token_ids
        if one.selection is not None:
            np.testing.assert_array_equal(one.selection.cells, other.selection.cells)
            assert one.selection.cells_read == other.selection.cells_read
    wanted = vlm.score_prompts(asked, prompts, [[f" {o}" for o in sample] for sample in OPTIONS])
    scores = vlm.score_prompts(again, prompts, [[f" {o}" for o in sample] for sample in OPTIONS])
    for one, other in zip(wanted, scores, strict=True):
        np.testing.assert_allclose(one.losses, other.losses, atol=1e-5)
    # Both questions about the first picture went on from one reading of their common beginning.
    assert [len(e.beginnings) for e in encoded] == [int(can_share(vlm.config))] * 2


@pytest.mark.slow
def test_pictures_encoded_or_not_and_none_go_together(pictures):
    vlm = build({})
    encoded = vlm.encode(pictures)
    mixed = [encoded[0], None, pictures[1]]
    assert vlm.answer(mixed, QUESTIONS, 4) == vlm.answer([pictures[0], None, pictures[1]], QUESTIONS, 4)
    ids = [[1, 9, -200, 7, 20], [1, 9, -200, 8]]
    np.testing.assert_allclose(vlm.logits(encoded, ids)[0], vlm.logits(pictures, ids)[0], atol=1e-5)


def test_a_picture_of_another_model_is_refused(pictures):
    one, other = build({}), build({})
    with pytest.raises(BatchError, match="encoded by another model"):
        other.answer(one.encode(pictures[:1]), QUESTIONS[:1])
    with pytest.raises(BatchError, match="images must be a list"):
        one.encode("dog.jpg")
