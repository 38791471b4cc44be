"""Both tokeniser formats against the ids of transformers' LlamaTokenizer, and LLaVA's way with the picture."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexattn_jax.config import IMAGE_PLACEHOLDER
from flexattn_jax.inputs.prompts import SHORT_ANSWER, build_prompt
from flexattn_jax.inputs.tokenizer import TokenizerError, load_tokenizer, tokenize_continuation, tokenize_prompt

FIXTURES = Path(__file__).parents[1] / "fixtures" / "inputs"
FORMATS = ("sentencepiece", "huggingface")
LOADED = {name: load_tokenizer(FIXTURES / name) for name in FORMATS}
REFERENCE = json.loads((FIXTURES / "tokens.json").read_text())

pytestmark = pytest.mark.parametrize("tokenizer", LOADED.values(), ids=FORMATS)


@pytest.fixture
def folder(tokenizer, tmp_path):
    """A copy of the tokeniser's folder to spoil."""
    name = next(name for name, loaded in LOADED.items() if loaded is tokenizer)
    shutil.copytree(FIXTURES / name, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("case", REFERENCE, ids=lambda case: repr(case["text"]))
def test_ids_equal_transformers(tokenizer, case):
    assert tokenizer.encode(case["text"], add_bos=True) == case["ids"]
    assert tokenizer.encode(case["text"]) == case["ids"][1:]


def test_special_ids(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size, tokenizer.adds_bos) == (1, 2, 420, True)


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30))
def test_decode_undoes_encode(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    specials = ("<s>", "</s>", "<unk>")
    if not any(special in text for special in specials) and "▁" not in text:
        assert tokenizer.decode(ids) == text


def test_decode_skips_special_and_unknown_ids(tokenizer):
    ids = tokenizer.encode("small car")
    assert tokenizer.decode([1, *ids, 2, 0, 420, 40_000, IMAGE_PLACEHOLDER]) == "small car"
    assert tokenizer.decode([]) == ""


def test_a_lone_surrogate_is_no_crash(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a \ud83d b")) == "a ? b"


def test_prompt_is_tokenised_around_the_picture(tokenizer):
    prompt = build_prompt("What color is the car?" + SHORT_ANSWER)
    before, after = prompt.split("<image>")
    ids = tokenize_prompt(tokenizer, prompt)
    assert ids == [*tokenizer.encode(before, add_bos=True), IMAGE_PLACEHOLDER, *tokenizer.encode(after)]
    assert ids.count(tokenizer.bos_id) == 1
    # "▁" and the line break: a piece after the picture has a leading space of its own
    assert tokenizer.encode(after)[:2] == tokenizer.encode("\n")


def test_picture_first_or_no_picture(tokenizer):
    assert tokenize_prompt(tokenizer, "<image>\nred")[:2] == [1, IMAGE_PLACEHOLDER]
    assert tokenize_prompt(tokenizer, "red") == [1, *tokenizer.encode("red")]


def test_two_pictures_are_refused(tokenizer):
    with pytest.raises(TokenizerError, match=r"2 times; one picture"):
        tokenize_prompt(tokenizer, build_prompt("What is <image>?"))


def test_continuation(tokenizer):
    prompt = build_prompt("What color is the car?")
    assert tokenize_continuation(tokenizer, prompt, " red</s>") == [*tokenizer.encode("red"), 2]
    whole = tokenize_prompt(tokenizer, prompt + " the small dog")
    ids = tokenize_continuation(tokenizer, prompt, " the small dog")
    assert tokenize_prompt(tokenizer, prompt) + ids == whole


def test_continuations_that_cannot_be_scored(tokenizer):
    prompt = build_prompt("What color is the car?")
    with pytest.raises(TokenizerError, match="adds no token"):
        tokenize_continuation(tokenizer, prompt, "")
    with pytest.raises(TokenizerError, match="start it with a space"):
        tokenize_continuation(tokenizer, prompt + " re", "d")


def test_settings_of_the_folder(tokenizer, folder):
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<unk>"}}))
    assert load_tokenizer(folder).eos_id == 0
    # the more specific file wins
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "add_bos_token": False}))
    loaded = load_tokenizer(folder)
    assert (loaded.eos_id, loaded.adds_bos) == (2, False)
    assert tokenize_prompt(loaded, "red") == tokenizer.encode("red")


def test_added_tokens(tokenizer, folder):
    if (folder / "tokenizer.json").exists():
        saved = json.loads((folder / "tokenizer.json").read_text())
        entry = dict(saved["added_tokens"][0], id=420, content="<pad>")
        saved["added_tokens"].append(entry)
        (folder / "tokenizer.json").write_text(json.dumps(saved))
    else:
        (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 420}))
    loaded = load_tokenizer(folder)
    assert loaded.vocab_size == 421
    assert loaded.encode("red<pad>blue") == [*tokenizer.encode("red"), 420, *tokenizer.encode("blue")]
    assert loaded.decode(loaded.encode("red<pad>")) == "red"


def test_truncation_saved_in_the_file_is_ignored(tokenizer, tmp_path):
    saved = json.loads((FIXTURES / "huggingface" / "tokenizer.json").read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    assert load_tokenizer(tmp_path).encode("What color is the car?") == tokenizer.encode("What color is the car?")


def test_tokenizer_json_is_preferred(tokenizer, folder):
    for name in FORMATS:
        shutil.copytree(FIXTURES / name, folder, dirs_exist_ok=True)
    (folder / "tokenizer.model").write_bytes(b"never read")
    assert load_tokenizer(folder).encode("red") == tokenizer.encode("red")


def test_folder_without_a_tokeniser(tokenizer, tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(TokenizerError, match=r"holds no tokeniser.*tokenizer\.json") as caught:
            load_tokenizer(folder)
        assert str(folder) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"garbage" * 20, b"{}", b"\xff\xfe{"])
def test_broken_tokeniser_file(tokenizer, folder, content):
    file = next(folder.iterdir())
    file.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"is empty|is damaged|no end-of-sequence") as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_broken_settings_file(tokenizer, folder, content):
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        load_tokenizer(folder)


def test_added_tokens_must_be_ids(tokenizer, folder):
    (folder / "added_tokens.json").write_text('{"<pad>": "x"}')
    with pytest.raises(TokenizerError, match="must map tokens to ids"):
        load_tokenizer(folder)


def test_unknown_end_token(tokenizer, folder):
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    with pytest.raises(TokenizerError, match="no end-of-sequence token"):
        load_tokenizer(folder)
