"""Tiny published checkpoints; their names are spelled out here and not taken from the rule table."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np
import safetensors.numpy

LAYERS, HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 10, 16, 24, 4, 2, 6, 20
TOWER_LAYERS, TOWER_HIDDEN, TOWER_MLP, IMAGE, PATCH = 3, 8, 12, 28, 14
LLAMA = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": TOWER_HIDDEN, "intermediate_size": TOWER_MLP,
    "num_hidden_layers": TOWER_LAYERS, "num_attention_heads": 2, "image_size": IMAGE, "patch_size": PATCH,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
MM = {
    "mm_hidden_size": TOWER_HIDDEN, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad", "mm_vision_tower": "somewhere/else",
}  # fmt: skip
EXTRA = {"zoom_ratio": "5", "warmup": "10", "lowres_size": "28", "highres_size": "140", "threshold": "48"}
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def _draw(rng: np.random.Generator, shapes: dict[str, tuple[int, ...]], dtype: str) -> dict[str, np.ndarray]:
    return {name: rng.standard_normal(shape).astype(DTYPES[dtype]) for name, shape in shapes.items()}


def decoder_tensors(rng, dtype: str, *, prefix="model", head="lm_head", flex=False, tied=False) -> dict:
    shapes = {f"{prefix}.embed_tokens.weight": (VOCAB, HIDDEN), f"{prefix}.norm.weight": (HIDDEN,)}
    if not tied:
        shapes[f"{head}.weight"] = (VOCAB, HIDDEN)
    key_value = ("k_proj", "v_proj", "k_proj_hd", "v_proj_hd") if flex else ("k_proj", "v_proj")
    for i in range(LAYERS):
        layer = f"{prefix}.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (HIDDEN,)
        shapes[f"{layer}.self_attn.q_proj.weight"] = (HEADS * HEAD_DIM, HIDDEN)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
        for name in key_value:
            shapes[f"{layer}.self_attn.{name}.weight"] = (KV_HEADS * HEAD_DIM, HIDDEN)
        shapes[f"{layer}.mlp.gate_proj.weight"] = shapes[f"{layer}.mlp.up_proj.weight"] = (MLP, HIDDEN)
        shapes[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, MLP)
    return _draw(rng, shapes, dtype)


def connector_tensors(rng, dtype: str, *, first="model.mm_projector.0", second="model.mm_projector.2") -> dict:
    shapes = {f"{first}.weight": (HIDDEN, TOWER_HIDDEN), f"{first}.bias": (HIDDEN,)}
    return _draw(rng, shapes | {f"{second}.weight": (HIDDEN, HIDDEN), f"{second}.bias": (HIDDEN,)}, dtype)


def tower_tensors(rng, dtype: str, *, prefix: str) -> dict:
    width, hidden = TOWER_HIDDEN, TOWER_MLP
    shapes = {
        f"{prefix}embeddings.class_embedding": (width,),
        f"{prefix}embeddings.patch_embedding.weight": (width, 3, PATCH, PATCH),
        f"{prefix}embeddings.position_embedding.weight": ((IMAGE // PATCH) ** 2 + 1, width),
    }
    linears = {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    linears |= {f"self_attn.{name}": (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    norms = [f"{prefix}pre_layrnorm", f"{prefix}post_layernorm"]
    for i in range(TOWER_LAYERS):
        norms += [f"{prefix}encoder.layers.{i}.layer_norm1", f"{prefix}encoder.layers.{i}.layer_norm2"]
        for name, shape in linears.items():
            shapes[f"{prefix}encoder.layers.{i}.{name}.weight"] = shape
            shapes[f"{prefix}encoder.layers.{i}.{name}.bias"] = shape[:1]
    for name in norms:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)
    return _draw(rng, shapes, dtype)


@dataclasses.dataclass
class Published:
    """A checkpoint folder to be changed and written; `tower` is a folder of its own, if any."""

    folder: pathlib.Path
    config: dict
    tensors: dict[str, np.ndarray]
    tower_config: dict | None = None
    tower_tensors: dict[str, np.ndarray] | None = None
    num_files: int = 1

    @property
    def tower(self) -> pathlib.Path:
        return self.folder.parent / (self.folder.name + "_tower")

    def write(self) -> Published:
        _write(self.folder, self.config, self.tensors, self.num_files)
        (self.folder / "tokenizer_config.json").write_text('{"model_max_length": 256}')
        if self.tower_config is not None:
            _write(self.tower, self.tower_config, self.tower_tensors or {}, 1)
        return self


def _write(folder: pathlib.Path, config: dict, tensors: dict, num_files: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    if num_files == 1:
        if tensors:
            safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return
    weight_map = {}
    for i in range(num_files):
        file = f"model-{i + 1:05d}-of-{num_files:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::num_files]}
        safetensors.numpy.save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def llava15(folder: pathlib.Path, dtype="float16") -> Published:
    """liuhaotian/llava-v1.5: the tower, a whole float32 CLIP model, in a folder of its own."""
    rng = np.random.default_rng(1)
    tensors = decoder_tensors(rng, dtype) | connector_tensors(rng, dtype)
    tensors |= {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.arange(3, dtype=np.float32) for i in range(LAYERS)
    }
    tower = tower_tensors(rng, "float32", prefix="vision_model.")
    tower |= _draw(rng, {"text_model.final_layer_norm.weight": (4,), "visual_projection.weight": (4, 8)}, "float32")
    tower |= {"logit_scale": np.array(2.6, np.float32), "vision_model.embeddings.position_ids": np.arange(5)[None]}
    whole = {"model_type": "clip", "vision_config": CLIP, "text_config": {}}
    return Published(folder, {"model_type": "llava", **LLAMA, **MM}, tensors, whole, tower).write()


def flexattn(folder: pathlib.Path, dtype="float16", num_files=3) -> Published:
    """senfu/llava-v1.5-7b-flexattn: sharded, projections in every layer, the tower inside."""
    rng = np.random.default_rng(2)
    tensors = decoder_tensors(rng, dtype, flex=True) | connector_tensors(rng, dtype)
    tensors |= tower_tensors(rng, dtype, prefix="model.vision_tower.vision_tower.vision_model.")
    config = {"model_type": "llava_llama", **LLAMA, **MM, "extra": EXTRA}
    return Published(folder, config, tensors, CLIP, None, num_files).write()


HF_NAMES = {
    "transformers4": {
        "decoder": ("language_model.model", "language_model.lm_head"),
        "connector": "multi_modal_projector.linear_{}",
        "tower": "vision_tower.vision_model.",
    },
    "transformers5": {
        "decoder": ("language_model.model", "language_model.lm_head"),
        "connector": "multi_modal_projector.linear_{}",
        "tower": "vision_tower.",
    },
    "transformers5_modules": {
        "decoder": ("model.language_model", "lm_head"),
        "connector": "model.multi_modal_projector.linear_{}",
        "tower": "model.vision_tower.",
    },
}


def llava_hf(folder: pathlib.Path, dtype="bfloat16", names="transformers4", tied=False) -> Published:
    """llava-hf: config.json nests its halves."""
    rng = np.random.default_rng(3)
    spelled = HF_NAMES[names]
    prefix, head = spelled["decoder"]
    tensors = decoder_tensors(rng, dtype, prefix=prefix, head=head, tied=tied)
    tensors |= connector_tensors(
        rng, dtype, first=spelled["connector"].format(1), second=spelled["connector"].format(2)
    )
    tensors |= tower_tensors(rng, dtype, prefix=spelled["tower"])
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 19,
        "text_config": {"model_type": "llama", **LLAMA, "tie_word_embeddings": tied}, "vision_config": CLIP,
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu",
        "tie_word_embeddings": tied,
    }  # fmt: skip
    return Published(folder, config, tensors).write()
