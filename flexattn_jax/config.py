"""Typed, frozen descriptions of a model: what the library passes around instead of ConfigDicts.

Axis letters (used in every docstring of the package): B batch, T sequence positions, N low-resolution image tokens
(g x g), G side of the high-resolution grid, M = G*G its tokens, C cells (cell_grid x cell_grid), P tokens a cell
(padded), K cells kept by one row, U cells kept by a sample (union over rows), R query rows that read high resolution,
L layers, D model width, H heads, J key/value heads, d head width, V vocabulary, S side of a picture in pixels.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

from flexattn_jax.config_parts import (
    MAX_SIDE,
    MAX_WIDTH,
    ConfigError,
    ConvVisionConfig,
    CrossAttentionConfig,
    DecoderConfig,
    DenseConfig,
    FlexAttentionConfig,
    GroupingConfig,
    ReductionConfig,
    VisionConfig,
    one_of,
    require,
    require_sizes,
)

__all__ = [
    "IMAGE_PLACEHOLDER",
    "ConfigError",
    "ConvVisionConfig",
    "CrossAttentionConfig",
    "DecoderConfig",
    "DenseConfig",
    "FlexAttentionConfig",
    "GroupingConfig",
    "ReductionConfig",
    "Segment",
    "VLMConfig",
    "VisionConfig",
    "dotted",
    "from_dict",
    "override",
    "preset",
    "to_dict",
]

# What a prompt's ids hold in the place of the picture (LLaVA's IMAGE_TOKEN_INDEX).
IMAGE_PLACEHOLDER = -200

LARGEST_INTEGER = 2**32
LARGEST_FLOAT = (2 - 2**-23) * 2.0**127  # that float32 can hold


@dataclasses.dataclass(frozen=True)
class Segment:
    """Decoder layers that follow each other and have as long a sequence: one stack of parameters.

    name: of the stack in the parameter tree.
    first_layer: index of its first layer in the decoder; num_layers: how many they are.
    num_slots: sequence positions that a picture takes in these layers.
    """

    name: str
    first_layer: int
    num_layers: int
    num_slots: int


@dataclasses.dataclass(frozen=True)
class VLMConfig:
    """A whole vision-language model: tower, connector (two linear layers, exact GELU), decoder, high resolution.

    Without any of flexattention, crossattention, dense, grouping and reduction it is LLaVA-1.5; see docs/systems.md.
    """

    vision: VisionConfig | ConvVisionConfig = dataclasses.field(default_factory=VisionConfig)
    decoder: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)
    flexattention: FlexAttentionConfig | None = None  # None: no projections to read high resolution with
    crossattention: CrossAttentionConfig | None = None
    dense: DenseConfig | None = None
    grouping: GroupingConfig | None = None
    reduction: ReductionConfig | None = None
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
    remat: str = "none"  # training: what a decoder layer computes again in the backward pass, see ops/layers.py

    def __post_init__(self):
        one_of("dtype", self.dtype, ("float32", "bfloat16"))
        one_of("remat", self.remat, ("none", "full", "dots"))
        require_sizes("", self, ("lowres_size", "image_size"), MAX_SIDE)
        require_sizes("", self, ("bos_token_id", "eos_token_id", "pad_token_id"), MAX_WIDTH, least=-1)
        for name, least in (("image_mean", 0.0), ("image_std", 1e-6)):
            value = getattr(self, name)
            require(
                len(value) == 3 and all(least <= v <= 1 for v in value),
                f"{name} is {value}; it must be 3 numbers in {least:g}..1, for red, green and blue",
            )
        patch = self.vision.patch_size
        require(
            self.lowres_size % patch == 0, f"lowres_size {self.lowres_size} is no multiple of the patch size {patch}"
        )
        require(
            isinstance(self.vision, ConvVisionConfig) or self.lowres_size <= self.vision.image_size,
            f"lowres_size {self.lowres_size} is above the tower's native {getattr(self.vision, 'image_size', 0)}, for "
            "which its position table is made",
        )
        _check_systems(self)

    @property
    def lowres_grid(self) -> int:
        """g: side of the low-resolution token grid."""
        return self.lowres_size // self.vision.patch_size

    @property
    def num_lowres_tokens(self) -> int:
        """N."""
        return self.lowres_grid**2

    @property
    def num_lowres_views(self) -> int:
        """Low-resolution tokens that the model takes over from the tower: N, or what a reduction leaves of them."""
        before = self.reduction is not None and not self.reduction.in_decoder
        return self.reduction.tokens if before else self.num_lowres_tokens

    @property
    def trains_in_tower(self) -> bool:
        """Whether grouping's semantic tokens, which are trained, run through the tower: one with attention."""
        return self.grouping is not None and isinstance(self.vision, VisionConfig)

    @property
    def num_slots(self) -> int:
        """Sequence positions that a picture takes where the decoder begins."""
        if self.grouping is not None:
            return self.grouping.groups
        return self.num_lowres_views + (self.highres_grid**2 if self.dense else 0)

    @property
    def tiles(self) -> int:
        """Squares a side into which the tower cuts the high-resolution picture; 0: it sees none."""
        other = self.crossattention or self.dense
        return other.tiles if other else self.flexattention.zoom_ratio if self.reads_highres else 0

    @property
    def highres_grid(self) -> int:
        """G: side of the high-resolution token grid."""
        if self.crossattention or self.dense:
            return self.image_size // self.vision.patch_size
        return self.lowres_grid * (self.flexattention.zoom_ratio if self.flexattention else 1)

    @property
    def reads_highres(self) -> bool:
        """Whether some layer reads what FlexAttention selects (a model of <= first_layer + 1 layers never does)."""
        flex = self.flexattention
        return flex is not None and flex.enabled and self.num_flex_layers > 1

    @property
    def num_flex_layers(self) -> int:
        """Layers that have FlexAttention's projections: first_layer (selects, reads nothing) and all later ones."""
        flex, others = self.flexattention, (self.crossattention, self.dense, self.grouping, self.reduction)
        if flex is None or (not flex.enabled and any(others)):
            return 0
        return max(0, self.decoder.num_layers - flex.first_layer)

    @property
    def num_plain_layers(self) -> int:
        """Layers before them, which have none."""
        return self.decoder.num_layers - self.num_flex_layers

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The decoder's layers in order: "layers", and "stage1", ... where tokens were dropped on the way."""
        depth, slots, cuts = self.decoder.num_layers, [self.num_slots], []
        if self.reduction is not None and self.reduction.in_decoder:
            cuts = list(self.reduction.cuts(depth))
            slots += self.reduction.kept(slots[0], depth)
        names = ["layers", *(f"stage{i}" for i in range(1, len(slots)))]
        bounds = zip(names, [0, *cuts], [*cuts, depth], slots, strict=True)
        return tuple(Segment(name, first, end - first, count) for name, first, end, count in bounds if end > first)


