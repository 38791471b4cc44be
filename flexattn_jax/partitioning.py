"""Where arrays lie: one mesh, one table of rules from logical axes to its axes, for parameters and activations alike.

    mesh axes       slice (slices of a pod joined by a slow network), data, fsdp, tensor
    logical axes    batch    samples, and everything that there is one of for each sample
                    tiles    samples times the squares that the vision tower cuts a picture into
                    embed    the side of a weight that faces the residual stream; of the tower's weights, any one side
                    heads    attention heads, side by side in one axis or in an axis of their own
                    mlp      the inner axis of an MLP
                    vocab    the vocabulary

A parameter's logical axes follow from its path (PARAMETERS), an activation's are named where it is made (`constrain`).
`Partition` puts both on a mesh. State is split over fsdp and tensor; samples over slice, data and fsdp; cells, and all
that ranks and reads them, over the samples alone, so that selecting moves nothing between devices.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flexattn_jax.config import ConfigError

AXES = ("slice", "data", "fsdp", "tensor")
RULES = (
    "batch=slice,data,fsdp",
    "tiles=slice,data,fsdp,tensor",
    "embed=fsdp",
    "heads=tensor",
    "mlp=tensor",
    "vocab=tensor",
)
# The one logical axis that is split where it does not divide: only activations have it, each of its entries costs much,
# and ten squares on four devices are the time of three.
UNEVEN = "tiles"
PRESETS = {
    "data": {"data": -1},
    "fsdp": {"fsdp": -1},
    "fsdp_tensor": {"fsdp": -1, "tensor": 2},
}

# The end of a parameter's path -> logical names of its last axes; kernels are stored (out, in). The first match counts.
PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"vision/(\w+/)*kernel", ("embed", None)),
    (r"vision/position_embedding", (None, "embed")),
    (r"grouping/\w+/kernel", ("embed", None)),
    (r"highres/positions", ("embed", None)),
    (r"(q|k|v)_proj(_hd)?/kernel", ("heads", "embed")),
    (r"o_proj/kernel", ("embed", "heads")),
    (r"((gate|up)_proj|connector/fc1)/kernel", ("mlp", "embed")),
    (r"(down_proj|connector/fc2)/kernel", ("embed", "mlp")),
    (r"decoder/(embedding|lm_head/kernel)", ("vocab", "embed")),
)


@dataclasses.dataclass(frozen=True)
class PartitionConfig:
    """A mesh and what lies on it; changes nothing that is learned but the order of sums.

    Sizes that are None are those of the preset, 1 where it names none; one may be -1: the devices that are left. Where
    preset "fsdp" gives more devices than a batch can be divided among and tensor is None, heads are split, too
    (`suited`).
    """

    preset: str = "fsdp"  # "data": parameters on every device; "fsdp": split over all; "fsdp_tensor": and heads over 2
    slice: int | None = None
    data: int | None = None
    fsdp: int | None = None
    tensor: int | None = None
    rules: tuple[str, ...] = RULES  # "logical axis=mesh axis,mesh axis"; a logical axis that is missing is not split
    largest_replicated: int = 1 << 22  # numbers in a parameter that a mesh which splits parameters may leave whole

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise ConfigError(f"partition.preset is {self.preset!r}; it must be one of {', '.join(PRESETS)}")
        sizes = self.sizes
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise ConfigError(f"partition.{axis} is {size}; it is a number of devices, or -1 for all that are left")
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise ConfigError(
                f"partition.{' and partition.'.join(free)} are both -1 (preset {self.preset!r} counted in); one axis "
                "can take the devices that are left"
            )
        if self.largest_replicated < 0:
            raise ConfigError(f"partition.largest_replicated is {self.largest_replicated}; it cannot be negative")
        parse_rules(self.rules)

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis of AXES; at most one is -1."""
        preset = PRESETS[self.preset]
        given = {axis: getattr(self, axis) for axis in AXES}
        return {axis: preset.get(axis, 1) if size is None else size for axis, size in given.items()}

    def suited(self, devices: int, samples: int) -> PartitionConfig:
        """With the smallest tensor of 1, 2, 4, 8 by which a batch of `samples` divides, if that is open to choose."""
        if self.preset == "fsdp" and self.tensor is None:
            for tensor in (1, 2, 4, 8):
                config = dataclasses.replace(self, tensor=tensor)
                with contextlib.suppress(ConfigError):
                    sizes = dict(zip(AXES, config.shape(devices), strict=True))
                    if samples % math.prod(sizes[axis] for axis in parse_rules(self.rules).get("batch", ())) == 0:
                        return config
        return self

    def shape(self, devices: int) -> tuple[int, ...]:
        """Devices along each axis; ConfigError unless they are `devices` together."""
        sizes = self.sizes
        fixed = math.prod(size for size in sizes.values() if size != -1)
        told = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        if devices % fixed or (fixed != devices and -1 not in sizes.values()):
            raise ConfigError(
                f"the mesh {told} does not fit the {devices} devices there are; set partition.slice, .data, .fsdp and "
                ".tensor so that their product is that number, or one of them to -1"
            )
        return tuple(devices // fixed if size == -1 else size for size in sizes.values())


def parse_rules(rules: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Logical axis -> mesh axes. Raises ConfigError for a rule that is not written "name=axis,axis"."""
    found: dict[str, tuple[str, ...]] = {}
    for rule in rules:
        name, _, axes = rule.partition("=")
        parts = tuple(axis.strip() for axis in axes.split(",") if axis.strip())
        if not name.strip() or any(axis not in AXES for axis in parts) or "=" not in rule:
            raise ConfigError(
                f'partition.rules has {rule!r}; write "logical axis=mesh axes", the mesh axes being {", ".join(AXES)}, '
                'such as "batch=data,fsdp"'
            )
        found[name.strip()] = parts
    return found


@dataclasses.dataclass(frozen=True)
class Partition:
    """A mesh with rules.

    mesh: axes AXES, of type Auto.
    rules: logical axis -> mesh axes.
    largest_replicated: see PartitionConfig.
    """

    mesh: Mesh
    rules: Mapping[str, tuple[str, ...]]
    largest_replicated: int = PartitionConfig.largest_replicated

    @property
    def replicated(self) -> NamedSharding:
        """Everything on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch_shards(self) -> int:
        """Parts that a batch is cut into; its size must be a multiple of this."""
        return math.prod(self.mesh.shape[axis] for axis in self.rules.get("batch", ()))

    def sharding(self, shape: Sequence[int], names: Sequence[str | None]) -> NamedSharding:
        """Of an array whose last axes have these logical names.

        An axis that its mesh axes do not divide is split over the first of them that do, or left whole; UNEVEN is
        split all the same.
        """
        names = (None,) * (len(shape) - len(names)) + tuple(names)[max(0, len(names) - len(shape)) :]
        parts: list[tuple[str, ...] | None] = []
        for size, name in zip(shape, names, strict=True):
            axes = [axis for axis in self.rules.get(name, ()) if self.mesh.shape[axis] > 1]
            while name != UNEVEN and axes and size % math.prod(self.mesh.shape[axis] for axis in axes):
                axes.pop()
            parts.append(tuple(axes) or None)
        return NamedSharding(self.mesh, PartitionSpec(*parts))

    def state_shardings(self, tree: Any) -> Any:
        """Shardings of parameters, and of all that is made like them (moments, averages), by their paths.

        Raises ConfigError for a large parameter that the rules leave whole although the mesh splits parameters.
        """
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: self._parameter(_path_name(path), tuple(leaf.shape)), tree
        )

    def batch_shardings(self, tree: Any, samples: int) -> Any:
        """Shardings of a batch: over the samples what has a row for each, the rest whole."""

        def place(leaf: Any) -> NamedSharding:
            if tuple(leaf.shape[:1]) != (samples,):
                return self.replicated
            return self._by_sample(leaf.shape)

        return jax.tree.map(place, tree)

    def rows(self, samples: int) -> tuple[int, ...]:
        """Places in a batch of `samples` whose rows this process's devices hold, ascending."""
        held = self._by_sample((samples,)).addressable_devices_indices_map((samples,)).values()
        return tuple(sorted({place for (part,) in held for place in range(samples)[part]}))

    def place_batch(self, tree: Any, samples: int) -> Any:
        """Host arrays of this process's `rows` as arrays of the whole batch, each device given its own rows."""
        rows = self.rows(samples)
        local = {place: i for i, place in enumerate(rows)}

        def place(leaf: Any) -> jax.Array:
            leaf = np.asarray(leaf)
            if leaf.shape[:1] != (len(rows),):
                return jax.make_array_from_callback(leaf.shape, self.replicated, lambda index: leaf[index])
            shape = (samples, *leaf.shape[1:])

            def part(index: tuple[slice, ...]) -> np.ndarray:
                first, end, _ = index[0].indices(samples)
                return leaf[local[first] : local[end - 1] + 1]

            return jax.make_array_from_callback(shape, self._by_sample(shape), part)

        return jax.tree.map(place, tree)

    def check_batch(self, samples: int) -> None:
        """Raises ConfigError unless a batch can be cut evenly."""
        if samples % self.batch_shards:
            raise ConfigError(
                f"batch_size / accumulation is {samples}, no multiple of the {self.batch_shards} parts that the mesh "
                f"cuts a batch into ({', '.join(f'{axis} {size}' for axis, size in self.mesh.shape.items())}); change "
                "one or the other"
            )

    def traced(self, function: Callable) -> Callable:
        """The function, whose `constrain`s hold while it is traced."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._active():
                return function(*args, **kwargs)

        return run

    def _by_sample(self, shape: Sequence[int]) -> NamedSharding:
        """Of an array with a row for each sample."""
        return self.sharding(shape, ("batch",) + (None,) * (len(shape) - 1))

    @contextlib.contextmanager
    def _active(self) -> Iterator[None]:
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    def _parameter(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        names = next((names for end, names in PARAMETERS if re.search(rf"(^|/){end}$", path)), None)
        sharding = self.sharding(shape, names or ())
        splitting = {axis for _, own in PARAMETERS for name in own for axis in self.rules.get(name, ())}
        meant = splitting if names is None else {axis for name in names for axis in self.rules.get(name, ())}
        if (
            math.prod(shape) > self.largest_replicated
            and sharding.is_fully_replicated
            and any(self.mesh.shape[axis] > 1 for axis in meant)
        ):
            why = (
                "no rule of partitioning.PARAMETERS names it"
                if names is None
                else f"none of its axes {tuple(names)} divides as partition.rules say"
            )
            raise ConfigError(
                f"parameter {path} {shape} would lie whole on every device: {why}; change the sizes of the mesh, or "
                "raise partition.largest_replicated"
            )
        return sharding


_ACTIVE: contextvars.ContextVar[Partition | None] = contextvars.ContextVar("partition", default=None)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Says where an activation lies, by the logical names of its axes, in programs traced by `Partition.traced`.

    Elsewhere, and on a mesh of one device, it does nothing.
    """
    partition = _ACTIVE.get()
    if partition is None or partition.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition.sharding(x.shape, names))


