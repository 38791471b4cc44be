"""TextVQA's and VQAv2's scores: literal cases, and 10,000 generated answer sets against M4C's rules restated."""

import random
import re
from fractions import Fraction
from itertools import combinations

import pytest

from flexattn_jax.evaluation.vqa_accuracy import normalize, soft_accuracy, textvqa_accuracy, vqa_accuracy


@pytest.mark.parametrize(
    "text, normal",
    [
        ("  The Cat ", "cat"),
        ("an apple and a pear", "apple and pear"),
        ("ten", "10"),
        ("None", "0"),
        ("eleven", "eleven"),  # no number word beyond ten
        ("1,000", "1000"),
        ("what?", "what"),
        ("bob's diner", "bob 's diner"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),  # two apostrophes are missing
        ("Im", "im"),  # M4C's table has "Im", but the text is in lower case by then
        ("somebody'd", "somebodyd"),  # M4C's table has this one the wrong way round
        ("she'd", "she'd"),
        ("coca-cola", "coca cola"),  # a mark within a word becomes a space,
        ("coca -cola", "coca cola"),
        ("coca - cola-light", "coca colalight"),  # but goes altogether where it also stands beside a space
        ("u.s.a.", "usa"),
        ("3.5", "3.5"),
        ("a.5", "a.5"),  # a period before a digit stays
        ("5.", "5"),
        ("7:30", "7:30"),  # neither ":" nor "'" nor "." before a digit is removed
        ("'quoted'", "'quoted'"),
        ("." * 40, "." * 8),  # at most 32 periods go, since re.UNICODE stands where re.sub takes a count
        ("two\nlines\there", "2 lines here"),
        ("{[(x)]}", "x"),
        ("", ""),
    ],
)
def test_normal_form(text, normal):
    assert normalize(text) == normal


@pytest.mark.parametrize("matches, score", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_a_score_is_the_mean_over_nine_of_ten_answers(matches, score):
    answers = ["yes"] * matches + [f"other {k}" for k in range(10 - matches)]
    # Every choice of nine: min(1, matches among them / 3).
    choices = [min(Fraction(1), Fraction(c.count("yes"), 3)) for c in combinations(answers, 9)]
    assert float(sum(choices) / 10) == pytest.approx(score)
    assert soft_accuracy("yes", answers) == pytest.approx(score)
    assert textvqa_accuracy("Yes.", answers) == pytest.approx(score)


def test_answers_that_are_the_same_normalised_count_together():
    assert textvqa_accuracy("the stop sign", ["Stop sign", "a stop sign", "STOP SIGN!", "stop-sign"] + ["x"] * 6) == 1
    assert textvqa_accuracy("", ["a", "the", "an", "?"] + ["x"] * 6) == 1  # all of them are nothing, and so is this


def test_vqav2_compares_letter_for_letter_where_all_agree():
    """The official evaluator normalises only where the ten answers differ; M4C's always does."""
    assert vqa_accuracy("Yes", ["yes"] * 10) == 1  # the prediction was normalised before it was submitted
    assert vqa_accuracy("yes", ["Yes"] * 10) == 0 and textvqa_accuracy("yes", ["Yes"] * 10) == 1
    assert vqa_accuracy("yes", ["Yes"] * 9 + ["no"]) == 1
    assert vqa_accuracy("2", ["two"] * 10) == 0 and vqa_accuracy("2", ["two"] * 9 + ["three"]) == 1
    assert vqa_accuracy("1000", ["1,000"] * 5 + ["1000"] * 5) == 1
    assert vqa_accuracy("a b", ["a-b, 1,2"] * 9 + ["x"]) == 0  # a comma within a number glues every mark's neighbours
    assert vqa_accuracy("ab 12", ["x-b, 1,2"] * 1 + ["ab 1,2"] * 9) == 1


# An independent restatement of M4C's rules, after the description in facebookresearch/mmf
# pythia/tasks/processors.py, EvalAIAnswerProcessor: a word at a time, with its own table.

_ONE_APOSTROPHE = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
    how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't
    should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd
    there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's
    where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll
    you're you've"""
_SEVERAL = """couldn'tve=couldn't've couldnt've=couldn't've hadnt've=hadn't've hadn'tve=hadn't've hed've=he'd've
    he'dve=he'd've itd've=it'd've it'dve=it'd've ow's'at='ow's'at 'ows'at='ow's'at 'ow'sat='ow's'at
    mightnt've=mightn't've mightn'tve=mightn't've shed've=she'd've she'dve=she'd've shouldnt've=shouldn't've
    shouldn'tve=shouldn't've somebody'd=somebodyd somebodyd've=somebody'd've somebody'dve=somebody'd've
    someoned've=someone'd've someone'dve=someone'd've somethingd've=something'd've something'dve=something'd've
    thered've=there'd've there'dve=there'd've theyd've=they'd've they'dve=they'd've wed've=we'd've we'dve=we'd've
    whod've=who'd've who'dve=who'd've wouldnt've=wouldn't've wouldn'tve=wouldn't've yall'll=y'all'll y'allll=y'all'll
    yall'd've=y'all'd've y'alld've=y'all'd've y'all'dve=y'all'd've youd've=you'd've you'dve=you'd've"""
_TABLE = {word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()}
_TABLE |= dict(pair.split("=") for pair in _SEVERAL.split())
_NUMBER = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
_NUMBER |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}


