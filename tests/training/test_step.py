"""The step on a model small enough to check by hand, and on recorded training cases of the reference."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import random_params

from flexattn_jax.config import ConfigError, override
from flexattn_jax.inputs.batching import Batch, Sample
from flexattn_jax.models.vlm import VLM
from flexattn_jax.parity import gradient_of, read_case
from flexattn_jax.training.data import TrainBatch, TrainSample, collate
from flexattn_jax.training.loss import IGNORED
from flexattn_jax.training.optimizer import Optimizer, OptimizerConfig, build_optimizer, join_params, split_params
from flexattn_jax.training.state import create_state
from flexattn_jax.training.step import alpha_ramp, make_eval_step, make_train_step, vlm_loss

GOLDEN = Path(__file__).parents[1] / "golden"
LABELS = np.array([[IGNORED, 1, 2, 3], [IGNORED, 5, IGNORED, IGNORED], [9, 2, 2, IGNORED], [1] + [IGNORED] * 3])


def toy_params():
    return {
        "connector": {"kernel": jnp.ones(3), "bias": jnp.zeros(())},
        "decoder": {"scale": jnp.ones(3)},
        "vision": {"kernel": jnp.ones(2)},
    }


def toy_batch(poison=0.0):
    x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
    x[0, 0] += poison
    return TrainBatch(Batch(x, np.ones(4, np.int32), np.zeros(4, np.int32), np.ones((4, 1), bool)), LABELS, LABELS)


def toy_loss(params, batch, alpha, key):
    """Squared errors over answer tokens, so that parts of a batch weigh by their tokens."""
    x = batch.batch.token_ids * params["vision"]["kernel"].sum()
    guess = (x * params["connector"]["kernel"] * params["decoder"]["scale"]).sum(axis=-1) + params["connector"]["bias"]
    counted = batch.labels[:, 1:] != IGNORED
    errors = jnp.where(counted, (guess[:, None] - batch.labels[:, 1:]) ** 2, 0)
    return errors.sum() / jnp.maximum(counted.sum(), 1), {"guess": guess[0]}


def toy_run(config=OptimizerConfig(), total=10, accumulation=1, params=None):  # noqa: B008  frozen
    optimizer = build_optimizer(config, total)
    state = jax.jit(lambda p: create_state(p, config, optimizer, seed=0))(params or toy_params())
    return state, make_train_step(toy_loss, optimizer, alpha_ramp(10.0, 20), accumulation, config.ema_decay)


def test_only_what_is_trained_moves_or_has_moments():
    state, step = toy_run(OptimizerConfig(trainable="connector", warmup_share=0.0))
    leaves = [leaf for leaf in jax.tree.leaves(state.moments) if leaf.ndim]
    assert sorted(leaf.shape for leaf in leaves) == [(3,), (3,)]  # mean and square of connector/kernel
    before = jax.tree.map(np.asarray, state.params)
    state, _ = step(state, toy_batch())
    after = state.params
    assert not np.array_equal(after["connector"]["kernel"], before["connector"]["kernel"])
    for part in ("decoder", "vision"):
        jax.tree.map(np.testing.assert_array_equal, after[part], before[part])


def test_parts_of_parameters_are_named_by_their_paths():
    params = {"decoder": {"layers": {"k_proj_hd": 1, "k_proj": 2}, "final_norm": 3}, "connector": 4}
    trained, frozen = split_params(params, "decoder/layers/k_proj, connector")
    assert trained == {"decoder": {"layers": {"k_proj": 2}}, "connector": 4}
    assert frozen == {"decoder": {"layers": {"k_proj_hd": 1}, "final_norm": 3}}
    assert join_params(trained, frozen) == params
    for wrong, message in (("decode", "'decode'"), (" ", "is empty")):
        with pytest.raises(ConfigError, match=message):
            split_params(params, wrong)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_a_batch_in_parts_gives_the_gradient_of_the_whole(accumulation):
    config = OptimizerConfig(warmup_share=0.0, learning_rate=0.1, trainable="connector,decoder")
    whole, step = toy_run(config)
    parts, part_step = toy_run(config, accumulation=accumulation)
    for _ in range(3):
        whole, one = step(whole, toy_batch())
        parts, other = part_step(parts, toy_batch())
        for name in ("loss", "gradient_norm", "answer_tokens"):
            assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-5)
    for one, other in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def counts(metrics):
    return tuple(float(metrics[name]) for name in ("bad_in_a_row", "skipped", "applied"))


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e38])
def test_an_update_that_is_not_finite_is_left_out_and_counted(poison):
    state, step = toy_run(OptimizerConfig(warmup_share=0.0, ema_decay=0.9))
    state, metrics = step(state, toy_batch())
    good = jax.tree.map(np.asarray, (state.params, state.moments, state.average))
    for expected in (1, 2):
        state, metrics = step(state, toy_batch(poison))
        assert (float(metrics["bad_in_a_row"]), float(metrics["skipped"]), float(metrics["applied"])) == (
            expected,
        ) * 2 + (0,)
    jax.tree.map(np.testing.assert_array_equal, good, (state.params, state.moments, state.average))
    state, metrics = step(state, toy_batch())
    assert counts(metrics) == (0, 2, 1)
    assert int(state.step) == 4


def test_a_batch_without_answers_changes_nothing_and_is_not_bad():
    state, step = toy_run(OptimizerConfig(warmup_share=0.0))
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = step(state, toy_batch().replace(labels=np.full_like(LABELS, IGNORED)))
    assert float(metrics["applied"]) == 0 and float(metrics["bad_in_a_row"]) == 0
    jax.tree.map(np.testing.assert_array_equal, before, state.params)


def test_the_moving_average_follows_and_is_what_is_evaluated():
    config = OptimizerConfig(warmup_share=0.0, learning_rate=0.1, ema_decay=0.5)
    state, step = toy_run(config)
    average = np.asarray(state.trained["connector"]["kernel"])
    for _ in range(3):
        state, _ = step(state, toy_batch())
        average = 0.5 * average + 0.5 * np.asarray(state.trained["connector"]["kernel"])
    np.testing.assert_allclose(state.average["connector"]["kernel"], average, rtol=1e-6)
    total, tokens = make_eval_step(toy_loss)(state, toy_batch())
    expected = toy_loss(state.averaged_params, toy_batch(), None, None)[0]
    assert float(total / tokens) == pytest.approx(float(expected), rel=1e-5)
    assert float(expected) != pytest.approx(float(toy_loss(state.params, toy_batch(), None, None)[0]), rel=1e-3)


def test_the_rate_is_that_of_the_released_recipe():
    """transformers' get_cosine_schedule_with_warmup, which LLaVA's trainer uses."""
    config, total = OptimizerConfig(), 101
    rate = build_optimizer(config, total).learning_rate
    warmup = math.ceil(total * 0.03)
    for step in range(total):
        if step < warmup:
            expected = step / warmup
        else:
            expected = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        assert float(rate(step)) == pytest.approx(2e-5 * expected, rel=1e-4, abs=1e-12)
    constant = build_optimizer(dataclasses.replace(config, schedule="constant"), total).learning_rate
    assert [float(constant(step)) for step in (0, 50, 100)] == pytest.approx([0, 2e-5, 2e-5])


def test_weights_decay_and_norms_and_biases_do_not():
    config = OptimizerConfig(weight_decay=0.1, warmup_share=0.0, schedule="constant", learning_rate=0.5, clip_norm=None)
    state, step = toy_run(config)
    silent = toy_batch().replace(labels=np.where(LABELS == IGNORED, IGNORED, 0))
    silent = silent.replace(batch=silent.batch.replace(token_ids=np.zeros((4, 3), np.float32)))
    state, _ = step(state, silent)  # a gradient of zero
    np.testing.assert_allclose(state.params["connector"]["kernel"], 0.95 * np.ones(3), rtol=1e-6)
    np.testing.assert_array_equal(state.params["decoder"]["scale"], np.ones(3))


def test_high_resolution_fades_in_over_a_tenth_of_an_epoch():
    alpha = alpha_ramp(10.0, steps_per_epoch=50)
    assert [float(alpha(step)) for step in (0, 1, 4, 5, 60)] == pytest.approx([0, 0.2, 0.8, 1, 1])


@pytest.mark.parametrize("wrong", [{"schedule": "step"}, {"learning_rate": 0.0}, {"ema_decay": 1.0}, {"b2": 1.0}])
def test_impossible_optimizers_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"optimizer.{next(iter(wrong))}"):
        OptimizerConfig(**wrong)


def test_the_step_on_a_recorded_case_gives_the_references_loss_and_gradients():
    case = read_case(GOLDEN / "t1_train_two_images.json")
    want, samples = case.arrays, []
    for b, ids in enumerate(want["input_ids"]):
        mask = want["attention_mask"][b].astype(bool)
        sample = Sample(ids[mask], want["pixel_values"][b], tuple(want["ori_sizes"][b]))
        samples.append(TrainSample(sample, want["labels"][b][mask] != IGNORED))
    length = want["expanded_labels"].shape[1]
    batch = collate(samples, case.config, length, max(int((want["expanded_labels"] != IGNORED).sum(axis=1).max()), 1))
    np.testing.assert_array_equal(batch.labels, want["expanded_labels"])

    plain = Optimizer(optax.identity(), lambda step: 1.0)  # so that the step subtracts the gradient itself
    before = jax.tree.map(np.asarray, case.params)
    state = create_state(case.params, OptimizerConfig(), plain, seed=0)
    step = make_train_step(vlm_loss(VLM(case.config)), plain, lambda step: jnp.float32(want["alpha"]))
    compiled = step.lower(state, batch).compile({"xla_backend_optimization_level": 0})  # compiles in half the time
    state, metrics = compiled(state, batch)
    assert float(metrics["loss"]) == pytest.approx(float(want["loss"]), abs=1e-5)
    gradients = jax.tree.map(lambda old, new: old - np.asarray(new), before, state.params)
    names = [name for name in want if name.startswith("grad::")]
    assert names
    for name in names:
        found, expected = gradient_of(case, gradients, name.removeprefix("grad::")), want[name]
        # A difference of parameters keeps fewer digits of a gradient than the gradient has.
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max() + 2e-7)


def product_types(jaxpr):
    """Type of the first operand of every matrix product in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.invars[0].aval.dtype
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from product_types(inner)


def test_computing_in_bfloat16_keeps_float32_parameters(small_config):
    config = override(small_config, {"dtype": "bfloat16"})
    params = random_params(small_config)
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 400, 12)
    ids[2] = -200
    pixels = rng.standard_normal((3, 168, 168)).astype(np.float32)
    batch = collate([TrainSample(Sample(ids, pixels), np.arange(12) > 8)], config, 16 + 16, 4)
    optimizer = build_optimizer(OptimizerConfig(), 10)
    state = create_state(params, OptimizerConfig(), optimizer, seed=0)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((state.params, state.moments)) if leaf.ndim)
    step = make_train_step(vlm_loss(VLM(config)), optimizer, alpha_ramp(10.0, 10))
    products = list(product_types(jax.make_jaxpr(step)(state, batch).jaxpr))
    # The rest: resizes of pictures and rotations, and gradients of softmaxes, in float32.
    assert products.count(jnp.bfloat16) > 0.8 * len(products)
    after, metrics = jax.eval_shape(step, state, batch)
    dtypes = lambda tree: jax.tree.map(lambda leaf: leaf.dtype, tree)  # noqa: E731
    assert dtypes(after) == dtypes(state) and set(dtypes(metrics).values()) == {jnp.dtype("float32")}
