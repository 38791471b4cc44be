"""What a run carries from step to step, and how it begins."""

from __future__ import annotations

import zlib
from collections.abc import Container
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from flexattn_jax.checkpoints import layouts
from flexattn_jax.checkpoints.trees import nest
from flexattn_jax.config import VLMConfig
from flexattn_jax.training.optimizer import Optimizer, OptimizerConfig, join_params, split_params

INIT_DEVIATION = 0.02
# Drawn by width: deviations, and what begins as an identity.
_BY_WIDTH = {"decoder/embedding": 0.3, "grouping/semantic_tokens": 1.0}
_IDENTITIES = ("grouping/v_proj/kernel", "grouping/o_proj/kernel")


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint holds beside the place in the data.

    step: () int32, steps done, skipped ones included.
    trained, frozen: the parameters, float32.
    moments: state of the optimiser, for `trained` alone.
    average: moving average of `trained`, or None.
    key: random key; step k uses `fold_in(key, k)`.
    bad_in_a_row, skipped: () int32, updates that were left out for a loss or gradient that was not finite.
    """

    step: jax.Array
    trained: dict
    frozen: dict
    moments: Any
    average: dict | None
    key: jax.Array
    bad_in_a_row: jax.Array
    skipped: jax.Array

    @property
    def params(self) -> dict:
        """The whole tree."""
        return join_params(self.trained, self.frozen)

    @property
    def averaged_params(self) -> dict:
        """The whole tree with the moving average where there is one: what is evaluated and exported."""
        return join_params(self.trained if self.average is None else self.average, self.frozen)


def create_state(params: dict, config: OptimizerConfig, optimizer: Optimizer, seed: int) -> TrainState:
    """The state before the first step; a pure function, so that under jit it is born in its shardings."""
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    trained, frozen = split_params(params, config.trainable)
    zeros = jnp.zeros(3, jnp.int32)
    return TrainState(
        step=zeros[0],
        trained=trained,
        frozen=frozen,
        moments=optimizer.transform.init(trained),
        # A copy: both are donated to the step, and one buffer cannot be donated twice.
        average=jax.tree.map(jnp.copy, trained) if config.ema_decay else None,
        key=jax.random.key(seed),
        bad_in_a_row=zeros[1],
        skipped=zeros[2],
    )


def draw_params(
    config: VLMConfig, seed: int, by_width: bool = False, only: Container[str] | None = None
) -> dict[str, Any]:
    """Random float32 numpy parameters, stacked over layers: N(0, 0.02), norms 1, biases 0, and 0 what begins so.

    A layer's tensor depends on the seed and its own name, not on what it is stacked with nor on the device.

    Args:
      by_width: in place of 0.02, which suits widths of thousands: connector and decoder's kernels have the variance
        1 / inputs, the MLPs' last ones 1 / (2 layers) of that, and the embedding has the deviation 0.3. At width 96
        what attention brings then stands out from what MLPs that know nothing yet add to it. Grouping's semantic tokens
        have the deviation 1, its queries' and keys' kernels the variance 4 / inputs, so that patches and not the noise
        say where they belong; values and output begin as identities: a group is what the connector knows, a mean.
      only: paths of the leaves to draw; None: all.
    """
    drawn = {}
    shapes = layouts.tensor_shapes(config)
    for path, names in layouts.leaf_tensors(config).items():
        if only is not None and path not in only:
            continue
        shape = shapes[names[0]]
        if by_width and path in _IDENTITIES:
            drawn[path] = np.eye(*shape, dtype=np.float32)
        else:
            deviation = _deviation(path, shape, config) if by_width else INIT_DEVIATION
            tensors = [_draw(name, shape, seed, deviation) for name in names]
            drawn[path] = tensors[0] if path == names[0] else np.stack(tensors)
    return nest(drawn)


def _deviation(path: str, shape: tuple[int, ...], config: VLMConfig) -> float:
    if path in _BY_WIDTH:
        return _BY_WIDTH[path]
    if not path.endswith("/kernel") or not path.startswith(("connector/", "decoder/", "grouping/")):
        return INIT_DEVIATION
    quiet = path.endswith("/down_proj/kernel")
    gain = 2 if path.startswith("grouping/") else 1
    return gain * (shape[-1] * (2 * config.decoder.num_layers if quiet else 1)) ** -0.5


def _draw(name: str, shape: tuple[int, ...], seed: int, deviation: float) -> np.ndarray:
    last = name.rsplit("/", 1)[-1]
    if last in ("scale", "bias") or layouts.begins_at_zero(name):
        return np.full(shape, float(last == "scale"), np.float32)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return np.float32(deviation) * rng.standard_normal(shape, np.float32)