def restated(text):
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    loose = {
        mark
        for mark in set(text) & set(';/[]"{}()=+\\_-><@`!')
        if re.search(f" {re.escape(mark)}|{re.escape(mark)} ", text)
    }
    marked = "".join("" if c in loose else " " if c in ';/[]"{}()=+\\_-><@`!' else c for c in text)
    kept, removed = [], 0
    for place, letter in enumerate(marked):
        before_digit = marked[place + 1 : place + 2].isdigit()
        if letter == "." and not before_digit and removed < 32:
            removed += 1
        else:
            kept.append(letter)
    words = []
    for word in "".join(kept).split():
        word = _NUMBER.get(word, word)
        if word not in ("a", "an", "the"):
            words.append(_TABLE.get(word, word))
    return " ".join(words)


def restated_accuracy(prediction, answers):
    prediction, answers = restated(prediction), [restated(answer) for answer in answers]
    total = Fraction(0)
    for left_out in range(10):
        among = sum(answer == prediction for place, answer in enumerate(answers) if place != left_out)
        total += min(Fraction(1), Fraction(among, 3))
    return float(total / 10)


_WORDS = """the a an one two ten none zero dont couldnt've couldntve somebody'd she'd 'twas it's bob's yall'd've u.s.a.
    3.5 1,000 7:30 coca-cola (stop) [x] nike! what? a/b c;d "q" e+f g=h i_j k@l `m` <n> o\\p Dakota STOP Yes no red
    é ß İ … ... -- ' , . ? ! 12 2015 x.5 5. .5"""
_PIECES = [*_WORDS.split(), *_TABLE]


def _answer(rng):
    glue = rng.choice(["", " ", " ", " ", "  ", "\n", "\t", "-", ", "])
    return glue.join(rng.choices(_PIECES, k=rng.randint(0, 4)))


def test_10_000_generated_answer_sets_agree_with_the_restated_rules():
    rng = random.Random(20240728)
    scores = []
    for _ in range(10_000):
        pool = [_answer(rng) for _ in range(rng.randint(1, 5))]
        pool += [text.upper() for text in pool[:1]] + [f"the {text}." for text in pool[:1]]
        answers, prediction = rng.choices(pool, k=10), rng.choice([*pool, _answer(rng)])
        score = textvqa_accuracy(prediction, answers)
        assert score == pytest.approx(restated_accuracy(prediction, answers), abs=1e-12), (prediction, answers)
        scores.append(round(score, 6))
    assert {0, 0.3, 0.6, 0.9, 1} == set(scores)  # every score that exists was met
