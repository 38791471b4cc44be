"""The Python API with arguments of wrong kinds, and with weights that are no numbers."""

import jax
import numpy as np
import pytest
from conftest import FIXTURES, random_params
from hostile.checks import one_sentence
from hostile.pictures import halves

from flexattn_jax.api import VisionLanguageModel, load
from flexattn_jax.checkpoints.errors import CheckpointError
from flexattn_jax.config import ConfigError, override, preset
from flexattn_jax.inputs.batching import BatchError
from flexattn_jax.inputs.images import ImageError
from flexattn_jax.inputs.tokenizer import TokenizerError, load_tokenizer

REFUSALS = (BatchError, ImageError, TokenizerError, ConfigError, CheckpointError)


@pytest.fixture(scope="module")
def vlm():
    tokenizer = load_tokenizer(FIXTURES / "inputs" / "huggingface")
    changes = {"decoder.vocab_size": tokenizer.vocab_size, "decoder.num_layers": 2, "vision.num_layers": 2}
    config = override(preset("tiny"), changes | {"flexattention.enabled": False, "scan_layers": True})
    return VisionLanguageModel(config, random_params(config), tokenizer)


PICTURE = halves()
CALLS = {
    "fewer questions": lambda vlm: vlm.answer([PICTURE, PICTURE], ["What?"]),
    "one text": lambda vlm: vlm.answer([PICTURE], "What?"),
    "no list": lambda vlm: vlm.answer(PICTURE, ["What?"]),
    "a number asked": lambda vlm: vlm.answer([PICTURE], [3]),
    "nothing asked": lambda vlm: vlm.answer([PICTURE], [None]),
    "an empty question": lambda vlm: vlm.answer([PICTURE], ["  "]),
    "a second picture's place": lambda vlm: vlm.answer([PICTURE], ["<image> What?"]),
    "a picture without a place": lambda vlm: vlm.generate_prompts([PICTURE], ["What?"]),
    "a place without a picture": lambda vlm: vlm.generate_prompts([None], ["<image> What?"]),
    "an endless question": lambda vlm: vlm.answer([PICTURE], ["x " * 2_000_000]),
    "a long question": lambda vlm: vlm.answer([PICTURE], ["word " * 20_000]),
    "a picture of no kind": lambda vlm: vlm.answer([object()], ["What?"]),
    "a picture of text": lambda vlm: vlm.answer([b"once upon a time"], ["What?"]),
    "a picture that is missing": lambda vlm: vlm.answer(["/nowhere.png"], ["What?"]),
    "no tokens": lambda vlm: vlm.answer([PICTURE], ["What?"], max_new_tokens=0),
    "tokens beyond all": lambda vlm: vlm.answer([PICTURE], ["What?"], max_new_tokens=10**9),
    "tokens of text": lambda vlm: vlm.answer([PICTURE], ["What?"], max_new_tokens="5"),
    "half a token": lambda vlm: vlm.answer([PICTURE], ["What?"], max_new_tokens=1.5),
    "no options": lambda vlm: vlm.score([PICTURE], ["What?"], [[]]),
    "an empty option": lambda vlm: vlm.score([PICTURE], ["What?"], [["", "b"]]),
    "options of text": lambda vlm: vlm.score([PICTURE], ["What?"], ["red"]),
    "options of numbers": lambda vlm: vlm.score([PICTURE], ["What?"], [[1, 2]]),
    "options of nothing": lambda vlm: vlm.score([PICTURE], ["What?"], [None]),
    "an endless option": lambda vlm: vlm.score([PICTURE], ["What?"], [["word " * 20_000, "b"]]),
    "ids beyond the vocabulary": lambda vlm: vlm.logits(None, [[1, 10**6]]),
    "ids below 0": lambda vlm: vlm.logits(None, [[1, -7]]),
    "ids of text": lambda vlm: vlm.logits(None, [["a"]]),
    "no ids": lambda vlm: vlm.logits(None, [[]]),
    "no samples": lambda vlm: vlm.logits(None, []),
    "pixels of another size": lambda vlm: vlm.logits(np.zeros((1, 3, 4, 4), np.float32), [[1, -200]]),
    "pixels that are no numbers": lambda vlm: vlm.logits(np.full((1, 3, 168, 168), np.nan), [[1, -200]]),
    "a folder that is none": lambda vlm: load("/nowhere"),
    "a file": lambda vlm: load("/dev/null"),
    "an empty path": lambda vlm: load(""),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_argument_is_one_sentence(vlm, name):
    with pytest.raises(REFUSALS) as caught:
        CALLS[name](vlm)
    assert one_sentence(str(caught.value))


def test_weights_that_are_no_numbers_give_no_answer(vlm):
    params = jax.tree.map(np.array, vlm.params)
    params["decoder"]["final_norm"]["scale"][:] = np.nan
    broken = VisionLanguageModel(vlm.config, params, vlm.tokenizer)
    with pytest.raises(BatchError, match="NaN or infinite"):
        broken.answer([PICTURE], ["What?"], max_new_tokens=2)
