"""Where arrays lie on the devices of a target: split over attention heads to infer, over parameters to train."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flexattn_jax.checkpoints.trees import STACKS
from flexattn_jax.ops.layers import Linear

# Products whose outputs are split, and products whose inputs are; kernels are stored (out, in).
_SPLIT_OUTPUTS = r"(q|k|v|gate|up)_proj|[kv]_proj_hd|fc1|lm_head"
_SPLIT_INPUTS = r"(o|out|down)_proj|fc2"


def infer_mesh(devices: list[Any], kv_heads: int) -> Mesh:
    """Axes ("data", "tensor"): as many devices along tensor as divide the key/value heads, the rest along data."""
    count = len(devices)
    tensor = max(n for n in range(1, count + 1) if count % n == 0 and kv_heads % n == 0)
    return _mesh(devices, (count // tensor, tensor))


def train_mesh(devices: list[Any]) -> Mesh:
    """Axes ("data", "tensor") with all devices along data."""
    return _mesh(devices, (len(devices), 1))


def _mesh(devices: list[Any], shape: tuple[int, int]) -> Mesh:
    return Mesh(np.array(devices).reshape(shape), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def place_weights(tree: Any, mesh: Mesh) -> Any:
    """Shapes with shardings for inference: heads and the MLP's inner axis over "tensor", the rest replicated."""

    def place(path, leaf):
        names = [entry.key for entry in path]
        owner, axis = names[-2] if len(names) > 1 else "", None
        if re.fullmatch(_SPLIT_OUTPUTS, owner):
            axis = len(leaf.shape) - (2 if names[-1] == "kernel" else 1)
        elif re.fullmatch(_SPLIT_INPUTS, owner) and names[-1] == "kernel":
            axis = len(leaf.shape) - 1
        return _placed(leaf, mesh, axis, "tensor")

    return jax.tree_util.tree_map_with_path(place, tree)


def place_cache(tree: Any, mesh: Mesh) -> Any:
    """Shapes of a cache with shardings: the heads, which lie side by side in the last axis, over "tensor"."""
    return jax.tree.map(
        lambda leaf: _placed(leaf, mesh, len(leaf.shape) - 1 if leaf.dtype != bool else None, "tensor"), tree
    )


def place_batch(tree: Any, mesh: Mesh, samples: int) -> Any:
    """Shapes with shardings: what has a row for each sample over "data" where they divide, else replicated."""
    return jax.tree.map(lambda leaf: _placed(leaf, mesh, 0 if leaf.shape[:1] == (samples,) else None, "data"), tree)


def replicate(leaf: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """A shape with a sharding that puts all of it on every device."""
    return _placed(leaf, mesh, None, "data")


def place_state(tree: Any, mesh: Mesh) -> Any:
    """Shapes of parameters and optimiser state with shardings: the longest axis of a matrix over "data".

    The layer axis of a stack is never split: every turn of the loop would need another device's part.
    """

    def place(path, leaf):
        stacked = any(re.fullmatch(STACKS, str(getattr(entry, "key", ""))) for entry in path)
        axes = range(int(stacked), len(leaf.shape))
        axis = max(axes, key=lambda i: leaf.shape[i], default=None) if len(axes) > 1 else None
        return _placed(leaf, mesh, axis, "data")

    return jax.tree_util.tree_map_with_path(place, tree)


@contextlib.contextmanager
def split_batch(mesh: Mesh) -> Iterator[None]:
    """While it is open, models that are traced keep their samples over "data" in and after every linear layer.

    Left alone, the compiler follows the parameters' split instead and moves activations from device to device.
    """
    sharding = NamedSharding(mesh, PartitionSpec("data"))

    def split(x: jax.Array) -> jax.Array:
        divides = x.shape[0] % mesh.shape["data"] == 0
        return jax.lax.with_sharding_constraint(x, sharding) if divides else x

    def intercept(call, args, kwargs, context):
        if not isinstance(context.module, Linear):
            return call(*args, **kwargs)
        return split(call(split(args[0]), *args[1:], **kwargs))

    with nn.intercept_methods(intercept):
        yield


def _placed(leaf: Any, mesh: Mesh, axis: int | None, name: str) -> jax.ShapeDtypeStruct:
    parts = [None] * len(leaf.shape)
    if axis is not None and leaf.shape[axis] % mesh.shape[name] == 0:
        parts[axis] = name
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*parts)))
