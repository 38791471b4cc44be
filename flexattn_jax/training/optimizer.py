"""AdamW with warm-up and a cosine, for the part of the parameters that is trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flexattn_jax.checkpoints.trees import flatten, nest
from flexattn_jax.config import LARGEST_FLOAT, ConfigError

SCHEDULES = ("cosine", "constant")
NOT_DECAYED = ("scale", "bias")  # of norms and linear layers


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """LLaVA-1.5's recipe, which FlexAttention keeps, is the default."""

    trainable: str = "connector,decoder"  # what is trained, by comma: the beginnings of paths in the parameter tree
    learning_rate: float = 2e-5
    schedule: str = "cosine"  # to 0 at the end; or "constant", both after the warm-up
    warmup_share: float = 0.03  # of all steps
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # not of norms and biases
    clip_norm: float | None = 1.0  # of the whole gradient; None: no clipping
    ema_decay: float | None = None  # of an exponential moving average of the parameters; None: none is kept

    def __post_init__(self):
        for name, allowed in (
            ("schedule", self.schedule in SCHEDULES),
            ("learning_rate", 0 < self.learning_rate <= LARGEST_FLOAT),
            ("warmup_share", 0 <= self.warmup_share < 1),
            ("b1", 0 <= self.b1 < 1),
            ("b2", 0 <= self.b2 < 1),
            ("eps", 0 < self.eps <= LARGEST_FLOAT),
            ("weight_decay", 0 <= self.weight_decay <= LARGEST_FLOAT),
            ("clip_norm", self.clip_norm is None or 0 < self.clip_norm <= LARGEST_FLOAT),
            ("ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1),
        ):
            if not allowed:
                raise ConfigError(f"optimizer.{name} is {getattr(self, name)!r}, which makes no sense here")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """`transform` makes a direction of a gradient; it is followed by -learning_rate(step)."""

    transform: optax.GradientTransformation
    learning_rate: Callable[[jax.Array], jax.Array]


def build_optimizer(config: OptimizerConfig, total_steps: int) -> Optimizer:
    """The optimiser of a run; its state is made for the trained parameters alone (`split_params`)."""
    warmup = math.ceil(total_steps * config.warmup_share)
    rate, rise = config.learning_rate, optax.linear_schedule(0.0, config.learning_rate, warmup)
    if config.schedule == "cosine":
        fall = optax.cosine_decay_schedule(rate, max(1, total_steps - warmup))
    else:
        fall = optax.constant_schedule(rate)
    schedule = optax.join_schedules([rise, fall], [warmup]) if warmup else fall
    parts = [
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else None,
        optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.float32),
        optax.add_decayed_weights(config.weight_decay, _decayed) if config.weight_decay else None,
    ]
    return Optimizer(optax.chain(*(part for part in parts if part)), schedule)


def split_params(params: Mapping[str, Any], trainable: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parts of the tree that are trained and that are not; a frozen leaf has neither gradient nor optimiser state.

    Args:
      params: nested, stacked over layers or not.
      trainable: OptimizerConfig.trainable.

    Raises:
      ConfigError: one of its entries names no parameter.
    """
    prefixes = [prefix.strip().strip("/") for prefix in trainable.split(",") if prefix.strip()]
    flat = flatten(params)
    for prefix in prefixes:
        if not any(_below(path, prefix) for path in flat):
            raise ConfigError(
                f"optimizer.trainable names {prefix!r}, but no parameter's path begins so; there are "
                f"{', '.join(sorted({'/'.join(path.split('/')[:2]) for path in flat}))}"
            )
    if not prefixes:
        raise ConfigError('optimizer.trainable is empty; name what to train, such as "connector,decoder"')
    chosen = {path for path in flat if any(_below(path, prefix) for prefix in prefixes)}
    return (
        nest({path: leaf for path, leaf in flat.items() if path in chosen}),
        nest({path: leaf for path, leaf in flat.items() if path not in chosen}),
    )


def join_params(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `split_params`."""
    return nest(flatten(trained) | flatten(frozen))


def _below(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix + "/")


def _decayed(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)
