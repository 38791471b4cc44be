import json

import pytest
from checkpoints import published

from flexattn_jax.checkpoints import export_config
from flexattn_jax.checkpoints.errors import CheckpointError
from flexattn_jax.checkpoints.source_config import (
    KNOWN_TOWERS,
    config_from_hf,
    config_from_llava,
    config_from_parts,
    family_of,
)
from flexattn_jax.config import override, preset

VICUNA_7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
    "hidden_act": "silu", "rope_scaling": None, "pretraining_tp": 1, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MM = {
    "mm_hidden_size": 1024, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch", "mm_use_im_start_end": False, "mm_resampler_type": None,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336", "image_aspect_ratio": "pad",
}  # fmt: skip
RELEASED = {"zoom_ratio": "3", "warmup": "10", "lowres_size": "336", "highres_size": "1008", "threshold": "48"}
TOWER = KNOWN_TOWERS["openai/clip-vit-large-patch14-336"]
# llava-hf/llava-1.5-7b-hf as published: what equals transformers' defaults is left out.
LLAVA_HF = {
    "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 32000,
    "pad_token_id": 32001, "projector_hidden_act": "gelu", "tie_word_embeddings": False,
    "text_config": {
        "model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064,
    },
    "vision_config": {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
    },
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
}  # fmt: skip


def llava(**changes):
    values = {"model_type": "llava", **VICUNA_7B, **MM, **changes}
    return config_from_llava(values, TOWER, {}, "config.json", "tower/config.json")


def hf(text=None, vision=None, **changes):
    values = {**LLAVA_HF, **changes}
    values["text_config"] = {**values["text_config"], **(text or {})}
    values["vision_config"] = {**values["vision_config"], **(vision or {})}
    return config_from_hf(values, {}, "config.json")


def test_llava_15():
    assert llava() == override(preset("7b"), {"flexattention": None, "image_size": 336})


def test_released_flexattention():
    assert llava(extra=RELEASED) == preset("7b")


def test_llava_hf():
    expected = override(preset("7b"), {"flexattention": None, "image_size": 336, "decoder.vocab_size": 32064})
    assert hf() == override(expected, {"image_token_id": 32000, "pad_token_id": 32001})


def test_transformers_5_spelling():
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "head_dim": 64, "num_key_value_heads": 8}
    config = hf(text=rope, image_token_id=7, image_token_index=None)
    assert (config.decoder.rope_theta, config.decoder.head_dim, config.decoder.num_kv_heads) == (5e5, 64, 8)
    assert config.image_token_id == 7


@pytest.mark.parametrize("where", ["top", "text"])
def test_tied_embeddings(where):
    config = hf(tie_word_embeddings=True) if where == "top" else hf(text={"tie_word_embeddings": True})
    assert config.decoder.tie_embeddings


def test_defaults_of_the_reference():
    flex = llava(extra={"zoom_ratio": "3"})
    assert (flex.flexattention.threshold, flex.flexattention.warmup, flex.flexattention.selector) == (
        64,
        3,
        "attention",
    )
    assert (flex.lowres_size, flex.image_size) == (336, 1008)
    assert llava(extra={**RELEASED, "special": "random"}).flexattention.selector == "random"
    assert llava(extra={"lowres_size": "168"}).lowres_size == 168
    assert llava(extra={}).flexattention is None
    zoom4 = llava(extra={"zoom_ratio": "4", "threshold": "255", "warmup": "2.5"})
    assert (zoom4.image_size, zoom4.flexattention.threshold, zoom4.flexattention.warmup) == (1344, 255, 2.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling .*rotary"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters .*rotary"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"mm_projector_type": "linear"}, 'mm_projector_type is "linear"'),
        ({"mm_projector_type": None}, "mm_projector_type is null"),
        ({"mm_vision_select_feature": "cls_patch"}, "cls_patch"),
        ({"image_aspect_ratio": "anyres"}, "anyres"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "spatial_unpad"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"mm_hidden_size": 768}, "not the tower"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'; an integer"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 5}, "num_kv_heads 5"),
        ({"num_attention_heads": 30, "num_key_value_heads": 30}, "no multiple"),
        ({"eos_token_id": [2, 3]}, "eos_token_id"),
        ({"mm_vision_select_layer": -40}, "select_layer"),
        ({"extra": {**RELEASED, "threshold": "48.5"}}, "threshold is '48.5'.*whole number"),
        ({"extra": {**RELEASED, "threshold": 48.5}}, "threshold is 48.5"),
        ({"extra": {**RELEASED, "treshold": "48"}}, "unknown keys treshold"),
        ({"extra": {**RELEASED, "special": "all"}}, "special"),
        ({"extra": {**RELEASED, "highres_size": "1000"}}, "image_size 1000 must be lowres_size 336"),
        ({"extra": {**RELEASED, "zoom_ratio": "0"}}, "zoom_ratio"),
        ({"extra": {**RELEASED, "lowres_size": "672", "highres_size": "2016"}}, "native 336"),
        ({"extra": ["zoom_ratio"]}, "extra"),
    ],
)
def test_what_is_not_supported_is_named(changes, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        llava(**changes)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_select_strategy": "full"}, "full"),
        ({"vision_feature_layer": [-2, -5]}, "vision_feature_layer"),
        ({"projector_hidden_act": "relu"}, "relu"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias"),
        ({"text": {"model_type": "mistral"}}, "mistral"),
        ({"text": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}}, "llama3"),
        ({"vision": {"model_type": "siglip_vision_model"}}, "siglip"),
        ({"vision": {"hidden_act": "relu"}}, "hidden_act"),
        ({"vision": {"num_channels": 1}}, "num_channels"),
        ({"vision": {"image_size": 330}}, "image_size 330"),
    ],
)
def test_what_is_not_supported_is_named_in_hf(changes, message):
    with pytest.raises(CheckpointError, match=message):
        hf(**changes)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({"do_normalize": False}, "do_normalize"),
        ({"resample": 2}, "resample"),
        ({"crop_size": {"height": 224, "width": 224}}, "crop_size"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_std": "x"}, "image_std"),
        ({"image_processor": {"do_rescale": False}}, "do_rescale"),
    ],
)
def test_an_image_processor_that_makes_other_pixels(processor, message):
    with pytest.raises(CheckpointError, match=message):
        config_from_hf(LLAVA_HF, processor, "config.json")


