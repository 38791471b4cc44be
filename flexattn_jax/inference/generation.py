"""Decoding, greedy or sampled: one prefill and one compiled loop, no host round trip a token.

    state = start(...)                  prompts read, the first token chosen
    state = advance(..., state, limit)  the loop, until `limit` tokens or the end of every answer
    finish(..., state)                  what `generate` returns

`generate` is the three in one program. Streaming runs `advance` with one limit after the other.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from flexattn_jax.highres.cells import Picture
from flexattn_jax.inference.reading import Prompts, read_prompts
from flexattn_jax.models.vlm import VLM, Memory


@flax.struct.dataclass
class Sampling:
    """How a token is chosen from logits.

    temperature: () float32, by which logits are divided; 0: greedy, the likeliest token.
    top_p: () float32 in 0..1, exclusive of 0: tokens are drawn among the likeliest ones that hold this share of the
      probability together (nucleus sampling, arXiv 1904.09751); 1: among all.
    seed: (B,) uint32; the n-th token of a sample is a function of its logits, its seed and n, and so does not depend
      on the batch.
    """

    temperature: Any
    top_p: Any
    seed: Any


@flax.struct.dataclass
class Generated:
    """What `generate` returns.

    tokens: (B, n) int32, the end-of-sequence token included where it came; entries from `counts` on are padding.
    counts: (B,) int32, tokens generated.
    finite: (B,) bool, whether the logits after the prompt were; tokens mean nothing where they were not.
    cells: (layers, B, C) bool, cells selected by the last prompt token, or None without high resolution.
    overflow: (layers, B) int32, or None.
    cells_read: (B,) int32, cells projected in all layers together over prompt and answer, or None.
    """

    tokens: jax.Array
    counts: jax.Array
    finite: jax.Array
    cells: jax.Array | None
    overflow: jax.Array | None
    cells_read: jax.Array | None


@flax.struct.dataclass
class State:
    """Answers on the way.

    count: () int32, tokens of the longest answer.
    running: (B,) bool, samples whose answer goes on.
    tokens: (B, n) int32, see Generated; the last one is not in the memory yet.
    finite, cells, overflow: see Generated.
    """

    count: jax.Array
    running: jax.Array
    tokens: jax.Array
    memory: Memory
    finite: jax.Array
    cells: jax.Array | None
    overflow: jax.Array | None


def greedy(batch: int) -> Sampling:
    """The likeliest token, always."""
    return Sampling(np.float32(0), np.float32(1), np.zeros(batch, np.uint32))


def generate(
    model: VLM,
    params: dict,
    prompts: Prompts,
    active: jax.Array,
    limit: jax.Array,
    sampling: Sampling,
    capacity: int,
) -> Generated:
    """Answers a batch of prompts.

    Args:
      params: of the model.
      active: (B,) bool, False for samples that only fill the batch.
      limit: () int32, most tokens to generate, at most `capacity`.
      capacity: n, static room for new tokens.

    Returns:
      Up to `limit` tokens for each sample; a sample stops after its end-of-sequence token.
    """
    state = start(model, params, prompts, active, sampling, capacity)
    return finish(model, advance(model, params, state, limit, sampling), limit)


def start(
    model: VLM,
    params: dict,
    prompts: Prompts,
    active: jax.Array,
    sampling: Sampling,
    capacity: int,
) -> State:
    """Reads the prompts and chooses the first tokens; see `generate`."""
    config = model.config
    logits, memory, named = read_prompts(model, params, prompts, capacity)
    first = choose(logits, sampling, jnp.zeros((), jnp.int32))
    tokens = jnp.full((first.shape[0], capacity), config.pad_token_id, jnp.int32).at[:, 0].set(first)
    running = active & (first != config.eos_token_id)
    return State(jnp.ones((), jnp.int32), running, tokens, memory, jnp.isfinite(logits).all(axis=-1), *selected(named))


def advance(model: VLM, params: dict, state: State, limit: jax.Array, sampling: Sampling) -> State:
    """Goes on until `limit` () tokens, or until no answer goes on."""
    config = model.config

    def step(state: State) -> State:
        last = jax.lax.dynamic_index_in_dim(state.tokens, state.count - 1, axis=1, keepdims=False)
        logits, memory, _ = model.apply({"params": params}, state.memory, last, method=VLM.decode)
        token = jnp.where(state.running, choose(logits, sampling, state.count), config.pad_token_id)
        # A finished sample's lengths grow with the others'; its cache is read by nobody any more.
        return state.replace(
            count=state.count + 1,
            running=state.running & (token != config.eos_token_id),
            tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.count, axis=1),
            memory=memory,
        )

    return jax.lax.while_loop(lambda s: (s.count < limit) & s.running.any(), step, state)


def finish(model: VLM, state: State, limit: jax.Array) -> Generated:
    """The answers so far, each up to its end or to `limit`."""
    ended = state.tokens == model.config.eos_token_id
    counts = jnp.where(ended.any(axis=1), ended.argmax(axis=1) + 1, jnp.minimum(state.count, limit))
    read = cells_projected(state.memory)
    return Generated(state.tokens, counts.astype(jnp.int32), state.finite, state.cells, state.overflow, read)


def choose(logits: jax.Array, sampling: Sampling, number: jax.Array) -> jax.Array:
    """The next token of each sample: logits (B, V) float32 -> (B,) int32; `number` () counts tokens of the answer."""

    def draw() -> jax.Array:
        scaled = logits / jnp.maximum(sampling.temperature, 1e-6)
        kept = nucleus(jax.nn.softmax(scaled, axis=-1), sampling.top_p)
        key_of = lambda seed: jax.random.fold_in(jax.random.key(seed), number)  # noqa: E731
        noise = jax.vmap(lambda seed: jax.random.gumbel(key_of(seed), logits.shape[-1:]))(sampling.seed)
        return jnp.argmax(jnp.where(kept, scaled + noise, -jnp.inf), axis=-1)

    token = jax.lax.cond(sampling.temperature > 0, draw, lambda: jnp.argmax(logits, axis=-1))
    return token.astype(jnp.int32)


def nucleus(probabilities: jax.Array, share: jax.Array) -> jax.Array:
    """The likeliest tokens that hold `share` of the probability together: (B, V) float32 -> (B, V) bool.

    Equally likely tokens are all in or all out, and the likeliest are always in. Nothing is sorted: the bits of
    positive floats are ordered as the floats are, and 31 sums find the largest bits above which there is enough.
    """
    bits = jax.lax.bitcast_convert_type(probabilities, jnp.int32)

    def halve(number: int, least: jax.Array) -> jax.Array:
        higher = least | jnp.left_shift(1, 30 - number)
        held = jnp.where(bits >= higher[:, None], probabilities, 0).sum(axis=-1)
        return jnp.where(held >= share, higher, least)

    least = jax.lax.fori_loop(0, 31, halve, jnp.zeros(len(bits), jnp.int32))
    least = jnp.minimum(least, bits.max(axis=-1))  # a share that rounds to 0 is held by no token
    return (bits >= least[:, None]) | (share >= 1)


def selected(named: dict) -> tuple[jax.Array | None, jax.Array | None]:
    """Cells (layers, B, C) and overflow (layers, B) of the first selector row, for the layers that read them.

    Layer first_layer reads nothing and what the last layer selects is read by nobody, so entry i is what layer
    first_layer + 1 + i reads.
    """
    if "cells" not in named:
        return None, None
    return named["cells"][:-1, :, 0], named["overflow"][:-1, :, 0]


def cells_projected(memory: Memory) -> jax.Array | None:
    """(B,) cells whose keys the cache holds, all layers together."""
    if not isinstance(memory.picture, Picture):
        return None
    cache = memory.cache["layers"]
    if isinstance(cache, tuple):
        filled = jnp.stack([layer.projected for layer in cache if layer.projected is not None])
    else:
        filled = cache.projected
    return filled.sum(axis=(0, 2), dtype=jnp.int32)
