"""int8 weights for inference: of the decoder's products, which a decoding step reads whole. An option of `api.load`.

Each row of a matrix (out, in), what makes one output, has a scale of its own: its largest entry becomes 127. Products
are made in the type of the activations and scaled afterwards. Embeddings, norms, the tower, the connector and the
projections of high resolution stay as they are. Rounding changes every number a little, and with it, now and then, a
cell or a token: `benchmarks/weights.py` measures by how much.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

from flexattn_jax.checkpoints.trees import flatten, nest
from flexattn_jax.config import ConfigError

WEIGHTS = ("int8",)
QUANTIZED = re.compile(r"decoder/(\w+/(self_attn|mlp)/(q|k|v|o|gate|up|down)_proj|lm_head)/kernel")


def quantize(params: dict, weights: str | None) -> dict:
    """Parameters with the decoder's matrices as qwix.QArray (int8, and a scale for each row); `params` is emptied.

    Args:
      params: stacked over layers or not.
      weights: one of WEIGHTS; None: `params` as they are.

    Raises:
      ConfigError: weights is another name, or qwix, which makes them, is not installed.
    """
    if weights is None:
        return params
    if weights not in WEIGHTS:
        raise ConfigError(f"weights is {weights!r}; it must be one of {', '.join(WEIGHTS)}, or None")
    try:
        import qwix
    except ImportError:
        raise ConfigError(
            'weights "int8" needs the package qwix; install it with pip install --editable ".[int8]"'
        ) from None

    def in_rows(leaf: jax.Array) -> Any:
        rows = tuple(range(leaf.ndim - 1))
        return qwix.quantize(leaf, jnp.int8, channelwise_axes=rows)

    flat = flatten(params)
    params.clear()
    for path in list(flat):  # one after the other, so that no second copy of the whole is held
        if QUANTIZED.fullmatch(path):
            flat[path] = jax.jit(in_rows)(flat[path])
    return nest(flat)
