"""Tokens by grouping what the tower sees: VisToG (arXiv 2411.17773).

Learned semantic tokens run through the tower behind the patches. Attention is isolated: class token and patches do not
read them, so that what the tower says of the picture stays the same to the bit; they read all. A grouping layer then
gives each patch to one semantic token, and the groups' tokens take the picture's place in the sequence. With g the
semantic tokens and s the patches, as they leave the tower:

    raw   = (g W_Q) (s W_K)^T / sqrt(Dv)                           similarity of token i and patch j
    y     = softmax over i of (raw + Gumbel noise) / temperature   in training; without noise otherwise
    A     = one-hot(argmax over i of y) + y - stop_gradient(y)     hard, with a straight-through gradient
    out_i = g_i + (sum over j of A_ij s_j W_V) / (1 + sum over j of A_ij) W_O

The paper gives the tokens' place, the isolated attention, the hard Gumbel-softmax and the one grouping layer. The
rest is chosen here after GroupViT's grouping block (arXiv 2202.11094): the similarity, the mean, the residual; and
temperature 1, no position for semantic tokens, N(0, 0.02) to begin with (with `start.draw_by_width` see
`training.state.draw_params`). A tower without attention, such as the `mini` preset's, has nothing that they could run
through: they go to the grouping layer as they were learned.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from flexattn_jax.config import GroupingConfig
from flexattn_jax.ops.layers import Linear
from flexattn_jax.partitioning import constrain


class Grouping(nn.Module):
    """The semantic tokens, and the layer that groups patches by them."""

    config: GroupingConfig
    width: int
    dtype: jnp.dtype

    def setup(self):
        shape = (self.config.groups, self.width)
        self.semantic_tokens = self.param("semantic_tokens", nn.initializers.normal(0.02), shape, self.dtype)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (Linear(self.width) for _ in "qkvo")

    def tokens(self, batch: int) -> jax.Array:
        """What goes into the tower: (batch, groups, Dv)."""
        return jnp.broadcast_to(self.semantic_tokens.astype(self.dtype), (batch, *self.semantic_tokens.shape))

    def __call__(self, patches: jax.Array, semantic: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """patches (B, N, Dv), semantic (B, groups, Dv), of the tower -> (B, groups, Dv), and each patch's group (B, N).

        Args:
          key: of the noise in a step of training; None: no noise.
        """
        query, keys = self.q_proj(semantic), self.k_proj(patches)
        raw = jnp.einsum("bgd,bnd->bgn", query, keys, preferred_element_type=jnp.float32) * self.width**-0.5
        member = assign(constrain(raw, "batch", None, None), key, self.config.temperature)
        total = jnp.einsum("bgn,bnd->bgd", member, self.v_proj(patches).astype(jnp.float32))
        mean = total / (1 + member.sum(axis=-1, keepdims=True))
        groups = semantic + self.o_proj(mean.astype(semantic.dtype))
        return groups, jax.lax.stop_gradient(member).argmax(axis=1)


def assign(raw: jax.Array, key: jax.Array | None, temperature: float) -> jax.Array:
    """Which group each patch belongs to: raw (B, groups, N) -> (B, groups, N), a 1 for each patch; of equals the first.

    The gradient is that of the softmax over groups.
    """
    if key is not None:
        raw = (raw + jax.random.gumbel(key, raw.shape)) / temperature
    soft = jax.nn.softmax(raw, axis=1)
    hard = jax.nn.one_hot(soft.argmax(axis=1), raw.shape[1], axis=1, dtype=soft.dtype)
    return hard + (soft - jax.lax.stop_gradient(soft))
