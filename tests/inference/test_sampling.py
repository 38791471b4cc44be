"""How a token is chosen: the nucleus, draws that depend on a sample's own seed alone, streaming."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FIXTURES, random_params

from flexattn_jax.api import VisionLanguageModel
from flexattn_jax.config import override, preset
from flexattn_jax.inference.generation import Sampling, choose, nucleus
from flexattn_jax.inputs.batching import BatchError, Buckets
from flexattn_jax.inputs.tokenizer import load_tokenizer

QUESTIONS = ["What is it?", "What colour is the small object on the left?", "Where?"]
WARM = {"max_new_tokens": 9, "temperature": 1.5, "top_p": 0.9}


@pytest.fixture(scope="module")
def vlm():
    tokenizer = load_tokenizer(FIXTURES / "inputs" / "huggingface")
    changes = {"decoder.vocab_size": tokenizer.vocab_size, "flexattention.threshold": 30.0}
    config = override(preset("tiny"), changes)
    buckets = Buckets(batch_sizes=(1, 4), text_lengths=(160,))
    return VisionLanguageModel(config, random_params(config, seed=3), tokenizer, buckets)


@pytest.fixture(scope="module")
def pictures():
    return [np.random.default_rng(i).integers(0, 255, (90 + 20 * i, 120, 3), np.uint8) for i in range(3)]


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.999])
def test_the_nucleus_is_the_shortest_beginning_of_the_sorted_tokens(share):
    logits = np.random.default_rng(0).standard_normal((3, 500)).astype(np.float32) * [[0.1], [1], [5]]
    probabilities = np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32)))
    kept = np.asarray(nucleus(jnp.asarray(probabilities), jnp.float32(share)))
    for row, own in zip(probabilities, kept, strict=True):
        order = np.argsort(-row)
        count = int(np.searchsorted(np.cumsum(row[order], dtype=np.float64), share)) + 1
        assert abs(own.sum() - count) <= (share > 0.99)  # sums in float32 may disagree about the last token
        assert own[order[: own.sum()]].all()


@pytest.mark.parametrize("share", [0.0, 1e-45, 1e-30])
def test_the_likeliest_token_is_kept_whatever_the_share(share):
    probabilities = jax.nn.softmax(jnp.array([[1.0, 3.0, 2.0], [0.0, 0.0, -90.0]]))
    kept = np.asarray(nucleus(probabilities, jnp.float32(share)))
    assert kept.tolist() == [[False, True, False], [True, True, False]]


def test_a_share_of_one_keeps_every_token_and_equals_stay_together():
    assert np.asarray(nucleus(jnp.full((1, 8), 0.125), jnp.float32(0.3))).all()
    assert np.asarray(nucleus(jax.nn.softmax(jnp.array([[-90.0, 0.0, 3.0]])), jnp.float32(1))).all()


def test_draws_follow_the_probabilities():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05], jnp.float32))
    many = 4000
    sampling = Sampling(jnp.float32(1), jnp.float32(0.9), jnp.arange(many, dtype=jnp.uint32))
    drawn = np.asarray(jax.jit(choose)(jnp.broadcast_to(logits, (many, 4)), sampling, jnp.int32(0)))
    shares = np.bincount(drawn, minlength=4) / many
    np.testing.assert_allclose(shares, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03)


def test_sampled_answers_do_not_depend_on_the_batch(vlm, pictures):
    together = vlm.answer(pictures, QUESTIONS, seed=[5, 6, 7], **WARM)
    alone = [vlm.answer([p], [q], seed=s, **WARM)[0] for p, q, s in zip(pictures, QUESTIONS, (5, 6, 7), strict=True)]
    assert together == alone
    assert vlm.answer(pictures[:1], QUESTIONS[:1], seed=8, **WARM) != together[:1]
    assert vlm._generate._cache_size() == 2  # one program for each size of batch, whatever the temperature
    greedy = vlm.answer(pictures, QUESTIONS, max_new_tokens=9)
    assert greedy != together and vlm._generate._cache_size() == 2


@pytest.mark.parametrize("settings", [{"max_new_tokens": 9}, WARM | {"seed": 5}])
def test_the_pieces_of_a_stream_are_the_answer(vlm, pictures, settings):
    pieces = list(vlm.stream(pictures[0], QUESTIONS[0], **settings))
    assert len(pieces) > 1
    answer = vlm.answer(pictures[:1], QUESTIONS[:1], **settings)[0]
    # Random weights write bytes that are no text, which shows only when the next ones come.
    assert len("".join(pieces)) == len(answer)
    assert all(one in (other, "\N{REPLACEMENT CHARACTER}") for one, other in zip(answer, "".join(pieces), strict=True))


def test_wrong_settings_are_named(vlm, pictures):
    def ask(**settings):
        return vlm.answer(pictures[:1], QUESTIONS[:1], **settings)

    with pytest.raises(BatchError, match="temperature is -1; it must be a number from 0 to"):
        ask(temperature=-1)
    with pytest.raises(BatchError, match="temperature is 1000"):
        ask(temperature=10**400)
    with pytest.raises(BatchError, match="top_p is 0; it must be a number above 0 and at most 1"):
        ask(top_p=0)
    with pytest.raises(
        BatchError, match=r"seed is \[1, 2\]; it must be a whole number, or a list of one for each of 1"
    ):
        ask(seed=[1, 2])
    with pytest.raises(BatchError, match="seeds are whole numbers"):
        ask(seed=-1)
    with pytest.raises(BatchError, match="max_new_tokens is 0"):
        vlm.stream(pictures[0], "What?", max_new_tokens=0)
