"""Pictures of what the model looked at: the cells that each layer kept, with the true boxes; groups of patches."""

from __future__ import annotations

import colorsys
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flexattn_jax.api import VisionLanguageModel
from flexattn_jax.config import IMAGE_PLACEHOLDER
from flexattn_jax.evaluation.harness import open_picture, unpack_cells
from flexattn_jax.evaluation.predictions import CellSelection, Prediction
from flexattn_jax.files import naming
from flexattn_jax.inputs.datasets.questions import Question

_ODD = re.compile(r"[\x00-\x1f\x7f\\:*?\"<>|]")
_NAME_BYTES = 200  # of a question's name as a path; a file system takes 255
_MAIN = (880, 660)  # largest size of the large panel
_SMALL_WIDTH = 280  # of a layer's panel
_TITLE = 26  # height below a layer's panel
_COLUMNS = 2
_MOST_PANELS = 6
_MOST_LINES = 6  # of a question (with OCR tokens it may have dozens) or an answer
_MOST_CHARACTERS = 1000  # of a text, more than fill so many lines
_MARGIN = 24
_GAP = 14

_PAPER = (255, 255, 255)
_INK = (28, 32, 38)
_FAINT = (105, 112, 122)
_BOX = (0, 230, 255)
_RIGHT = (22, 128, 60)
_WRONG = (190, 40, 40)
_SHADE = np.array([12, 14, 20], np.float32)  # what cells that nobody kept are darkened towards
_HEAT = np.array([[70, 90, 235], [30, 165, 200], [110, 205, 90], [255, 225, 40]], np.float32)  # few to all layers


