"""Where cells lie on a picture that was padded to a square, and that sheets are drawn for every shape."""

import dataclasses
import time

import numpy as np
import pytest
from evaluation.fakes import FakeVLM
from PIL import Image

from flexattn_jax.evaluation.benchmarks import BENCHMARKS
from flexattn_jax.evaluation.harness import evaluate
from flexattn_jax.evaluation.pictures import _file_name, cell_map, draw_question, write_pictures
from flexattn_jax.evaluation.predictions import PredictionLog
from flexattn_jax.inputs.datasets.vstar import read_vstar


def test_cells_of_a_square_are_a_plain_grid():
    assert cell_map((6, 6), (6, 6), cell_grid=3, grid=6).tolist() == [
        [0, 0, 1, 1, 2, 2],
        [0, 0, 1, 1, 2, 2],
        [3, 3, 4, 4, 5, 5],
        [3, 3, 4, 4, 5, 5],
        [6, 6, 7, 7, 8, 8],
        [6, 6, 7, 7, 8, 8],
    ]


def test_cells_of_a_wide_and_of_a_tall_picture_skip_the_padding():
    # 6 x 2 in a square of 6: rows 2 and 3 of the square, which are the middle cells.
    assert cell_map((6, 2), (6, 2), cell_grid=3, grid=6).tolist() == [[3, 3, 4, 4, 5, 5]] * 2
    assert cell_map((2, 6), (2, 6), cell_grid=3, grid=6).tolist() == [[1, 1], [1, 1], [4, 4], [4, 4], [7, 7], [7, 7]]
    # 6 x 3: the offset (6 - 3) // 2 is 1, so rows 1, 2, 3 of the square.
    assert cell_map((6, 3), (6, 3), cell_grid=3, grid=6)[:, 0].tolist() == [0, 3, 3]


def test_ragged_cells_follow_the_tokens():
    # 8 tokens in 3 cells: token t is in cell t * 3 // 8, so cells have 3, 3 and 2 tokens.
    assert cell_map((8, 8), (8, 8), cell_grid=3, grid=8)[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("size", [(90, 60), (61, 90), (90, 7)])
def test_the_map_agrees_with_painting_the_padded_square(size):
    """A restatement: paint every cell's block of tokens on the square, cut the picture out."""
    grid, cell_grid, side = 18, 9, max(size)
    token = np.arange(side) * grid // side
    cells = (token * cell_grid // grid)[:, None] * cell_grid + (token * cell_grid // grid)[None, :]
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    expected = cells[top : top + size[1], left : left + size[0]]
    assert (cell_map(size, size, cell_grid, grid) == expected).all()


def answered(data_dir, workdir, vlm):
    questions, _ = read_vstar(data_dir)
    with PredictionLog(workdir, {}, questions) as log:
        evaluate(lambda: vlm, questions, log, BENCHMARKS["vstar"].scorers["released"], show_progress=False)
        return questions, log.finished


def test_kept_cells_stay_bright_and_the_box_is_drawn(data_dir, tmp_path):
    class OneCell(FakeVLM):
        def _selection(self, prompt):
            selection = super()._selection(prompt)
            selection.cells[:] = False
            selection.cells[:, 40] = True  # the middle one of 9 x 9
            return selection

    Image.new("RGB", (90, 90), (200, 200, 200)).save(data_dir / "direct_attributes" / "q0.png")
    questions, finished = answered(data_dir, tmp_path / "w", OneCell())
    sheet = np.asarray(draw_question(questions[0], finished[questions[0].id]))
    main = sheet[24 : 24 + 660, 24 : 24 + 660].astype(int)  # the large panel, 660 pixels for 9 cells
    assert main[330, 330].sum() > main[330, 600].sum() + 150 and main[600, 330].sum() < 400
    x, y = round(3 * 660 / 90) - 4, round((4 + 4) * 660 / 90)  # left side of the box (3, 4, 10, 8)
    assert (main[y, x] == [0, 230, 255]).all()


def test_where_no_layer_reads_a_cell_again_its_colour_says_which_did(data_dir, tmp_path):
    class Apart(FakeVLM):
        def _selection(self, prompt):
            selection = super()._selection(prompt)
            selection.cells[:] = False
            np.fill_diagonal(selection.cells, True)
            return selection

    Image.new("RGB", (90, 90), (200, 200, 200)).save(data_dir / "direct_attributes" / "q0.png")
    questions, finished = answered(data_dir, tmp_path / "w", Apart())
    sheet = np.asarray(draw_question(questions[0], finished[questions[0].id])).astype(int)
    colours = [sheet[24 + 36, 24 + 36 + 73 * layer] for layer in range(2)]  # the middles of cells 0 and 1
    assert np.abs(colours[0] - colours[1]).max() > 10


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (1, 500), (500, 1)])
@pytest.mark.parametrize("vlm", [FakeVLM({"What": [float("nan")] * 4}), FakeVLM(selects=False)])
def test_sheets_of_every_shape(data_dir, tmp_path, size, vlm):
    Image.new("RGB", size, "white").save(data_dir / "direct_attributes" / "q0.png")
    vlm = FakeVLM({"attributes number": [float("nan")] * 4}, selects=vlm.selects)
    questions, finished = answered(data_dir, tmp_path / "w", vlm)
    sheet = draw_question(questions[0], finished[questions[0].id])
    assert 500 < sheet.width < 2000 and 100 < sheet.height < 1200


def test_endless_texts_are_cut(data_dir, tmp_path):
    questions, finished = answered(data_dir, tmp_path / "w", FakeVLM())
    words, word = "x " * 500_000, "x" * 1_000_000
    question = dataclasses.replace(questions[0], question=words, options=(word, words, "b", "c"))
    long = dataclasses.replace(finished[questions[0].id], output=word, answers=(words,))
    began = time.process_time()
    assert draw_question(question, long).height < 2500 and time.process_time() - began < 10


def test_files_of_any_name_are_short_apart_and_inside_the_folder(data_dir, tmp_path):
    questions, finished = answered(data_dir, tmp_path / "w", FakeVLM())
    names = ["a", "a.png/b", "a:b", "a*b", "\ud800", "\udfff/x", "é" * 300, "é" * 301, "..", "../a", "/etc/x", ""]
    asked = [dataclasses.replace(questions[0], id=name) for name in names]
    paths = write_pictures(asked, dict.fromkeys(names, finished[questions[0].id]), tmp_path / "out", len(names))
    assert sorted(paths) == sorted((tmp_path / "out").rglob("*.png")) and len(set(paths)) == len(names)
    assert all(path.resolve().is_relative_to(tmp_path / "out") and path.is_file() for path in paths)
    assert [_file_name(name) for name in ("a", "OCR/0001/1", "v1_0")] == ["a", "OCR/0001/1", "v1_0"]


def test_as_many_files_as_asked_for(data_dir, tmp_path):
    questions, finished = answered(data_dir, tmp_path / "w", FakeVLM())
    del finished["direct_attributes/q1"]
    paths = write_pictures(questions, finished, tmp_path / "out", 2)
    assert [p.relative_to(tmp_path / "out").as_posix() for p in paths] == [
        "direct_attributes/q0.png",
        "direct_attributes/q2.png",
    ]
    assert all(Image.open(path).format == "PNG" for path in paths)
    assert write_pictures(questions, finished, tmp_path / "none", 0) == [] and not (tmp_path / "none").exists()
