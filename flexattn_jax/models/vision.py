"""Vision towers, CLIP's and a small convolutional one, and how each of them sees a picture at two resolutions."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from flexattn_jax.config import ConvVisionConfig, VisionConfig
from flexattn_jax.ops.attention import attend, merge, row_probabilities
from flexattn_jax.ops.layers import Linear, activation, layer_stack
from flexattn_jax.partitioning import constrain


@flax.struct.dataclass
class Views:
    """What a tower sees of pictures; constant while it is frozen, so that it may be kept.

    lowres: (B, N, Dv).
    highres: (B, M, Dv) in raster order; None where the model reads none.
    semantic: (B, groups, Dv), grouping's tokens after the tower, trained and so not constant; else None.
    """

    lowres: Any
    highres: Any = None
    semantic: Any = None


def patchify(pixels: jax.Array, patch: int, tiles: int = 1) -> jax.Array:
    """Cuts square pictures into tiles, and these into patches, both row-major.

    Args:
      pixels: (B, 3, S, S), S a multiple of tiles * patch.

    Returns:
      (B, tiles**2, g**2, 3 * patch**2), g = S / tiles / patch.
    """
    batch, channels, side, _ = pixels.shape
    grid = side // tiles // patch
    pixels = pixels.reshape(batch, channels, tiles, grid, patch, tiles, grid, patch)
    return pixels.transpose(0, 2, 5, 3, 6, 1, 4, 7).reshape(batch, tiles**2, grid**2, channels * patch**2)


def untile(tokens: jax.Array, tiles: int) -> jax.Array:
    """Lays the tokens of a picture's tiles out in the raster of the whole picture.

    Args:
      tokens: (B, z**2, g**2, Dv), of z = `tiles` tiles a side, row-major, and in each tile row-major.

    Returns:
      (B, (z*g)**2, Dv). An exchange of axes: TPU's compiler takes longer for a gather.
    """
    batch, _, each, width = tokens.shape
    grid = math.isqrt(each)
    return tokens.reshape(batch, tiles, tiles, grid, grid, width).swapaxes(2, 3).reshape(batch, -1, width)


@flax.struct.dataclass
class ClassRow:
    """What a block's class token looks at: what VisionZip ranks patches by.

    scores: (B, n) float32, its attention to each token, itself first, summed over heads.
    keys: (B, n, d), averaged over heads.
    """

    scores: Any
    keys: Any


@flax.struct.dataclass
class Tokens:
    """What goes from block to block.

    x: (B, n, Dv), class token and patches.
    row: the last block's class row; None where nobody asks for it.
    semantic: (B, groups, Dv), tokens that read x and themselves and that x does not read; or None.
    """

    x: Any
    row: ClassRow | None = None
    semantic: Any = None


class Attention(nn.Module):
    """Multi-head self-attention with biases, every token reading every token, but x no semantic one."""

    num_heads: int

    @nn.compact
    def __call__(self, tokens: Tokens) -> Tokens:
        """Normalised tokens -> what each of them reads, and the class row if `tokens` has one."""
        x, semantic = tokens.x, tokens.semantic
        split = (*x.shape[:-1], self.num_heads, x.shape[-1] // self.num_heads)
        q_proj, k_proj, v_proj, out_proj = (
            Linear(x.shape[-1], True, name=f"{part}_proj") for part in ("q", "k", "v", "out")
        )
        query, key, value = q_proj(x).reshape(split), k_proj(x), v_proj(x)
        out, lse = attend(query, key, value)
        row = None
        if tokens.row is not None:
            scores = row_probabilities(query[:, :1], key, lse[:, :1])[:, 0]
            row = ClassRow(scores, key.reshape(split).mean(axis=2))
        if semantic is not None:  # apart from x, whose numbers then are the same without them
            own_query = q_proj(semantic).reshape(*semantic.shape[:-1], *split[2:])
            own_key, own_value = k_proj(semantic), v_proj(semantic)
            read, _ = merge(attend(own_query, key, value), attend(own_query, own_key, own_value))
            semantic = out_proj(read.reshape(semantic.shape))
        return Tokens(out_proj(out.reshape(x.shape)), row, semantic)


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
    def __call__(self, tokens: Tokens, index: jax.Array | int) -> tuple[Tokens, None]:
        """One block."""
        config, x, semantic = self.config, tokens.x, tokens.semantic
        norm1, norm2 = (layer_norm(config, x.dtype, name) for name in ("norm1", "norm2"))
        mlp = MLP(config.mlp_dim, config.activation, name="mlp")
        normed = tokens.replace(x=norm1(x), semantic=None if semantic is None else norm1(semantic))
        read = Attention(config.num_heads, name="self_attn")(normed)
        x = x + read.x
        x = constrain(x + mlp(norm2(x)), "tiles", None, None)
        if semantic is not None:
            semantic = semantic + read.semantic
            semantic = semantic + mlp(norm2(semantic))
        return Tokens(x, read.row, semantic), None


def layer_norm(config: VisionConfig | ConvVisionConfig, dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    """LayerNorm with float32 statistics (two-pass variance, as PyTorch computes it)."""
    return nn.LayerNorm(epsilon=config.norm_eps, dtype=dtype, param_dtype=dtype, use_fast_variance=False, name=name)


class VisionTower(nn.Module):
    """CLIP's image encoder up to the selected hidden state; later blocks and the final norm do not exist."""

    config: VisionConfig
    dtype: jnp.dtype
    scan_layers: bool

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Encodes pictures or tiles of at most the native size.

        Args:
          pixels: (B, 3, s, s), normalised. A smaller picture uses the top-left corner of the position table, as the
            released code does; a larger one has been refused by the config.

        Returns:
          (B, (s / patch)**2, Dv): hidden state `select_layer` without the class token.
        """
        return self.tokens(pixels).x[:, 1:]

    def tokens(self, pixels: jax.Array, ranked: bool = False, semantic: jax.Array | None = None) -> Tokens:
        """All tokens that leave the tower.

        Args:
          pixels: (B, 3, s, s), see above.
          ranked: with the last block's class row.
          semantic: (B, groups, Dv), tokens that run along behind the patches.

        Returns:
          x (B, 1 + (s / patch)**2, Dv), the class token first; and what was asked for.
        """
        return self._tokens(patchify(pixels, self.config.patch_size)[:, 0], ranked, semantic)

    @nn.compact
    def _tokens(self, patches: jax.Array, ranked: bool = False, semantic: jax.Array | None = None) -> Tokens:
        """`tokens` of patches (B, g**2, 3 * patch**2)."""
        config, patches = self.config, patches.astype(self.dtype)
        batch, grid = patches.shape[0], math.isqrt(patches.shape[1])
        x = Linear(config.width, name="patch_embedding")(constrain(patches, "tiles", None, None))

        init = nn.initializers.normal(0.02)
        class_token = self.param("class_embedding", init, (config.width,), self.dtype).astype(self.dtype)
        table = self.param("position_embedding", init, (config.grid**2 + 1, config.width), self.dtype)
        positions = table[1:].reshape(config.grid, config.grid, config.width)[:grid, :grid]
        positions = jnp.concatenate([table[:1], positions.reshape(grid**2, config.width)]).astype(self.dtype)

        x = jnp.concatenate([jnp.broadcast_to(class_token, (batch, 1, config.width)), x], axis=1) + positions
        pre_norm = layer_norm(config, self.dtype, "pre_norm")
        x = pre_norm(x)
        row = None
        if ranked:  # of the shape that the blocks give it
            row = ClassRow(
                jnp.zeros(x.shape[:2], jnp.float32),
                jnp.zeros((*x.shape[:2], config.width // config.num_heads), self.dtype),
            )
        tokens = Tokens(x, row, None if semantic is None else pre_norm(semantic))
        if config.num_blocks:
            tokens, _ = layer_stack(Block, "blocks", config.num_blocks, self.scan_layers, config=config)(tokens)
        return tokens

    def views(self, small: jax.Array, pixels: jax.Array | None, tiles: int) -> Views:
        """Sees pictures at low resolution and, tile by tile, at high resolution.

        Args:
          small: (B, 3, s, s), normalised.
          pixels: (B, 3, S, S), the same larger; None: low resolution only.
          tiles: squares a side into which the larger picture is cut.
        """
        if pixels is None:
            return Views(self(small))
        squares = patchify(small, self.config.patch_size), patchify(pixels, self.config.patch_size, tiles)
        if squares[0].shape[2:] == squares[1].shape[2:]:  # one batch for the tower
            features = self._see(jnp.concatenate(squares, axis=1))
            lowres, highres = features[:, 0], features[:, 1:]
        else:
            lowres, highres = self._see(squares[0])[:, 0], self._see(squares[1])
        highres = constrain(highres, "batch", None, None, None)
        lowres = constrain(lowres, "batch", None, None)
        return Views(lowres, untile(highres, tiles))

    def _see(self, squares: jax.Array) -> jax.Array:
        """Patches of a sample's squares (B, n, g**2, .), side by side in the tower's batch -> (B, n, g**2, Dv)."""
        features = self._tokens(squares.reshape(-1, *squares.shape[2:])).x[:, 1:]
        return features.reshape(*squares.shape[:3], -1)


def position_features(grid: int, dims: int) -> np.ndarray:
    """(g, g, dims) float32: sines and cosines of x and y in 0..1, the longest wave twice the picture's side."""
    place = (np.arange(grid) + 0.5) / grid
    angles = np.pi * place[:, None] * 2.0 ** np.arange(dims // 4)
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    across, down = np.broadcast_to(waves, (grid, *waves.shape)), np.broadcast_to(waves[:, None], (grid, *waves.shape))
    return np.concatenate([across, down], axis=-1).astype(np.float32)


class ConvBlock(nn.Module):
    """A pre-norm residual block: a 3 x 3 convolution, GELU, linear."""

    config: ConvVisionConfig

    @nn.compact
    def __call__(self, x: jax.Array, index: jax.Array | int) -> tuple[jax.Array, None]:
        """x (B, g, g, c) -> (B, g, g, c)."""
        config = self.config
        hidden = convolution(config.mlp_dim, 3, 1, x.dtype, "conv")(layer_norm(config, x.dtype, "norm")(x))
        x = x + Linear(x.shape[-1], True, name="fc")(activation("gelu_tanh")(hidden))
        return constrain(x, "tiles", None, None, None), None


def convolution(features: int, window: int, stride: int, dtype: jnp.dtype, name: str) -> nn.Conv:
    """A convolution whose windows are centred, zeros around the picture: (B, s, s, c) -> (B, s/stride, s/stride, .)."""
    around = (window - stride) // 2
    init = nn.initializers.normal(0.02)
    size, padding = (window, window), ((around, around),) * 2
    return nn.Conv(features, size, stride, padding, kernel_init=init, dtype=dtype, param_dtype=dtype, name=name)


class ConvTower(nn.Module):
    """Downscaling convolutions, residual blocks, and channels that say where a token is.

    Content and place have channels of their own, so that a projection can read either: keys learn to look for what is
    there, values to tell where it is. It reads the whole picture, so that no object is cut by a tile's border.
    """

    config: ConvVisionConfig
    dtype: jnp.dtype
    scan_layers: bool

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """pixels (B, 3, s, s), normalised, s a multiple of the patch size -> (B, (s / patch)**2, Dv), row-major."""
        config = self.config
        x = pixels.astype(self.dtype).transpose(0, 2, 3, 1)
        for i, (width, stride) in enumerate(zip(config.stem_widths, config.stem_strides, strict=True)):
            x = convolution(width, 2 * stride, stride, self.dtype, f"stem_{i}")(x)
            x = layer_norm(config, self.dtype, f"stem_norm_{i}")(activation("gelu_tanh")(x))
        if config.num_layers:
            x, _ = layer_stack(ConvBlock, "blocks", config.num_layers, self.scan_layers, config=config)(x)
        x = layer_norm(config, self.dtype, "post_norm")(x)
        place = jnp.asarray(position_features(x.shape[1], config.position_dims), self.dtype)
        x = jnp.concatenate([x, jnp.broadcast_to(place, (*x.shape[:3], config.position_dims))], axis=-1)
        return x.reshape(x.shape[0], -1, config.width)

    def views(self, small: jax.Array, pixels: jax.Array | None, tiles: int) -> Views:
        """Sees pictures at low resolution, small (B, 3, s, s), and at high resolution, pixels (B, 3, S, S) or None.

        `tiles` changes nothing: this tower reads the whole picture.
        """
        return Views(self(small), None if pixels is None else self(pixels))


def build_tower(config: VisionConfig | ConvVisionConfig, dtype: jnp.dtype, scan_layers: bool) -> nn.Module:
    """The tower that a configuration describes."""
    tower = ConvTower if isinstance(config, ConvVisionConfig) else VisionTower
    return tower(config, dtype, scan_layers)
