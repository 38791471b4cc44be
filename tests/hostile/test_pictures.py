"""Every hostile picture at every door: it is read as what it shows, or refused in a sentence that names it."""

import io
import json
import os
import tracemalloc

import numpy as np
import pytest
from evaluation.fakes import FakeVLM
from hostile.checks import in_time, one_sentence, vstar_folder, vstar_settings
from hostile.pictures import PICTURES, halves, rotated, saved
from PIL import Image

from flexattn_jax.config import preset
from flexattn_jax.evaluation import run as evaluation_run
from flexattn_jax.inputs import images
from flexattn_jax.inputs.images import ImageError, load_image, picture_size, preprocess

NAMES = list(PICTURES)
REFUSED = [name for name in NAMES if PICTURES[name].error]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("door", ["path", "bytes"])
def test_a_picture_is_read_or_refused(tmp_path, recwarn, name, door):
    case = PICTURES[name]
    path = tmp_path / "picture.jpg"  # the suffix is wrong for most: the content counts
    path.write_bytes(case.make())
    source = path if door == "path" else path.read_bytes()
    if case.error:
        with pytest.raises(ImageError, match=case.error) as caught:
            load_image(source)
        assert one_sentence(str(caught.value))
        assert (str(path) if door == "path" else "bytes") in str(caught.value)
    else:
        image = load_image(source)
        assert image.mode == "RGB" and image.size == case.size
        if case.corner is not None:
            np.testing.assert_allclose(image.getpixel((0, 0)), case.corner, atol=2)
        pixels, size = preprocess(image, preset("tiny"))
        assert np.isfinite(pixels).all() and size == case.size
    assert not recwarn.list  # nothing beside the sentence is printed


@pytest.mark.parametrize("name", ["60,000 x 60,000", "10,000 x 10,000", "BMP that claims", "text bomb", "many scans"])
def test_a_small_file_takes_little_memory(name):
    data = PICTURES[name].make()
    tracemalloc.start()
    try:
        with pytest.raises(ImageError):
            load_image(data)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    for path in ("", ".", tmp_path, tmp_path / "pipe.png", "/dev/zero", "a\0b", tmp_path / "loop.png", "x" * 300):
        with pytest.raises(ImageError) as caught:
            in_time(load_image, path)
        assert one_sentence(str(caught.value))


def test_a_file_beyond_the_limit_is_not_read(tmp_path):
    path = tmp_path / "sparse.webp"
    path.write_bytes(saved(halves(), "WEBP"))
    os.truncate(path, images.MAX_BYTES + 1)
    with pytest.raises(ImageError, match="larger than"):
        load_image(path)


def test_ordinary_jpegs_are_far_from_the_limit_of_scans():
    noise = Image.effect_noise((200, 200), 90).convert("RGB")
    assert images._scans(saved(noise, "JPEG")) == 1
    assert 3 < images._scans(saved(noise, "JPEG", progressive=True)) < images.MAX_SCANS / 4
    # What follows the end of the picture, a film say, is not counted; nor is a thumbnail in front.
    assert images._scans(saved(noise, "JPEG") + b"\xff\xda" * 500) == 1


def test_boxes_of_turned_pictures_are_refused():
    """Nobody says whether their pixels are those of the stored picture or of the upright one."""
    assert picture_size(rotated(1), "it") == (40, 30)
    with pytest.raises(ImageError, match="it has an EXIF orientation"):
        picture_size(rotated(6), "it")


def test_eval_counts_what_it_cannot_ask(tmp_path, monkeypatch, capsys):
    """One folder with every picture: the good ones are asked, the others are in results.json with their reasons."""
    data = vstar_folder(tmp_path / "data", {f"q{k}": PICTURES[name].make() for k, name in enumerate(NAMES)})
    monkeypatch.setattr(evaluation_run, "load", lambda *_, **__: FakeVLM())
    settings = vstar_settings(data, tmp_path)
    results = evaluation_run.run_questions("vstar", settings, tmp_path / "w", show_progress=False)
    reasons = {error["id"]: error["reason"] for error in results["errors"]}
    assert results["overall"]["n"] == len(NAMES) - len(REFUSED) and len(reasons) == len(REFUSED)
    for number, name in enumerate(NAMES):
        assert (f"direct_attributes/q{number}" in reasons) == (name in REFUSED), name
    assert all(one_sentence(reason) for reason in reasons.values())
    assert f"{len(REFUSED)} not asked" in capsys.readouterr().out
    assert json.loads((tmp_path / "w" / "results.json").read_text())["errors"]


def test_arrays_that_are_no_pictures():
    for array in (
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.full((4, 4, 3), np.nan),
        np.broadcast_to(np.uint8(0), (60_000, 60_000, 3)),  # takes no memory, until it is copied
    ):
        with pytest.raises(ImageError) as caught:
            load_image(array)
        assert one_sentence(str(caught.value))


def test_a_lazily_opened_picture_is_checked_before_it_is_decoded():
    with pytest.warns(Image.DecompressionBombWarning):
        image = Image.open(io.BytesIO(PICTURES["10,000 x 10,000"].make()))
    with pytest.raises(ImageError, match="10000 x 10000"):
        load_image(image)
