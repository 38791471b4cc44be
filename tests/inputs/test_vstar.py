"""The reader of V* Bench's folder layout, on whole and on broken folders."""

import json
import os

import pytest
from PIL import Image

from flexattn_jax.inputs.datasets.questions import DatasetError
from flexattn_jax.inputs.datasets.vstar import SPLITS, read_vstar

FIELDS = {
    "question": "What is the color of the hat?",
    "options": ["The hat is red.", "The hat is blue."],
    "target_object": ["hat"],
    "bbox": [[1, 2, 3, 4]],
}


def write(folder, stem, fields=FIELDS, suffix=".jpg"):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6)).save(folder / f"{stem}{suffix}", format="PNG")
    (folder / f"{stem}.json").write_text(fields if isinstance(fields, str) else json.dumps(fields))


def test_reads_every_field_in_a_stable_order(tmp_path):
    write(tmp_path / "relative_position", "b", FIELDS | {"target_object": ["hat", "cat"], "bbox": [[0, 0, 1, 1]] * 2})
    write(tmp_path / "direct_attributes", "z", suffix=".JPG")
    write(tmp_path / "direct_attributes", "a", suffix=".webp")
    questions, errors = read_vstar(tmp_path)
    assert errors == []
    assert [q.id for q in questions] == ["direct_attributes/a", "direct_attributes/z", "relative_position/b"]
    first = questions[0]
    assert (first.split, first.image) == ("direct_attributes", tmp_path / "direct_attributes" / "a.webp")
    assert (first.question, first.options) == (FIELDS["question"], ("The hat is red.", "The hat is blue."))
    assert (first.target_object, first.bbox) == (("hat",), ((1.0, 2.0, 3.0, 4.0),))
    assert questions[2].target_object == ("hat", "cat")


@pytest.mark.parametrize(
    "fields, reason",
    [
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("\xff\xfe", "must hold an object|not valid JSON"),
        ("[]", "must hold an object"),
        ({k: v for k, v in FIELDS.items() if k != "question"}, "'question' is missing"),
        ({k: v for k, v in FIELDS.items() if k != "options"}, "'options' is missing"),
        ({k: v for k, v in FIELDS.items() if k != "bbox"}, "'bbox' is missing"),
        (FIELDS | {"question": 3}, "'question' must be a text"),
        (FIELDS | {"question": " "}, "'question' must be a text"),
        (FIELDS | {"question": "what is <image>?"}, "place-holder"),
        (FIELDS | {"options": []}, "'options' must be a list"),
        (FIELDS | {"options": ["a", ""]}, "'options' must be a list"),
        (FIELDS | {"options": "a"}, "'options' must be a list"),
        (FIELDS | {"options": ["a"]}, "'options' has 1 entries"),
        (FIELDS | {"options": [str(k) for k in range(27)]}, "'options' has 27 entries"),
        (FIELDS | {"target_object": "hat"}, "'target_object' must be a list"),
        (FIELDS | {"bbox": [1, 2, 3, 4]}, "'bbox' must be"),
        (FIELDS | {"bbox": [[1, 2, 3]]}, "'bbox' must be"),
        (FIELDS | {"bbox": [[1, 2, -3, 4]]}, "'bbox' must be"),
        (FIELDS | {"bbox": [[1, 2, 3, True]]}, "'bbox' must be"),
        (json.dumps(FIELDS).replace("[1, 2", "[NaN, 2"), "holds NaN"),
        (json.dumps(FIELDS).replace("[1, 2", "[Infinity, 2"), "holds Infinity"),
        (json.dumps(FIELDS).replace("[1, 2", f"[1{'0' * 400}, 2"), "no number"),
    ],
)
def test_a_broken_json_is_named_and_the_others_are_read(tmp_path, fields, reason):
    for split in SPLITS:
        write(tmp_path / split, "good")
    write(tmp_path / "direct_attributes", "bad", fields)
    questions, errors = read_vstar(tmp_path)
    assert [q.id for q in questions] == ["direct_attributes/good", "relative_position/good"]
    (error,) = errors
    assert error.id == "direct_attributes/bad" and str(tmp_path / "direct_attributes" / "bad.json") in error.reason
    assert any(part in error.reason for part in reason.split("|")), error.reason


def test_files_without_their_partner_are_errors_and_stray_files_are_not(tmp_path):
    for split in SPLITS:
        write(tmp_path / split, "good")
    folder = tmp_path / "direct_attributes"
    (folder / "alone.json").write_text(json.dumps(FIELDS))
    Image.new("RGB", (4, 4)).save(folder / "lonely.png")
    write(folder, "twice")
    Image.new("RGB", (4, 4)).save(folder / "twice.png")
    for stray in ("._good.jpg", "readme.txt", ".DS_Store"):
        (folder / stray).write_bytes(b"x")
    questions, errors = read_vstar(tmp_path)
    assert len(questions) == 2
    reasons = {error.id.split("/")[1]: error.reason for error in errors}
    assert set(reasons) == {"alone", "lonely", "twice"}
    assert "has no picture" in reasons["alone"] and "no lonely.json" in reasons["lonely"]
    assert "twice.jpg, twice.json, twice.png" in reasons["twice"]


def test_links_may_not_leave_the_folder(tmp_path):
    data, outside = tmp_path / "data", tmp_path / "outside"
    for split in SPLITS:
        write(data / split, "good")
    write(outside, "secret")
    os.symlink(outside / "secret.jpg", data / "direct_attributes" / "stolen.jpg")
    (data / "direct_attributes" / "stolen.json").write_text(json.dumps(FIELDS))
    os.symlink(data / "relative_position" / "good.jpg", data / "direct_attributes" / "inner.jpg")
    (data / "direct_attributes" / "inner.json").write_text(json.dumps(FIELDS))
    questions, errors = read_vstar(data)
    assert [q.id for q in questions] == [f"{SPLITS[0]}/good", f"{SPLITS[0]}/inner", f"{SPLITS[1]}/good"]
    assert [e.id for e in errors] == ["direct_attributes/stolen"] and "leaves the data folder" in errors[0].reason


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")])
def test_a_missing_dataset_says_where_to_get_it(tmp_path, make):
    make(tmp_path / "vstar")
    with pytest.raises(DatasetError, match=r"craigwu/vstar_bench.*direct_attributes and relative_position"):
        read_vstar(tmp_path / "vstar")
    with pytest.raises(DatasetError, match="craigwu/vstar_bench"):
        read_vstar("")


def test_one_missing_split_is_reported(tmp_path):
    write(tmp_path / "relative_position", "a")
    questions, errors = read_vstar(tmp_path)
    assert [q.id for q in questions] == ["relative_position/a"]
    assert [e.id for e in errors] == ["direct_attributes"]
