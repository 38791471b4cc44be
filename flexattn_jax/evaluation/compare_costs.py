"""What an answer costs a system: operations counted from shapes, and one question timed.

Times are of one question alone in a batch: `encode` from pixels to the decoder's width, `prefill` the decoder over the
whole prompt, `decode` one more token. Every pass loads and times every system once, in turn, so that a slow minute of
the machine falls on all of them and one model at a time is in memory.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexattn_jax.api import VisionLanguageModel
from flexattn_jax.config import VLMConfig
from flexattn_jax.evaluation.harness import unpack_cells
from flexattn_jax.evaluation.predictions import Prediction
from flexattn_jax.inputs.batching import Batch, Sample, make_batch
from flexattn_jax.inputs.images import ImageSource, load_image, preprocess
from flexattn_jax.inputs.tokenizer import tokenize_prompt
from flexattn_jax.models.flops import decoder_flops, prefill_flops
from flexattn_jax.models.vlm import VLM
from flexattn_jax.requests import is_list

PARTS = ("encode", "prefill", "decode")
_STEPS = 8  # tokens that are decoded in one go; the time is a token's

Times = dict[str, Any]


def count_costs(config: VLMConfig, text_lengths: Sequence[int], predictions: Sequence[Prediction]) -> dict[str, float]:
    """Operations and tokens of one question's prompt, means over questions; models/flops.py says what counts.

    Args:
      text_lengths: of each question's prompt, tokens without the picture.
      predictions: their `selection` tells the cells that a row read; the last prompt row alone reads any, but in
        variant "paper" all do.

    Returns:
      `decoder_gflop` (its layers over the prompt), `answer_gflop` (tower, connector, decoder, head), and `tokens_read`:
      tokens of the picture that the row which answers attends to, mean over the decoder's layers.
    """
    cells = [0 if p.selection is None else int(unpack_cells(p.selection).sum()) for p in predictions]
    kept, lengths = float(np.mean(cells)) if cells else 0.0, Counter(text_lengths)
    all_read = config.reads_highres and config.flexattention.variant == "paper"

    def mean(operations: Callable[[int], float]) -> float:
        return sum(operations(n) * count for n, count in lengths.items()) / lengths.total() / 1e9

    def reads(n: int) -> float:
        return kept * (config.num_slots + n if all_read else 1)

    one_row = not all_read
    slots = sum(segment.num_slots * segment.num_layers for segment in config.segments)
    read = 0.0
    if config.reads_highres:
        read = kept * config.highres_grid**2 / config.flexattention.num_cells
    elif config.crossattention is not None:
        read = config.highres_grid**2 * config.decoder.num_layers
    return {
        "decoder_gflop": mean(lambda n: decoder_flops(config, config.num_slots + n, kept, reads(n), one_row)),
        "answer_gflop": mean(lambda n: prefill_flops(config, n, kept, reads(n), one_row)),
        "tokens_read": (slots + read) / config.decoder.num_layers,
    }


def is_times(value: Any) -> bool:
    """Whether a value out of a file may be what `time_systems` gave for a system."""
    if not isinstance(value, dict) or not all(is_list(value.get(part)) and len(value[part]) == 3 for part in PARTS):
        return False
    numbers = [*(number for part in PARTS for number in value[part]), value.get("memory"), value.get("passes")]
    return isinstance(value.get("device"), str) and all(type(number) in (int, float) for number in numbers)


def time_systems(
    systems: Mapping[str, Callable[[], VisionLanguageModel]],
    picture: ImageSource,
    prompt: str,
    passes: int,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Times]:
    """Times one question with each system; see the module.

    Args:
      systems: what loads each of them.
      picture, prompt: of the question, "<image>" where the picture goes.
      passes: times that each is timed.
      tick: called after every reading.

    Returns:
      for each system milliseconds of each of PARTS as [median, smallest, largest], `memory` in bytes (weights, inputs,
      outputs and temporaries of the largest of the three programs, as XLA plans it) and `device`.
    """
    programs: dict[VLMConfig, _Programs] = {}
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    memory = {}
    for _ in range(passes):
        for name, load in systems.items():
            vlm = load()
            batch = _batch(vlm, picture, prompt)
            if vlm.config not in programs:
                programs[vlm.config] = _Programs(vlm, batch)
            found = programs[vlm.config]
            found.run(vlm.params, batch)  # what is done once: pages touched, constants moved
            seconds[name].append(found.run(vlm.params, batch))
            memory[name] = found.memory
            tick()
    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else "cpu"
    return {
        name: {part: _spread([1000 * reading[part] for reading in readings]) for part in PARTS}
        | {"memory": memory[name], "device": kind, "passes": passes}
        for name, readings in seconds.items()
    }


def _spread(values: Sequence[float]) -> list[float]:
    return [statistics.median(values), min(values), max(values)]


def _batch(vlm: VisionLanguageModel, picture: ImageSource, prompt: str) -> Batch:
    ids = tokenize_prompt(vlm.tokenizer, prompt)
    return make_batch([Sample(ids, *preprocess(load_image(picture), vlm.config))], vlm.config, vlm.buckets)


class _Programs:
    """The three programs of one configuration, compiled, and the most memory that one of them takes, in bytes."""

    def __init__(self, vlm: VisionLanguageModel, batch: Batch):
        model, room = VLM(vlm.config), batch.token_ids.shape[1] + _STEPS

        def encode(params: dict, pixels: jax.Array) -> Any:
            return model.apply({"params": params}, pixels, method=VLM.encode)[0]

        def prefill(params: dict, batch: Batch, features: Any) -> Any:
            return model.apply({"params": params}, batch, room, features, method=VLM.prefill)[:2]

        def decode(params: dict, logits: jax.Array, memory: Any) -> Any:
            def step(state: Any, _: None) -> Any:
                logits, memory = state
                token = logits.argmax(axis=-1).astype(jnp.int32)
                return model.apply({"params": params}, memory, token, method=VLM.decode)[:2], token

            _, tokens = jax.lax.scan(step, (logits, memory), length=_STEPS)
            return tokens

        params, asked = vlm.params, batch.replace(pixels=None)
        with jax.default_matmul_precision("highest" if vlm.config.dtype == "float32" else None):
            features = jax.eval_shape(encode, params, batch.pixels)
            first = jax.eval_shape(prefill, params, asked, features)
            inputs = {"encode": (batch.pixels,), "prefill": (asked, features), "decode": first}
            bodies = {"encode": encode, "prefill": prefill, "decode": decode}
            self._compiled = {name: jax.jit(bodies[name]).lower(params, *inputs[name]).compile() for name in PARTS}
        self.memory = _bytes(params) + max(_bytes(inputs[name]) + _own_bytes(self._compiled[name]) for name in PARTS)

    def run(self, params: dict, batch: Batch) -> dict[str, float]:
        """Seconds of each part."""
        clock, arguments, seconds = time.perf_counter, (jax.device_put(batch.pixels),), {}
        for name in PARTS:
            jax.block_until_ready(arguments)
            began = clock()
            out = jax.block_until_ready(self._compiled[name](params, *arguments))
            seconds[name] = clock() - began
            arguments = (jax.device_put(batch.replace(pixels=None)), out) if name == "encode" else out
        seconds["decode"] /= _STEPS
        return seconds


def _bytes(tree: Any) -> int:
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _own_bytes(compiled: Any) -> int:
    sizes = compiled.memory_analysis()
    return sizes.output_size_in_bytes - sizes.alias_size_in_bytes + sizes.temp_size_in_bytes
