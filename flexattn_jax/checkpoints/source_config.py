"""config.json of published checkpoints -> VLMConfig.

Only what the model can honour is accepted. A setting that would change the numbers and is not implemented here (scaled
rotary embeddings, biases in the decoder, other connectors, "anyres" pictures ...) is an error, never ignored.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from flexattn_jax import config as configs
from flexattn_jax import files
from flexattn_jax.checkpoints.errors import CheckpointError
from flexattn_jax.config import DecoderConfig, FlexAttentionConfig, VisionConfig, VLMConfig

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_EXTRA_KEYS = ("zoom_ratio", "threshold", "warmup", "lowres_size", "highres_size", "special")
_CLIP_LARGE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "patch_size": 14, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "model_type": "clip_vision_model",
}  # fmt: skip
# The towers that LLaVA names without shipping their config.json.
KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14-336": _CLIP_LARGE | {"image_size": 336},
    "openai/clip-vit-large-patch14": _CLIP_LARGE | {"image_size": 224},
}
_REFERENCE_LOWRES_SIZE = 336


class Fields:
    """A table of JSON settings whose every reading is checked; null counts as absent, as transformers has it."""

    def __init__(self, values: Any, where: str):
        if not isinstance(values, dict):
            raise CheckpointError(f"{where}: a JSON table is expected, not {values!r}.")
        self.values, self.where = values, where

    def get(self, key: str, default: Any, kinds: tuple[type, ...], expected: str) -> Any:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise CheckpointError(f"{self.where}: {key} is {value!r}; {expected} is expected.")
        return value

    def integer(self, key: str, default: int | None = None) -> Any:
        return self.get(key, default, (int,), "an integer")

    def size(self, key: str, default: int) -> int:
        value = self.integer(key, default)
        if value < 1:
            raise CheckpointError(f"{self.where}: {key} is {value}; it must be at least 1.")
        return value

    def number(self, key: str, default: float) -> float:
        return float(self.get(key, default, (int, float), "a number"))

    def text(self, key: str, default: str | None = None) -> Any:
        return self.get(key, default, (str,), "a text")

    def flag(self, key: str, default: bool = False) -> bool:
        return self.get(key, default, (bool,), "true or false")

    def table(self, key: str) -> Fields:
        return Fields(self.get(key, {}, (dict,), "a table"), f"{self.where}: {key}")

    def triple(self, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
        value = self.get(key, default, (list, tuple), "a list of 3 numbers")
        if len(value) != 3 or not all(isinstance(v, (int, float)) for v in value):
            raise CheckpointError(f"{self.where}: {key} is {value!r}; a list of 3 numbers is expected.")
        return tuple(float(v) for v in value)

    def require(self, key: str, allowed: tuple[Any, ...], default: Any) -> None:
        """Refuse a setting that is none of `allowed`."""
        value = self.values.get(key)
        if (default if value is None else value) not in allowed:
            known = " or ".join(json.dumps(v) for v in allowed)
            raise CheckpointError(
                f"{self.where}: {key} is {json.dumps(value)}, which is not supported; only {known} is implemented."
            )


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON table. Raises CheckpointError when the file is missing or is something else."""
    try:
        values = files.read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a checkpoint folder needs it.") from None
    except files.FileError as error:
        raise CheckpointError(f"{path} {error}. Fetch it again.") from None
    return Fields(values, str(path)).values


def family_of(values: dict[str, Any], where: str = "config.json") -> str:
    """ "hf" or "llava": both call themselves model_type "llava", but only Hugging Face's nests its halves."""
    fields = Fields(values, where)
    kind = fields.text("model_type", "")
    names = fields.get("architectures", [], (list,), "a list")
    if kind == "llava" and ("text_config" in values or "LlavaForConditionalGeneration" in names):
        return "hf"
    if kind in ("llava", "llava_llama") and any(key.startswith("mm_") for key in values):
        return "llava"
    raise CheckpointError(
        f"{where} describes a model of type {kind!r} (architectures: {', '.join(map(str, names)) or 'none named'}); "
        "supported are LLaVA-1.5 checkpoints as liuhaotian or FlexAttention's authors publish them (model_type llava "
        "or llava_llama, with mm_ settings) and Hugging Face's LlavaForConditionalGeneration with a LLaMA decoder."
    )


