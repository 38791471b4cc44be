"""The programs of the table as XLA sees them: jitted functions, abstract arguments, nothing in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexattn_jax.checkpoints.trees import param_shapes
from flexattn_jax.config import VLMConfig, from_dict
from flexattn_jax.costs.cases import Case, model_config
from flexattn_jax.costs.hlo import AS_WRITTEN, Assumed
from flexattn_jax.costs.rankings import ranked_by
from flexattn_jax.highres.cells import PROJECTED_AT_ONCE, READ_AT_ONCE
from flexattn_jax.inference.reading import Prompts
from flexattn_jax.inference.scoring import score
from flexattn_jax.inputs.batching import Batch, OptionBatch
from flexattn_jax.models.flops import connector_flops, decoder_flops, grouping_flops, step_flops, tower_flops
from flexattn_jax.models.vlm import VLM, Memory
from flexattn_jax.ops.attention import attend
from flexattn_jax.ops.cache import new_cache
from flexattn_jax.ops.selection import cell_tokens
from flexattn_jax.partitioning import Partition, PartitionConfig, make_partition, with_shardings
from flexattn_jax.training.data import TrainBatch
from flexattn_jax.training.optimizer import OptimizerConfig, build_optimizer
from flexattn_jax.training.state import create_state
from flexattn_jax.training.step import alpha_ramp, make_train_step, vlm_loss

ROOM = 64  # sequence positions that a cache has for an answer
OPTIONS, OPTION_LENGTH = 4, 8  # of option scoring
READERS = 128  # rows that predict an answer, in training
CHECK_SIZE, CHECK_LAYERS = 4096, 8  # of the matmul program


@dataclasses.dataclass(frozen=True)
class Program:
    """What is traced, lowered and compiled.

    run: jitted.
    arguments: abstract, with shardings.
    analytic_flops: on all devices together, counted from shapes; None where nobody has counted.
    assumed: see hlo.walk.
    assumption: the same for people, of loops that depend on data; "" where there are none.
    tokens_a_cell: P, for the rankings.
    notes: further entries of the reading.
    """

    run: Callable
    arguments: tuple[Any, ...]
    analytic_flops: float | None
    assumed: Assumed = AS_WRITTEN
    assumption: str = ""
    tokens_a_cell: int = 1
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def trace(self, ranking: str = "cells") -> jax.stages.Traced:
        """The traced program, ranked in the given way."""
        with ranked_by(ranking, self.tokens_a_cell) if ranking != "cells" else contextlib.nullcontext():
            return self.run.trace(*self.arguments)


def build(case: Case, devices: list[Any]) -> Program:
    """The program of a case on a target's devices; nothing is traced yet."""
    if case.program in _CHECKS:
        return _CHECKS[case.program](devices)
    return _PROGRAMS[case.program](case, model_config(case), devices)


def _prefill(case: Case, config: VLMConfig, devices: list[Any]) -> Program:
    partition = infer_partition(devices, config.decoder.num_kv_heads)
    prefill, batch, length = _prefill_function(case, config)
    # Not by the shapes of a prefill, as `_decode` has them: tracing is part of what is measured.
    cache = _place_cache(jax.eval_shape(lambda: new_cache(config, case.batch, length + ROOM, True)), partition)
    cells, reading = _cells_of_a_row(config), _reading_layers(config)
    flops = case.batch * (
        tower_flops(config)
        + grouping_flops(config)[0]
        + connector_flops(config)
        + decoder_flops(config, length, cells * reading, cells * reading, one_row=True)
        + _head_flops(config)
    )
    return _with_cells(
        config,
        Program(
            jax.jit(
                partition.traced(prefill), out_shardings=(None, Memory(_shardings(cache), lengths=None, picture=None))
            ),
            (_weights(config, partition), _place_batch(batch, partition, case.batch)),
            flops,
        ),
        projecting=cells,
        reading=cells,
    )


def _decode(case: Case, config: VLMConfig, devices: list[Any]) -> Program:
    model, partition = VLM(config), infer_partition(devices, config.decoder.num_kv_heads)
    memory = _memory(case, config, partition)

    def decode(params, memory, tokens):
        return model.apply({"params": params}, memory, tokens, method=VLM.decode)[:2]

    decoder, cells = config.decoder, _cells_of_a_row(config)
    flops = None
    if config.crossattention is None and len({segment.num_slots for segment in config.segments}) == 1:
        positions = config.num_slots + case.text + ROOM
        keys = 4 * (positions - 1) * decoder.num_heads * decoder.head_dim  # beside the one that decoder_flops counts
        layers = decoder_flops(config, 1, 0, cells * _reading_layers(config), one_row=True) + decoder.num_layers * keys
        flops = case.batch * (layers + _head_flops(config))
    tokens = _place_batch(jax.ShapeDtypeStruct((case.batch,), np.int32), partition, case.batch)
    return _with_cells(
        config,
        Program(
            jax.jit(partition.traced(decode), donate_argnums=1, out_shardings=(None, _shardings(memory))),
            (_weights(config, partition), memory, tokens),
            flops,
        ),
        projecting=0,
        reading=cells,
    )


