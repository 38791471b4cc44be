"""The programs of the table as XLA sees them: jitted functions, abstract arguments, nothing in memory."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexattn_jax.config import VLMConfig
from flexattn_jax.costs import placement
from flexattn_jax.costs.cases import Case, model_config
from flexattn_jax.costs.rankings import ranked_by
from flexattn_jax.highres.cells import CELLS_AT_ONCE
from flexattn_jax.inference.scoring import score
from flexattn_jax.inputs.batching import Batch, OptionBatch
from flexattn_jax.models.flops import connector_flops, decoder_flops, step_flops, tower_flops
from flexattn_jax.models.vlm import VLM, Memory
from flexattn_jax.ops.attention import attend
from flexattn_jax.ops.cache import new_cache
from flexattn_jax.ops.selection import cell_tokens
from flexattn_jax.training.data import TrainBatch
from flexattn_jax.training.optimizer import OptimizerConfig, build_optimizer
from flexattn_jax.training.start import param_shapes
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
    assumed: turns of loops that depend on data, see hlo.walk.
    assumption: the same for people; "" where there are no such loops.
    tokens_a_cell: P, for the rankings.
    """

    run: Callable
    arguments: tuple[Any, ...]
    analytic_flops: float | None
    assumed: Callable[[bool], float] | None = None
    assumption: str = ""
    tokens_a_cell: int = 1

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
    mesh = placement.infer_mesh(devices, config.decoder.num_kv_heads)
    prefill, batch, length = _prefill_function(case, config)
    # Not by the shapes of a prefill, as `_decode` has them: tracing is part of what is measured.
    cache = placement.place_cache(jax.eval_shape(lambda: new_cache(config, case.batch, length + ROOM, True)), mesh)
    cells, reading = _cells_of_a_row(config), _reading_layers(config)
    flops = case.batch * (
        tower_flops(config)
        + connector_flops(config)
        + decoder_flops(config, length, cells * reading, cells * reading)
        + _head_flops(config)
    )
    return _with_cells(
        config,
        Program(
            jax.jit(prefill, out_shardings=(None, Memory(_shardings(cache), lengths=None, picture=None))),
            (_weights(config, mesh), placement.place_batch(batch, mesh, case.batch)),
            flops,
        ),
        projecting=cells,
        reading=cells,
    )


def _decode(case: Case, config: VLMConfig, devices: list[Any]) -> Program:
    model, mesh = VLM(config), placement.infer_mesh(devices, config.decoder.num_kv_heads)
    memory = _memory(case, config, mesh)

    def decode(params, memory, tokens):
        return model.apply({"params": params}, memory, tokens, method=VLM.decode)[:2]

    decoder, cells = config.decoder, _cells_of_a_row(config)
    flops = None
    if config.crossattention is None and len({segment.num_slots for segment in config.segments}) == 1:
        positions = config.num_slots + case.text + ROOM
        keys = 4 * (positions - 1) * decoder.num_heads * decoder.head_dim  # beside the one that decoder_flops counts
        layers = decoder_flops(config, 1, 0, cells * _reading_layers(config)) + decoder.num_layers * keys
        flops = case.batch * (layers + _head_flops(config))
    tokens = placement.place_batch(jax.ShapeDtypeStruct((case.batch,), np.int32), mesh, case.batch)
    return _with_cells(
        config,
        Program(
            jax.jit(decode, donate_argnums=1, out_shardings=(None, _shardings(memory))),
            (_weights(config, mesh), memory, tokens),
            flops,
        ),
        projecting=0,
        reading=cells,
    )


