"""Masks of conversations against LLaVA's own way of counting, and LLaVA's files with all that is wrong in them."""

import json

import numpy as np
import pytest
from conftest import FIXTURES
from hypothesis import given, settings
from hypothesis import strategies as st

from flexattn_jax.inputs.conversations import ConversationError, Turn, tokenize_conversation, truncate
from flexattn_jax.inputs.datasets.llava import read_llava
from flexattn_jax.inputs.tokenizer import load_tokenizer, tokenize_prompt

TOKENIZERS = [load_tokenizer(FIXTURES / "inputs" / name) for name in ("huggingface", "sentencepiece")]
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
IGNORED = -100


def preprocess_v1(tokenizer, turns):
    """What LLaVA's function of that name does: mask by counting the tokens of each round on its own."""
    text = SYSTEM + " " + "".join(f"USER: {q} ASSISTANT: {a}</s>" for q, a in turns)
    ids = tokenize_prompt(tokenizer, text)
    labels = list(ids)
    labels[0] = IGNORED
    place = 1
    for part in text.split("</s>"):
        if not part:
            break
        instruction, answer = part.split(" ASSISTANT: ")
        instruction += " ASSISTANT: "
        assert answer
        masked = len(tokenize_prompt(tokenizer, instruction)) - 2
        labels[place : place + masked] = [IGNORED] * masked
        place += len(tokenize_prompt(tokenizer, part))
    assert place == len(ids)
    return ids, labels


words = st.text(st.sampled_from("ab cdé?.,\n 1 "), min_size=1, max_size=20).filter(str.strip)
conversations = st.lists(st.tuples(words, words), min_size=1, max_size=4)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["huggingface", "sentencepiece"])
@settings(max_examples=60, deadline=None)
@given(turns=conversations, picture=st.booleans())
def test_masks_are_those_of_llava(tokenizer, turns, picture):
    if picture:
        turns = [("<image>\n" + turns[0][0], turns[0][1]), *turns[1:]]
    expected, labels = preprocess_v1(tokenizer, turns)
    ids, learned = tokenize_conversation(tokenizer, tuple(Turn(*turn) for turn in turns))
    assert ids.tolist() == expected
    assert np.where(learned, ids, IGNORED).tolist() == labels


def test_what_is_learned_reads_as_the_answers_with_their_ends(tokenizer):
    ids, learned = tokenize_conversation(tokenizer, (Turn("<image>\nWhat?", "red car"), Turn("Sure?", "yes")))
    pieces = np.split(ids, np.flatnonzero(np.diff(learned)) + 1)
    assert [tokenizer.decode(piece.tolist()).strip() for piece in pieces[1::2]] == ["red car", "yes"]
    assert all(piece[-1] == tokenizer.eos_id for piece in pieces[1::2])
    assert (ids == -200).sum() == 1 and not learned[ids == -200].any()


def test_truncation_counts_the_slots_of_the_picture(tokenizer):
    ids, learned = tokenize_conversation(tokenizer, (Turn("<image>\nWhat?", "red " * 30),))
    cut, kept = truncate(ids, learned, max_length=len(ids) + 16 - 1 - 5, slots=16)
    assert len(cut) == len(ids) - 5 and kept.tolist() == learned[:-5].tolist()
    assert truncate(ids, learned, len(ids) + 15, 16)[0].tolist() == ids.tolist()
    with pytest.raises(ConversationError, match="first answer begins beyond"):
        truncate(ids, learned, 90, 16)
    with pytest.raises(ConversationError, match="picture begins beyond"):
        truncate(ids, learned, 40, 16)


def test_conversations_without_an_answer_or_with_two_pictures_are_refused(tokenizer):
    for turns, message in (
        ((Turn("a", " "),), "without an answer"),
        ((), "without an answer"),
        ((Turn("<image>\na", "b"), Turn("<image>\nc", "d")), "in one question, once"),
        ((Turn("a", "<image>"),), "in no answer"),
    ):
        with pytest.raises(ConversationError, match=message):
            tokenize_conversation(tokenizer, turns)


