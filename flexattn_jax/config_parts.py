"""The settings of a model's parts and of each way to read a picture with more or fewer tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

IN_DECODER = ("fastv", "pyramiddrop")  # methods of ReductionConfig
BEFORE_DECODER = ("visionzip", "tome", "random", "downsample")

MAX_SIDE = 2**16  # pixels of a picture as the model reads it
MAX_LAYERS = 2**10
MAX_WIDTH = 2**20  # of any layer, and tokens of a vocabulary
MAX_POSITIONS = 2**24


class ConfigError(ValueError):
    """A configuration that cannot describe a model; the message names the field, the value and what is allowed."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def require_sizes(prefix: str, config: Any, names: Iterable[str], most: int, least: int = 1) -> None:
    """Raises ConfigError for a size outside `least`..`most`: nothing that large was ever built, so it is a mistake."""
    for name in names:
        value = getattr(config, name)
        require(least <= value <= most, f"{prefix}{name} is {value}; it must lie in {least}..{most}")


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    require(value in allowed, f"{name} is {value!r}; it must be one of {', '.join(allowed)}")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision transformer, of which only the blocks up to `select_layer` are computed."""

    image_size: int = 336  # native side in pixels; the position table has (image_size // patch_size)**2 + 1 rows
    patch_size: int = 14
    width: int = 1024
    mlp_dim: int = 4096
    num_layers: int = 24  # blocks of the published tower, used or not
    num_heads: int = 16
    norm_eps: float = 1e-5
    activation: str = "quick_gelu"  # or "gelu" (erf), "gelu_tanh"
    select_layer: int = -2  # index into CLIP's hidden states (the embedding is entry 0), as LLaVA's config has it

    def __post_init__(self):
        require_sizes("vision.", self, ("image_size", "patch_size"), MAX_SIDE)
        require_sizes("vision.", self, ("width", "mlp_dim", "num_heads"), MAX_WIDTH)
        require_sizes("vision.", self, ("num_layers",), MAX_LAYERS)
        require(self.norm_eps > 0, f"vision.norm_eps {self.norm_eps} must be above 0")
        require(
            self.image_size % self.patch_size == 0,
            f"vision.image_size {self.image_size} is no multiple of vision.patch_size {self.patch_size}",
        )
        require(
            self.width % self.num_heads == 0,
            f"vision.width {self.width} is no multiple of vision.num_heads {self.num_heads}",
        )
        one_of("vision.activation", self.activation, ("quick_gelu", "gelu", "gelu_tanh"))
        require(
            0 <= self.num_blocks <= self.num_layers,
            f"vision.select_layer {self.select_layer} is outside the {self.num_layers + 1} hidden states",
        )

    @property
    def num_blocks(self) -> int:
        """Blocks that are computed and stored: the selected hidden state needs no later one."""
        return self.select_layer if self.select_layer >= 0 else self.num_layers + 1 + self.select_layer

    @property
    def grid(self) -> int:
        """Side of the native patch grid."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class ConvVisionConfig:
    """A small convolutional tower that reads a whole picture of any size: the `mini` preset's."""

    stem_widths: tuple[int, ...] = (16, 48, 96, 128)  # channels after each downscaling convolution
    stem_strides: tuple[int, ...] = (2, 2, 2, 2)
    mlp_dim: int = 256
    num_layers: int = 2  # residual blocks after the stem
    position_dims: int = 16  # channels that say where in the picture a token is; a multiple of 4
    norm_eps: float = 1e-5

    def __post_init__(self):
        require(
            0 < len(self.stem_widths) == len(self.stem_strides) <= MAX_LAYERS
            and 0 < min(self.stem_widths) <= max(self.stem_widths) <= MAX_WIDTH,
            f"vision.stem_widths {self.stem_widths} and vision.stem_strides {self.stem_strides} must be as many "
            f"numbers, at least one; widths lie in 1..{MAX_WIDTH}",
        )
        require(
            all(stride % 2 == 0 and stride > 0 for stride in self.stem_strides),
            f"vision.stem_strides {self.stem_strides} must be even: windows are twice as wide and centred",
        )
        require(
            all(stride <= MAX_SIDE for stride in self.stem_strides) and self.patch_size <= MAX_SIDE,
            f"vision.stem_strides {self.stem_strides} make a patch of more than {MAX_SIDE} pixels a side",
        )
        require_sizes("vision.", self, ("mlp_dim",), MAX_WIDTH)
        require_sizes("vision.", self, ("num_layers",), MAX_LAYERS, least=0)
        require(self.norm_eps > 0, f"vision.norm_eps {self.norm_eps} must be above 0")
        require(
            self.position_dims % 4 == 0 and 0 <= self.position_dims <= MAX_WIDTH,
            f"vision.position_dims {self.position_dims} is no multiple of 4 (sine and cosine of x and y)",
        )

    @property
    def patch_size(self) -> int:
        """Pixels a token's side."""
        return math.prod(self.stem_strides)

    @property
    def width(self) -> int:
        """Dv: what was seen, and where."""
        return self.stem_widths[-1] + self.position_dims


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A LLaMA decoder."""

    vocab_size: int = 32000
    width: int = 4096
    mlp_dim: int = 11008
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    max_positions: int = 4096  # longest sequence, image tokens included, that the checkpoint was trained for

    def __post_init__(self):
        sizes = ("vocab_size", "width", "mlp_dim", "num_heads", "num_kv_heads", "head_dim")
        require_sizes("decoder.", self, sizes, MAX_WIDTH)
        require_sizes("decoder.", self, ("num_layers",), MAX_LAYERS)
        require_sizes("decoder.", self, ("max_positions",), MAX_POSITIONS)
        require(
            self.rope_theta > 0 and self.norm_eps > 0,
            f"decoder.rope_theta {self.rope_theta} and decoder.norm_eps {self.norm_eps} must be above 0",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"decoder.num_heads {self.num_heads} is no multiple of decoder.num_kv_heads {self.num_kv_heads}",
        )
        require(self.head_dim % 2 == 0, f"decoder.head_dim {self.head_dim} is odd; rotary embeddings need an even one")


@dataclasses.dataclass(frozen=True)
class FlexAttentionConfig:
    """How the decoder reads high-resolution tokens (arXiv 2407.20228, section 3; released code)."""

    enabled: bool = True  # False: the same weights as a low-resolution LLaVA-1.5; the projections are not read
    zoom_ratio: int = 3  # the high-resolution grid is zoom_ratio times finer than the low-resolution one
    first_layer: int = 8  # plain below; this layer makes the first selection, later layers read and re-select
    variant: str = "released"  # or "paper": every row reads one shared selection, whose map includes high resolution
    selector: str = "attention"  # or, for ablation, "random", "center", "all" (every cell)
    selection: str = "threshold"  # or "top_k": the `capacity` strongest cells, whatever their strength
    threshold: float = 48.0  # on the 0..255 map, strict
    ablation_share: float = 0.1  # share of the cells that "random" and "center" keep under selection="threshold"
    revisit: bool = True  # False: what a row has read it does not select again (an addition of ours; not for "all")
    seed: int = 0  # of selector="random"
    cell_grid: int = 9  # cells a side; the map is max-pooled to cell_grid x cell_grid
    capacity: int | None = None  # K: most cells a row may keep; None: all (exactly the reference)
    union_capacity: int | None = None  # U: most cells a sample may project for all its rows; None: all
    warmup: float = 10.0  # slope of the training blend: alpha = min(1, epoch * warmup)
    dropout: float = 0.0  # share of a training step's samples that read low resolution alone, whose map selects

    def __post_init__(self):
        one_of("flexattention.variant", self.variant, ("released", "paper"))
        one_of("flexattention.selector", self.selector, ("attention", "random", "center", "all"))
        one_of("flexattention.selection", self.selection, ("threshold", "top_k"))
        require_sizes("flexattention.", self, ("zoom_ratio", "cell_grid"), MAX_SIDE)
        require_sizes("flexattention.", self, ("first_layer",), MAX_LAYERS, least=0)
        require_sizes("flexattention.", self, ("ablation_share",), 1, least=0)
        require_sizes("flexattention.", self, ("dropout",), 1, least=0)
        require(0 <= self.warmup < math.inf, f"flexattention.warmup {self.warmup} must be a number from 0 on")
        for name in ("capacity", "union_capacity"):
            value = getattr(self, name)
            require(
                value is None or 1 <= value <= self.num_cells,
                f"flexattention.{name} {value} must lie in 1..{self.num_cells} (cell_grid squared), or be None for all",
            )
        require(
            self.selection == "threshold" or self.capacity is not None,
            'flexattention.selection "top_k" needs flexattention.capacity, the number of cells to keep',
        )

    @property
    def num_cells(self) -> int:
        """C."""
        return self.cell_grid**2

    @property
    def row_capacity(self) -> int:
        """K: most cells that a row keeps."""
        return self.num_cells if self.capacity is None or self.selector == "all" else self.capacity

    @property
    def sample_capacity(self) -> int:
        """U."""
        return self.num_cells if self.union_capacity is None else self.union_capacity


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """LLaVA-1.5-HD (arXiv 2310.03744, section 3.4): every high-resolution token sits in the sequence."""

    tiles: int = 3  # a side; the tower sees squares of image_size / tiles pixels

    def __post_init__(self):
        require_sizes("dense.", self, ("tiles",), MAX_SIDE)


@dataclasses.dataclass(frozen=True)
class CrossAttentionConfig:
    """Cross-attention to high resolution in every decoder layer (CogAgent, arXiv 2312.08914, section 2.2).

    The defaults are CogAgent's; the FlexAttention paper's LLaVA-XAttn is width 4096 over the connector's tokens.
    """

    tiles: int = 3  # a side; the tower sees squares of image_size / tiles pixels
    width: int = 1024  # of queries, keys and values, all heads together
    num_heads: int = 32
    source: str = "tower"  # what keys and values are made from: its features, or "connector", whose output is D wide

    def __post_init__(self):
        one_of("crossattention.source", self.source, ("tower", "connector"))
        require_sizes("crossattention.", self, ("tiles",), MAX_SIDE)
        require_sizes("crossattention.", self, ("width", "num_heads"), MAX_WIDTH)
        require(
            self.width % self.num_heads == 0,
            f"crossattention.width {self.width} is no multiple of crossattention.num_heads {self.num_heads}",
        )


@dataclasses.dataclass(frozen=True)
class ReductionConfig:
    """Fewer of the picture's tokens, without training; docs/systems.md has the sources.

    "fastv" and "pyramiddrop" drop tokens inside the decoder, by the attention that the last prompt token pays to them;
    the others hand it fewer tokens: "visionzip", "tome", and as controls "random" and "downsample".
    """

    method: str = "fastv"
    tokens: int = 192  # what is left of a picture; with "pyramiddrop", in its last stage
    layers: tuple[int, ...] | None = None  # those before which tokens are dropped; None: as published, see `cuts`
    seed: int = 0  # of "random"

    def __post_init__(self):
        one_of("reduction.method", self.method, (*IN_DECODER, *BEFORE_DECODER))
        require(self.tokens >= 1, f"reduction.tokens {self.tokens} must be at least 1")
        if self.layers is None:
            return
        require(self.in_decoder, f'reduction.layers is for {" and ".join(IN_DECODER)}; "{self.method}" has none')
        require(
            len(self.layers) > 0 and list(self.layers) == sorted(set(self.layers)) and self.layers[0] >= 1,
            f"reduction.layers {self.layers} must be ascending numbers from 1 on",
        )
        require(
            self.method == "pyramiddrop" or len(self.layers) == 1,
            f"reduction.layers {self.layers}: {self.method} drops tokens once",
        )

    @property
    def in_decoder(self) -> bool:
        """Whether tokens are dropped between decoder layers."""
        return self.method in IN_DECODER

    def cuts(self, num_layers: int) -> tuple[int, ...]:
        """Layers before which tokens are dropped: `layers`, or 2 (FastV), or each quarter of the depth (PyramidDrop).

        Of 32 layers the quarters are 8, 16 and 24, as published. Empty for a method that works before the decoder.
        """
        if not self.in_decoder:
            return ()
        if self.layers is not None:
            return self.layers
        quarters = dict.fromkeys(i * num_layers // 4 for i in (1, 2, 3))
        return (2,) if self.method == "fastv" else tuple(layer for layer in quarters if layer)

    def kept(self, slots: int, num_layers: int) -> tuple[int, ...]:
        """Tokens that are left after each cut of `slots` tokens: equal ratios down to `tokens` (PyramidDrop)."""
        count = len(self.cuts(num_layers))
        return tuple(round(slots * (self.tokens / slots) ** (i / count)) for i in range(1, count + 1))


@dataclasses.dataclass(frozen=True)
class GroupingConfig:
    """Learned tokens that gather the patches they resemble (VisToG, arXiv 2411.17773)."""

    groups: int = 64  # tokens of a picture in the sequence; 144 and 256 are the paper's other numbers
    temperature: float = 1.0  # of the softmax in training

    def __post_init__(self):
        require_sizes("grouping.", self, ("groups",), MAX_WIDTH)
        require(self.temperature > 0, f"grouping.temperature {self.temperature} must be above 0")
