"""Which tensor of a published checkpoint is which parameter: one ordered table of rules, read in both directions.

A rule is a regular expression for the published name and a template for ours, in which {1}, {2} stand for its groups.
Groups never nest and the rest of an expression is literal, so the same rule also turns our name into the published
one. Our names are those of the parameter tree, with each layer under its absolute number ("decoder/layers/9/...",
"vision/layers/0/..."); `leaf_tensors` says how they stack up to the leaves of the tree.

Published linear kernels are (out, in), and so are ours. The only transform that moves anything is the patch
embedding's, (Dv, 3, p, p) to (Dv, 3*p*p), which is a reshape.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable

import numpy as np

from flexattn_jax.checkpoints.errors import CheckpointError
from flexattn_jax.config import ConvVisionConfig, VisionConfig, VLMConfig

# Tensors of a vision tower in a folder of its own go by this prefix; a slash is in no published name.
TOWER_FOLDER = "vision_tower"


@dataclasses.dataclass(frozen=True)
class AsIs:
    """The published tensor is the parameter."""

    def source_shape(self, shape: tuple[int, ...], config: VLMConfig) -> tuple[int, ...]:
        """Shape of the published tensor, from the parameter's."""
        return shape

    def load(self, array: np.ndarray) -> np.ndarray:
        """The parameter (a view of `array`)."""
        return array


