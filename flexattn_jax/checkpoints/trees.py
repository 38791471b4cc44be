"""Parameter trees: nested dicts, stacked over layers or one entry a layer, and moves between the decoder's segments."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexattn_jax.checkpoints import layouts
from flexattn_jax.checkpoints.errors import CheckpointError
from flexattn_jax.config import VLMConfig

Array = Any  # jax.Array or np.ndarray
STACKS = r"blocks|layers|highres|stage\d+"  # subtrees of a part whose leaves have a layer axis in front


def check_room(config: VLMConfig, dtype: str, shardings: Any) -> None:
    """Raises CheckpointError for parameters that are all to go into this machine's memory and are larger than that.

    What a device of another kind cannot hold, its own allocator says.
    """
    if shardings is not None or jax.default_backend() != "cpu":
        return
    needed = sum(math.prod(shape) for shape in layouts.leaf_shapes(config).values()) * np.dtype(dtype).itemsize
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise CheckpointError(
            f"the parameters take {needed / 2**30:.1f} GiB in {dtype}, and this machine's memory has "
            f"{memory / 2**30:.1f} GiB; take dtype bfloat16, a smaller model or a larger machine."
        )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"decoder/layers/mlp/up_proj/kernel": leaf} of a nested tree."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def param_shapes(config: VLMConfig) -> dict[str, Any]:
    """The parameter tree of a configuration as jax.ShapeDtypeStruct, float32."""
    shapes = {path: jax.ShapeDtypeStruct(s, np.float32) for path, s in layouts.leaf_shapes(config).items()}
    if config.scan_layers:
        return nest(shapes)
    return jax.eval_shape(lambda: unstack_layers(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), nest(shapes))))


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with {"layers": [L, ...]} as {"layers_0": [...], "layers_1": [...], ...}, likewise all STACKS."""
    return nest(unstack_flat(flatten(params)))


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `unstack_layers`; numpy leaves stay numpy."""
    stacks: dict[str, dict[int, Array]] = {}
    flat = {}
    for path, leaf in flatten(params).items():
        match = re.fullmatch(rf"(\w+/(?:{STACKS}))_(\d+)/(.+)", path)
        if match is None:
            flat[path] = leaf
        else:
            stacks.setdefault(f"{match[1]}/{match[3]}", {})[int(match[2])] = leaf
    for path, layers in stacks.items():
        flat[path] = _concatenate([layers[i][None] for i in range(len(layers))])
    return nest(flat)


def unstack_flat(flat: dict[str, Array]) -> dict[str, Array]:
    """`unstack_layers` on a flat tree, which it empties, so that no second copy of the whole is held."""
    result = {}
    while flat:
        path = next(iter(flat))
        leaf = flat.pop(path)
        part, stack, *rest = path.split("/")
        if not re.fullmatch(STACKS, stack):
            result[path] = leaf
            continue
        for i in range(leaf.shape[0]):
            result["/".join((part, f"{stack}_{i}", *rest))] = leaf[i]
    return result


def restack(params: Mapping[str, Any], old: VLMConfig, new: VLMConfig) -> dict[str, Any]:
    """The stacked tree of `old` as that of `new`, whose segments may divide the same layers otherwise.

    `new` may begin FlexAttention at a later layer, have none, or use fewer blocks of the tower: the projections and
    blocks that it does not read are dropped. Raises CheckpointError when it needs a tensor that `old` does not hold.
    """
    return nest(restack_flat(flatten(params), old, new))


def restack_flat(flat: dict[str, Array], old: VLMConfig, new: VLMConfig) -> dict[str, Array]:
    """`restack` on a flat tree."""
    check_convertible(old, new)
    result = {}
    for leaf, names in layouts.leaf_tensors(new).items():
        places = [layouts.leaf_of(name, old) for name in names]
        if places[0][1] is None:
            result[leaf] = flat[leaf]
            continue
        pieces = []
        for source in dict.fromkeys(path for path, _ in places):
            rows = [row for path, row in places if path == source]
            whole = len(rows) == flat[source].shape[0]
            pieces.append(flat[source] if whole else flat[source][rows[0] : rows[-1] + 1])
        result[leaf] = pieces[0] if len(pieces) == 1 else _concatenate(pieces)
    return result


def check_convertible(old: VLMConfig, new: VLMConfig) -> None:
    """Raise CheckpointError unless every tensor that `new` reads is one that `old` reads, in the same shape."""
    held, wanted = layouts.tensor_shapes(old), layouts.tensor_shapes(new)
    missing = [name for name in wanted if name not in held]
    if missing and all("_proj_hd" in name for name in missing):
        have = f"begins at layer {old.flexattention.first_layer}" if old.flexattention else "is absent"
        raise CheckpointError(
            f"flexattention.first_layer {new.flexattention.first_layer} asks for high-resolution projections that this "
            f"checkpoint does not hold: its FlexAttention {have}. Import the original checkpoint with that setting "
            "(or a LLaVA-1.5 one with --flexattention), or choose a later layer."
        )
    if missing:
        leaves = dict.fromkeys(layouts.leaf_of(name, new)[0] for name in missing)
        raise CheckpointError(f"the changed configuration needs tensors that are not stored: {', '.join(leaves)}.")
    # A change of shape is the same in all layers: name each kind of tensor once.
    other = {
        f"{layouts.leaf_of(name, new)[0]} {list(held[name])} -> {list(shape)}"
        for name, shape in wanted.items()
        if held[name] != shape
    }
    if other:
        raise CheckpointError(
            f"the changed configuration needs other shapes than the checkpoint has: {'; '.join(sorted(other))}."
        )


def target_leaves(config: VLMConfig) -> dict[str, tuple[list[str], bool]]:
    """{leaf as the model wants it: (its tensors, whether they are stacked)}; unstacked unless config.scan_layers."""
    result: dict[str, tuple[list[str], bool]] = {}
    for leaf, names in layouts.leaf_tensors(config).items():
        stacked = re.fullmatch(STACKS, leaf.split("/")[1]) is not None
        if config.scan_layers or not stacked:
            result[leaf] = (names, stacked)
            continue
        part, stack, rest = leaf.split("/", 2)
        result |= {f"{part}/{stack}_{i}/{rest}": ([name], False) for i, name in enumerate(names)}
    return result


def sharding_of(shardings: Any) -> Callable[[str], jax.sharding.Sharding]:
    """Leaf path -> sharding, from a tree of shardings, one for all leaves, or None (the default device)."""
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(shardings, jax.sharding.Sharding):
        return lambda path: shardings
    flat = flatten(shardings)

    def find(path: str) -> jax.sharding.Sharding:
        if path not in flat:
            raise CheckpointError(f"the given shardings have no entry for parameter {path}.")
        return flat[path]

    return find


def _concatenate(pieces: list[Array]) -> Array:
    return np.concatenate(pieces) if isinstance(pieces[0], np.ndarray) else jnp.concatenate(pieces)