def _score(case: Case, config: VLMConfig, devices: list[Any]) -> Program:
    model, partition = VLM(config), infer_partition(devices, config.decoder.num_kv_heads)
    length = config.num_slots + case.text
    options = OptionBatch(
        jax.ShapeDtypeStruct((case.batch, OPTIONS, OPTION_LENGTH), np.int32),
        jax.ShapeDtypeStruct((case.batch, OPTIONS), np.int32),
    )

    def score_options(params, batch, options):
        return score(model, params, Prompts(batch), options)

    # Every row of every option selects for itself; together they may want every cell.
    cells = _cells_of_a_row(config)
    cells = min(cells * OPTIONS * OPTION_LENGTH, config.flexattention.num_cells) if cells else 0
    program = Program(
        jax.jit(partition.traced(score_options)),
        (
            _weights(config, partition),
            *_place_batch((_batch(config, case.batch, length), options), partition, case.batch),
        ),
        None,
    )
    return _with_cells(config, program, projecting=cells, reading=cells, at_most=True)


def _train(case: Case, config: VLMConfig, devices: list[Any]) -> Program:
    samples, length = case.batch * len(devices), config.num_slots + case.text
    partition = make_partition(PartitionConfig(), devices)
    return train_program(
        config, OptimizerConfig(trainable=_trained(config)), partition, samples, length, min(READERS, length)
    )


def train_program(
    config: VLMConfig,
    settings: OptimizerConfig,
    partition: Partition,
    samples: int,
    length: int,
    readers: int,
    accumulation: int = 1,
) -> Program:
    """A step of training, see `make_train_step`.

    Args:
      samples: B, of all devices; length: T; readers: R.
    """
    optimizer = build_optimizer(settings, total_steps=1000)
    state = jax.eval_shape(lambda params: create_state(params, settings, optimizer, 0), param_shapes(config))
    shardings = partition.state_shardings(state)
    batch = TrainBatch(
        _batch(config, samples, length),
        jax.ShapeDtypeStruct((samples, length), np.int32),
        jax.ShapeDtypeStruct((samples, readers), np.int32),
    )
    warmup = config.flexattention.warmup if config.flexattention else 0.0
    step = make_train_step(
        vlm_loss(VLM(config)),
        optimizer,
        alpha_ramp(warmup, 1000),
        accumulation,
        settings.ema_decay,
        partition,
        shardings,
    )
    trains_decoder = any(name.strip().startswith("decoder") for name in settings.trainable.split(","))
    arguments = with_shardings(state, shardings), _place_batch(batch, partition, samples)
    return Program(
        step,
        arguments,
        step_flops(config, samples, length, readers, trains_decoder),
        assumed=Assumed(flex_layers=_flex_share(config)),
        tokens_a_cell=_tokens_a_cell(config),
        notes=dict(zip(("state", "batch"), map(device_bytes, arguments), strict=True)),
    )


def _trained(config: VLMConfig) -> str:
    """What LLaVA's recipe trains, and what the system has of its own outside of the decoder."""
    own = {"highres": config.crossattention, "grouping": config.grouping}
    return ",".join(["connector", "decoder", *(name for name, present in own.items() if present is not None)])


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of abstract arrays with shardings on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Fit:
    """A step of training as plain types.

    config, optimizer, partition: fields of VLMConfig, OptimizerConfig and PartitionConfig.
    samples: B, of all devices; text: T without the picture's slots; readers: R.
    """

    config: dict[str, Any]
    optimizer: dict[str, Any]
    partition: dict[str, Any]
    samples: int
    accumulation: int
    text: int
    readers: int


