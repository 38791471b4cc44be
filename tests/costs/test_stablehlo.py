"""Counts on lowered programs: FLOPs with turns, rankings, loops."""

import jax
import jax.numpy as jnp
import pytest

from flexattn_jax.costs import hlo, stablehlo
from flexattn_jax.costs.hlo import AS_WRITTEN, Assumed
from flexattn_jax.highres.flexattention import LAYER_SCOPE


def counts(function, *shapes, assumed=AS_WRITTEN):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return stablehlo.count(jax.jit(function).trace(*arguments).lower(), assumed)


def test_flops_of_products_and_convolutions():
    assert counts(lambda a, b: a @ b, (3, 5), (5, 7)).flops == 2 * 3 * 5 * 7
    assert counts(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), (2, 3, 5), (2, 7, 5)).flops == 2 * 2 * 3 * 7 * 5

    def convolution(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert counts(convolution, (1, 8, 8, 3), (2, 2, 3, 6)).flops == 2 * (4 * 4 * 6) * (2 * 2 * 3)


def test_loops_multiply_and_shared_functions_count_each_time():
    def layer(x, weights):
        return jax.jit(lambda y: y @ weights)(x), None

    def scanned(x, weights):
        x, _ = jax.lax.scan(lambda y, _: layer(y, weights), x, None, length=4)
        return layer(x, weights)[0]

    found = counts(scanned, (4, 4), (4, 4))
    assert found.flops == 5 * 2 * 4**3
    assert found.data_loops == 0

    def nested(x, weights):
        return jax.lax.scan(lambda y, _: (scanned(y, weights), None), x, None, length=3)[0]

    assert counts(nested, (4, 4), (4, 4)).flops == 3 * 5 * 2 * 4**3


def test_a_gradient_through_a_scan_is_three_times_the_forward_pass():
    def loss(x, weights):
        return jax.lax.scan(lambda y, _: (jnp.sin(y @ weights), None), x, None, length=6)[0].sum()

    forward = counts(loss, (4, 4), (4, 4)).flops
    assert counts(jax.grad(loss, argnums=(0, 1)), (4, 4), (4, 4)).flops == 3 * forward


def test_loops_that_depend_on_data_take_the_turns_that_are_assumed():
    def function(x):
        reading = jax.lax.while_loop(lambda s: s[0] < x.max(), lambda s: (s[0] + 1, jnp.exp(s[1] @ x)), (0.0, x))
        return jax.lax.while_loop(lambda s: s[0] < x.max(), lambda s: (s[0] + 1, s[1] @ x), (0.0, reading[1]))

    one = 2 * 4**3
    assert counts(function, (4, 4)).flops == 2 * one
    found = counts(function, (4, 4), assumed=Assumed(projecting=3, reading=10))
    assert found.flops == 13 * one
    assert found.data_loops == 2


def test_the_condition_of_flexattention_counts_in_the_layers_that_have_it():
    def body(x, layer):
        with jax.named_scope(LAYER_SCOPE):
            x = jax.lax.cond(layer >= 1, lambda: jax.lax.cond(x.sum() > 0, lambda: x @ x, lambda: x), lambda: x)
        return jax.lax.cond(x.sum() > 1, lambda: x @ x, lambda: x), None

    def loss(x):
        return jax.lax.scan(body, x, jnp.arange(4))[0].sum()

    one = 2 * 4**3
    assert counts(loss, (4, 4)).flops == (4 + 4) * one
    assert counts(loss, (4, 4), assumed=Assumed(flex_layers=0.75)).flops == (4 + 3) * one
    step = counts(jax.value_and_grad(loss), (4, 4), assumed=Assumed(flex_layers=0.75))
    assert step.flops == 3 * (4 + 3) * one
    compiled = jax.jit(loss).lower(jax.ShapeDtypeStruct((4, 4), jnp.float32)).compile().as_text()
    times = [times for _, i, times in hlo.walk(hlo.parse(compiled), Assumed(flex_layers=0.75)) if i.opcode == "dot"]
    assert sorted(times) == [3, 4]


@pytest.mark.parametrize(
    ("function", "rankings"),
    [
        (lambda x: jax.lax.top_k(x, 2), [("chlo.top_k", 9)]),
        (lambda x: jnp.sort(x, axis=0), [("stablehlo.sort", 4)]),
        (lambda x: jax.lax.approx_max_k(x, 2), None),
        (lambda x: x.max(axis=-1), []),
    ],
)
def test_rankings_are_found_with_the_length_that_they_rank(function, rankings):
    found = counts(function, (4, 9)).rankings
    if rankings is None:  # lowered in one way or another, but never unseen
        assert found and all(length == 9 for _, length in found)
    else:
        assert list(found) == rankings


def test_sharding_constraints_are_counted():
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    constrained = counts(lambda x: jax.lax.with_sharding_constraint(x * 2, sharding) + 1, (4,))
    assert constrained.constraints == 1
    assert counts(lambda x: x * 2 + 1, (4,)).constraints == 0
    assert constrained.operations > 2