def _check_systems(config: VLMConfig) -> None:
    """Raises ConfigError unless the ways to use high resolution and to reduce tokens go together and with the sizes."""
    flex = config.flexattention if config.flexattention and config.flexattention.enabled else None
    present = [name for name in ("crossattention", "dense", "grouping") if getattr(config, name)]
    present += ["flexattention"] if flex else []
    require(
        len(present) <= 1,
        f"{' and '.join(present)} are both on; a model reads pictures in one of these ways: set the other to None, or "
        "flexattention.enabled to False",
    )
    if flex:
        zoom = flex.zoom_ratio
        require(
            config.image_size == config.lowres_size * zoom,
            f"image_size {config.image_size} must be lowres_size {config.lowres_size} x zoom_ratio {zoom}, which "
            "FlexAttention's tiles need",
        )
        require(
            flex.cell_grid <= config.highres_grid,
            f"flexattention.cell_grid {flex.cell_grid} is finer than the high-resolution grid {config.highres_grid}",
        )
    elif config.tiles:
        name, patch = present[0], config.vision.patch_size
        require(
            config.image_size % (config.tiles * patch) == 0,
            f"image_size {config.image_size} is no multiple of {name}.tiles {config.tiles} x the patch size {patch}",
        )
        require(
            isinstance(config.vision, ConvVisionConfig)
            or config.image_size // config.tiles <= config.vision.image_size,
            f"image_size {config.image_size} / {name}.tiles {config.tiles} is above the tower's native size "
            f"{getattr(config.vision, 'image_size', 0)}; take more tiles",
        )
    if config.reduction is not None:
        _check_reduction(config, config.reduction, present)


def _check_reduction(config: VLMConfig, reduction: ReductionConfig, present: list[str]) -> None:
    method, slots = reduction.method, config.num_lowres_tokens + (config.highres_grid**2 if config.dense else 0)
    require(
        not present or (present == ["dense"] and reduction.in_decoder),
        f'reduction.method "{method}" cannot be combined with {" and ".join(present)}'
        + ("; fastv and pyramiddrop can" if present == ["dense"] else ""),
    )
    require(
        reduction.tokens <= slots, f"reduction.tokens {reduction.tokens} is above the {slots} tokens that a picture has"
    )
    require(
        method != "visionzip" or (isinstance(config.vision, VisionConfig) and config.vision.num_blocks > 0),
        'reduction.method "visionzip" ranks tokens by a CLIP tower\'s class token; this model has another tower',
    )
    require(
        method != "visionzip" or reduction.tokens >= 2,
        f'reduction.tokens {reduction.tokens} is too few for "visionzip": the class token and one other',
    )
    cuts = reduction.cuts(config.decoder.num_layers)
    require(
        not reduction.in_decoder or (len(cuts) > 0 and cuts[-1] < config.decoder.num_layers),
        f"{method} drops tokens before layers {cuts}, but the decoder has {config.decoder.num_layers}; "
        "choose reduction.layers inside it",
    )


