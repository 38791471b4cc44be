"""A small checkpoint of random weights and its tokeniser, for trying every part of the machinery with no download.

Its answers mean nothing. The files are in the layout of the published FlexAttention checkpoint, so everything behind
it (import, loading, both resolutions, selection, scoring, generation) runs as it does on the real one.

    python -m flexattn_jax.evaluation.demo runs/demo/source
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy
import tokenizers

from flexattn_jax.files import FileError, packaged, read_json
from flexattn_jax.inputs.datasets.vstar import read_vstar
from flexattn_jax.inputs.prompts import LETTER_ANSWER, SHORT_ANSWER, build_prompt

CHECKPOINT = "runs/demo/checkpoint"  # where an evaluation of the demo expects it, and writes it if it is not there
RANDOM_NAME = "flexattn_jax random demo weights"  # told apart by this in tokenizer_config.json, which imports keep
NOTE = "random weights: the accuracy is chance; this run shows the machinery"

_VOCABULARY = 512
_WIDTH, _MLP, _LAYERS, _HEADS = 128, 352, 12, 4
_TOWER_WIDTH, _TOWER_MLP, _TOWER_LAYERS, _TOWER_HEADS = 64, 256, 4, 4
_PATCH, _SIDE = 14, 336
_SEED = 20240728
# Larger than usual, so that attention has peaks and a selection is neither everything nor nothing.
_QUERY_GAIN = 3.0


def demo_questions() -> Path:
    """The packaged folder of real photographs with hand-written questions, in V* Bench's layout."""
    return packaged("demo") / "vstar"


def is_random(checkpoint: str | Path) -> bool:
    """Whether a checkpoint folder, imported or not, holds what `write_random_checkpoint` made."""
    try:
        settings = read_json(Path(checkpoint) / "tokenizer_config.json")
    except (OSError, FileError):
        return False
    return isinstance(settings, dict) and settings.get("name_or_path") == RANDOM_NAME