def _score(case: Case, config: VLMConfig, devices: list[Any]) -> Program:
    model, mesh = VLM(config), placement.infer_mesh(devices, config.decoder.num_kv_heads)
    length = config.num_slots + case.text
    options = OptionBatch(
        jax.ShapeDtypeStruct((case.batch, OPTIONS, OPTION_LENGTH), np.int32),
        jax.ShapeDtypeStruct((case.batch, OPTIONS), np.int32),
    )

    def score_options(params, batch, options):
        return score(model, params, batch, options)

    # Every row of every option selects for itself; together they may want every cell.
    cells = _cells_of_a_row(config)
    cells = min(cells * OPTIONS * OPTION_LENGTH, config.flexattention.num_cells) if cells else 0
    program = Program(
        jax.jit(score_options),
        (
            _weights(config, mesh),
            *placement.place_batch((_batch(config, case.batch, length), options), mesh, case.batch),
        ),
        None,
    )
    return _with_cells(config, program, projecting=cells, reading=cells, at_most=True)


def _train(case: Case, config: VLMConfig, devices: list[Any]) -> Program:
    mesh, settings = placement.train_mesh(devices), OptimizerConfig()
    length, samples = config.num_slots + case.text, case.batch * len(devices)
    optimizer = build_optimizer(settings, total_steps=1000)
    state = jax.eval_shape(lambda params: create_state(params, settings, optimizer, 0), param_shapes(config))
    readers = min(READERS, length)
    batch = TrainBatch(
        _batch(config, samples, length),
        jax.ShapeDtypeStruct((samples, length), np.int32),
        jax.ShapeDtypeStruct((samples, readers), np.int32),
    )
    warmup = config.flexattention.warmup if config.flexattention else 0.0
    loss_of_model = vlm_loss(VLM(config))

    def loss(params, batch, alpha, key):
        with placement.split_batch(mesh):
            return loss_of_model(params, batch, alpha, key)

    step = make_train_step(loss, optimizer, alpha_ramp(warmup, 1000))
    return Program(
        step,
        (placement.place_state(state, mesh), placement.place_batch(batch, mesh, samples)),
        step_flops(config, samples, length, readers),
        tokens_a_cell=_tokens_a_cell(config),
    )


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
    mesh = placement.train_mesh(devices[:1])
    return Program(jax.jit(function), jax.tree.map(lambda leaf: placement.replicate(leaf, mesh), arguments), flops)


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


def _weights(config: VLMConfig, mesh: jax.sharding.Mesh) -> Any:
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(config.dtype)), param_shapes(config))
    return placement.place_weights(shapes, mesh)


def _prefill_function(case: Case, config: VLMConfig) -> tuple[Callable, Batch, int]:
    """The function that reads prompts, an abstract batch of them, and its T."""
    model, length = VLM(config), config.num_slots + case.text

    def prefill(params, batch):
        return model.apply({"params": params}, batch, length + ROOM, method=VLM.prefill)[:2]

    return prefill, _batch(config, case.batch, length), length


def _memory(case: Case, config: VLMConfig, mesh: jax.sharding.Mesh) -> Memory:
    """What a prefill leaves, as abstract arrays."""
    prefill, batch, _ = _prefill_function(case, config)
    _, memory = jax.eval_shape(prefill, _weights(config, mesh), batch)
    placed = placement.place_batch(memory.replace(cache=None), mesh, case.batch)
    return placed.replace(cache=placement.place_cache(memory.cache, mesh))


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _cells_of_a_row(config: VLMConfig) -> int:
    """K of a model that reads cells, else 0."""
    if not config.reads_highres:
        return 0
    flex = config.flexattention
    return flex.num_cells if flex.selector == "all" else flex.row_capacity


def _reading_layers(config: VLMConfig) -> int:
    """Layers that read cells: the first of the second segment only selects."""
    return max(0, config.num_flex_layers - 1) if config.reads_highres else 0


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
    project, read = (share * -(-cells // CELLS_AT_ONCE) for cells in (projecting, reading))
    return dataclasses.replace(
        program,
        assumed=lambda exponentials: read if exponentials else project,
        assumption=f"a layer projects {projecting} and reads {reading} cells" + (" at most" if at_most else ""),
        tokens_a_cell=_tokens_a_cell(config),
    )


def _head_flops(config: VLMConfig) -> float:
    return 2.0 * config.decoder.width * config.decoder.vocab_size