def to_dict(config: VLMConfig) -> dict[str, Any]:
    """A configuration as plain JSON types."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], kind: type = VLMConfig, path: str = "") -> Any:
    """The configuration that `to_dict` wrote. An unknown key or a value of the wrong type is a ConfigError."""
    require(isinstance(values, Mapping), f"{path or 'a configuration'} must be a table of settings, not {values!r}")
    hints = typing.get_type_hints(kind)
    unknown = [path + (key if key.isprintable() else repr(key)) for key in sorted(set(values) - set(hints))]
    require(not unknown, f"unknown keys {', '.join(unknown)}; known: {', '.join(hints)}")
    absent = [
        path + field.name
        for field in dataclasses.fields(kind)
        if field.name not in values and field.default is field.default_factory is dataclasses.MISSING
    ]
    require(not absent, f"{', '.join(absent)} is missing")
    return kind(**{key: _coerce(value, hints[key], path + key) for key, value in values.items()})


def override(config: VLMConfig, overrides: dict[str, Any] | None) -> VLMConfig:
    """`config` with dotted keys replaced, e.g. {"flexattention.threshold": 72, "dtype": "bfloat16"}.

    A setting of crossattention, dense, grouping or reduction turns that on, with defaults for its other settings.

    Raises ConfigError for a key that does not exist, a value of the wrong type or an impossible combination.
    """
    values = to_dict(config)
    overrides = overrides or {}
    require(
        isinstance(overrides, Mapping) and all(isinstance(key, str) for key in overrides),
        f'config_overrides must be a table of dotted names, {{"flexattention.threshold": 72}}, not {overrides!r}',
    )
    for key, value in overrides.items():
        *parents, leaf = key.split(".")
        node = values
        for parent in parents:
            if node is values and node.get(parent, 0) is None and parent in OPENED:
                node[parent] = dataclasses.asdict(OPENED[parent]())
            require(
                isinstance(node, dict) and isinstance(node.get(parent), dict),
                f"config_overrides names {key!r}, but this configuration has no {parent!r} to change",
            )
            node = node[parent]
        require(leaf in node, f"config_overrides names {key!r}; known there: {', '.join(node)}")
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
        require(isinstance(value, dict), f"{path} must be a table of settings, not {value!r}")
        # Of several kinds of tower, the one that has all these settings.
        tables = [o for o in options if dataclasses.is_dataclass(o)]
        known = (t for t in tables if set(value) <= {field.name for field in dataclasses.fields(t)})
        return from_dict(value, next(known, kind), path + ".")
    if typing.get_origin(kind) is tuple:
        item, *others = typing.get_args(kind)
        allowed, what = {int: (int, "whole numbers"), float: ((int, float), "numbers"), str: (str, "names")}[item]
        require(
            isinstance(value, (list, tuple)) and all(isinstance(v, allowed) for v in value),
            f"{path} must be a list of {what}, not {value!r}",
        )
        count = 1 + len(others)
        require(Ellipsis in others or len(value) == count, f"{path} must be {count} {what}, not {value!r}")
        return tuple(_number(v, item, path) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = _number(value, float, path)
    require(
        isinstance(value, kind) and (kind is bool or not isinstance(value, bool)),
        f"{path} must be {kind.__name__}, not {value!r}",
    )
    return _number(value, kind, path)


def _number(value: Any, kind: type, path: str) -> Any:
    """A value as `kind`; a number must be one that arithmetic here can take."""
    if kind is int:
        require(abs(value) <= LARGEST_INTEGER, f"{path} is beyond {LARGEST_INTEGER}, the largest whole number here")
    if kind is float:
        require(abs(value) <= sys.float_info.max, f"{path} must be a finite number")  # NaN compares as False
    return kind(value)


def preset(name: str) -> VLMConfig:
    """A named configuration.

    "tiny" is for tests, "mini" learns visual search on two CPU cores (docs/mini.md), "7b" and "13b" are LLaVA-1.5 with
    FlexAttention as released.
    """
    require(name in _PRESETS, f"unknown preset {name!r}; known: {', '.join(_PRESETS)}")
    return _PRESETS[name]


# FlexAttention is missing here: it cannot be turned on without projections, which the importer draws where asked to.
OPENED = {
    "crossattention": CrossAttentionConfig,
    "dense": DenseConfig,
    "grouping": GroupingConfig,
    "reduction": ReductionConfig,
}

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
            vocab_size=128,
            width=96,
            mlp_dim=256,
            num_layers=5,
            num_heads=4,
            num_kv_heads=4,
            head_dim=24,
            rope_theta=1e8,  # slow, so that content can be searched for whatever its place
        ),
        flexattention=FlexAttentionConfig(
            zoom_ratio=5, first_layer=1, selection="top_k", revisit=False, cell_grid=6, capacity=4
        ),
        lowres_size=96,
        image_size=480,
        scan_layers=False,
    ),
    "7b": VLMConfig(flexattention=FlexAttentionConfig(), image_size=1008),
    "13b": VLMConfig(
        decoder=DecoderConfig(width=5120, mlp_dim=13824, num_layers=40, num_heads=40, num_kv_heads=40),
        flexattention=FlexAttentionConfig(),
        image_size=1008,
    ),
}
