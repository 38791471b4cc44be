"""Nothing is compiled a second time: what a program gives back, and the next batch of a bucket, look like the first."""

import functools

import jax
import numpy as np
import pytest
from conftest import random_params

from flexattn_jax.config import override, preset
from flexattn_jax.costs.cases import Case
from flexattn_jax.costs.programs import build
from flexattn_jax.inference.generation import generate, greedy
from flexattn_jax.inference.reading import Prompts
from flexattn_jax.inference.scoring import score
from flexattn_jax.inputs.batching import Buckets, Sample, make_batch, make_options
from flexattn_jax.models.vlm import VLM
from flexattn_jax.training.data import TrainSample, collate
from flexattn_jax.training.loss import IGNORED
from flexattn_jax.training.optimizer import OptimizerConfig, build_optimizer
from flexattn_jax.training.state import create_state
from flexattn_jax.training.step import alpha_ramp, make_train_step, vlm_loss


@functools.cache
def traced(program):
    case = Case("flex:2", program, "cpu", preset="tiny", text=32 if program == "train" else 8, depth=4)
    return build(case, jax.devices("cpu")[:1]).trace()


@pytest.mark.parametrize(("program", "carried"), [("train", 0), ("decode", 1)])
def test_what_a_step_gives_back_is_what_the_next_one_takes(program, carried):
    """A changed type, or a weak one, would make the second call of a loop compile the program again."""
    trace = traced(program)
    given = [leaf.dtype for leaf in jax.tree.leaves(trace.args_info[0][carried])]
    before = sum(len(jax.tree.leaves(argument)) for argument in trace.args_info[0][:carried])
    ins = trace.jaxpr.in_avals[before : before + len(given)]
    outs = trace.jaxpr.out_avals[: len(given)] if program == "train" else trace.jaxpr.out_avals[-len(given) :]
    assert len(given) > 5
    for old, new in zip(ins, outs, strict=True):
        assert (old.shape, old.dtype, old.weak_type) == (new.shape, new.dtype, new.weak_type)


def shapes(tree):
    return jax.tree.map(lambda leaf: (np.shape(leaf), np.asarray(leaf).dtype), tree)


def questions(config, seed, words, count=2):
    rng = np.random.default_rng(seed)
    pixels = rng.standard_normal((3, config.image_size, config.image_size)).astype(np.float32)
    return [Sample([1, -200, *rng.integers(3, 99, words)], pixels, (90, 60)) for _ in range(count)]


def test_batches_of_a_bucket_look_alike():
    config = preset("tiny")
    few, more = (make_batch(questions(config, n, words, n), config, Buckets()) for n, words in ((3, 5), (4, 40)))
    assert shapes(few) == shapes(more)
    one, two = (make_options([[[5] * n, [7]]] * 3, config, Buckets(), 4) for n in (1, 8))
    assert shapes(one) == shapes(two)


@pytest.mark.slow
def test_each_bucket_and_the_training_step_are_compiled_once(tiny):
    config, params = tiny
    model = VLM(config)
    asked = ((0, 4), (1, 20), (2, 9))
    batches = [make_batch(questions(config, seed, words), config, Buckets()) for seed, words in asked]
    scoring = jax.jit(functools.partial(score, model))
    generating = jax.jit(functools.partial(generate, model), static_argnames="capacity")
    for number, batch in enumerate(batches):
        scoring(params, Prompts(batch), make_options([[[number + 3], [7, 9]]] * 2, config, Buckets()))
        generating(params, Prompts(batch), np.ones(2, bool), np.int32(number + 1), greedy(2), capacity=16)
    assert scoring._cache_size() == generating._cache_size() == 1

    settings = OptimizerConfig()
    optimizer = build_optimizer(settings, total_steps=10)
    state = create_state(random_params(override(config, {"scan_layers": True})), settings, optimizer, seed=0)
    step = make_train_step(vlm_loss(model), optimizer, alpha_ramp(10.0, 10))
    length = config.num_lowres_tokens + 64
    for seed, words in asked:
        samples = [TrainSample(sample, np.arange(words + 2) > 3) for sample in questions(config, seed, words)]
        batch = collate(samples, config, length, 32)
        assert (np.asarray(batch.labels) != IGNORED).any()
        state, metrics = step(state, batch)
        assert np.isfinite(metrics["loss"])
    assert step._cache_size() == 1
