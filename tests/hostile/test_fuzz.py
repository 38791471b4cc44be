"""A bounded time of fuzzing at the doors where strangers' bytes come in: each answers, or refuses by its own error."""

import contextlib
import io
import json
import random
import struct
import time

import pytest
from conftest import FIXTURES
from hostile.pictures import PICTURES, halves, saved
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs.layouts import LAYOUTS

from flexattn_jax.checkpoints.errors import CheckpointError
from flexattn_jax.checkpoints.safetensors_io import INDEX_NAME, read_file, read_folder
from flexattn_jax.checkpoints.source_config import config_from_hf, config_from_llava, family_of
from flexattn_jax.config import ConfigError, VLMConfig, from_dict, preset, to_dict
from flexattn_jax.evaluation.benchmarks import BENCHMARKS
from flexattn_jax.evaluation.predictions import WorkdirError, read_predictions
from flexattn_jax.files import FileError, parse_json
from flexattn_jax.inputs.conversations import ConversationError
from flexattn_jax.inputs.datasets.llava import read_llava
from flexattn_jax.inputs.datasets.questions import DatasetError
from flexattn_jax.inputs.images import ImageError, load_image, preprocess
from flexattn_jax.inputs.tokenizer import TokenizerError, load_tokenizer

pytestmark = pytest.mark.slow
SECONDS = 25  # for each door that is fuzzed by hand
FUZZ = settings(max_examples=400, deadline=5000, suppress_health_check=list(HealthCheck))

NUMBERS = st.integers(-5, 5) | st.integers() | st.floats() | st.sampled_from([2**31, 2**63, 10**30, 10**300])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


