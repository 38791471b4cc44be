"""The Python API with arguments of wrong kinds, and with weights that are no numbers."""

from functools import partial

import jax
import numpy as np
import pytest
from conftest import FIXTURES, random_params
from hostile.checks import one_sentence
from hostile.pictures import halves

from flexattn_jax.api import VisionLanguageModel, load
from flexattn_jax.checkpoints.errors import CheckpointError
from flexattn_jax.config import ConfigError, override, preset
from flexattn_jax.files import packaged
from flexattn_jax.inputs.batching import BatchError, Buckets
from flexattn_jax.inputs.images import ImageError, load_image
from flexattn_jax.inputs.tokenizer import TokenizerError, load_tokenizer

REFUSALS = (BatchError, ImageError, TokenizerError, ConfigError, CheckpointError)


@pytest.fixture(scope="module")
def vlm():
    tokenizer = load_tokenizer(FIXTURES / "inputs" / "huggingface")
    changes = {"decoder.vocab_size": tokenizer.vocab_size, "decoder.num_layers": 2, "vision.num_layers": 2}
    config = override(preset("tiny"), changes | {"flexattention.enabled": False, "scan_layers": True})
    return VisionLanguageModel(config, random_params(config), tokenizer)


PICTURE = halves()
MINI = packaged("mini") / "flex"
SIZES = (5, np.array(5), (5,), (5, 5, 5), ("a", "b"), (np.nan, 1), (np.inf, 1), (0, 0))


def sized(size, vlm):
    return vlm.logits(np.zeros((1, 3, 168, 168), np.float32), [[1, -200]], image_sizes=[size])


def captured(names, vlm):
    return vlm.logits(None, [[1, 5]], capture=names)


def opened(path, vlm):
    return load(path)


def bucketed(name, sizes, vlm):
    return Buckets(**{name: sizes})


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
    "a set of pictures": lambda vlm: vlm.answer({"a.png"}, ["What?"]),
    "a table of pictures": lambda vlm: vlm.answer({0: PICTURE}, ["What?"]),
    "pictures of a single number": lambda vlm: vlm.answer(np.array(3), ["What?"]),
    "a set of questions": lambda vlm: vlm.answer([PICTURE], {"What?"}),
    "a set to encode": lambda vlm: vlm.encode({"a.png"}),
    "a table to encode": lambda vlm: vlm.encode({0: PICTURE}),
    "a single number to encode": lambda vlm: vlm.encode(np.array(3)),
    "an endless question": lambda vlm: vlm.answer([PICTURE], ["x " * 2_000_000]),
    "a long question": lambda vlm: vlm.answer([PICTURE], ["word " * 20_000]),
    "a picture of no kind": lambda vlm: vlm.answer([object()], ["What?"]),
    "a picture of text": lambda vlm: vlm.answer([b"once upon a time"], ["What?"]),
    "a picture that is missing": lambda vlm: vlm.answer(["/nowhere.png"], ["What?"]),
    "no tokens": lambda vlm: vlm.answer([PICTURE], ["What?"], max_new_tokens=0),
    "tokens beyond all": lambda vlm: vlm.answer([PICTURE], ["What?"], max_new_tokens=10**9),
    "tokens of text": lambda vlm: vlm.answer([PICTURE], ["What?"], max_new_tokens="5"),
    "half a token": lambda vlm: vlm.answer([PICTURE], ["What?"], max_new_tokens=1.5),
    "a temperature beyond floats": lambda vlm: vlm.answer([PICTURE], ["What?"], temperature=10**400),
    "a seed in an array": lambda vlm: vlm.answer([PICTURE], ["What?"], seed=np.array(3)),
    "a set of seeds": lambda vlm: vlm.answer([PICTURE], ["What?"], seed={3}),
    "a table of seeds": lambda vlm: vlm.answer([PICTURE], ["What?"], seed={3: 4}),
    "a scorer of no name": lambda vlm: vlm.score([PICTURE], ["What?"], [["a", "b"]], scorer="nosuch"),
    "a set of options": lambda vlm: vlm.score([PICTURE], ["What?"], [{"a", "b"}]),
    "options of a single number": lambda vlm: vlm.score([PICTURE], ["What?"], [np.array(3)]),
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
    "one id": lambda vlm: vlm.logits(None, 5),
    "ids that are missing": lambda vlm: vlm.logits(None, None),
    "ragged ids": lambda vlm: vlm.logits(None, [[[1], [1, 2]]]),
    "no samples": lambda vlm: vlm.logits(None, []),
    "pixels of another size": lambda vlm: vlm.logits(np.zeros((1, 3, 4, 4), np.float32), [[1, -200]]),
    "pixels that are no numbers": lambda vlm: vlm.logits(np.full((1, 3, 168, 168), np.nan), [[1, -200]]),
    "complex pixels": lambda vlm: vlm.logits(np.zeros((1, 3, 168, 168), complex), [[1, -200]]),
    "pixels of text": lambda vlm: vlm.logits(np.full((1, 3, 168, 168), "a"), [[1, -200]]),
    "pixels of a single number": lambda vlm: vlm.logits(np.array(3.0), [[1, -200]]),
    **{f"a picture of size {size!r}": partial(sized, size) for size in SIZES},
    **{f"capture {names!r}": partial(captured, names) for names in (3, None, [1], "cells", ["nosuch"])},
    **{f"a path that is {path!r:.20}": partial(opened, path) for path in (None, 5, b"x", [], "x" * 5000)},
    "changes of text": lambda vlm: load(MINI, config_overrides="abc"),
    "a list of changes": lambda vlm: load(MINI, config_overrides=[("dtype", "float32")]),
    "no buckets": lambda vlm: load(MINI, buckets=None),
    "buckets of numbers": lambda vlm: load(MINI, buckets=(1, 2)),
    "a partition of text": lambda vlm: load(MINI, partition="x"),
    **{f"text_lengths {sizes!r}": partial(bucketed, "text_lengths", sizes) for sizes in (64, None, ("a",), ())},
    **{f"batch_sizes {sizes!r}": partial(bucketed, "batch_sizes", sizes) for sizes in ((1.5,), (np.nan,), (True,))},
    "pixels at most of text": lambda vlm: load_image(PICTURE, max_pixels="x"),
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
    with pytest.raises(BatchError, match="NaN or infinite"):
        broken.score([PICTURE], ["What?"], [["a", "b"]])


def test_an_unknown_intermediate_is_refused_before_anything_is_compiled(vlm):
    compiled = vlm._forward._cache_size()
    with pytest.raises(BatchError, match="no intermediate nosuch here; there are"):
        vlm.logits(None, [[1, 5, 7]], capture=["hidden", "nosuch"])
    assert vlm._forward._cache_size() == compiled
