"""One step of training, compiled once for each static shape of the batch; its state is donated.

    loss_fn(params, batch, alpha, key) -> (mean loss, named scalars)        key: None in evaluation

is what differs between tasks; `vlm_loss` is the next-token loss on answers, and tower.py has another.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flexattn_jax.models.vlm import VLM
from flexattn_jax.partitioning import Partition, constrain
from flexattn_jax.training.data import TrainBatch
from flexattn_jax.training.loss import grounding_loss, next_token_loss
from flexattn_jax.training.optimizer import Optimizer, join_params
from flexattn_jax.training.state import TrainState

# The batch is TrainBatch, or another pytree with `learned`, the number of items that the loss is the mean of.
LossFn = Callable[[dict, Any, jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
Metrics = dict[str, jax.Array]


def vlm_loss(model: VLM, grounding: float = 0.0) -> LossFn:
    """Mean cross-entropy over answer tokens, and what was selected: cells a reading row kept, cells over capacity.

    Args:
      grounding: weight of `grounding_loss`, in training, where batches say what rows are asked about.
    """

    flex = model.config.flexattention
    draws = 0 if flex is None else flex.capacity or flex.num_cells  # also while every cell is read

    def loss_fn(params: dict, batch: TrainBatch, alpha: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        # What float32 names is float32: an accelerator would otherwise round the products' inputs to bfloat16.
        with jax.default_matmul_precision("highest" if model.config.dtype == "float32" else None):
            grounded = bool(grounding) and batch.asked is not None and key is not None
            inputs = batch.batch, batch.labels, batch.readers, alpha, key
            loss, named = next_token_loss(model, params, *inputs, grounded=grounded)
        if "cells" not in named:
            return loss, {}
        metrics = {}
        if grounded:
            metrics["grounding_loss"] = grounding_loss(named["map"], batch.asked, draws)
            loss += grounding * metrics["grounding_loss"]
        # The last layer's selection is made and read by none.
        cells, overflow = named["cells"][:-1].astype(jnp.float32), named["overflow"][:-1].astype(jnp.float32)
        rows = (batch.readers < batch.labels.shape[1]) & (batch.batch.image_start >= 0)[:, None]
        rows = rows[:, : cells.shape[2]]  # variant "paper": one row selects for all
        count = jnp.maximum(rows.sum(), 1) * max(1, cells.shape[0])
        return loss, metrics | {
            "cells_per_row": jnp.where(rows, cells.sum(axis=-1), 0).sum() / count,
            "overflow_per_row": jnp.where(rows, overflow, 0).sum() / count,
        }

    return loss_fn


def alpha_ramp(warmup: float, steps_per_epoch: int) -> Callable[[jax.Array], jax.Array]:
    """Weight of high resolution at a step: min(1, epoch * warmup), epochs counted in fractions (released code)."""
    return lambda step: jnp.minimum(1.0, step / steps_per_epoch * warmup).astype(jnp.float32)


def make_train_step(
    loss_fn: LossFn,
    optimizer: Optimizer,
    alpha: Callable[[jax.Array], jax.Array],
    accumulation: int = 1,
    ema_decay: float | None = None,
    partition: Partition | None = None,
    shardings: TrainState | None = None,
) -> Callable[[TrainState, TrainBatch], tuple[TrainState, Metrics]]:
    """A (state, batch) -> (state, metrics), jitted: `.lower(state, batch)` gives its program.

    Args:
      alpha: of the step, see `alpha_ramp`.
      accumulation: parts that the batch is cut into, one after the other in memory; the gradient is the whole batch's.
      ema_decay: OptimizerConfig.ema_decay.
      partition: where the model computes; None: on one device.
      shardings: where the state lies, before and after: `Partition.state_shardings`; None as `partition`.

    The metrics are float32 scalars: `loss`, `gradient_norm`, `learning_rate`, `alpha`, `answer_tokens`, `applied` (0
    if the update was left out), `bad_in_a_row`, `skipped`, and those of `loss_fn`.
    """

    def step(state: TrainState, batch: TrainBatch) -> tuple[TrainState, Metrics]:
        weight = alpha(state.step)
        key = jax.random.fold_in(state.key, state.step)

        def part_loss(trained: dict, part: TrainBatch, part_key: jax.Array):
            return loss_fn(join_params(trained, state.frozen), part, weight, part_key)

        gradient, sums, tokens = _accumulate(part_loss, state.trained, batch, key, accumulation)
        if shardings is not None and partition.mesh.size > 1:
            gradient = jax.lax.with_sharding_constraint(gradient, shardings.trained)
        norm = optax.tree.norm(gradient)
        direction, moments = optimizer.transform.update(gradient, state.moments, state.trained)
        rate = optimizer.learning_rate(state.step)
        moved = jax.tree.map(lambda p, d: p - rate * d, state.trained, direction)

        finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(direction))
        applied = finite & (tokens > 0)
        keep = partial(jax.tree.map, lambda new, old: jnp.where(applied, new, old))
        average = state.average
        if average is not None:
            moved_average = jax.tree.map(lambda a, p: ema_decay * a + (1 - ema_decay) * p, average, moved)
            average = keep(moved_average, average)
        state = state.replace(
            step=state.step + 1,
            trained=keep(moved, state.trained),
            moments=keep(moments, state.moments),
            average=average,
            bad_in_a_row=jnp.where(finite, 0, state.bad_in_a_row + 1),
            skipped=state.skipped + ~finite,
        )
        metrics = sums | {
            "gradient_norm": norm,
            "learning_rate": rate,
            "alpha": weight,
            "answer_tokens": tokens,
            "applied": applied,
            "bad_in_a_row": state.bad_in_a_row,
            "skipped": state.skipped,
        }
        return state, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    if partition is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(partition.traced(step), donate_argnums=0, out_shardings=(shardings, partition.replicated))


def make_eval_step(
    loss_fn: LossFn, partition: Partition | None = None
) -> Callable[[TrainState, TrainBatch], tuple[jax.Array, jax.Array]]:
    """A jitted (state, batch) -> (summed loss, answer tokens), with the moving average where there is one, alpha 1."""

    def step(state: TrainState, batch: TrainBatch) -> tuple[jax.Array, jax.Array]:
        loss, _ = loss_fn(state.averaged_params, batch, jnp.float32(1), None)
        tokens = batch.learned.astype(jnp.float32)
        return loss * tokens, tokens

    return jax.jit(step) if partition is None else jax.jit(partition.traced(step), out_shardings=partition.replicated)


def _accumulate(loss_fn: Callable, trained: dict, batch: TrainBatch, key: jax.Array, parts: int) -> tuple[Any, ...]:
    """Gradient and scalars of the whole batch, means over its answer tokens, and the number of these."""
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    total = batch.learned.astype(jnp.float32)
    if parts == 1:
        (loss, named), gradient = value_and_grad(trained, batch, key)
        return gradient, named | {"loss": loss}, total

    def add(sums: Any, inputs: tuple[TrainBatch, jax.Array]) -> tuple[Any, None]:
        part, number = inputs
        (loss, named), gradient = value_and_grad(trained, part, jax.random.fold_in(key, number))
        share = part.learned / jnp.maximum(total, 1)
        return jax.tree.map(lambda s, x: s + share * x, sums, (gradient, named | {"loss": loss})), None

    def cut_rows(x: jax.Array) -> jax.Array:
        # Every parts-th row, so that each device cuts the rows that it has.
        x = jnp.asarray(x).reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    cut = jax.tree.map(cut_rows, batch)
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), cut)
    (loss, named), gradient = jax.eval_shape(value_and_grad, trained, first, key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (gradient, named | {"loss": loss}))
    (gradient, sums), _ = jax.lax.scan(add, zeros, (cut, jnp.arange(parts)))
    return gradient, sums, total