def fit_program(fit: Fit, devices: list[Any]) -> Program:
    """The program of a Fit; its notes also tell `granule`, of which a batch must be a multiple. Raises ConfigError."""
    config = from_dict(fit.config)
    split = from_dict(fit.partition, PartitionConfig, "partition.")
    partition = make_partition(split, devices, fit.samples // fit.accumulation)
    settings = from_dict(fit.optimizer, OptimizerConfig, "optimizer.")
    length = config.num_slots + fit.text
    program = train_program(
        config, settings, partition, fit.samples, length, min(fit.readers, length), fit.accumulation
    )
    notes = {**program.notes, "granule": partition.batch_shards * fit.accumulation}
    return dataclasses.replace(program, notes=notes)


def infer_partition(devices: list[Any], kv_heads: int) -> Partition:
    """For inference: as many devices along tensor as divide the key/value heads, the rest along data."""
    count = len(devices)
    tensor = max(n for n in range(1, count + 1) if count % n == 0 and kv_heads % n == 0)
    return make_partition(PartitionConfig("data", tensor=tensor), devices)


def _matmul(devices: list[Any]) -> Program:
    """A chain of square bfloat16 products, in a scan, on one device."""
    array = jax.ShapeDtypeStruct((CHECK_SIZE, CHECK_SIZE), jnp.bfloat16)

    def matmul(x, weights):
        return jax.lax.scan(lambda y, _: (y @ weights, None), x, None, length=CHECK_LAYERS)[0]

    return _check(matmul, (array, array), 2.0 * CHECK_LAYERS * CHECK_SIZE**3, devices)


def _attention(devices: list[Any]) -> Program:
    """Attention of 4096 rows to 4096 keys, 32 heads of 128, on one device."""
    rows, heads, width = CHECK_SIZE, 32, 128
    query = jax.ShapeDtypeStruct((1, rows, heads, width), jnp.bfloat16)
    keys = jax.ShapeDtypeStruct((1, rows, heads * width), jnp.bfloat16)

    def attention(query, key, value):
        return attend(query, key, value)

    return _check(attention, (query, keys, keys), 4.0 * rows * rows * heads * width, devices)


def _check(function: Callable, arguments: tuple, flops: float, devices: list[Any]) -> Program:
    whole = make_partition(PartitionConfig(), devices[:1]).replicated
    return Program(jax.jit(function), with_shardings(arguments, jax.tree.map(lambda _: whole, arguments)), flops)


_CHECKS: dict[str, Callable[[list[Any]], Program]] = {"matmul": _matmul, "attention": _attention}
_PROGRAMS: dict[str, Callable[[Case, VLMConfig, list[Any]], Program]] = {
    "prefill": _prefill,
    "decode": _decode,
    "score": _score,
    "train": _train,
}


def _batch(config: VLMConfig, samples: int, length: int) -> Batch:
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((samples, *shape), dtype)  # noqa: E731
    return Batch(
        token_ids=array(np.int32, length),
        lengths=array(np.int32),
        image_start=array(np.int32),
        content=array(bool, config.num_lowres_tokens),
        pixels=array(np.float32, 3, config.image_size, config.image_size),
    )


def _weights(config: VLMConfig, partition: Partition) -> Any:
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(config.dtype)), param_shapes(config))
    return with_shardings(shapes, partition.state_shardings(shapes))


def _prefill_function(case: Case, config: VLMConfig) -> tuple[Callable, Batch, int]:
    """The function that reads prompts, an abstract batch of them, and its T."""
    model, length = VLM(config), config.num_slots + case.text

    def prefill(params, batch):
        return model.apply({"params": params}, batch, length + ROOM, method=VLM.prefill)[:2]

    return prefill, _batch(config, case.batch, length), length


def _memory(case: Case, config: VLMConfig, partition: Partition) -> Memory:
    """What a prefill leaves, as abstract arrays."""
    prefill, batch, _ = _prefill_function(case, config)
    _, memory = jax.eval_shape(prefill, _weights(config, partition), batch)
    placed = _place_batch(memory.replace(cache=None), partition, case.batch)
    return placed.replace(cache=_place_cache(memory.cache, partition))


def _place_cache(tree: Any, partition: Partition) -> Any:
    """Shapes of a cache with shardings: the heads, which lie side by side in the last axis, split as the rules say."""
    shardings = jax.tree.map(
        lambda leaf: partition.replicated if leaf.dtype == bool else partition.sharding(leaf.shape, ("heads",)), tree
    )
    return with_shardings(tree, shardings)


def _place_batch(tree: Any, partition: Partition, samples: int) -> Any:
    return with_shardings(tree, partition.batch_shardings(tree, samples))


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _cells_of_a_row(config: VLMConfig) -> int:
    """K of a model that reads cells, else 0."""
    return config.flexattention.row_capacity if config.reads_highres else 0


def _reading_layers(config: VLMConfig) -> int:
    """Layers that read cells: the first with FlexAttention only selects."""
    return max(0, config.num_flex_layers - 1) if config.reads_highres else 0


def _flex_share(config: VLMConfig) -> float:
    """Share of a stack's layers that have FlexAttention, where a condition in the one body of all layers asks."""
    return config.num_flex_layers / config.decoder.num_layers if config.reads_highres else 1.0


def _tokens_a_cell(config: VLMConfig) -> int:
    if not config.reads_highres:
        return 1
    return cell_tokens(config.highres_grid, config.flexattention.cell_grid)[0].shape[1]


def _with_cells(config: VLMConfig, program: Program, projecting: int, reading: int, at_most: bool = False) -> Program:
    """The program with what is assumed of its loops over cells: the text of a program cannot tell how many are read.

    Args:
      projecting, reading: cells that a layer projects and reads.
    """
    if not config.reads_highres:
        return program
    # Where layers are scanned, the first one's loops are in the text, too, and turn no time.
    share = _reading_layers(config) / config.num_flex_layers if config.scan_layers else 1.0
    project, read = share * -(-projecting // PROJECTED_AT_ONCE), share * -(-reading // READ_AT_ONCE)
    if reading * 2 > config.flexattention.num_cells:  # where they lie, in the other branch, which is counted, too
        read = 0
    return dataclasses.replace(
        program,
        assumed=Assumed(project, read, _flex_share(config)),
        assumption=f"a layer projects {projecting} and reads {reading} cells" + (" at most" if at_most else ""),
        tokens_a_cell=_tokens_a_cell(config),
    )


def _head_flops(config: VLMConfig) -> float:
    return 2.0 * config.decoder.width * config.decoder.vocab_size