def config_from_parts(
    llama_config: dict[str, Any],
    clip_config: dict[str, Any],
    mm_config: dict[str, Any],
    extra: dict[str, Any] | None,
    *,
    where: str = "config.json",
    tower_where: str = "the vision tower's config.json",
) -> VLMConfig:
    """The configuration that the reference builds from its parts (float32).

    Args:
      llama_config: the decoder's settings, with the names of transformers' LlamaConfig and its defaults.
      clip_config: the tower's, with the names of CLIPVisionConfig (or of a whole CLIPConfig, which nests it).
      mm_config: LLaVA's `mm_*` settings, `image_aspect_ratio`, and `image_mean` / `image_std` where known.
      extra: the table of strings whose key `zoom_ratio` switches FlexAttention on; None or {} for plain LLaVA-1.5.

    Raises CheckpointError for a setting that is malformed or not supported.
    """
    mm = Fields(mm_config, where)
    mm.require("mm_projector_type", ("mlp2x_gelu",), "linear")
    mm.require("mm_vision_select_feature", ("patch",), "patch")
    mm.require("mm_patch_merge_type", ("flat",), "flat")
    mm.require("image_aspect_ratio", ("pad",), "pad")
    mm.require("mm_use_im_start_end", (False,), False)
    mm.require("mm_resampler_type", (None,), None)
    mm.require("s2", (False,), False)
    vision = _vision_config(Fields(clip_config, tower_where), mm.integer("mm_vision_select_layer", -2))
    if mm.size("mm_hidden_size", vision.width) != vision.width:
        raise CheckpointError(
            f"{where}: mm_hidden_size is {mm_config['mm_hidden_size']}, but the vision tower is {vision.width} wide "
            f"({tower_where}); this is not the tower the checkpoint was trained with."
        )
    return _assemble(
        where=where,
        vision=vision,
        llama=Fields(llama_config, where),
        extra=extra,
        flexattention=mm_config.get("flexattention"),
        image_mean=mm.triple("image_mean", VLMConfig.image_mean),
        image_std=mm.triple("image_std", VLMConfig.image_std),
        tie_embeddings=Fields(llama_config, where).flag("tie_word_embeddings"),
        image_token_id=_image_token_id(mm, configs.IMAGE_PLACEHOLDER),
    )


def config_from_llava(
    values: dict[str, Any], clip: dict[str, Any], processor: dict[str, Any], where: str, tower_where: str
) -> VLMConfig:
    """The configuration of a checkpoint as liuhaotian publishes it: `values` is its config.json, `clip` and
    `processor` the tower's config.json and preprocessor_config.json ({} when there is none)."""
    native = _vision_config(Fields(clip, tower_where), 0).image_size
    image = _processor_settings(processor, native, tower_where)
    return config_from_parts(values, clip, image | values, values.get("extra"), where=where, tower_where=tower_where)


def config_from_hf(values: dict[str, Any], processor: dict[str, Any], where: str) -> VLMConfig:
    """The configuration of a Hugging Face LlavaForConditionalGeneration: its config.json and, where there is one,
    its preprocessor_config.json (transformers 5: the `image_processor` of processor_config.json)."""
    fields = Fields(values, where)
    fields.require("vision_feature_select_strategy", ("default",), "default")
    fields.require("projector_hidden_act", ("gelu",), "gelu")
    fields.require("multimodal_projector_bias", (True,), True)
    text = fields.table("text_config")
    text.require("model_type", ("llama",), "llama")
    clip = (
        fields.table("vision_config")
        if "vision_config" in values
        else Fields(KNOWN_TOWERS["openai/clip-vit-large-patch14-336"], where)
    )
    # Special ids stand at the top in some versions, in text_config in others.
    special = {k: values.get(k) for k in ("bos_token_id", "eos_token_id", "pad_token_id") if values.get(k) is not None}
    llama = Fields(text.values | special, text.where)
    vision = _vision_config(clip, fields.integer("vision_feature_layer", -2))
    image = Fields(_processor_settings(processor, vision.image_size, where), where)
    return _assemble(
        where=where,
        vision=vision,
        llama=llama,
        extra=values.get("extra"),
        flexattention=values.get("flexattention"),
        image_mean=image.triple("image_mean", VLMConfig.image_mean),
        image_std=image.triple("image_std", VLMConfig.image_std),
        tie_embeddings=fields.flag("tie_word_embeddings") or text.flag("tie_word_embeddings"),
        image_token_id=_image_token_id(fields, fields.integer("image_token_id", 32000)),
    )


def _assemble(
    *,
    where: str,
    vision: VisionConfig,
    llama: Fields,
    extra: dict[str, Any] | None,
    flexattention: dict[str, Any] | None,
    tie_embeddings: bool,
    **rest: Any,
) -> VLMConfig:
    try:
        flex, lowres_size, image_size = read_extra(extra or {}, vision.image_size, f"{where}: extra")
        if flexattention is not None:
            # Written by this library's export where `extra` has no words for the configuration.
            flex = configs.from_dict(flexattention, FlexAttentionConfig, "flexattention.")
            image_size = lowres_size * flex.zoom_ratio
        return VLMConfig(
            vision=vision,
            decoder=_decoder_config(llama, tie_embeddings),
            flexattention=flex,
            lowres_size=lowres_size,
            image_size=image_size,
            bos_token_id=_token_id(llama, "bos_token_id", 1),
            eos_token_id=_token_id(llama, "eos_token_id", 2),
            pad_token_id=_token_id(llama, "pad_token_id", 0),
            **rest,
        )
    except configs.ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None


def _image_token_id(fields: Fields, default: int) -> int | None:
    value = fields.integer("image_token_index", default)
    return value if value >= 0 else None  # LLaVA's place-holder -200 is no id of the vocabulary


def _token_id(llama: Fields, key: str, default: int) -> int:
    value = llama.integer(key, default)
    return value if value >= 0 else default  # -1 stands for "none" in early LLaMA conversions


