import math
import pathlib

import pytest
from checkpoints import published

from flexattn_jax.checkpoints import layouts
from flexattn_jax.checkpoints.layouts import HF, LLAVA, FlattenPatches
from flexattn_jax.checkpoints.safetensors_io import read_file
from flexattn_jax.config import VLMConfig, override, preset

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "hf_llava_tiny"


@pytest.mark.parametrize(
    ("layout", "source", "name"),
    [
        (LLAVA, "model.embed_tokens.weight", "decoder/embedding"),
        (LLAVA, "model.norm.weight", "decoder/final_norm/scale"),
        (LLAVA, "lm_head.weight", "decoder/lm_head/kernel"),
        (LLAVA, "model.layers.31.self_attn.k_proj_hd.weight", "decoder/layers/31/self_attn/k_proj_hd/kernel"),
        (LLAVA, "model.layers.0.mlp.down_proj.weight", "decoder/layers/0/mlp/down_proj/kernel"),
        (LLAVA, "model.mm_projector.2.bias", "connector/fc2/bias"),
        (
            LLAVA,
            "model.vision_tower.vision_tower.vision_model.encoder.layers.7.layer_norm2.weight",
            "vision/layers/7/norm2/scale",
        ),
        (HF, "language_model.model.layers.3.self_attn.o_proj.weight", "decoder/layers/3/self_attn/o_proj/kernel"),
        (HF, "multi_modal_projector.linear_1.weight", "connector/fc1/kernel"),
        (HF, "vision_tower.vision_model.pre_layrnorm.bias", "vision/pre_norm/bias"),
        (HF, "vision_tower.vision_model.embeddings.position_embedding.weight", "vision/position_embedding"),
    ],
)
def test_a_rule_reads_both_ways(layout, source, name):
    assert layout.find(source)[0] == name
    assert layout.source_of(name)[0] == source


@pytest.mark.parametrize(
    "source",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.x.self_attn.q_proj.weight",
        "xmodel.embed_tokens.weight",
        "model.embed_tokens.weight.more",
        "modelXembed_tokens.weight",
        "model.image_newline",
    ],
)
def test_names_that_are_nearly_known_are_not_known(source):
    assert LLAVA.find(source) is None


def test_every_tensor_of_a_whole_clip_folder_has_a_name_and_gets_it_back(tmp_path):
    tower = read_file(published.llava15(tmp_path / "x").tower / "model.safetensors")
    sources = [f"vision_tower/{name}" for name in tower]
    layout = layouts.detect_layout("llava", sources)
    assert layout.tower_in_folder
    names = [layout.find(source)[0] for source in sources]
    assert len(set(names)) == len(names)
    assert [layout.source_of(name)[0] for name in names] == sources
    assert LLAVA.source_of("clip/logit_scale") is None


def test_names_of_current_transformers_are_known():
    tensors = read_file(FIXTURE / "model.safetensors")
    layout = layouts.detect_layout("hf", tensors)
    assert layout.vision == "vision_tower."
    assert all(layout.source_of(layout.find(source)[0])[0] == source for source in tensors)


def test_patch_embedding_is_a_reshape():
    _, transform = LLAVA.source_of("vision/patch_embedding/kernel")
    assert transform == FlattenPatches()
    assert transform.source_shape((1024, 588), VLMConfig()) == (1024, 3, 14, 14)


def count(shapes, part=""):
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(part))


@pytest.mark.parametrize(
    ("name", "decoder", "connector"), [("7b", 6_738_415_616, 20_979_712), ("13b", 13_015_864_320, 31_467_520)]
)
def test_parameter_counts_are_the_published_ones(name, decoder, connector):
    flex = preset(name)
    base = override(flex, {"flexattention": None})
    shapes = layouts.tensor_shapes(base)
    assert count(shapes, "decoder") == decoder
    assert count(shapes, "connector") == connector
    # CLIP ViT-L/14-336 has 303,507,456; its last block and its final norm are never computed.
    whole = override(base, {"vision.select_layer": -1})
    assert count(layouts.tensor_shapes(whole), "vision") + 2 * 1024 == 303_507_456
    block = 4 * (1024**2 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
    assert count(shapes, "vision") == 303_507_456 - 2 * 1024 - block
    # The published FlexAttention file has projections in every layer; those of layers 0..7 are not loaded.
    width, layers = flex.decoder.width, flex.decoder.num_layers
    everywhere = override(flex, {"flexattention.first_layer": 0})
    assert count(layouts.tensor_shapes(everywhere), "decoder") == decoder + layers * 2 * width**2
    assert count(layouts.tensor_shapes(flex), "decoder") == decoder + (layers - 8) * 2 * width**2
    assert count(layouts.leaf_shapes(flex)) == count(layouts.tensor_shapes(flex))


def test_layers_are_one_stack_and_projections_another():
    config = override(preset("tiny"), {"flexattention.first_layer": 2})
    leaves = layouts.leaf_tensors(config)
    assert leaves["decoder/layers/mlp/up_proj/kernel"] == [f"decoder/layers/{i}/mlp/up_proj/kernel" for i in range(5)]
    assert leaves["decoder/highres/k_proj_hd/kernel"] == [
        f"decoder/layers/{i}/self_attn/k_proj_hd/kernel" for i in (2, 3, 4)
    ]
    assert layouts.leaf_of("decoder/layers/3/input_norm/scale", config) == ("decoder/layers/input_norm/scale", 3)
    name = "decoder/layers/3/self_attn/v_proj_hd/kernel"
    assert layouts.leaf_of(name, config) == ("decoder/highres/v_proj_hd/kernel", 1)
    baseline = override(config, {"flexattention": None})
    assert not any(leaf.startswith("decoder/highres") for leaf in layouts.leaf_tensors(baseline))
    assert set(layouts.leaf_tensors(baseline)) < set(leaves)
    cut = override(baseline, {"reduction.method": "fastv", "reduction.tokens": 4, "image_size": 56})
    assert layouts.leaf_of("decoder/layers/3/input_norm/scale", cut) == ("decoder/stage1/input_norm/scale", 1)
    tied = override(config, {"decoder.tie_embeddings": True})
    assert "decoder/lm_head/kernel" not in layouts.leaf_tensors(tied)
