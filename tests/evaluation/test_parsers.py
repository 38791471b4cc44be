"""Letters, yes and no, and boxes, as the published rules read them, traps included."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexattn_jax.evaluation import parsers

OPTIONS = ["The hat is red.", "The hat is blue.", "The hat is green."]


@pytest.mark.parametrize(
    "text, index",
    [
        ("B", 1),
        (" B\n", 1),
        ("B.", 1),
        ("(B)", 1),
        ("B)", 1),
        ("B: The hat is blue", 1),
        ("(C) the hat is green.", 2),
        ("The hat is red", 0),
        ("The answer is C.", 2),
        ("answer: A", 0),
        ("B\nbecause of A", 1),
        ("b", None),
        ("answer: a", None),
        ("D", None),
        ("A or B", None),
        ("A, B", None),
        ("A. The hat is blue.", None),
        ("Blue", None),
        ("A hat", None),
        ("Because it is blue", None),
        ("", None),
    ],
)
def test_letters_are_read_strictly(text, index):
    assert parsers.strict_letter(text, OPTIONS) == index


ANIMALS = ("a dog", "the cat", "Birds.", "none of them")


@pytest.mark.parametrize(
    "text, index",
    [
        ("B", 1),
        ("The answer is C", 2),
        ("Answer: D. The answer is B", 1),
        ("D or A", 0),  # A is looked for first, wherever it stands
        ("C, I think. But B", 1),
        ("A dog", 0),  # the article
        ("Because of it", 1),  # the B of a word
        ("it is the cat", 0),  # no capital: the "a" of "cat"
        ("none", None),
        ("", None),
    ],
)
def test_first_letter_rewards_wordy_answers(text, index):
    assert parsers.first_letter(text) == index


def test_first_letter_with_the_options_texts():
    assert parsers.first_letter("some birds fly", ANIMALS) == 2  # the period of "Birds." is not asked for
    assert parsers.first_letter("it is the cat", ANIMALS) == 1  # where no capital is, a text goes before "a"
    assert parsers.first_letter("a dog, the cat", ANIMALS) == 0
    assert parsers.first_letter("C. the cat", ANIMALS) == 2  # a letter goes before a text
    assert parsers.first_letter("?", ANIMALS) is None


@pytest.mark.parametrize(
    "text, index",
    [
        ("B", 1),
        ("(B)", 1),
        ("B. the cat", 1),
        ("The answer is B.", 1),
        ("A dog sits there", 0),  # the article is taken for option A
        ("A or B", None),  # two letters, and no text of an option
        ("either A or B: the cat", 1),  # two letters, one text
        ("I see the cat", 1),
        ("a dog and the cat", None),  # two texts
        ("Z", None),
        ("b", None),
        ("", None),
        ("B. Sorry, I can't help with images of people yet.", None),
    ],
)
def test_inferred_option(text, index):
    assert parsers.inferred_option(text, ANIMALS) == index


@given(st.text(max_size=30))
def test_letters_of_any_text_are_options_or_nothing(text):
    for parse in (parsers.strict_letter, parsers.first_letter, parsers.inferred_option):
        assert parse(text, ANIMALS) in (None, 0, 1, 2, 3)


@pytest.mark.parametrize(
    "text, no",
    [
        ("no", True),
        ("No, there is none.", True),
        ("There is not.", True),
        ("Yes", False),
        ("Yes. There is no doubt.", False),  # the first sentence counts
        ("no.", True),
        ("NO", False),  # only "No", "no" and "not" are looked for
        ("Nope", False),
        ("", False),  # whatever is not no is yes
        ("I cannot tell", False),
        ("there is,no,cat", False),  # commas go, so that the words grow together
    ],
)
def test_pope_reads_no(text, no):
    assert parsers.says_no(text) is no


@pytest.mark.parametrize(
    "text, word",
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("YES!", "yes"),
        ("Not really", "no"),  # "no" is in the first four characters
        ("Snow", "no"),
        ("Well, yes", None),
        ("", None),
        ("It is not", None),
    ],
)
def test_mme_reads_yes_and_no(text, word):
    assert parsers.yes_or_no(text) == word


@pytest.mark.parametrize(
    "text, box",
    [
        ("[0.1, 0.2, 0.3, 0.4]", (0.1, 0.2, 0.3, 0.4)),
        (" [.1, 0, 1, 0.5]\n", (0.1, 0, 1, 0.5)),
        ("(0, 0, 1, 1)", (0, 0, 1, 1)),
        ("0, 0, 1, 1", (0, 0, 1, 1)),
        ("[0.1, 0.2, 0.3]", None),
        ("[0.1, 0.2, 0.3, 0.4, 0.5]", None),
        ("The box is [0.1, 0.2, 0.3, 0.4]", None),
        ("[0.1, 0.2, 0.3, 0.4].", None),
        ("[1e999, 0, 1, 1]", None),
        ("[True, 0, 1, 1]", None),
        ("[0, 0, 1, '1']", None),
        ("__import__('os').getcwd()", None),
        ("[" * 150, None),
        ("9" * 10_000, None),
        ("", None),
    ],
)
def test_boxes_are_read_and_never_run(text, box):
    assert parsers.box(text) == box


def test_overlap():
    assert parsers.overlap((0, 0, 1, 1), (0, 0, 1, 1)) == 1
    assert parsers.overlap((0, 0, 1, 1), (0.5, 0, 1.5, 1)) == pytest.approx(1 / 3)
    assert parsers.overlap((0, 0, 1, 1), (1, 1, 2, 2)) == 0
    assert parsers.overlap((0, 0, 0, 0), (0, 0, 0, 0)) == 0
    assert parsers.overlap((0, 0, 2, 1), (0, 0, 1, 1)) == 0.5