def per_sample(function: Callable, *args: Any, in_axes: Sequence[int | None] | int = 0, out_axis: int = 0) -> Any:
    """function(*args), run by each device on the samples that lie there, for a function that treats samples alone.

    To XLA a gather, scatter or ranking by an index of each sample looks as if it reached across samples, and it brings
    together what the devices have. In programs traced by `Partition.traced` this says that nothing is needed from
    elsewhere. In others, and where samples are not split, it is the plain call. Mesh axes that do not split samples
    stay the compiler's affair: heads may be split inside.

    Args:
      function: gives a tree of arrays; it must not close over traced arrays nor call `constrain`.
      args: trees of arrays.
      in_axes: as of jax.vmap, for each of args the axis of samples; None: it is the same for all samples.
      out_axis: axis of samples in all that it gives.
    """
    partition = _ACTIVE.get()
    if isinstance(in_axes, int):
        in_axes = (in_axes,) * len(args)
    samples = next(
        leaf.shape[axis]
        for arg, axis in zip(args, in_axes, strict=True)
        if axis is not None
        for leaf in jax.tree.leaves(arg)
    )
    split = None if partition is None else partition.sharding((samples,), ("batch",)).spec[0]
    if split is None:
        return function(*args)
    split = (split,) if isinstance(split, str) else split

    def spec(axis: int | None) -> PartitionSpec:
        return PartitionSpec() if axis is None else PartitionSpec(*(None,) * axis, split)

    mapped = jax.shard_map(
        function,
        mesh=partition.mesh,
        in_specs=tuple(map(spec, in_axes)),
        out_specs=spec(out_axis),
        axis_names=set(split),
    )
    return mapped(*args)


