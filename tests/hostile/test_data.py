"""Data files that are broken, huge, contradictory or lead out of their folder; predictions of another's making."""

import json
import os
import random

import pytest
from conftest import FIXTURES
from hostile.checks import QUESTION, in_time, one_sentence, vstar_folder
from hostile.pictures import halves, saved
from inputs.layouts import LAYOUTS

from flexattn_jax import files
from flexattn_jax.config import override, preset
from flexattn_jax.evaluation import rescore
from flexattn_jax.evaluation.benchmarks import BENCHMARKS
from flexattn_jax.evaluation.predictions import question_digest
from flexattn_jax.inputs.batching import Buckets
from flexattn_jax.inputs.conversations import ConversationError
from flexattn_jax.inputs.datasets.llava import read_llava
from flexattn_jax.inputs.datasets.questions import DatasetError
from flexattn_jax.inputs.datasets.vstar import read_vstar
from flexattn_jax.inputs.tokenizer import load_tokenizer
from flexattn_jax.training.data import BatchPlan, BatchSource, ConversationSource

# What a file of JSON can be; each is refused wherever JSON is read.
BROKEN = {
    "empty": (b"", "not valid JSON"),
    "cut short": (b'{"a": [1, 2', "not valid JSON"),
    "two values": (b"{} {}", "not valid JSON"),
    "binary": (bytes(range(256)), "not valid JSON"),
    "UTF-16 that ends early": (b"\xff\xfe{", "not valid JSON"),
    "NaN": (b'{"a": NaN}', "holds NaN"),
    "infinity": (b'{"a": -Infinity}', "holds -Infinity"),
    "a float beyond all": (b'{"a": 1e999}', "holds 1e999"),
    "an integer of a million digits": (b'{"a": ' + b"9" * 1_000_000 + b"}", "no number"),
    "nested": (b"[" * 200_000, "nested too deeply"),
    "nested tables": (b'{"a":' * 200_000, "nested too deeply"),
    "a name twice": (b'{"q": 1, "q": 2}', "'q' twice"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_json_that_is_broken_or_open_to_two_readings(tmp_path, name):
    content, message = BROKEN[name]
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(files.FileError, match=message) as caught:
        in_time(files.read_json, path)
    assert one_sentence(str(caught.value))


def test_files_that_are_no_files_or_too_large(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(files.FileError, match="folder, pipe or device"):
            in_time(files.read_json, type(tmp_path)(path))
    (tmp_path / "huge.json").touch()
    os.truncate(tmp_path / "huge.json", files.SETTINGS_BYTES + 1)
    with pytest.raises(files.FileError, match="larger than"):
        files.read_json(tmp_path / "huge.json")
    with pytest.raises(FileNotFoundError):
        files.read_json(tmp_path / "none.json")


def test_what_names_may_do_to_a_terminal():
    assert files.printable("a\x1b[2J\r\ud800b\tc\n") == "a\\x1b[2J\\x0d?b\tc\n"


# Every benchmark: the file that its reader parses first, broken in each way, is one sentence that names it.
FIRST = {
    "gqa": "testdev_balanced_questions.json", "vqav2": "v2_OpenEnded_mscoco_val2014_questions.json",
    "textvqa": "TextVQA_0.5.1_val.json", "rsvqa": "USGS_split_test_phili_questions.json", "mmvet": "mm-vet.json",
    "magnifier": "data_instructions.json", "pope": "coco/coco_pope_random.json",
}  # fmt: skip


@pytest.mark.parametrize("benchmark", FIRST)
def test_a_broken_data_file_is_named(tmp_path, benchmark):
    LAYOUTS[benchmark](tmp_path)
    path = tmp_path / FIRST[benchmark]
    for name in ("cut short", "binary", "NaN", "nested", "an integer of a million digits"):
        path.write_bytes(BROKEN[name][0])
        with pytest.raises(DatasetError) as caught:
            in_time(BENCHMARKS[benchmark].read, tmp_path, BENCHMARKS[benchmark].variants[0])
        assert str(path) in str(caught.value) and one_sentence(str(caught.value))


PICTURES = {"gqa": "images", "vqav2": "val2014", "textvqa": "train_images", "mmvet": "images", "pope": "val2014"}


@pytest.mark.parametrize("benchmark", PICTURES)
def test_links_out_of_a_data_folder(tmp_path, benchmark):
    data, outside = tmp_path / "data", tmp_path / "secret.jpg"
    LAYOUTS[benchmark](data)
    outside.write_bytes(saved(halves(), "JPEG"))
    read, variant = BENCHMARKS[benchmark].read, BENCHMARKS[benchmark].variants[0]
    asked = len(read(data, variant)[0])
    pictures = sorted((data / PICTURES[benchmark]).iterdir())
    pictures[0].unlink()
    pictures[0].symlink_to(outside)
    if len(pictures) > 1:
        questions, errors = read(data, variant)
        assert len(questions) + len(errors) >= asked and pictures[0] not in {q.image for q in questions}
        assert any("is a link out of the data folder" in error.reason for error in errors)
    else:
        with pytest.raises(DatasetError, match="is a link out of the data folder"):
            read(data, variant)
    # A link that stays inside is as good as a copy, and so is a link to the folder itself.
    pictures[0].unlink()
    (data / "inside.jpg").write_bytes(outside.read_bytes())
    pictures[0].symlink_to("../inside.jpg")
    (tmp_path / "link").symlink_to(data)
    assert len(read(tmp_path / "link", variant)[0]) == asked
    # The whole folder of pictures lies elsewhere.
    (data / PICTURES[benchmark]).rename(tmp_path / "elsewhere")
    (data / PICTURES[benchmark]).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DatasetError, match="leaves the data folder"):
        read(data, variant)


def test_answers_that_contradict_each_other_are_no_answers(tmp_path):
    LAYOUTS["vqav2"](tmp_path)
    path = tmp_path / "v2_mscoco_val2014_annotations.json"
    content = json.loads(path.read_text())
    asked = len(BENCHMARKS["vqav2"].read(tmp_path, "val")[0])
    content["annotations"].append(content["annotations"][0] | {"answers": [{"answer": "other"}] * 10})
    path.write_text(json.dumps(content))
    questions, errors = BENCHMARKS["vqav2"].read(tmp_path, "val")
    assert len(questions) == asked - 1 and "has several answers to question" in errors[0].reason


# One entry of a file made odd, by what is replaced there: it is counted with its reason, and the others are asked.
COUNTED = {
    "half a character, gqa": ("gqa", '"imageId": "n235859"', '"imageId": "\\ud800/x"', "is missing"),
    "half a character, textvqa": ("textvqa", '"003a8ae2ef43b901"', '"\\ud800/x"', "is missing"),
    "half a character, mmvet": ("mmvet", '"v1_0.png"', '"\\ud800/x.png"', "is missing"),
    "an endless index": ("mmbench", "\n252\t", f"\n{'1' * 5000}\t", "no index or no question"),
    "active of text": ("rsvqa", 'true, "question": "Is there', '"true", "question": "Is there', "'active' must be"),
    "type of a list": ("rsvqa", '"type": "comp"', '"type": []', "'type' must be a text"),
    "two answers": ("rsvqa", '"answers_ids": [7]', '"answers_ids": [7, 6]', "list of one whole number"),
    "a box beyond its picture": ("refcoco", "0,0,24,24", "0,0,24,240", "leaves its picture of 48 x 24 pixels"),
    "a box before its picture": ("refcoco", "0,0,24,24", "-1e8,0,24,24", "leaves its picture"),
    "a box without width": ("refcoco", "0,0,24,24", "5,5,5,9", "is not x1,y1,x2,y2"),
}
TABLES = {"mmbench": "mmbench_dev_20230712.tsv", "refcoco": "refcocog_val.tsv", "hrbench": "hr_bench_4k.tsv"}


@pytest.mark.parametrize("name", COUNTED)
def test_an_odd_entry_is_counted(tmp_path, name):
    benchmark, old, new, reason = COUNTED[name]
    LAYOUTS[benchmark](tmp_path)
    path = tmp_path / (FIRST | TABLES)[benchmark]
    asked = len(BENCHMARKS[benchmark].read(tmp_path, BENCHMARKS[benchmark].variants[0])[0])
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    questions, errors = BENCHMARKS[benchmark].read(tmp_path, BENCHMARKS[benchmark].variants[0])
    assert len(questions) == asked - 1
    assert [error for error in errors if reason in error.reason] == errors and len(errors) == 1


@pytest.mark.parametrize("benchmark", TABLES)
def test_a_table_that_is_a_pipe_does_not_hang(tmp_path, benchmark):
    os.mkfifo(tmp_path / TABLES[benchmark])
    with pytest.raises(DatasetError, match="folder, pipe or device") as caught:
        in_time(BENCHMARKS[benchmark].read, tmp_path, BENCHMARKS[benchmark].variants[0])
    assert TABLES[benchmark] in str(caught.value)


def test_a_table_that_names_a_column_twice_is_refused(tmp_path):
    LAYOUTS["hrbench"](tmp_path)
    path = tmp_path / TABLES["hrbench"]
    head, *rows = path.read_text().splitlines()
    path.write_text("\n".join([f"{head}\tanswer", *(f"{row}\tA" for row in rows)]))
    with pytest.raises(DatasetError, match="has 2 columns 'answer'"):
        BENCHMARKS["hrbench"].read(tmp_path, "4k")


def test_instructions_that_begin_many_options_and_pictures_of_half_characters(tmp_path):
    LAYOUTS["magnifier"](tmp_path)
    for name, old, new in (
        ("data_instructions.json", "A. Red, B. Blue, C. Light green, D. White", "A. x, B. x, C. x, " * 5000),
        ("images.json", '"MAG_IMG_1": "', '"MAG_IMG_1": "\\ud800'),
    ):
        path = tmp_path / name
        path.write_text(path.read_text().replace(old, new))
    questions, errors = in_time(BENCHMARKS["magnifier"].read, tmp_path, "", seconds=10)
    assert errors == [] and questions[0].options == tuple("ABCD")
    assert question_digest(questions[0]) != question_digest(questions[1])


def test_texts_of_mme_that_lie_elsewhere_or_have_endless_names(tmp_path):
    data = tmp_path / "data"
    LAYOUTS["mme"](data)
    text, endless = data / "OCR" / "0001.txt", data / "OCR" / f"{'n' * 251}.txt"
    endless.write_text("a\tYes\nb\tNo\n")
    text.write_bytes(b"\xef\xbb\xbf" + text.read_bytes())  # as some editors save
    asked = [q.question for q in BENCHMARKS["mme"].read(data, "")[0]]
    assert "Is there OCR?" in asked
    text.rename(tmp_path / "outside.txt")
    text.symlink_to(tmp_path / "outside.txt")
    questions, errors = BENCHMARKS["mme"].read(data, "")
    assert "Is there OCR?" not in [q.question for q in questions]
    reasons = {error.id: error.reason for error in errors}
    assert "is a link that leaves the data folder" in reasons["OCR/0001/1"]
    assert "is missing" in reasons[f"OCR/{'n' * 251}/1"]


def test_a_pipe_among_the_texts_of_mme_does_not_hang(tmp_path):
    LAYOUTS["mme"](tmp_path)
    text = next(tmp_path.rglob("*.txt"))
    text.unlink()
    os.mkfifo(text)
    _, errors = in_time(BENCHMARKS["mme"].read, tmp_path, "")
    assert any(str(text) in error.reason for error in errors)


def test_a_table_in_one_endless_line(tmp_path, monkeypatch):
    monkeypatch.setattr("flexattn_jax.inputs.datasets.tables._LARGEST_FIELD", 1000)
    for benchmark, variant in (("hrbench", "4k"), ("refcoco", "refcocog_val")):
        name = "hr_bench_4k.tsv" if benchmark == "hrbench" else "refcocog_val.tsv"
        (tmp_path / name).write_bytes(b"index\timage\n" * (benchmark == "hrbench") + b"x" * 5000)
        with pytest.raises(DatasetError, match="no whole table") as caught:
            BENCHMARKS[benchmark].read(tmp_path, variant)
        assert name in str(caught.value)


# Conversations: what is wrong with one, by its reason.
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
CONVERSATIONS = {
    "up": ({"image": "../secret.jpg", "conversations": TURNS}, "no path inside"),
    "absolute": ({"image": "/etc/passwd", "conversations": TURNS}, "no path inside"),
    "zero byte": ({"image": "a\0.jpg", "conversations": TURNS}, "no path inside"),
    "link": ({"image": "link.jpg", "conversations": TURNS}, "is a link out of the folder"),
    "linked folder": ({"image": "away/secret.jpg", "conversations": TURNS}, "is a link out of the folder"),
    "missing": ({"image": "none.jpg", "conversations": TURNS}, "is missing"),
    "half a character": ({"image": "\ud800/x.jpg", "conversations": TURNS}, "is missing"),
    "two pictures": ({"image": ["a.jpg", "b.jpg"], "conversations": TURNS}, "more than one picture"),
    "no turns": ({"image": "good.jpg"}, "no list `conversations`"),
    "odd turns": ({"image": "good.jpg", "conversations": [{"from": "system", "value": 3}]}, "a sentence of it"),
    "a number": (7, "no conversation"),
    "two tags": (
        {"image": "good.jpg", "conversations": [{"from": "human", "value": "<image> <image>"}, TURNS[1]]},
        "stands in it 2 times",
    ),
}
# These are found out later: when the text is tokenised, or when the picture is decoded.
LATE = {
    "endless text": [{"from": "human", "value": "a" * (2 << 20)}, TURNS[1]],
    "no answer": [TURNS[0], {"from": "gpt", "value": "  "}],
}


def test_conversations_that_cannot_be_used_are_counted_with_their_reason(tmp_path):
    root = tmp_path / "pictures"
    root.mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.jpg").write_bytes(saved(halves(), "JPEG"))
    (root / "good.jpg").write_bytes(saved(halves(), "JPEG"))
    (root / "torn.jpg").write_bytes(saved(halves(), "JPEG")[:300])
    (root / "link.jpg").symlink_to(tmp_path / "outside" / "secret.jpg")
    (root / "away").symlink_to(tmp_path / "outside")
    good = [{"id": "same", "image": f"{name}.jpg", "conversations": TURNS} for name in ("good", "good", "torn")]
    late = [{"image": "good.jpg", "conversations": turns} for turns in LATE.values()]
    records = [record for record, _ in CONVERSATIONS.values()] + late + good
    path = tmp_path / "c.json"
    path.write_text(json.dumps(records))
    usable, skipped = read_llava(path, root)
    assert len(usable) == len(good) + len(late) and len(skipped) == len(CONVERSATIONS)
    for fault, (_, reason) in zip(skipped, CONVERSATIONS.values(), strict=True):
        assert reason in fault.reason and one_sentence(fault.reason)
    assert len(read_llava(path, root, follow_links=True)[1]) == len(CONVERSATIONS) - 2

    tokenizer = load_tokenizer(FIXTURES / "inputs" / "huggingface")
    config = override(preset("tiny"), {"decoder.vocab_size": tokenizer.vocab_size})
    source = ConversationSource(usable, root, tokenizer, config, 200)
    assert len(source) == len(good) and "more than" in source.skipped[0].reason
    plan = BatchPlan(4, Buckets(text_lengths=(128,)), (64,))
    (fault,) = BatchSource(source, range(len(good)), config, plan)[0].skipped
    assert "torn.jpg is damaged or truncated" in fault.reason


def test_a_conversation_file_that_is_none(tmp_path):
    for name, (content, _) in BROKEN.items():
        (tmp_path / "c.json").write_bytes(content)
        with pytest.raises(ConversationError, match=r"c\.json") as caught:
            in_time(read_llava, tmp_path / "c.json", tmp_path)
        assert one_sentence(str(caught.value)), name


# Predictions, as rescore reads them.
LINE = {
    "id": "q", "split": "s", "digest": "d", "question": "?", "options": ["a", "b"], "target": 0, "answers": [],
    "unit": "", "losses": [1.0, 2.0], "output": None, "order": None, "seconds": 0.1, "compiled": False, "device": "cpu",
    "selection": {"layers": [1], "cells": ["ff80"], "cell_grid": 3, "grid": 9, "overflow": [0], "cells_read": 9},
}  # fmt: skip


def _rescore(folder, lines, run=None):
    (folder / "run.json").write_text(json.dumps(run or {"benchmark": "vstar", "scorer": "released"}))
    (folder / "predictions.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return in_time(rescore.main, [str(folder / "predictions.jsonl")])


def test_rescore_takes_what_eval_writes(tmp_path, capsys):
    assert _rescore(tmp_path, [json.dumps(LINE).encode()]) == 0
    assert "100.0 %" in capsys.readouterr().out


def test_rescore_prints_names_of_strangers_as_they_are(tmp_path, capsys):
    odd = {"device": "[/x]\x1b[2J", "split": "[/y]\x1b[2J", "output": "yes", "losses": None}
    run = {"benchmark": "pope", "scorer": "official"}  # whose figures are called after the splits
    assert _rescore(tmp_path, [json.dumps(LINE | odd).encode()], run) == 0
    said = capsys.readouterr().out
    assert "[/x]\\x1b[2J" in said and said.count("[/y]\\x1b[2J") > 1 and "\x1b" not in said


@pytest.mark.parametrize(
    "change",
    [
        {"losses": [1.0]}, {"losses": "12"}, {"losses": [{}, 1]}, {"losses": None}, {"target": 9}, {"target": "0"},
        {"options": []}, {"options": 3}, {"order": [0, 0]}, {"order": [5, 1]}, {"score": "x"}, {"score": [1]},
        {"id": [1]},
        {"seconds": None}, {"seconds": "1"}, {"extra": 1}, {"selection": {}}, {"selection": 3}, {"choice": -1},
        {"selection": LINE["selection"] | {"cells": ["zz80"]}}, {"selection": LINE["selection"] | {"cells": ["f"]}},
        {"selection": LINE["selection"] | {"cell_grid": 10**9}}, {"selection": LINE["selection"] | {"overflow": []}},
        {"selection": LINE["selection"] | {"cell_grid": 0, "cells": [""]}},
        {"selection": LINE["selection"] | {"cell_grid": -3}}, {"seconds": -1.0}, {"seconds": 1e308},
        {"split": None}, {"answers": [[]]}, {"device": {}},
    ],
)  # fmt: skip
def test_predictions_that_were_tampered_with(tmp_path, capsys, change):
    assert _rescore(tmp_path, [json.dumps(LINE | change).encode()]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "predictions.jsonl") in error and one_sentence(error)


def test_predictions_and_runs_that_are_none(tmp_path, capsys):
    good = json.dumps(LINE).encode()
    cases = [([good, good], None), ([good], {"benchmark": "gqa", "scorer": "exact"}), ([good], {"benchmark": 3})]
    cases += [([content.replace(b"\n", b"")], None) for content, _ in BROKEN.values()]
    cases += [([good], {"benchmark": "vstar", "scorer": scorer}) for scorer in (None, [], "nosuch")]
    cases += [([good], {"benchmark": "vstar", "scorer": "released", "variant": odd}) for odd in (5, None, "\x1b[2J")]
    for lines, run in cases:
        assert _rescore(tmp_path, lines, run) == 2
        assert one_sentence(capsys.readouterr().err)
    (tmp_path / "run.json").unlink()
    os.mkfifo(tmp_path / "run.json")
    assert in_time(rescore.main, [str(tmp_path / "predictions.jsonl")]) == 2
    assert in_time(rescore.main, [str(tmp_path / "none.jsonl")]) == 2


def test_every_value_of_a_v_star_question_replaced(tmp_path):
    """Whatever stands in one question's file, the question beside it is asked and the fault is named."""
    vstar_folder(tmp_path / "data", 2)
    path = tmp_path / "data" / "direct_attributes" / "q0.json"
    odd = [None, 3, -1, "", "x", [], {}, [[]], True, 1e300, "<image>", "\ud800", "x" * 100_000]
    for name in QUESTION:
        for value in odd:
            path.write_text(json.dumps(QUESTION | {name: value}))
            questions, errors = read_vstar(tmp_path / "data")
            assert len(questions) + len(errors) == 2 and "direct_attributes/q1" in {q.id for q in questions}
            assert all(str(path) in error.reason and one_sentence(error.reason) for error in errors)


def test_bytes_of_a_data_file_flipped(tmp_path):
    """A few hundred damaged copies: read, counted or refused, never another exception."""
    LAYOUTS["gqa"](tmp_path)
    path, draw = tmp_path / FIRST["gqa"], random.Random(0)
    whole = path.read_bytes()
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
        try:
            BENCHMARKS["gqa"].read(tmp_path, "")
        except DatasetError as error:
            refused += one_sentence(str(error).split("VL")[0])
    assert refused > 20
