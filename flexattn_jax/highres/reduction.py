"""Fewer tokens before the decoder: which way, by ReductionConfig.method."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flexattn_jax.config import ReductionConfig
from flexattn_jax.highres.controls import downsampling, random_places
from flexattn_jax.highres.tome import merge_tokens


def reduce_features(config: ReductionConfig, features: jax.Array) -> jax.Array:
    """features (B, N, Dv) of a tower, in raster order -> (B, config.tokens, Dv), for methods that need nothing else."""
    total, count = features.shape[1], config.tokens
    if config.method == "tome":
        return merge_tokens(features, count)
    if config.method == "random":
        return features[:, random_places(total, count, config.seed)]
    weights = jnp.asarray(downsampling(round(total**0.5), count))
    return jnp.einsum("kn,bnd->bkd", weights, features.astype(jnp.float32)).astype(features.dtype)