def said(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


@pytest.fixture
def write(tmp_path):
    for name in ("vqa/1.jpg", "vqa/2.png", "vqa/3.GIF", "vqa/4.jpg", "vqa/4.png", "a.b/5.v2.jpg"):
        file = tmp_path / "pictures" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")

    def read(*records):
        (tmp_path / "data.json").write_text(json.dumps(records))
        return read_llava(tmp_path / "data.json", tmp_path / "pictures")

    return read


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("vqa/1.jpg", "vqa/1.jpg"),
        ("vqa/2.jpg", "vqa/2.png"),
        ("vqa/3.jpg", "vqa/3.GIF"),
        ("vqa/4.png", "vqa/4.png"),
        ("vqa/4.gif", "vqa/4.png"),
        ("a.b/5.v2.png", "a.b/5.v2.jpg"),
    ],
)
def test_pictures_are_found_under_another_suffix(write, named, found):
    usable, skipped = write({"id": "x", "image": named, "conversations": said("<image>\nWhat?", "red")})
    assert [c.picture for c in usable] == [found] and not skipped


@pytest.mark.parametrize("question", ["<image>\nWhat image", "What image\n<image>", "What image", " <image>What image"])
def test_the_place_of_the_picture_comes_first_and_no_letter_is_lost(write, question):
    usable, _ = write({"id": "x", "image": "vqa/1.jpg", "conversations": said(question, "red")})
    assert usable[0].turns == (Turn("<image>\nWhat image", "red"),)


def test_text_stays_as_it_is_and_a_first_word_of_the_model_is_dropped(write):
    usable, skipped = write(
        {"id": 7, "conversations": said(" Hi ", " Hello ", "Bye", "Goodbye", "And")},
        {"id": 8, "conversations": [{"from": "gpt", "value": "Hm"}, *said("Hi", "Hello")]},
    )
    assert [c.turns for c in usable] == [(Turn(" Hi ", " Hello "), Turn("Bye", "Goodbye")), (Turn("Hi", "Hello"),)]
    assert [c.picture for c in usable] == [None, None] and usable[0].name == "0:7" and not skipped


def test_what_cannot_be_used_is_listed_and_the_rest_is_read(write):
    good = {"id": "good", "image": "vqa/1.jpg", "conversations": said("<image>\nWhat?", "red")}
    bad = {
        "missing, under any of": good | {"image": "vqa/9.jpg"},
        "missing, under any": good | {"image": "no/folder/1.jpg"},
        "no path inside": good | {"image": "../../secret.jpg"},
        "is no path inside": good | {"image": "/etc/passwd"},
        "more than one picture": good | {"image": ["vqa/1.jpg", "vqa/2.png"]},
        "not the path of a picture": good | {"image": 5},
        "stands in it 2 times": good | {"conversations": said("<image>\n<image>\nWhat?", "red")},
        "names no picture": {"id": "x", "conversations": said("<image>\nWhat?", "red")},
        "stands in an answer": good | {"conversations": said("What?", "<image>")},
        "do not alternate": good | {"conversations": [*said("a", "b"), {"from": "gpt", "value": "c"}]},
        'is not {"from"': good | {"conversations": [{"from": "system", "value": "a"}]},
        "no question with an answer": good | {"conversations": said("a")},
        "no list `conversations`": {"id": "x"},
        "it is no conversation": "text",
    }
    usable, skipped = write(*bad.values(), good)
    assert [c.name for c in usable] == [f"{len(bad)}:good"]
    assert len(skipped) == len(bad)
    for message, entry in zip(bad, skipped, strict=True):
        assert message in entry.reason, entry


def test_a_file_or_folder_that_is_not_there_says_where_to_get_it(tmp_path):
    with pytest.raises(ConversationError, match="llava_v1_5_mix665k"):
        read_llava(tmp_path / "none.json", tmp_path)
    (tmp_path / "data.json").write_text('[{"id": ')
    with pytest.raises(ConversationError, match="coco/train2017"):
        read_llava(tmp_path / "data.json", tmp_path / "none")
    with pytest.raises(ConversationError, match="not valid JSON"):
        read_llava(tmp_path / "data.json", tmp_path)
    (tmp_path / "data.json").write_text('{"a": 1}')
    with pytest.raises(ConversationError, match="no list of conversations"):
        read_llava(tmp_path / "data.json", tmp_path)