def per_head(function: Callable, mask: jax.Array, *arrays: jax.Array, heads: int) -> Any:
    """function(mask, *arrays), run by each device on the samples and heads that lie there, each of them by itself.

    As `per_sample`, which leaves heads to the compiler, for a function that goes through them one by one.

    Args:
      function: gives a tree of arrays like `arrays`.
      mask: (1 or B, ., .), the same for all heads.
      arrays: (B, ., n), their heads side by side in the last axis.
      heads: of `arrays`; n is a multiple of it.
    """
    partition = _ACTIVE.get()
    spec = () if partition is None else partition.sharding((len(arrays[0]), heads), ("batch", "heads")).spec
    if not any(spec):
        return function(mask, *arrays)
    samples, split = spec
    own = PartitionSpec(samples, None, split)
    mapped = jax.shard_map(
        function,
        mesh=partition.mesh,
        in_specs=(PartitionSpec(samples if len(mask) > 1 else None), *(own for _ in arrays)),
        out_specs=own,
        axis_names={axis for axes in spec if axes for axis in ((axes,) if isinstance(axes, str) else axes)},
        check_vma=False,
    )
    return mapped(mask, *arrays)


def make_partition(
    config: PartitionConfig, devices: Sequence[Any] | None = None, samples: int | None = None
) -> Partition:
    """The mesh of a configuration, neighbours along its last axes close to each other.

    Args:
      devices: None: all that are attached, of all processes.
      samples: of a batch, which must divide; None: that does not matter.

    Raises:
      ConfigError: the sizes do not fit the devices, or the batch does not divide.
    """
    devices = list(jax.devices() if devices is None else devices)
    if samples is not None:
        config = config.suited(len(devices), samples)
    shape = config.shape(len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] > 1 and slices == shape[0]:
        array = mesh_utils.create_hybrid_device_mesh((1, *shape[1:]), (shape[0], 1, 1, 1), devices)
    elif slices > 1:
        raise ConfigError(f"the devices are {slices} slices of a pod, but partition.slice is {shape[0]}; set it so")
    else:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    mesh = Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    partition = Partition(mesh, parse_rules(config.rules), config.largest_replicated)
    if samples is not None:
        partition.check_batch(samples)
    return partition


def with_shardings(tree: Any, shardings: Any) -> Any:
    """The shapes of a tree with shardings: jax.ShapeDtypeStruct each."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _path_name(path: Sequence[Any]) -> str:
    """trained/decoder/layers/..., from the keys of jax.tree_util."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")