def test_mean_and_deviation_come_from_the_image_processor():
    processor = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "crop_size": 336}
    for config in (
        config_from_hf(LLAVA_HF, {"image_processor": processor}, "config.json"),
        config_from_llava({**VICUNA_7B, **MM}, TOWER, processor, "config.json", "tower"),
    ):
        assert (config.image_mean, config.image_std) == ((0.5,) * 3, (0.25,) * 3)


def test_parts_of_a_golden_case():
    parts = json.loads(json.dumps([published.LLAMA, published.CLIP, published.MM, published.EXTRA]))
    config = config_from_parts(*parts)
    assert (config.lowres_size, config.image_size, config.highres_grid) == (28, 140, 10)
    assert (config.decoder.head_dim, config.num_plain_layers, config.num_flex_layers) == (6, 8, 2)
    assert config_from_parts(*parts[:3], {"lowres_size": "28"}).flexattention is None
    whole = {"model_type": "clip", "vision_config": parts[1]}
    assert config_from_parts(parts[0], whole, *parts[2:]) == config


@pytest.mark.parametrize(
    ("values", "family"),
    [
        ({"model_type": "llava", "mm_hidden_size": 1}, "llava"),
        ({"model_type": "llava_llama", "mm_hidden_size": 1}, "llava"),
        (LLAVA_HF, "hf"),
        ({"model_type": "llava", "text_config": {}}, "hf"),
        ({"model_type": "llava_next", "text_config": {}}, None),
        ({"model_type": "llama"}, None),
        ({"model_type": "llava"}, None),
        ({}, None),
    ],
)
def test_family(values, family):
    if family is None:
        with pytest.raises(CheckpointError, match="supported are"):
            family_of(values)
    else:
        assert family_of(values) == family


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"flexattention": None, "image_size": 336},
        {"flexattention": None, "image_size": 336, "lowres_size": 168},
        {"flexattention.threshold": 48.5},
        {"flexattention.selector": "random"},
        {"flexattention.first_layer": 12, "flexattention.capacity": 9, "flexattention.variant": "paper"},
        {"decoder.num_kv_heads": 8, "decoder.head_dim": 64, "decoder.tie_embeddings": True, "image_token_id": 5},
        {"vision.activation": "gelu_tanh", "vision.num_layers": 26, "image_mean": [0.5, 0.5, 0.5]},
    ],
)
def test_what_is_exported_reads_back(changes):
    config = override(preset("7b"), changes)
    clip, processor = export_config.to_clip(config), export_config.to_processor(config)
    values = json.loads(json.dumps(export_config.to_llava(config, {})))
    assert config_from_llava(values, clip, processor, "config.json", "tower") == config
    values = json.loads(json.dumps(export_config.to_hf(config, {})))
    image_token = 32000 if config.image_token_id is None else config.image_token_id
    assert config_from_hf(values, processor, "config.json") == override(config, {"image_token_id": image_token})