def write_random_checkpoint(folder: str | Path) -> None:
    """Writes config.json, model.safetensors, tokenizer.json and vision_tower/config.json, about 15 MB.

    The weights are the same in every call. The folder appears whole or not at all.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "vision_tower").mkdir(parents=True)
    for name, values in {
        "config.json": _llava_config(),
        "vision_tower/config.json": _tower_config(),
        "tokenizer_config.json": {
            "name_or_path": RANDOM_NAME,
            "add_bos_token": True,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        },
    }.items():
        (partial / name).write_text(json.dumps(values, indent=1) + "\n")
    (partial / "tokenizer.json").write_text(_train_tokenizer().to_str())
    safetensors.numpy.save_file(_random_tensors(), partial / "model.safetensors")
    partial.replace(folder)


def _llava_config() -> dict:
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "hidden_size": _WIDTH,
        "intermediate_size": _MLP,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "max_position_embeddings": 4096,
        "vocab_size": _VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "mm_hidden_size": _TOWER_WIDTH,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": "vision_tower",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "extra": {
            "zoom_ratio": "3",
            "threshold": "48",
            "warmup": "10",
            "lowres_size": str(_SIDE),
            "highres_size": str(3 * _SIDE),
        },
    }


def _tower_config() -> dict:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": _TOWER_WIDTH,
        "intermediate_size": _TOWER_MLP,
        "num_hidden_layers": _TOWER_LAYERS,
        "num_attention_heads": _TOWER_HEADS,
        "image_size": _SIDE,
        "patch_size": _PATCH,
        "num_channels": 3,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-05,
    }


def _train_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE tokeniser with LLaMA's special ids, trained on the demo's own prompts."""
    questions, _ = read_vstar(demo_questions())
    text = [build_prompt(q.question + suffix) for q in questions for suffix in (SHORT_ANSWER, LETTER_ANSWER)]
    text += [f" {option}" for q in questions for option in q.options]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def _random_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(_SEED)
    tensors: dict[str, np.ndarray] = {}

    def normal(name: str, *shape: int, scale: float | None = None) -> None:
        scale = 1 / np.sqrt(np.prod(shape[1:])) if scale is None else scale
        tensors[name] = (scale * rng.standard_normal(shape, np.float32)).astype(np.float32)

    def linear(name: str, out: int, width: int, gain: float = 1.0) -> None:
        normal(f"{name}.weight", out, width, scale=gain / np.sqrt(width))
        normal(f"{name}.bias", out, scale=0.02)

    def norm(name: str, width: int, bias: bool) -> None:
        tensors[f"{name}.weight"] = np.ones(width, np.float32)
        if bias:
            tensors[f"{name}.bias"] = np.zeros(width, np.float32)

    normal("model.embed_tokens.weight", _VOCABULARY, _WIDTH, scale=1.0)
    normal("lm_head.weight", _VOCABULARY, _WIDTH)
    norm("model.norm", _WIDTH, bias=False)
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}"
        norm(f"{prefix}.input_layernorm", _WIDTH, bias=False)
        norm(f"{prefix}.post_attention_layernorm", _WIDTH, bias=False)
        for part in ("q_proj", "k_proj", "v_proj", "o_proj", "k_proj_hd", "v_proj_hd"):
            gain = _QUERY_GAIN if part == "q_proj" else 1.0
            normal(f"{prefix}.self_attn.{part}.weight", _WIDTH, _WIDTH, scale=gain / np.sqrt(_WIDTH))
        normal(f"{prefix}.mlp.gate_proj.weight", _MLP, _WIDTH)
        normal(f"{prefix}.mlp.up_proj.weight", _MLP, _WIDTH)
        normal(f"{prefix}.mlp.down_proj.weight", _WIDTH, _MLP)
    linear("model.mm_projector.0", _WIDTH, _TOWER_WIDTH)
    linear("model.mm_projector.2", _WIDTH, _WIDTH, gain=2.0)

    tower = "model.vision_tower.vision_tower.vision_model"
    normal(f"{tower}.embeddings.class_embedding", _TOWER_WIDTH, scale=0.1)
    normal(f"{tower}.embeddings.patch_embedding.weight", _TOWER_WIDTH, 3, _PATCH, _PATCH)
    normal(f"{tower}.embeddings.position_embedding.weight", (_SIDE // _PATCH) ** 2 + 1, _TOWER_WIDTH, scale=0.1)
    norm(f"{tower}.pre_layrnorm", _TOWER_WIDTH, bias=True)
    norm(f"{tower}.post_layernorm", _TOWER_WIDTH, bias=True)
    for layer in range(_TOWER_LAYERS):
        prefix = f"{tower}.encoder.layers.{layer}"
        norm(f"{prefix}.layer_norm1", _TOWER_WIDTH, bias=True)
        norm(f"{prefix}.layer_norm2", _TOWER_WIDTH, bias=True)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{prefix}.self_attn.{part}", _TOWER_WIDTH, _TOWER_WIDTH)
        linear(f"{prefix}.mlp.fc1", _TOWER_MLP, _TOWER_WIDTH)
        linear(f"{prefix}.mlp.fc2", _TOWER_WIDTH, _TOWER_MLP)
    return tensors


def main(arguments: list[str]) -> int:
    """Writes the checkpoint to the folder named; leaves one that is there as it is."""
    if len(arguments) != 1:
        print("usage: python -m flexattn_jax.evaluation.demo FOLDER", file=sys.stderr)
        return 2
    (folder,) = arguments
    if is_random(folder):
        print(f"{folder} holds the demo's random weights already")
        return 0
    if Path(folder).exists():
        print(f"{folder} exists and holds something else; name a folder that does not exist", file=sys.stderr)
        return 2
    Path(folder).parent.mkdir(parents=True, exist_ok=True)
    write_random_checkpoint(folder)
    print(f"wrote random weights to {folder}; answers given with them mean nothing")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
