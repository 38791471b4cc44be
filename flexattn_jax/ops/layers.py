"""Small parts shared by the tower, the connector and the decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flexattn_jax.ops.blockwise import KEPT


def product(x: jax.Array, kernel: Any) -> jax.Array:
    """x (..., in) times a matrix stored (out, in) -> (..., out), in the type of x.

    Args:
      kernel: an array; or int8 with a scale for each row (`checkpoints.quantize`), which multiplies what comes out.
    """
    matrix = getattr(kernel, "qvalue", kernel).astype(x.dtype)
    y = jax.lax.dot_general(x, matrix, (((x.ndim - 1,), (1,)), ((), ())))
    return (y * kernel.scale[:, 0]).astype(x.dtype) if hasattr(kernel, "qvalue") else y


class Linear(nn.Module):
    """y = x W^T + b with W stored (out, in), as published checkpoints store it.

    Import then needs no transpose, and on CPUs a matrix-vector product, which decoding is made of, reads such a matrix
    about 1.5 x faster than an (in, out) one.
    """

    features: int
    use_bias: bool = False
    kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (..., in) -> (..., features), in the type of x."""
        y = product(x, self.param("kernel", self.kernel_init, (self.features, x.shape[-1]), x.dtype))
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros_init(), (self.features,), x.dtype).astype(x.dtype)
        return y


class Kernel(nn.Module):
    """A Linear's weights without its product, for projections that are applied cell by cell."""

    features: int
    inputs: int
    dtype: Any

    @nn.compact
    def __call__(self) -> jax.Array:
        """(features, inputs)."""
        return self.param("kernel", nn.initializers.normal(0.02), (self.features, self.inputs), self.dtype)


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The non-linearity that a config names; quick_gelu is CLIP's x * sigmoid(1.702 x)."""
    return {
        "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    }[name]


def _of_rows_and_weights(primitive: Any, *operands: Any, **parameters: Any) -> bool:
    """Whether it is a product of rows (B, T, .) with weights.

    Keys and values of cells (B, U, P, .) are not kept: all 81 cells of a sample would be more than all else of a layer.
    """
    kept = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *operands, **parameters)
    return kept and operands[0].ndim <= 3


def layer_stack(
    layer: type[nn.Module], name: str, length: int, scan: bool, remat: str = "none", **kwargs: Any
) -> Callable:
    """A stack of equal layers as one function (carry, *broadcast) -> (carry, outputs stacked on axis 0).

    Args:
      layer: module class with __call__(carry, index, *broadcast) -> (carry, outputs); index is the layer's place in
        this stack, traced when scanned and a Python int otherwise.
      name: of the stack in the parameter tree.
      length: number of layers.
      scan: True: one compiled body, parameters stacked on axis 0 under `name`. False: one body a layer, parameters
        under `name`_0, `name`_1, ...: compiles slower, but on CPU no layer's weights are copied out of the stack.
      remat: what the backward pass computes again instead of keeping it: "none"; "full", all but the layers' inputs;
        "dots", all but those, the results of rows' products with weights, and those of attention.
      **kwargs: of the layer's constructor.
    """
    if remat != "none":
        # Inside a scan nothing can be merged across layers anyway; index (argument 2) is a Python int without one.
        policies = jax.checkpoint_policies
        dots = policies.save_from_both_policies(_of_rows_and_weights, policies.save_only_these_names(KEPT))
        policy = dots if remat == "dots" else None
        layer = nn.remat(layer, policy=policy, prevent_cse=not scan, static_argnums=() if scan else (2,))
    if scan:

        def run(carry, *broadcast):
            stacked = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=length,
                in_axes=(0, *(nn.broadcast for _ in broadcast)),
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return stacked(name=name, **kwargs)(carry, jnp.arange(length), *broadcast)

        return run

    def run_unrolled(carry, *broadcast):
        outputs = []
        for i in range(length):
            carry, output = layer(name=f"{name}_{i}", **kwargs)(carry, i, *broadcast)
            outputs.append(output)
        return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

    return run_unrolled
