"""Loading checkpoints through the public API, and the logits of other people's models."""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import FIXTURES

import flexattn_jax
from flexattn_jax.config import ConfigError
from flexattn_jax.evaluation.demo import write_random_checkpoint
from flexattn_jax.inputs.batching import BatchError

LLAVA = FIXTURES / "hf_llava_tiny"


@pytest.fixture(scope="module")
def case():
    return dict(np.load(LLAVA / "case.npz"))


@pytest.mark.parametrize("scan", [True, False])
def test_logits_of_a_model_that_transformers_saved(case, scan):
    vlm = flexattn_jax.load(LLAVA, dtype="float32", config_overrides={"scan_layers": scan})
    logits = vlm.logits(case["pixel_values"], case["input_ids"])
    assert logits.shape == case["logits"].shape and logits.dtype == np.float32
    np.testing.assert_allclose(logits, case["logits"], atol=1e-4)


def test_logits_of_the_key_names_of_transformers_4(case, tmp_path):
    from safetensors.numpy import load_file, save_file

    shutil.copy(LLAVA / "config.json", tmp_path)
    renamed = {}
    for name, tensor in load_file(LLAVA / "model.safetensors").items():
        for new, old in (
            ("model.language_model.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
            ("model.vision_tower.", "vision_tower."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
        ):
            if name.startswith(new):
                name = old + name.removeprefix(new)
                break
        if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
            name = "vision_tower.vision_model." + name.removeprefix("vision_tower.")
        renamed[name] = tensor
    save_file(renamed, tmp_path / "model.safetensors")
    logits = flexattn_jax.load(tmp_path).logits(case["pixel_values"], case["input_ids"])
    np.testing.assert_allclose(logits, case["logits"], atol=1e-4)


def test_the_place_holder_and_expanded_image_tokens_mean_the_same(case):
    vlm = flexattn_jax.load(LLAVA)
    short = []
    for row in case["input_ids"]:
        first = int(np.flatnonzero(row == 150)[0])
        short.append([*row[:first], -200, *row[first + 16 :]])
    np.testing.assert_array_equal(
        vlm.logits(case["pixel_values"], short), vlm.logits(case["pixel_values"], case["input_ids"])
    )


def test_bfloat16_is_close(case):
    logits = flexattn_jax.load(LLAVA, dtype="bfloat16").logits(case["pixel_values"], case["input_ids"])
    assert logits.dtype == np.float32
    error = np.abs(np.asarray(logits) - case["logits"])
    assert 1e-4 < error.max() < 0.2 * case["logits"].std() and error.mean() < 0.03 * case["logits"].std()


def test_a_model_without_tokeniser_says_so_when_text_comes(case):
    with pytest.raises(BatchError, match=r"tokenizer\.json or tokenizer\.model into its folder"):
        flexattn_jax.load(LLAVA).answer([None], ["What?"])


def test_overrides_are_checked_by_name_type_and_sense():
    with pytest.raises(ConfigError, match="no 'flexattention' to change"):
        flexattn_jax.load(LLAVA, config_overrides={"flexattention.threshold": 72})
    with pytest.raises(ConfigError, match="lowres_sise"):
        flexattn_jax.load(LLAVA, config_overrides={"lowres_sise": 72})
    with pytest.raises(ConfigError, match="dtype is 'float8'"):
        flexattn_jax.load(LLAVA, dtype="float8")
    with pytest.raises(ConfigError, match=r"decoder\.num_layers must be int"):
        flexattn_jax.load(LLAVA, config_overrides={"decoder.num_layers": "4"})


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path / "nothing")):
        flexattn_jax.load(tmp_path / "nothing")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="bert"):
        flexattn_jax.load(tmp_path)


def test_the_public_names_are_few():
    assert sorted(flexattn_jax.__all__) == [
        *("EncodedPicture", "Generation", "OptionScores", "SelectionReport", "VisionLanguageModel", "load")
    ]
    assert jax.config.jax_enable_x64 is False


def test_a_first_layer_beyond_the_decoder_is_warned_of(tmp_path, caplog):
    write_random_checkpoint(tmp_path / "checkpoint")
    flexattn_jax.load(tmp_path / "checkpoint", config_overrides={"flexattention.first_layer": 99})
    assert "no layer reads high resolution" in caplog.text
    caplog.clear()
    off = {"flexattention.enabled": False, "image_size": 336}  # needs no tiles
    assert flexattn_jax.load(tmp_path / "checkpoint", config_overrides=off).config.image_size == 336
    assert not caplog.text