def flipped(whole: bytes, draw: random.Random) -> bytes:
    """`whole` with bytes changed, cut, doubled or grown."""
    data = bytearray(whole)
    for _ in range(draw.randint(1, 6)):
        place = draw.randrange(len(data) or 1)
        kind = draw.randrange(5)
        if kind == 0:
            data[place : place + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            del data[place : place + draw.randint(1, 200)]
        elif kind == 2:
            data[place:place] = data[draw.randrange(len(data) or 1) :][: draw.randint(1, 200)]
        elif kind == 3:
            data[place : place + 4] = draw.choice(
                [b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", struct.pack(">I", 65_500)]
            )
        else:
            data[place : place + 1] = draw.choice([b'"', b"[", b"{", b"}", b"9" * 30, b"1e999", b"null", b"\\ud800"])
    return bytes(data)


def for_a_while(act, seed: int) -> int:
    """Calls act(draw) until the time is up; the number of calls, none of which may take long."""
    draw, calls, end = random.Random(seed), 0, time.monotonic() + SECONDS
    while time.monotonic() < end:
        began = time.process_time()  # other work on the machine counts for nothing
        act(draw)
        assert time.process_time() - began < 20
        calls += 1
    return calls


KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")


def test_the_picture_loader():
    seeds = [saved(halves(), kind) for kind in KINDS] + [c.make() for c in PICTURES.values() if len(c.make()) > 10]
    config, read = preset("tiny"), []

    def act(draw):
        try:
            pixels, size = preprocess(load_image(flipped(draw.choice(seeds), draw)), config)
        except ImageError as error:
            assert "\n" not in str(error)
            return
        read.append(size)
        assert pixels.shape == (3, config.image_size, config.image_size)

    assert for_a_while(act, 0) > len(read) > 0


def test_the_head_of_safetensors(tmp_path):
    tensors = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    tensors |= {"b": {"dtype": "BF16", "shape": [0], "data_offsets": [24, 24]}}
    text = json.dumps(tensors).encode()
    whole = struct.pack("<Q", len(text)) + text + bytes(24)

    def act(draw):
        (tmp_path / "x.safetensors").write_bytes(flipped(whole, draw))
        try:
            found = read_file(tmp_path / "x.safetensors")
        except CheckpointError:
            return
        for tensor in found.values():
            assert tensor.bytes().size == tensor.info.num_bytes

    assert for_a_while(act, 1) > 100


@FUZZ
@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]) | st.text(max_size=3), VALUES, max_size=4) | VALUES)
def test_any_json_as_head_of_safetensors(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    text = json.dumps(values).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with contextlib.suppress(CheckpointError):
        read_file(path)


@FUZZ
@given(VALUES, st.dictionaries(st.text(max_size=4), VALUES | st.just("model.safetensors"), max_size=4))
def test_any_json_as_index_of_safetensors(tmp_path_factory, values, weight_map):
    folder = tmp_path_factory.getbasetemp() / "index"
    folder.mkdir(exist_ok=True)
    for content in (values, {"weight_map": values}, {"weight_map": weight_map}):
        (folder / INDEX_NAME).write_text(json.dumps(content))
        with pytest.raises(CheckpointError):
            if read_folder(folder) == {}:
                raise CheckpointError("an index of nothing names nothing")


@FUZZ
@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:0123456789.eE-+NaInfity\\u', max_size=60))
def test_any_bytes_as_json(data):
    try:
        json.dumps(parse_json(data), allow_nan=False)
    except FileError as error:
        assert "\n" not in str(error)


def _replaced(values, draw, new):
    """A copy with one value, somewhere, replaced."""
    if isinstance(values, dict) and values and draw.random() < 0.9:
        key = draw.choice(list(values))
        return values | {key: _replaced(values[key], draw, new)}
    if isinstance(values, list) and values and draw.random() < 0.9:
        place = draw.randrange(len(values))
        return [*values[:place], _replaced(values[place], draw, new), *values[place + 1 :]]
    return new


@FUZZ
@given(VALUES, st.randoms(use_true_random=False))
def test_any_value_in_a_configuration(new, draw):
    values = _replaced(json.loads(json.dumps(to_dict(preset("7b")))), draw, new)
    try:
        config = from_dict(values)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(config, VLMConfig)


@FUZZ
@given(VALUES, st.randoms(use_true_random=False))
def test_any_value_in_a_published_config(new, draw):
    from checkpoints import published

    llava = {"model_type": "llava", **published.LLAMA, **published.MM, "extra": published.EXTRA}
    hf = {"model_type": "llava", "text_config": published.LLAMA, "vision_config": published.CLIP}
    cases = [(_replaced(llava, draw, new), published.CLIP), (llava, _replaced(published.CLIP, draw, new))]
    for values, tower in [*cases, (_replaced(hf, draw, new), {})]:
        try:
            if not isinstance(values, dict) or not isinstance(tower, dict):
                continue  # read_json has refused these
            if family_of(values) == "hf":
                config_from_hf(values, {}, "config.json")
            else:
                config_from_llava(values, tower, {}, "config.json", "tower")
        except CheckpointError:
            pass


@pytest.mark.parametrize("benchmark", LAYOUTS)
def test_the_readers_of_benchmarks(tmp_path, benchmark):
    LAYOUTS[benchmark](tmp_path)
    chosen = BENCHMARKS[benchmark]
    paths = [p for p in sorted(tmp_path.rglob("*")) if p.suffix in (".json", ".jsonl", ".tsv", ".txt")]
    whole = {path: path.read_bytes() for path in paths}

    def act(draw):
        path = draw.choice(paths)
        path.write_bytes(flipped(whole[path], draw))
        try:
            questions, errors = chosen.read(tmp_path, draw.choice(chosen.variants))
        except DatasetError:
            pass
        else:
            assert len({q.id for q in questions}) == len(questions)
            assert all(isinstance(error.reason, str) for error in errors)
        path.write_bytes(whole[path])

    global SECONDS
    before, SECONDS = SECONDS, 5
    try:
        assert for_a_while(act, 2) > 20
    finally:
        SECONDS = before


def test_the_reader_of_conversations(tmp_path):
    (tmp_path / "a.jpg").write_bytes(saved(halves(), "JPEG"))
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    whole = json.dumps([{"id": str(k), "image": "a.jpg", "conversations": turns} for k in range(5)]).encode()

    def act(draw):
        (tmp_path / "c.json").write_bytes(flipped(whole, draw))
        with contextlib.suppress(ConversationError):
            read_llava(tmp_path / "c.json", tmp_path)

    assert for_a_while(act, 3) > 100


def test_the_reader_of_predictions(tmp_path):
    from hostile.test_data import LINE

    whole = b"\n".join(json.dumps(LINE | {"id": str(k)}).encode() for k in range(4))

    def act(draw):
        (tmp_path / "p.jsonl").write_bytes(flipped(whole, draw))
        with contextlib.suppress(WorkdirError):
            read_predictions(tmp_path / "p.jsonl")

    assert for_a_while(act, 4) > 100


@pytest.mark.parametrize("name", ["huggingface/tokenizer.json", "sentencepiece/tokenizer.model"])
def test_the_reader_of_tokenisers(tmp_path, name):
    path = FIXTURES / "inputs" / name
    whole = path.read_bytes()

    def act(draw):
        (tmp_path / path.name).write_bytes(flipped(whole, draw))
        with contextlib.suppress(TokenizerError):
            load_tokenizer(tmp_path).encode("The quick brown fox </s> \n")

    assert for_a_while(act, 5) > 3


def test_flipping_changes_something():
    draw = random.Random(0)
    assert len({flipped(b"0123456789" * 9, draw) for _ in range(50)}) > 45
    assert flipped(b"", draw) is not None and io.BytesIO(flipped(b"x", draw)).read() is not None
