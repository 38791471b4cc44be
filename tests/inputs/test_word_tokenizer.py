"""The tokeniser of whole words: it knows every word of vsearch, and the mini model's vocabulary holds it."""

import numpy as np
import pytest
from mini_search import search_config

from flexattn_jax.config import IMAGE_PLACEHOLDER, preset
from flexattn_jax.inputs.conversations import Turn, tokenize_conversation
from flexattn_jax.inputs.datasets.vsearch_examples import PRESETS, SPLITS, generate
from flexattn_jax.inputs.datasets.vsearch_scenes import CLASSES, COLOURS
from flexattn_jax.inputs.prompts import (
    IMAGE_TAG,
    LETTER_ANSWER,
    SHORT_ANSWER,
    SYSTEM,
    build_prompt,
    format_options,
)
from flexattn_jax.inputs.tokenizer import load_tokenizer, tokenize_continuation, tokenize_prompt
from flexattn_jax.inputs.word_tokenizer import SAID, write_word_tokenizer

UNKNOWN, BOS, EOS = 0, 1, 2


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words") / "made" / "on the way"
    return folder, write_word_tokenizer(folder)


@pytest.fixture(scope="module")
def words(written):
    return load_tokenizer(written[0])


@pytest.fixture(scope="module")
def examples():
    """Many questions in little time: what is asked does not depend on how large the pictures are."""
    drawn = []
    for split in SPLITS:
        pictures = tuple(30 * (name == split) for name in SPLITS)
        config = search_config("standard", num_classes=len(CLASSES), pictures=pictures)
        drawn += generate(config, split, threads=1)
    return drawn


def test_the_folder_loads_as_a_llama_tokeniser_would(written, words):
    assert (words.bos_id, words.eos_id, words.adds_bos) == (BOS, EOS, True)
    assert words.vocab_size == written[1] <= preset("mini").decoder.vocab_size
    assert write_word_tokenizer(written[0]) == written[1]  # over the old one
    assert all(config.num_classes <= len(CLASSES) for config in PRESETS.values())


def test_no_text_of_vsearch_holds_an_unknown_word(words, examples):
    asked = [question for example in examples for question in example.questions]
    names = {example.objects[t].name for example in examples for q in example.questions for t in q.targets}
    assert names == set(CLASSES) and {word for q in asked for word in q.words} == {*COLOURS, "left", "right"}
    for question in asked:
        for suffix in ("", SHORT_ANSWER, format_options(question.words) + LETTER_ANSWER):
            prompt = build_prompt(question.question + suffix)
            ids = tokenize_prompt(words, prompt)
            assert UNKNOWN not in ids and ids[0] == BOS and ids.count(IMAGE_PLACEHOLDER) == 1
        for answer in (*question.options, *question.words, "A", "B", "C", "D"):
            ids, _ = tokenize_conversation(words, (Turn(f"{IMAGE_TAG}\n{question.question}", answer),))
            assert UNKNOWN not in ids and ids[-1] == EOS


def test_an_answer_comes_back_as_it_was_written(words, examples):
    prompt = build_prompt("What is the color of the crown?")
    for question in [q for example in examples for q in example.questions]:
        for answer in (question.question, *question.options, *question.words):
            assert words.decode(words.encode(answer)) == answer
        ids = tokenize_continuation(words, prompt, f" {question.options[0]}</s>")
        assert words.decode(ids) == question.options[0] and ids[-1] == EOS


def test_a_conversation_is_its_prompt_and_its_answer(words):
    question, answer = "What is the color of the crown?", "The color of the crown is red."
    ids, learned = tokenize_conversation(words, (Turn(f"{IMAGE_TAG}\n{question}", answer),))
    prompt = tokenize_prompt(words, build_prompt(question))
    np.testing.assert_array_equal(ids[~learned], prompt)
    assert ids[learned].tolist() == tokenize_continuation(words, build_prompt(question), f" {answer}</s>")


def test_sentences_that_are_always_the_same_are_one_token(words):
    assert len(words.encode(SYSTEM)) == len(words.encode(SHORT_ANSWER)) == len(words.encode(LETTER_ANSWER)) == 1
    assert len(tokenize_prompt(words, build_prompt("What is the color of the crown?"))) == 9


def test_what_is_said_of_an_object_follows_its_name_in_one_token(words):
    for answer in ("The color of the crown is red.", "Relative to the key, the crown is on the left."):
        after = words.encode(answer.removeprefix(answer.split("crown")[0]))
        assert words.decode(after[:1]) == "crown" and words.decode(after[1:2]) in SAID


def test_words_that_nobody_asks_for_are_unknown_and_not_lost(words):
    assert words.encode("the zeppelin") == [*words.encode("the"), UNKNOWN]
