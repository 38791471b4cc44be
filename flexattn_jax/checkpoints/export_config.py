"""VLMConfig -> config.json and preprocessor_config.json of published checkpoints."""

from __future__ import annotations

from typing import Any

from flexattn_jax import config as configs
from flexattn_jax.checkpoints.source_config import ACTIVATIONS, read_extra
from flexattn_jax.config import VLMConfig


def to_llava(config: VLMConfig, base: dict[str, Any]) -> dict[str, Any]:
    """config.json in liuhaotian's form; what `base` says beside it is kept."""
    if config.image_token_id is not None:
        base = {**base, "image_token_index": config.image_token_id}
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": "vision_tower",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        **base,
        "model_type": base.get("model_type", "llava"),
        **_to_llama(config),
        **_to_extra(config),
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": config.vision.width,
        "mm_vision_select_layer": config.vision.select_layer,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "tie_word_embeddings": config.decoder.tie_embeddings,
    }


def to_hf(config: VLMConfig, base: dict[str, Any]) -> dict[str, Any]:
    """config.json of a LlavaForConditionalGeneration, nested; what `base` says beside it is kept."""
    # An id for the picture is part of the format. One past the vocabulary is never embedded, only replaced.
    image_token = config.decoder.vocab_size if config.image_token_id is None else config.image_token_id
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        **base,
        "model_type": "llava",
        "image_token_index": image_token,
        "image_seq_length": config.num_lowres_tokens,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "pad_token_id": config.pad_token_id,
        "text_config": {**base.get("text_config", {}), "model_type": "llama", **_to_llama(config)},
        "tie_word_embeddings": config.decoder.tie_embeddings,
        "vision_config": {**base.get("vision_config", {}), **to_clip(config)},
        "vision_feature_layer": config.vision.select_layer,
        "vision_feature_select_strategy": "default",
        **_to_extra(config),
    }


def to_clip(config: VLMConfig) -> dict[str, Any]:
    """config.json of the vision tower."""
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "model_type": "clip_vision_model",
        "hidden_size": config.vision.width,
        "intermediate_size": config.vision.mlp_dim,
        "num_hidden_layers": config.vision.num_layers,
        "num_attention_heads": config.vision.num_heads,
        "image_size": config.vision.image_size,
        "patch_size": config.vision.patch_size,
        "hidden_act": names[config.vision.activation],
        "layer_norm_eps": config.vision.norm_eps,
        "num_channels": 3,
    }


def to_processor(config: VLMConfig) -> dict[str, Any]:
    """preprocessor_config.json for the tower's native size."""
    side = config.vision.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": side, "width": side},
        "size": {"shortest_edge": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
        "resample": 3,
        "rescale_factor": 1 / 255,
    }


def _to_llama(config: VLMConfig) -> dict[str, Any]:
    decoder = config.decoder
    return {
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.width,
        "intermediate_size": decoder.mlp_dim,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "head_dim": decoder.head_dim,
        "hidden_act": "silu",
        "rope_theta": decoder.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": decoder.rope_theta},
        "rms_norm_eps": decoder.norm_eps,
        "max_position_embeddings": decoder.max_positions,
        "tie_word_embeddings": decoder.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }


def _to_extra(config: VLMConfig) -> dict[str, Any]:
    """The reference's table of strings, and the whole of ours beside it where the strings would lose something."""
    flex = config.flexattention
    if flex is None:
        return {"extra": {"lowres_size": str(config.lowres_size)}, "flexattention": None}
    extra = {
        "zoom_ratio": str(flex.zoom_ratio),
        "warmup": f"{flex.warmup:g}",
        "lowres_size": str(config.lowres_size),
        "highres_size": str(config.image_size),
        "threshold": str(int(flex.threshold)),
    }
    if flex.selector == "random":
        extra["special"] = "random"
    read_back, _, _ = read_extra(extra, config.vision.image_size, "extra")
    return {"extra": extra, "flexattention": None if read_back == flex else configs.to_dict(flex)}
