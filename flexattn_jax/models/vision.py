"""CLIP vision tower and the tiling of high-resolution pictures."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from flexattn_jax.config import VisionConfig
from flexattn_jax.models.layers import Linear, activation, layer_stack
from flexattn_jax.ops.attention import attend


def tile(pixels: jax.Array, tiles: int) -> jax.Array:
    """Cuts square pictures into tiles x tiles squares, row-major.

    Args:
      pixels: (B, 3, S, S), S a multiple of `tiles`.

    Returns:
      (B * tiles**2, 3, S / tiles, S / tiles).
    """
    batch, channels, side, _ = pixels.shape
    small = side // tiles
    pixels = pixels.reshape(batch, channels, tiles, small, tiles, small)
    return pixels.transpose(0, 2, 4, 1, 3, 5).reshape(batch * tiles**2, channels, small, small)


def untile_index(tiles: int, grid: int) -> jax.Array:
    """For each token of the whole picture's raster, its place among the tiles' tokens.

    Args:
      tiles: z, tiles a side.
      grid: g, tokens a tile's side.

    Returns:
      (M,) int32 with M = (z*g)**2: token (ti*g + i, tj*g + j) is entry i*g + j of tile ti*z + tj.
    """
    y, x = jnp.divmod(jnp.arange((tiles * grid) ** 2), tiles * grid)
    return ((y // grid) * tiles + x // grid) * grid**2 + (y % grid) * grid + x % grid


class Attention(nn.Module):
    """Multi-head self-attention with biases, every token reading every token."""

    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (B, n, Dv) -> (B, n, Dv)."""
        split = (*x.shape[:-1], self.num_heads, x.shape[-1] // self.num_heads)
        query, key, value = (Linear(x.shape[-1], True, name=f"{part}_proj")(x) for part in "qkv")
        out, _ = attend(query.reshape(split), key, value)
        return Linear(x.shape[-1], True, name="out_proj")(out.reshape(x.shape))


class MLP(nn.Module):
    """Two linear layers with biases."""

    width: int
    activation: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (..., Dv) -> (..., Dv)."""
        hidden = activation(self.activation)(Linear(self.width, True, name="fc1")(x))
        return Linear(x.shape[-1], True, name="fc2")(hidden)


class Block(nn.Module):
    """A pre-norm transformer block."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: jax.Array, index: jax.Array | int) -> tuple[jax.Array, None]:
        """x (B, n, Dv) -> (B, n, Dv)."""
        config = self.config
        x = x + Attention(config.num_heads, name="self_attn")(layer_norm(config, x.dtype, "norm1")(x))
        x = x + MLP(config.mlp_dim, config.activation, name="mlp")(layer_norm(config, x.dtype, "norm2")(x))
        return x, None


def layer_norm(config: VisionConfig, dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    """LayerNorm with float32 statistics (two-pass variance, as PyTorch computes it)."""
    return nn.LayerNorm(epsilon=config.norm_eps, dtype=dtype, param_dtype=dtype, use_fast_variance=False, name=name)


class VisionTower(nn.Module):
    """CLIP's image encoder up to the selected hidden state; later blocks and the final norm do not exist."""

    config: VisionConfig
    dtype: jnp.dtype
    scan_layers: bool

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Encodes pictures or tiles of at most the native size.

        Args:
          pixels: (B, 3, s, s), normalised. A smaller picture uses the top-left corner of the position table, as the
            released code does; a larger one has been refused by the config.

        Returns:
          (B, (s / patch)**2, Dv): hidden state `select_layer` without the class token.
        """
        config, patch = self.config, self.config.patch_size
        batch, _, side, _ = pixels.shape
        grid = side // patch
        patches = pixels.astype(self.dtype).reshape(batch, 3, grid, patch, grid, patch)
        patches = patches.transpose(0, 2, 4, 1, 3, 5).reshape(batch, grid**2, 3 * patch**2)
        x = Linear(config.width, name="patch_embedding")(patches)

        init = nn.initializers.normal(0.02)
        class_token = self.param("class_embedding", init, (config.width,), self.dtype).astype(self.dtype)
        table = self.param("position_embedding", init, (config.grid**2 + 1, config.width), self.dtype)
        positions = table[1:].reshape(config.grid, config.grid, config.width)[:grid, :grid]
        positions = jnp.concatenate([table[:1], positions.reshape(grid**2, config.width)]).astype(self.dtype)

        x = jnp.concatenate([jnp.broadcast_to(class_token, (batch, 1, config.width)), x], axis=1) + positions
        x = layer_norm(config, self.dtype, "pre_norm")(x)
        if config.num_blocks:
            x, _ = layer_stack(Block, "blocks", config.num_blocks, self.scan_layers, config=config)(x)
        return x[:, 1:]
