"""Generation and option scoring: against the float64 restatement, whatever the batch, compiling once a bucket."""

import jax
import numpy as np
import pytest
import restatement
from conftest import FIXTURES, random_params
from PIL import Image

from flexattn_jax.api import VisionLanguageModel
from flexattn_jax.config import override, preset
from flexattn_jax.inputs.batching import BatchError, Buckets
from flexattn_jax.inputs.images import preprocess
from flexattn_jax.inputs.prompts import build_prompt
from flexattn_jax.inputs.tokenizer import load_tokenizer, tokenize_continuation, tokenize_prompt

QUESTIONS = [
    "What is it?",
    "What colour is the small object on the left of the table?",
    "Where?",
    "Is there a cat or a dog?",
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FIXTURES / "inputs" / "huggingface")


@pytest.fixture(scope="module")
def setup(tokenizer):
    config = override(
        preset("tiny"),
        {"decoder.vocab_size": tokenizer.vocab_size, "flexattention.threshold": 30.0},
    )
    return config, random_params(config, seed=3)


def picture(i):
    rng = np.random.default_rng(i)
    small = rng.integers(0, 255, (6 + i % 3, 8 - i % 4, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((200 - 30 * (i % 3), 140 + 20 * (i % 4)), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def eight():
    """Eight questions of four lengths, one of them about no picture."""
    images = [None if i == 5 else picture(i) for i in range(8)]
    return images, [QUESTIONS[i % 4] for i in range(8)]


def restated_logits(config, params, ids, image, readers=None):
    pixels, size = preprocess(Image.fromarray(image), config) if image is not None else (None, None)
    return restatement.model(params, config, ids, pixels, size, readers)[0]


@pytest.mark.parametrize("changes", [{"scan_layers": False}, {"flexattention.capacity": 2}])
def test_greedy_answers_are_those_of_the_restated_uncached_model(setup, tokenizer, eight, changes):
    config, params = override(setup[0], changes), setup[1]
    images, questions = [e[4:7] for e in eight]
    prompts = [build_prompt(q, image is not None) for q, image in zip(questions, images, strict=True)]
    vlm = VisionLanguageModel(config, params, tokenizer)
    answers = vlm.generate_prompts(images, prompts, max_new_tokens=6)
    for image, prompt, answer in zip(images, prompts, answers, strict=True):
        ids = tokenize_prompt(tokenizer, prompt)
        first = len(ids) - 1 + (config.num_lowres_tokens - 1 if image is not None else 0)
        for n, token in enumerate(answer.token_ids):
            logits = restated_logits(config, params, ids, image, range(first, first + n + 1))[-1]
            order = np.argsort(logits)
            assert token == order[-1] or logits[order[-1]] - logits[token] < 1e-4
            ids = [*ids, token]


def test_option_losses_are_those_of_one_restated_forward_each(setup, tokenizer, eight):
    config, params = setup
    images, questions = [e[3:6] for e in eight]
    options = [[" red", " a blue bus", " no"], [" left", " right of it"], [" yes", " no", " maybe so", " never"]]
    prompts = [build_prompt(q, image is not None) for q, image in zip(questions, images, strict=True)]
    scores = VisionLanguageModel(config, params, tokenizer).score_prompts(images, prompts, options)
    for image, prompt, sample, found in zip(images, prompts, options, scores, strict=True):
        ids = tokenize_prompt(tokenizer, prompt)
        first = len(ids) - 1 + (config.num_lowres_tokens - 1 if image is not None else 0)
        assert len(found.losses) == len(sample)
        for option, loss in zip(sample, found.losses, strict=True):
            tail = tokenize_continuation(tokenizer, prompt, option)
            readers = range(first, first + len(tail))
            logits = restated_logits(config, params, [*ids, *tail], image, readers)[first : first + len(tail)]
            logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            assert loss == pytest.approx(-np.mean(logits[np.arange(len(tail)), tail]), abs=1e-4)


@pytest.mark.slow
def test_answers_and_scores_do_not_depend_on_the_batch(setup, tokenizer, eight):
    config, params = setup
    images, questions = eight
    options = [["red", "dark blue", "no"]] * 8
    answers, scores = [], []
    for size in (1, 3, 8):
        vlm = VisionLanguageModel(config, params, tokenizer, Buckets(batch_sizes=(size,), text_lengths=(160,)))
        answers.append(vlm.answer(images, questions, max_new_tokens=8))
        scores.append(vlm.score(images, questions, options))
    assert answers[0] == answers[1] == answers[2]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)
    np.testing.assert_allclose(scores[0], scores[2], atol=1e-5)


def test_a_second_batch_of_a_bucket_compiles_nothing(setup, tokenizer, eight):
    config, params = setup
    images, questions = eight
    vlm = VisionLanguageModel(config, params, tokenizer, Buckets(batch_sizes=(4,), text_lengths=(160,)))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    vlm.answer(images[:4], questions[:4], max_new_tokens=3)
    vlm.score(images[:4], questions[:4], [["red", "dark blue"]] * 4)
    assert compiled
    compiled.clear()
    vlm.answer(images[4:7], questions[4:7], max_new_tokens=9)
    vlm.score(images[5:8], questions[5:8], [["left"], ["to the right", "a"], ["b"]])
    assert not compiled
    assert vlm._generate._cache_size() == vlm._score._cache_size() == 1


def test_scorers_differ_in_question_and_end_of_sequence(setup, tokenizer):
    config, params = setup
    vlm = VisionLanguageModel(config, params, tokenizer)
    image, options = [picture(0)], [["red", "blue"]]
    released = build_prompt("What?\nAnswer the question using a single word or phrase.")
    for scorer, prompt, end in (("released", released, ""), ("official", build_prompt("What?"), "</s>")):
        by_hand = vlm.score_prompts(image, [prompt], [[f" red{end}", f" blue{end}"]])[0].losses
        assert vlm.score(image, ["What?"], options, scorer=scorer) == [by_hand]
    with pytest.raises(ValueError, match=r"'strict'.*released, official"):
        vlm.score(image, ["What?"], options, scorer="strict")


def test_selection_reports_what_was_read(setup, tokenizer):
    config, params = setup
    vlm = VisionLanguageModel(override(config, {"flexattention.capacity": 2}), params, tokenizer)
    seeing, blind = vlm.generate_prompts([picture(1), None], [build_prompt("What?"), build_prompt("What?", False)], 4)
    assert blind.selection is None
    assert seeing.selection.layers == (2, 3, 4)
    assert seeing.selection.cells.shape == (3, 9) and (seeing.selection.cells.sum(axis=1) <= 2).all()
    assert seeing.selection.overflow.shape == (3,) and seeing.selection.overflow.sum() > 0
    assert seeing.selection.cells.sum() <= seeing.selection.cells_read <= 27


def test_generation_stops_at_the_end_of_sequence_and_at_the_limit(setup, tokenizer):
    config, params = setup
    vlm = VisionLanguageModel(config, params, tokenizer)
    ids = vlm.generate_prompts([picture(2)], [build_prompt("What?")], 16)[0].token_ids
    assert len(ids) == 16
    stopping = VisionLanguageModel(override(config, {"eos_token_id": ids[3]}), params, tokenizer)
    assert (
        stopping.generate_prompts([picture(2)], [build_prompt("What?")], 16)[0].token_ids
        == ids[: ids.index(ids[3]) + 1]
    )
    assert vlm.generate_prompts([picture(2)], [build_prompt("What?")], 1)[0].token_ids == ids[:1]


def test_wrong_calls_say_what_is_wrong(setup, tokenizer):
    config, params = setup
    vlm = VisionLanguageModel(config, params, tokenizer)
    with pytest.raises(BatchError, match="1 images, 2 questions"):
        vlm.answer([picture(0)], ["a", "b"])
    with pytest.raises(BatchError, match="max_new_tokens is 0"):
        vlm.answer([picture(0)], ["a"], max_new_tokens=0)
    with pytest.raises(BatchError, match="no picture"):
        vlm.generate_prompts([None], [build_prompt("a")])
    with pytest.raises(BatchError, match="came without a tokeniser"):
        VisionLanguageModel(config, params).answer([None], ["a"])
    with pytest.raises(BatchError, match="no intermediate heat here; there are"):
        vlm.logits(None, [[1, 5]], capture=["heat"])


def test_forgotten_lists_are_errors(setup, tokenizer):
    vlm = VisionLanguageModel(*setup, tokenizer)
    with pytest.raises(BatchError, match="options must be a list of texts for each question"):
        vlm.score([picture(0)], ["a"], ["red"])
    with pytest.raises(BatchError, match=r"options\[0\]\[0\] is 1; it must be a text"):
        vlm.score_prompts([picture(0)], [build_prompt("a")], [[1, 2]])
    with pytest.raises(BatchError, match="images must be a list with an entry for each question, not str"):
        vlm.answer("dog.jpg", "What?")
    with pytest.raises(BatchError, match="images must be a list with an entry for each question, not NoneType"):
        vlm.answer(None, ["a"])
