"""Small random models for the tests."""

import os
import pathlib

# Before JAX reads it: programs this small take longer to compile than to run, and compile in half the time. What only
# the optimising compiler shows is left to a run with XLA_FLAGS= set by hand, and to benchmarks/.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import numpy as np
import pytest

from flexattn_jax.config import VLMConfig, override, preset
from flexattn_jax.inputs.batching import Batch
from flexattn_jax.models.vlm import VLM

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


def random_params(config: VLMConfig, seed: int = 0) -> dict:
    """Parameters as `VLM(config)` reads them, large enough that attention maps are not flat."""
    stacked = override(config, {"scan_layers": True})
    size, slots = config.image_size, config.num_slots
    batch = Batch(
        token_ids=np.zeros((1, slots + 2), np.int32),
        lengths=np.array([slots + 2]),
        image_start=np.array([1]),
        content=np.ones((1, config.num_lowres_tokens), bool),
        pixels=np.zeros((1, 3, size, size), np.float32),
    )
    shapes = jax.eval_shape(lambda: VLM(stacked).init(jax.random.key(0), batch))["params"]
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        name = path[-1].key
        noise = rng.standard_normal(shape.shape).astype(np.float32)
        if name == "scale":
            return 1 + 0.1 * noise
        return (0.6 if name == "embedding" else 0.1 if name in ("bias", "class_embedding") else 0.15) * noise

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="session")
def tiny() -> tuple[VLMConfig, dict]:
    """The tiny preset (grouped-query attention) with random parameters."""
    config = preset("tiny")
    return config, random_params(config)
