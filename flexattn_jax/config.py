"""Typed, frozen descriptions of a model: what the library passes around instead of ConfigDicts.

Axis letters (used in every docstring of the package): B batch, T sequence positions, N low-resolution image tokens
(g x g), G side of the high-resolution grid, M = G*G its tokens, C cells (cell_grid x cell_grid), P tokens a cell
(padded), K cells kept by one row, U cells kept by a sample (union over rows), R query rows that read high resolution,
L layers, D model width, H heads, J key/value heads, d head width, V vocabulary, S side of a picture in pixels.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

# What a prompt's ids hold in the place of the picture (LLaVA's IMAGE_TOKEN_INDEX).
IMAGE_PLACEHOLDER = -200


class ConfigError(ValueError):
    """A configuration that cannot describe a model; the message names the field, the value and what is allowed."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{name} is {value!r}; it must be one of {', '.join(allowed)}")


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
        _require(
            self.image_size % self.patch_size == 0,
            f"vision.image_size {self.image_size} is no multiple of vision.patch_size {self.patch_size}",
        )
        _require(
            self.width % self.num_heads == 0,
            f"vision.width {self.width} is no multiple of vision.num_heads {self.num_heads}",
        )
        _one_of("vision.activation", self.activation, ("quick_gelu", "gelu", "gelu_tanh"))
        _require(
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
        _require(
            len(self.stem_widths) == len(self.stem_strides) > 0 and min(self.stem_widths) > 0,
            f"vision.stem_widths {self.stem_widths} and vision.stem_strides {self.stem_strides} must be as many "
            "numbers, at least one, above 0",
        )
        _require(
            all(stride % 2 == 0 and stride > 0 for stride in self.stem_strides),
            f"vision.stem_strides {self.stem_strides} must be even: windows are twice as wide and centred",
        )
        _require(
            self.mlp_dim > 0 and self.num_layers >= 0,
            f"vision.mlp_dim {self.mlp_dim} must be above 0 and vision.num_layers {self.num_layers} not below it",
        )
        _require(
            self.position_dims % 4 == 0 and self.position_dims >= 0,
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
        _require(
            self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads == 0,
            f"decoder.num_heads {self.num_heads} is no multiple of decoder.num_kv_heads {self.num_kv_heads}",
        )
        _require(self.head_dim % 2 == 0, f"decoder.head_dim {self.head_dim} is odd; rotary embeddings need an even one")


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
    seed: int = 0  # of selector="random"
    cell_grid: int = 9  # cells a side; the map is max-pooled to cell_grid x cell_grid
    capacity: int | None = None  # K: most cells a row may keep; None: all (exactly the reference)
    union_capacity: int | None = None  # U: most cells a sample may project for all its rows; None: all
    warmup: float = 10.0  # slope of the training blend: alpha = min(1, epoch * warmup)

    def __post_init__(self):
        _one_of("flexattention.variant", self.variant, ("released", "paper"))
        _one_of("flexattention.selector", self.selector, ("attention", "random", "center", "all"))
        _one_of("flexattention.selection", self.selection, ("threshold", "top_k"))
        _require(self.zoom_ratio >= 1, f"flexattention.zoom_ratio {self.zoom_ratio} must be at least 1")
        _require(self.first_layer >= 0, f"flexattention.first_layer {self.first_layer} must not be negative")
        _require(self.cell_grid >= 1, f"flexattention.cell_grid {self.cell_grid} must be at least 1")
        for name in ("capacity", "union_capacity"):
            value = getattr(self, name)
            _require(
                value is None or 1 <= value <= self.num_cells,
                f"flexattention.{name} {value} must lie in 1..{self.num_cells} (cell_grid squared), or be None for all",
            )
        _require(
            self.selection == "threshold" or self.capacity is not None,
            'flexattention.selection "top_k" needs flexattention.capacity, the number of cells to keep',
        )

    @property
    def num_cells(self) -> int:
        """C."""
        return self.cell_grid**2

    @property
    def row_capacity(self) -> int:
        """K."""
        return self.num_cells if self.capacity is None else self.capacity

    @property
    def sample_capacity(self) -> int:
        """U."""
        return self.num_cells if self.union_capacity is None else self.union_capacity


@dataclasses.dataclass(frozen=True)
class VLMConfig:
    """A whole vision-language model: tower, connector (two linear layers, exact GELU), decoder, high resolution."""

    vision: VisionConfig | ConvVisionConfig = VisionConfig()
    decoder: DecoderConfig = DecoderConfig()
    flexattention: FlexAttentionConfig | None = None  # None: LLaVA-1.5, which has no projections to read with
    lowres_size: int = 336  # S of the picture whose tokens sit in the sequence
    image_size: int = 336  # S of the picture that is handed in; lowres_size * zoom_ratio with FlexAttention
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    image_token_id: int | None = None  # id of an expanded image token, where the checkpoint's vocabulary has one
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0
    dtype: str = "float32"  # of parameters and activations; softmax, norms and selection are always float32
    scan_layers: bool = True  # one compiled body for all layers; False: one copy a layer (faster on CPU, see docs)
    remat: str = "none"  # training: what a decoder layer computes again in the backward pass, see models/layers.py

    def __post_init__(self):
        _one_of("dtype", self.dtype, ("float32", "bfloat16"))
        _one_of("remat", self.remat, ("none", "full", "dots"))
        patch = self.vision.patch_size
        _require(
            self.lowres_size % patch == 0, f"lowres_size {self.lowres_size} is no multiple of the patch size {patch}"
        )
        _require(
            isinstance(self.vision, ConvVisionConfig) or self.lowres_size <= self.vision.image_size,
            f"lowres_size {self.lowres_size} is above the tower's native size, for which its position table is made",
        )
        if self.flexattention is None or not self.flexattention.enabled:
            return
        zoom = self.flexattention.zoom_ratio
        _require(
            self.image_size == self.lowres_size * zoom,
            f"image_size {self.image_size} must be lowres_size {self.lowres_size} x zoom_ratio {zoom}, which "
            "FlexAttention's tiles need",
        )
        _require(
            self.flexattention.cell_grid <= self.highres_grid,
            f"flexattention.cell_grid {self.flexattention.cell_grid} is finer than the high-resolution grid "
            f"{self.highres_grid}",
        )

    @property
    def lowres_grid(self) -> int:
        """g: side of the low-resolution token grid."""
        return self.lowres_size // self.vision.patch_size

    @property
    def num_lowres_tokens(self) -> int:
        """N."""
        return self.lowres_grid**2

    @property
    def highres_grid(self) -> int:
        """G: side of the high-resolution token grid."""
        return self.lowres_grid * (self.flexattention.zoom_ratio if self.flexattention else 1)

    @property
    def reads_highres(self) -> bool:
        """Whether some layer reads high-resolution tokens (a model of <= first_layer + 1 layers never does)."""
        flex = self.flexattention
        return flex is not None and flex.enabled and self.num_flex_layers > 1

    @property
    def num_flex_layers(self) -> int:
        """Layers of the second segment: first_layer (makes a selection, reads none) and all later ones."""
        return 0 if self.flexattention is None else max(0, self.decoder.num_layers - self.flexattention.first_layer)

    @property
    def num_plain_layers(self) -> int:
        """Layers of the first segment."""
        return self.decoder.num_layers - self.num_flex_layers


def to_dict(config: VLMConfig) -> dict[str, Any]:
    """A configuration as plain JSON types."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], kind: type = VLMConfig, path: str = "") -> Any:
    """The configuration that `to_dict` wrote. An unknown key or a value of the wrong type is a ConfigError."""
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    _require(not unknown, f"unknown keys {', '.join(path + k for k in unknown)}; known: {', '.join(hints)}")
    return kind(**{key: _coerce(value, hints[key], path + key) for key, value in values.items()})


def override(config: VLMConfig, overrides: dict[str, Any] | None) -> VLMConfig:
    """`config` with dotted keys replaced, e.g. {"flexattention.threshold": 72, "dtype": "bfloat16"}.

    Raises ConfigError for a key that does not exist, a value of the wrong type or an impossible combination.
    """
    values = to_dict(config)
    for key, value in (overrides or {}).items():
        *parents, leaf = key.split(".")
        node = values
        for parent in parents:
            _require(
                isinstance(node, dict) and isinstance(node.get(parent), dict),
                f"config_overrides names {key!r}, but this configuration has no {parent!r} to change",
            )
            node = node[parent]
        _require(leaf in node, f"config_overrides names {key!r}; known there: {', '.join(node)}")
        node[leaf] = value
    return from_dict(values)


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `override` takes them, without what is None: {"a": {"b": 1, "c": None}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= dotted(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value
    return flat


def _coerce(value: Any, hint: Any, path: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = next(o for o in options if o is not type(None))
    if dataclasses.is_dataclass(kind):
        _require(isinstance(value, dict), f"{path} must be a table of settings, not {value!r}")
        # Of several kinds of tower, the one that has all these settings.
        tables = [o for o in options if dataclasses.is_dataclass(o)]
        known = (t for t in tables if set(value) <= {field.name for field in dataclasses.fields(t)})
        return from_dict(value, next(known, kind), path + ".")
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        allowed, what = {int: (int, "whole numbers"), float: ((int, float), "numbers"), str: (str, "names")}[item]
        _require(
            isinstance(value, (list, tuple)) and all(isinstance(v, allowed) for v in value),
            f"{path} must be a list of {what}, not {value!r}",
        )
        return tuple(item(v) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    _require(
        isinstance(value, kind) and (kind is bool or not isinstance(value, bool)),
        f"{path} must be {kind.__name__}, not {value!r}",
    )
    return value


def preset(name: str) -> VLMConfig:
    """A named configuration.

    "tiny" is for tests, "mini" learns visual search on two CPU cores (docs/mini.md), "7b" and "13b" are LLaVA-1.5 with
    FlexAttention as released.
    """
    _require(name in _PRESETS, f"unknown preset {name!r}; known: {', '.join(_PRESETS)}")
    return _PRESETS[name]


_PRESETS = {
    "tiny": VLMConfig(
        vision=VisionConfig(image_size=56, width=32, mlp_dim=64, num_layers=3, num_heads=2),
        decoder=DecoderConfig(
            vocab_size=128, width=48, mlp_dim=96, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=16
        ),
        flexattention=FlexAttentionConfig(zoom_ratio=3, first_layer=1, cell_grid=3),
        lowres_size=56,
        image_size=168,
    ),
    "mini": VLMConfig(
        vision=ConvVisionConfig(),
        decoder=DecoderConfig(
            vocab_size=128, width=96, mlp_dim=256, num_layers=5, num_heads=4, num_kv_heads=4, head_dim=24
        ),
        flexattention=FlexAttentionConfig(
            zoom_ratio=4, first_layer=1, selection="top_k", cell_grid=8, capacity=8
        ),
        lowres_size=128,
        image_size=512,
        scan_layers=False,
    ),
    "7b": VLMConfig(flexattention=FlexAttentionConfig(), image_size=1008),
    "13b": VLMConfig(
        decoder=DecoderConfig(width=5120, mlp_dim=13824, num_layers=40, num_heads=40, num_kv_heads=40),
        flexattention=FlexAttentionConfig(),
        image_size=1008,
    ),
}