def _decoder_config(llama: Fields, tie_embeddings: bool) -> DecoderConfig:
    llama.require("hidden_act", ("silu",), "silu")
    llama.require("attention_bias", (False,), False)
    llama.require("mlp_bias", (False,), False)
    llama.require("quantization_config", (None,), None)
    theta = llama.number("rope_theta", 10000.0)
    for key in ("rope_scaling", "rope_parameters"):
        rope = llama.table(key)
        kind = rope.text("rope_type", rope.text("type", "default"))
        if kind != "default" or rope.number("partial_rotary_factor", 1.0) != 1.0 or rope.number("factor", 1.0) != 1.0:
            raise CheckpointError(
                f"{llama.where}: {key} is {json.dumps(rope.values)}; scaled or partial rotary embeddings are not "
                'supported, only the "default" kind with its rope_theta is implemented.'
            )
        theta = rope.number("rope_theta", theta)
    width, heads = llama.size("hidden_size", 4096), llama.size("num_attention_heads", 32)
    if llama.integer("head_dim") is None and width % heads:
        raise CheckpointError(f"{llama.where}: hidden_size {width} is no multiple of num_attention_heads {heads}.")
    return DecoderConfig(
        vocab_size=llama.size("vocab_size", 32000),
        width=width,
        mlp_dim=llama.size("intermediate_size", 11008),
        num_layers=llama.size("num_hidden_layers", 32),
        num_heads=heads,
        num_kv_heads=llama.size("num_key_value_heads", heads),
        head_dim=llama.size("head_dim", width // heads),
        rope_theta=theta,
        norm_eps=llama.number("rms_norm_eps", 1e-6),
        tie_embeddings=tie_embeddings,
        max_positions=llama.size("max_position_embeddings", 2048),
    )


def _vision_config(clip: Fields, select_layer: int) -> VisionConfig:
    if "vision_config" in clip.values:
        clip = clip.table("vision_config")
    clip.require("model_type", ("clip_vision_model",), "clip_vision_model")
    clip.require("num_channels", (3,), 3)
    clip.require("hidden_act", tuple(ACTIVATIONS), "quick_gelu")
    try:
        return VisionConfig(
            image_size=clip.size("image_size", 224),
            patch_size=clip.size("patch_size", 32),
            width=clip.size("hidden_size", 768),
            mlp_dim=clip.size("intermediate_size", 3072),
            num_layers=clip.size("num_hidden_layers", 12),
            num_heads=clip.size("num_attention_heads", 12),
            norm_eps=clip.number("layer_norm_eps", 1e-5),
            activation=ACTIVATIONS[clip.text("hidden_act", "quick_gelu")],
            select_layer=select_layer,
        )
    except configs.ConfigError as error:
        raise CheckpointError(f"{clip.where}: {error}.") from None


def read_extra(extra: Any, native: int, where: str) -> tuple[FlexAttentionConfig | None, int, int]:
    """FlexAttention, lowres_size and image_size from the reference's table of strings and its defaults."""
    fields = Fields(extra, where)
    unknown = sorted(set(extra) - set(_EXTRA_KEYS))
    if unknown:
        raise CheckpointError(f"{where} has unknown keys {', '.join(unknown)}; known: {', '.join(_EXTRA_KEYS)}.")

    def parse(key: str, kind: type, default: Any) -> Any:
        value = fields.get(key, default, (str, int) if kind is int else (str, int, float), "a number as a text")
        try:
            return kind(value)
        except ValueError:
            what = "whole number" if kind is int else "number"
            raise CheckpointError(f"{where}: {key} is {value!r}; the reference reads a {what} here.") from None

    if "zoom_ratio" not in extra:
        # Without FlexAttention the picture is the tower's own size; LLaVA-1.5 itself has no lowres_size at all.
        return None, parse("lowres_size", int, native), native
    fields.require("special", ("random",), "random")
    zoom, lowres = parse("zoom_ratio", int, None), parse("lowres_size", int, _REFERENCE_LOWRES_SIZE)
    flex = FlexAttentionConfig(
        zoom_ratio=zoom,
        threshold=float(parse("threshold", int, 64)),
        warmup=parse("warmup", float, 3.0),
        selector="random" if extra.get("special") == "random" else "attention",
    )
    return flex, lowres, parse("highres_size", int, native * zoom)


def _processor_settings(processor: dict[str, Any], native: int, where: str) -> dict[str, Any]:
    """Mean and deviation from an image processor's settings; anything that would need other pixels is an error."""
    fields = Fields(processor, f"{where} (its image processor)")
    if "image_processor" in processor:
        fields = fields.table("image_processor")
    for key in ("do_rescale", "do_normalize", "do_resize"):
        fields.require(key, (True,), True)
    fields.require("resample", (3,), 3)
    crop = fields.values.get("crop_size")
    side = crop.get("height") if isinstance(crop, dict) else crop
    if side is not None and side != native:
        raise CheckpointError(f"{fields.where}: crop_size is {json.dumps(crop)}, but the tower reads {native} pixels.")
    return {key: fields.values[key] for key in ("image_mean", "image_std") if fields.values.get(key) is not None}
