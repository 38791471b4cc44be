"""From the tower's features to the decoder's width (LLaVA-1.5's mlp2x_gelu)."""

from __future__ import annotations

import flax.linen as nn
import jax

from flexattn_jax.ops.layers import Linear
from flexattn_jax.partitioning import constrain


class Connector(nn.Module):
    """Linear, exact (erf) GELU, linear; both with biases."""

    width: int

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """features (B, n, Dv) -> (B, n, D)."""
        hidden = jax.nn.gelu(Linear(self.width, True, name="fc1")(features), approximate=False)
        hidden = constrain(hidden, "batch", None, "mlp")
        return constrain(Linear(self.width, True, name="fc2")(hidden), "batch", None, None)
