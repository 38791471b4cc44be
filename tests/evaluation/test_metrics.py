"""Intervals, choices and the order of options, on literal cases."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexattn_jax.evaluation.metrics import accuracy, choose, presentation_order, wilson_interval


@pytest.mark.parametrize(
    "correct, n, low, high",
    # From statsmodels.stats.proportion.proportion_confint(correct, n, method="wilson").
    [(0, 10, 0.0, 0.2775328), (10, 10, 0.7224672, 1.0), (93, 191, 0.4169861, 0.5573520), (1, 2, 0.0945312, 0.9054688)],
)
def test_wilson_interval(correct, n, low, high):
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=1e-6)


@given(st.integers(0, 300), st.integers(0, 300))
def test_the_interval_holds_the_accuracy(correct, extra):
    n = correct + extra
    if n == 0:
        assert wilson_interval(0, 0) is None
        return
    low, high = wilson_interval(correct, n)
    assert 0 <= low <= correct / n <= high <= 1 and low < high


def test_accuracy():
    assert accuracy([True, False, True, True]) == {
        "n": 4,
        "correct": 3,
        "accuracy": 0.75,
        "ci95": pytest.approx([0.3006418, 0.9544127], abs=1e-6),
    }
    assert accuracy([]) == {"n": 0, "correct": 0, "accuracy": None, "ci95": None}


def test_the_lowest_loss_is_chosen():
    assert choose([2.0, 1.0, 3.0]).index == 1
    assert choose([1.0, 2.0, 2.0]).index == 0  # a tie that is not for the lowest place decides nothing
    assert choose([1.0, math.nextafter(1.0, 0)]).index == 1


@pytest.mark.parametrize(
    "losses, reason",
    [
        ([1.0, 1.0], "tie"),
        ([3.0, 1.0, 1.0], "tie"),
        ([math.nan, 1.0], "not finite"),
        ([1.0, math.nan], "not finite"),
        ([math.nan, math.nan], "not finite"),
        ([1.0, math.inf], "not finite"),
        ([-math.inf, 1.0], "not finite"),
    ],
)
def test_ties_and_losses_that_are_not_finite_choose_nothing(losses, reason):
    choice = choose(losses)
    assert choice.index is None and choice.reason == reason and choice.detail


OPTIONS = ["The hat is red.", "The hat is blue.", "The hat is green."]


@given(st.text(max_size=12), st.permutations(range(4)))
def test_shown_order_does_not_depend_on_the_order_in_the_file(name, permutation):
    options = ["red", "blue", "green", "white"]
    shuffled = [options[k] for k in permutation]
    shown = [options[k] for k in presentation_order(name, options)]
    assert [shuffled[k] for k in presentation_order(name, shuffled)] == shown
    assert sorted(shown) == sorted(options)


def test_the_correct_option_gets_every_letter_alike():
    places = [presentation_order(f"question {k}", OPTIONS).index(0) for k in range(600)]
    assert all(150 < places.count(letter) < 250 for letter in range(3))
