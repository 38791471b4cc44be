"""The LLaVA v1 conversation, letter for letter."""

import pytest

from flexattn_jax.inputs.prompts import LETTER_ANSWER, SHORT_ANSWER, build_prompt, format_options


def test_evaluation_prompt():
    assert build_prompt("What is it?" + SHORT_ANSWER) == (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. USER: <image>\nWhat is it?\n"
        "Answer the question using a single word or phrase. ASSISTANT:"
    )


def test_prompt_without_a_picture():
    assert build_prompt("Hello", with_image=False).endswith(" questions. USER: Hello ASSISTANT:")


def test_multiple_choice_question():
    question = "Which colour?" + format_options(["red", "blue"]) + LETTER_ANSWER
    assert question == (
        "Which colour?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly."
    )


def test_more_options_than_letters():
    assert format_options(["x"] * 26).endswith("\nZ. x")
    with pytest.raises(ValueError, match="27 options"):
        format_options(["x"] * 27)