def cell_map(size: tuple[int, int], panel: tuple[int, int], cell_grid: int, grid: int) -> np.ndarray:
    """The cell that each pixel of a panel belongs to, where the panel shows the whole unpadded picture.

    Cells tile the square that the picture was padded to, with the picture at offset (side - short) // 2. A
    high-resolution token (row, column) of the G x G grid belongs to the cell (row * cell_grid // G,
    column * cell_grid // G), so cells are ragged where G is no multiple of cell_grid.

    Args:
        size: (width, height) of the picture before padding.
        panel: (width, height) of the panel.
        cell_grid: cells a side.
        grid: G.

    Returns:
        (panel height, panel width) int, row-major indices of cells, 0..C-1.
    """
    side = max(size)
    columns, rows = (
        ((np.arange(shown) + 0.5) * length / shown + (side - length) // 2) * grid // side * cell_grid // grid
        for length, shown in zip(size, panel, strict=True)
    )
    return (rows[:, None] * cell_grid + columns[None, :]).astype(int)


def draw_groups(photograph: Image.Image, groups: np.ndarray) -> Image.Image:
    """The picture with each group of patches (VisToG) as a coloured region.

    Args:
        photograph: before padding.
        groups: (N,) int, the group of each patch of the padded square, row-major.
    """
    panel, grid = _fit(photograph, _MAIN), round(len(groups) ** 0.5)
    regions = np.asarray(groups)[cell_map(photograph.size, panel.size, grid, grid)]
    # Hues a golden section apart: groups whose numbers are close differ most.
    hues = np.arange(int(regions.max()) + 1) * 0.618034 % 1
    colours = np.array([colorsys.hsv_to_rgb(hue, 0.75, 0.95) for hue in hues], np.float32) * 255
    strength = np.where(_borders(regions), 0.9, 0.45).astype(np.float32)
    return _blend(panel, colours[regions], strength)


def draw_question(question: Question, prediction: Prediction) -> Image.Image:
    """One sheet: all layers together on the left, single layers on the right, the question and the answer below."""
    photograph = open_picture(question)
    selection = prediction.selection
    chosen = unpack_cells(selection) if selection is not None else np.zeros((0, 1), bool)
    shown = _spread(len(chosen), _MOST_PANELS)

    main = _fit(photograph, _MAIN)
    if selection is not None:
        main = _heat(main, chosen, selection, photograph.size)
    main = _boxes(main, question, photograph.size)
    rows = -(-len(shown) // _COLUMNS)
    small = _fit(photograph, (_SMALL_WIDTH, main.height // max(1, rows) - _TITLE))
    panels = [_boxes(_layer(small, chosen[k], selection, photograph.size), question, photograph.size) for k in shown]
    right_width = _COLUMNS * (small.width + _GAP) if panels else 0
    caption = _caption(question, prediction, max(main.width + right_width, 560))
    top_height = max(main.height + _TITLE, rows * (small.height + _TITLE))
    size = (caption.width + 2 * _MARGIN, top_height + caption.height + 2 * _MARGIN + _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    sheet.paste(main, (_MARGIN, _MARGIN))
    draw = ImageDraw.Draw(sheet)
    _legend(draw, (_MARGIN, _MARGIN + main.height + 6), selection, chosen, boxes=bool(question.bbox))
    for place, (layer, panel) in enumerate(zip(shown, panels, strict=True)):
        x = _MARGIN + main.width + _GAP + (place % _COLUMNS) * (small.width + _GAP)
        y = _MARGIN + (place // _COLUMNS) * (small.height + _TITLE)
        sheet.paste(panel, (x, y))
        title = f"layer {selection.layers[layer]}: {int(chosen[layer].sum())} cells"
        draw.text((x, y + small.height + 3), title, fill=_FAINT, font=_font(14))
    sheet.paste(caption, (_MARGIN, _MARGIN + top_height + _GAP))
    return sheet


def write_pictures(
    questions: Sequence[Question], predictions: dict[str, Prediction], folder: Path, count: int
) -> list[Path]:
    """Writes a PNG for each of the first `count` answered questions and returns the paths."""
    answered = [question for question in questions if question.id in predictions][:count]
    paths = []
    for question in answered:
        path = folder / f"{_file_name(question.id)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming(path):
            draw_question(question, predictions[question.id]).save(path)
        paths.append(path)
    return paths


def write_groups(vlm: VisionLanguageModel, questions: Sequence[Question], folder: Path, count: int) -> list[Path]:
    """Writes a PNG with the groups of a model with grouping for each of the first `count` questions' pictures."""
    paths = []
    for question in questions[:count]:
        photograph, ids = open_picture(question), [vlm.config.bos_token_id, IMAGE_PLACEHOLDER]
        _, named = vlm.logits([photograph], [ids], capture=["groups"])
        path = folder / f"{_file_name(question.id)}-groups.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_groups(photograph, np.asarray(named["groups"][0])).save(path)
        paths.append(path)
    return paths


def _file_name(name: str) -> str:
    """A question's name, which comes out of a file, as a short path that stays in its folder.

    No folder has a full stop, so that none is called as a picture is; what had to be changed ends in a digest.
    """
    cut = name.encode("utf-8", "replace")[:_NAME_BYTES].decode(errors="ignore")
    *folders, last = (_ODD.sub("_", part).lstrip(".") or "_" for part in cut.split("/"))
    path = "/".join([*(folder.replace(".", "_") for folder in folders), last])
    if path == name:
        return path
    return f"{path}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:12]}"


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of the indices 0..count-1, evenly spread, first and last included."""
    return sorted({round(k) for k in np.linspace(0, count - 1, min(count, most))}) if count else []


def _fit(picture: Image.Image, limit: tuple[int, int]) -> Image.Image:
    scale = min(limit[0] / picture.width, limit[1] / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _heat(panel: Image.Image, chosen: np.ndarray, selection: CellSelection, size: tuple[int, int]) -> Image.Image:
    """Cells tinted by how many layers kept them, or by which, where none was kept twice; others are darkened."""
    cells = cell_map(size, panel.size, selection.cell_grid, selection.grid)
    counts, most = chosen.sum(axis=0), max(1, len(chosen) - 1)
    steps = chosen.argmax(axis=0) if _apart(chosen) else counts - 1
    colours = np.where(counts[:, None] > 0, [_heat_colour(step / most) for step in steps], _SHADE).astype(np.float32)
    strength = np.where(counts, 0.34, 0.5).astype(np.float32)[cells]
    strength[_borders(cells) & (counts[cells] > 0)] = 0.85
    return _blend(panel, colours[cells], strength)


def _apart(chosen: np.ndarray) -> bool:
    """Whether several layers kept cells (layers, C), none of them the same."""
    return len(chosen) > 1 and chosen.sum(axis=0).max() == 1


def _layer(panel: Image.Image, kept: np.ndarray, selection: CellSelection, size: tuple[int, int]) -> Image.Image:
    """One layer: the cells that it kept are bright, the others dark."""
    cells = cell_map(size, panel.size, selection.cell_grid, selection.grid)
    return _blend(panel, _SHADE, np.where(kept, 0.0, 0.78).astype(np.float32)[cells])


def _blend(panel: Image.Image, colour: np.ndarray, strength: np.ndarray) -> Image.Image:
    mixed = np.asarray(panel, np.float32) * (1 - strength[..., None]) + colour * strength[..., None]
    return Image.fromarray(mixed.round().astype(np.uint8))


def _borders(cells: np.ndarray) -> np.ndarray:
    """Pixels whose right or lower neighbour belongs to another cell."""
    border = np.zeros(cells.shape, bool)
    border[:, :-1] |= cells[:, 1:] != cells[:, :-1]
    border[:-1] |= cells[1:] != cells[:-1]
    return border


def _heat_colour(value: float) -> np.ndarray:
    place = float(np.clip(value, 0, 1)) * (len(_HEAT) - 1)
    return np.array([np.interp(place, range(len(_HEAT)), _HEAT[:, channel]) for channel in range(3)])


def _boxes(panel: Image.Image, question: Question, size: tuple[int, int]) -> Image.Image:
    draw = ImageDraw.Draw(panel)
    scale = panel.width / size[0]
    width = 3 if panel.width > 400 else 2
    for x, y, box_width, box_height in question.bbox:
        # A little room, so that the line does not hide a small thing.
        corners = (x * scale - 4, y * scale - 4, (x + box_width) * scale + 4, (y + box_height) * scale + 4)
        draw.rectangle([c + d for c, d in zip(corners, (-1, -1, 1, 1), strict=True)], outline=_INK, width=width + 2)
        draw.rectangle(corners, outline=_BOX, width=width)
    return panel


def _legend(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], selection: CellSelection | None, chosen: np.ndarray, boxes: bool
) -> None:
    x, y = at
    font = _font(14)
    if boxes:
        draw.rectangle((x, y + 2, x + 16, y + 14), outline=_BOX, width=3)
        draw.text((x + 24, y), "the answer lies here", fill=_FAINT, font=font)
        x += 24 + round(draw.textlength("the answer lies here", font=font)) + 28
    if selection is None:
        draw.text((x, y), "no layer read high resolution", fill=_FAINT, font=font)
        return
    text, end = "cell kept by 1 layer", f"all {len(chosen)} layers"
    if _apart(chosen):
        text, end = f"cell read by layer {selection.layers[0]}", f"layer {selection.layers[-1]}"
    draw.text((x, y), text, fill=_FAINT, font=font)
    x += round(draw.textlength(text, font=font)) + 8
    for step in range(100):
        colour = tuple(int(v) for v in _heat_colour(step / 99))
        draw.line((x + step, y + 3, x + step, y + 14), fill=colour)
    draw.text((x + 108, y), end, fill=_FAINT, font=font)


def _caption(question: Question, prediction: Prediction, width: int) -> Image.Image:
    lines: list[tuple[str, tuple[int, int, int], int]] = []
    for line in _wrap(question.question, _font(22), width)[:_MOST_LINES]:
        lines.append((line, _INK, 22))
    for index, option in enumerate(question.options):
        loss = "" if prediction.losses is None else f"   loss {prediction.losses[index]:.4f}"
        correct = index == prediction.target
        marks = [mark for mark, here in (("correct", correct), ("chosen", index == prediction.choice)) if here]
        colour = _FAINT
        if index == prediction.choice:
            colour = _RIGHT if correct else _WRONG
        elif correct:
            colour = _RIGHT
        text = f"{option}{loss}" + (f"   ({', '.join(marks)})" if marks else "")
        lines.extend((line, colour, 17) for line in _wrap(text, _font(17), width))
    if prediction.output is not None:
        colour = _INK if prediction.score is None else _RIGHT if prediction.score == 1 else _WRONG
        written = _wrap(f"Written: {prediction.output}", _font(17), width)[:_MOST_LINES]
        lines.extend((line, colour, 17) for line in written)
    if prediction.answers:
        answers = "Answers: " + "; ".join(dict.fromkeys(prediction.answers))
        lines.extend((line, _FAINT, 17) for line in _wrap(answers, _font(17), width)[:_MOST_LINES])
    if prediction.reason:
        lines.extend((line, _WRONG, 17) for line in _wrap(f"No choice: {prediction.detail}", _font(17), width))
    lines.extend((line, _FAINT, 14) for line in _wrap(question.id, _font(14), width))
    height = sum(size + 8 for _, _, size in lines) + 4
    image = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(image)
    y = 0
    for text, colour, size in lines:
        draw.text((0, y), text, fill=colour, font=_font(size))
        y += size + 8
    return image


def _wrap(text: str, font: ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    shown = text[:_MOST_CHARACTERS].encode("utf-8", "replace").decode()  # a lone surrogate cannot be drawn
    for word in shown.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width or not lines[-1]:
            lines[-1] = joined
        else:
            lines.append(word)
    return lines


def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)