@dataclasses.dataclass(frozen=True)
class FlattenPatches(AsIs):
    """A convolution of stride p over p x p patches is a linear map of the flattened patch."""

    def source_shape(self, shape: tuple[int, ...], config: VLMConfig) -> tuple[int, ...]:
        side = config.vision.patch_size
        return (shape[0], 3, side, side)

    def load(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(array.shape[0], -1)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Published name <-> our name; see the module's docstring."""

    pattern: str
    name: str
    transform: AsIs = AsIs()

    def to_name(self, source: str) -> str | None:
        """Our name of a published tensor, None when the rule is not about it."""
        match = re.fullmatch(self.pattern, source)
        return match and self.name.format(source, *match.groups())

    def to_source(self, name: str) -> str | None:
        """The published name of our tensor, None when the rule is not about it."""
        inverse, order, parts = _invert(self.pattern, self.name)
        match = inverse.fullmatch(name)
        if match is None:
            return None
        values = dict(zip(order, match.groups(), strict=True))
        return parts[0] + "".join(values[i] + rest for i, rest in enumerate(parts[1:]))


@functools.lru_cache(maxsize=1024)
def _invert(pattern: str, name: str) -> tuple[re.Pattern[str], list[int], list[str]]:
    """A pattern for `name`, which group of `pattern` each of its groups is, and the literal parts of `pattern`."""
    groups = re.findall(r"\(.*?\)", pattern)
    order = [int(number) - 1 for number in re.findall(r"\{(\d)\}", name)]
    literals = [re.escape(part) for part in re.split(r"\{\d\}", name)]
    inverse = literals[0] + "".join(groups[i] + rest for i, rest in zip(order, literals[1:], strict=True))
    parts = [part.replace("\\", "") for part in re.split(r"\(.*?\)", pattern)]
    return re.compile(inverse), order, parts


@dataclasses.dataclass(frozen=True)
class Layout:
    """The prefixes by which one way of publishing differs from another; `family` decides how config.json is written."""

    family: str  # "llava" or "hf"
    decoder: str
    head: str
    connector: tuple[str, str]  # of the two linear layers
    vision: str  # with TOWER_FOLDER/ in front: a folder of its own

    def __post_init__(self):
        prefixes = (self.decoder, self.head, *self.connector, self.vision)
        if self.family not in ("llava", "hf") or not all(re.fullmatch(r"[\w./]*", prefix) for prefix in prefixes):
            raise CheckpointError(f"a layout of family {self.family!r} with the prefixes {prefixes} is not known here.")

    @property
    def tower_in_folder(self) -> bool:
        return self.vision.startswith(TOWER_FOLDER + "/")

    @functools.cached_property
    def rules(self) -> tuple[Rule, ...]:
        """The ordered table; the first rule that matches counts."""
        decoder, head = re.escape(self.decoder), re.escape(self.head)
        first, second = map(re.escape, self.connector)
        vision = re.escape(self.vision)
        layer, block = decoder + r"\.layers\.(\d+)\.", vision + r"encoder\.layers\.(\d+)\."
        return (
            Rule(decoder + r"\.embed_tokens\.weight", "decoder/embedding"),
            Rule(layer + r"input_layernorm\.weight", "decoder/layers/{1}/input_norm/scale"),
            Rule(layer + r"post_attention_layernorm\.weight", "decoder/layers/{1}/post_attention_norm/scale"),
            Rule(
                layer + r"self_attn\.(q_proj|k_proj|v_proj|o_proj)\.weight", "decoder/layers/{1}/self_attn/{2}/kernel"
            ),
            Rule(layer + r"self_attn\.(k_proj_hd|v_proj_hd)\.weight", "decoder/layers/{1}/self_attn/{2}/kernel"),
            Rule(layer + r"mlp\.(gate_proj|up_proj|down_proj)\.weight", "decoder/layers/{1}/mlp/{2}/kernel"),
            Rule(layer + r"self_attn\.rotary_emb\.inv_freq", "decoder/layers/{1}/self_attn/inv_freq"),
            Rule(decoder + r"\.norm\.weight", "decoder/final_norm/scale"),
            Rule(head + r"\.weight", "decoder/lm_head/kernel"),
            Rule(first + r"\.weight", "connector/fc1/kernel"),
            Rule(first + r"\.bias", "connector/fc1/bias"),
            Rule(second + r"\.weight", "connector/fc2/kernel"),
            Rule(second + r"\.bias", "connector/fc2/bias"),
            Rule(vision + r"embeddings\.class_embedding", "vision/class_embedding"),
            Rule(vision + r"embeddings\.patch_embedding\.weight", "vision/patch_embedding/kernel", FlattenPatches()),
            Rule(vision + r"embeddings\.position_embedding\.weight", "vision/position_embedding"),
            Rule(vision + r"embeddings\.position_ids", "vision/position_ids"),
            Rule(vision + r"pre_layrnorm\.weight", "vision/pre_norm/scale"),
            Rule(vision + r"pre_layrnorm\.bias", "vision/pre_norm/bias"),
            Rule(block + r"layer_norm([12])\.weight", "vision/layers/{1}/norm{2}/scale"),
            Rule(block + r"layer_norm([12])\.bias", "vision/layers/{1}/norm{2}/bias"),
            Rule(
                block + r"self_attn\.(q_proj|k_proj|v_proj|out_proj)\.weight", "vision/layers/{1}/self_attn/{2}/kernel"
            ),
            Rule(block + r"self_attn\.(q_proj|k_proj|v_proj|out_proj)\.bias", "vision/layers/{1}/self_attn/{2}/bias"),
            Rule(block + r"mlp\.(fc1|fc2)\.weight", "vision/layers/{1}/mlp/{2}/kernel"),
            Rule(block + r"mlp\.(fc1|fc2)\.bias", "vision/layers/{1}/mlp/{2}/bias"),
            Rule(vision + r"post_layernorm\.weight", "vision/post_norm/scale"),
            Rule(vision + r"post_layernorm\.bias", "vision/post_norm/bias"),
            # The other half of a whole CLIP model, when the tower's folder holds one.
            Rule(TOWER_FOLDER + r"/(text_model\..+|logit_scale|visual_projection.+|text_projection.+)", "clip/{1}"),
        )

    def find(self, source: str) -> tuple[str, AsIs] | None:
        """Our name and the transform of a published tensor, None when no rule knows it."""
        for rule in self.rules:
            name = rule.to_name(source)
            if name is not None:
                return name, rule.transform
        return None

    def source_of(self, name: str) -> tuple[str, AsIs] | None:
        """The published name and the transform of one of our tensors, None when this layout has no place for it."""
        for rule in self.rules:
            source = rule.to_source(name)
            if source is not None and (self.tower_in_folder or not name.startswith("clip/")):
                return source, rule.transform
        return None


# What --layout llava and --layout hf write. Transformers 4 wrote the latter; transformers 5 reads it.
LLAVA = Layout(
    family="llava",
    decoder="model",
    head="lm_head",
    connector=("model.mm_projector.0", "model.mm_projector.2"),
    vision="model.vision_tower.vision_tower.vision_model.",
)
HF = Layout(
    family="hf",
    decoder="language_model.model",
    head="language_model.lm_head",
    connector=("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
    vision="vision_tower.vision_model.",
)
EXPORTS = {"llava": LLAVA, "hf": HF}

# Prefixes in use, most specific first. Transformers 5 dropped `vision_model.` and writes either its own names or, by
# default, those of transformers 4 for the rest.
_DECODERS = {
    "llava": (("model", "lm_head"),),
    "hf": (("language_model.model", "language_model.lm_head"), ("model.language_model", "lm_head")),
}
_CONNECTORS = {
    "llava": ("model.mm_projector.{}",),
    "hf": ("multi_modal_projector.{}", "model.multi_modal_projector.{}"),
}
_LINEARS = {"llava": ("0", "2"), "hf": ("linear_1", "linear_2")}
_TOWERS = {
    "llava": ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.vision_tower."),
    "hf": ("vision_tower.vision_model.", "vision_tower.", "model.vision_tower.vision_model.", "model.vision_tower."),
}
_OWN_TOWERS = (TOWER_FOLDER + "/vision_model.", TOWER_FOLDER + "/")
_TOWER_MARK = "embeddings.class_embedding"


def detect_layout(family: str, sources: Iterable[str]) -> Layout:
    """The layout of `family` ("llava" or "hf") whose prefixes `sources`, published names, use.

    Names of a tower's own folder come with TOWER_FOLDER/ in front; a tower inside the checkpoint goes before it.
    """
    sources = set(sources)
    decoder, head = next(
        (pair for pair in _DECODERS[family] if pair[0] + ".embed_tokens.weight" in sources), _DECODERS[family][0]
    )
    first, second = _LINEARS[family]
    connector = next(
        (form for form in _CONNECTORS[family] if form.format(first) + ".weight" in sources), _CONNECTORS[family][0]
    )
    vision = next(
        (tower for tower in _TOWERS[family] + _OWN_TOWERS if tower + _TOWER_MARK in sources), _TOWERS[family][0]
    )
    return Layout(family, decoder, head, (connector.format(first), connector.format(second)), vision)


def has_tower(family: str, sources: Iterable[str]) -> bool:
    """Whether the vision tower is among the published names of a checkpoint."""
    sources = set(sources)
    return any(tower + _TOWER_MARK in sources for tower in _TOWERS[family])


def tensor_shapes(config: VLMConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that the model reads, one entry a layer, by our name."""
    vision, decoder = config.vision, config.decoder
    shapes = (_conv_tower if isinstance(vision, ConvVisionConfig) else _clip_tower)(vision) | {
        "connector/fc1/kernel": (decoder.width, vision.width),
        "connector/fc1/bias": (decoder.width,),
        "connector/fc2/kernel": (decoder.width, decoder.width),
        "connector/fc2/bias": (decoder.width,),
        "decoder/embedding": (decoder.vocab_size, decoder.width),
        "decoder/final_norm/scale": (decoder.width,),
    }
    if not decoder.tie_embeddings:
        shapes["decoder/lm_head/kernel"] = (decoder.vocab_size, decoder.width)
    for i in range(decoder.num_layers):
        shapes |= {f"decoder/layers/{i}/{name}": shape for name, shape in _decoder_layer(config).items()}
        if i >= config.num_plain_layers:
            for name in ("k_proj_hd", "v_proj_hd"):
                shapes[f"decoder/layers/{i}/self_attn/{name}/kernel"] = _key_value_shape(config)
        if config.crossattention is not None:
            shapes |= {f"decoder/layers/{i}/cross_attn/{name}": s for name, s in _cross_attention(config).items()}
    if config.grouping is not None:
        width = config.vision.width
        shapes["grouping/semantic_tokens"] = (config.grouping.groups, width)
        shapes |= {f"grouping/{part}_proj/kernel": (width, width) for part in "qkvo"}
    if config.crossattention is not None:
        shapes["highres/positions"] = (config.highres_grid**2, _cross_attention(config)["k_proj/kernel"][1])
    return shapes


def begins_at_zero(leaf: str) -> bool:
    """Whether a leaf of the parameter tree is drawn as zeros, so that training begins with the model without it."""
    return leaf == "highres/positions" or leaf.endswith("/cross_attn/o_proj/kernel")


def _clip_tower(vision: VisionConfig) -> dict[str, tuple[int, ...]]:
    width, hidden = vision.width, vision.mlp_dim
    block: dict[str, tuple[int, ...]] = {}
    for name in ("norm1", "norm2"):
        block |= {f"{name}/scale": (width,), f"{name}/bias": (width,)}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        block |= {f"self_attn/{name}/kernel": (width, width), f"self_attn/{name}/bias": (width,)}
    block |= {"mlp/fc1/kernel": (hidden, width), "mlp/fc1/bias": (hidden,)}
    block |= {"mlp/fc2/kernel": (width, hidden), "mlp/fc2/bias": (width,)}
    return {
        "vision/patch_embedding/kernel": (width, 3 * vision.patch_size**2),
        "vision/class_embedding": (width,),
        "vision/position_embedding": (vision.grid**2 + 1, width),
        "vision/pre_norm/scale": (width,),
        "vision/pre_norm/bias": (width,),
    } | {f"vision/layers/{i}/{name}": shape for i in range(vision.num_blocks) for name, shape in block.items()}


def _conv_tower(vision: ConvVisionConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    channels = 3
    for i, (width, stride) in enumerate(zip(vision.stem_widths, vision.stem_strides, strict=True)):
        shapes |= {
            f"vision/stem_{i}/kernel": (2 * stride, 2 * stride, channels, width),
            f"vision/stem_{i}/bias": (width,),
        }
        shapes |= {f"vision/stem_norm_{i}/scale": (width,), f"vision/stem_norm_{i}/bias": (width,)}
        channels = width
    shapes |= {"vision/post_norm/scale": (channels,), "vision/post_norm/bias": (channels,)}
    for i in range(vision.num_layers):
        block = f"vision/layers/{i}"
        shapes |= {f"{block}/norm/scale": (channels,), f"{block}/norm/bias": (channels,)}
        shapes |= {f"{block}/conv/kernel": (3, 3, channels, vision.mlp_dim), f"{block}/conv/bias": (vision.mlp_dim,)}
        shapes |= {f"{block}/fc/kernel": (channels, vision.mlp_dim), f"{block}/fc/bias": (channels,)}
    return shapes


def _key_value_shape(config: VLMConfig) -> tuple[int, int]:
    return (config.decoder.num_kv_heads * config.decoder.head_dim, config.decoder.width)


def _cross_attention(config: VLMConfig) -> dict[str, tuple[int, ...]]:
    cross, width = config.crossattention, config.decoder.width
    source = config.vision.width if cross.source == "tower" else width
    return {
        "norm/scale": (width,),
        "q_proj/kernel": (cross.width, width),
        "k_proj/kernel": (cross.width, source),
        "v_proj/kernel": (cross.width, source),
        "o_proj/kernel": (width, cross.width),
    }


def _decoder_layer(config: VLMConfig) -> dict[str, tuple[int, ...]]:
    width, hidden = config.decoder.width, config.decoder.mlp_dim
    query = config.decoder.num_heads * config.decoder.head_dim
    return {
        "input_norm/scale": (width,),
        "post_attention_norm/scale": (width,),
        "self_attn/q_proj/kernel": (query, width),
        "self_attn/k_proj/kernel": _key_value_shape(config),
        "self_attn/v_proj/kernel": _key_value_shape(config),
        "self_attn/o_proj/kernel": (width, query),
        "mlp/gate_proj/kernel": (hidden, width),
        "mlp/up_proj/kernel": (hidden, width),
        "mlp/down_proj/kernel": (width, hidden),
    }


def leaf_of(name: str, config: VLMConfig) -> tuple[str, int | None]:
    """Leaf of the parameter tree that holds tensor `name`, and its row there (None: the tensor is the whole leaf)."""
    match = re.fullmatch(r"(vision|decoder)/layers/(\d+)/(.+)", name)
    if match is None:
        return name, None
    part, layer, rest = match[1], int(match[2]), match[3]
    if part == "vision":
        return f"vision/blocks/{rest}", layer
    if "_proj_hd/" in rest:
        return f"decoder/highres/{rest.removeprefix('self_attn/')}", layer - config.num_plain_layers
    segment = next(s for s in reversed(config.segments) if layer >= s.first_layer)
    return f"decoder/{segment.name}/{rest}", layer - segment.first_layer


def leaf_tensors(config: VLMConfig) -> dict[str, list[str]]:
    """{leaf of the stacked parameter tree: its tensors, one a layer in order (or the one tensor that it is)}."""
    leaves: dict[str, list[str]] = {}
    for name in tensor_shapes(config):
        leaves.setdefault(leaf_of(name, config)[0], []).append(name)
    return leaves


def leaf_shapes(config: VLMConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf of the stacked parameter tree, by its path ("decoder/layers/mlp/up_proj/kernel")."""
    shapes = tensor_shapes(config)
    return {
        leaf: shapes[names[0]] if leaf in shapes else (len(names), *shapes[names[0]])
        for leaf, names in leaf_tensors(config).items()
    }


def is_known(name: str, config: VLMConfig) -> bool:
    """Whether a tensor of our name belongs to the model at all, read or not (a layer beyond the last does not)."""
    match = re.match(r"(vision|decoder)/layers/(\d+)/", name)
    if match is None:
        return True
    return int(match[2]) < (config.vision if match[1] == "vision" else config.decoder).num_layers


def export_layout(kind: str, source: Layout | None) -> Layout:
    """The layout to export to: the one that was imported when it is of that family, else the family's usual one."""
    if kind not in EXPORTS:
        raise CheckpointError(f"--layout is {kind!r}; it must be one of {', '.join(EXPORTS)}.")
    return source if source is not None and source.family == kind else EXPORTS[kind]
