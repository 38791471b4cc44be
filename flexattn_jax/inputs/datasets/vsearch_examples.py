"""The examples of vsearch: its settings, a picture's questions in V* Bench's two forms, and their generation."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from flexattn_jax.inputs.datasets import vsearch_scenes
from flexattn_jax.inputs.datasets.vsearch_scenes import ARTISTS, CLASSES, COLOURS, Assets, PlacedObject

ATTRIBUTES = "direct_attributes"
RELATIONS = "relative_position"
FORMS = (ATTRIBUTES, RELATIONS)  # V* Bench's splits
NUM_OPTIONS = 4  # of an attribute question; all of them are colours seen in the picture
SIDES = ("left", "right")
COLUMNS = ("one", "two", "three", "four", "five", "six", "seven", "eight")  # eighths of a picture, from the left

# test_art shows the test photographs with the objects of an artist that no other split has.
SPLITS = ("train", "validation", "test", "test_art")
OTHER_ARTIST = "twemoji"

_VERSION = 3  # raised when the same settings give other examples
_QUALITY = 90
_LEAST_OFFSET = 0.1  # of the picture, between the middles of two objects whose sides are asked about


class VSearchError(ValueError):
    """Settings with which no data set can be drawn; the message names the setting, its value and what is allowed."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise VSearchError(message)


@dataclasses.dataclass(frozen=True)
class VSearchConfig:
    """What decides every byte of a data set."""

    preset: str = "custom"  # part of the data set's name
    seed: int = 0
    picture_side: int = 512  # S
    num_objects: tuple[int, int] = (5, 6)  # least and most objects of a picture
    object_sides: tuple[int, int] = (32, 48)  # least and greatest longer side of an object in pixels
    num_classes: int = 24  # the first so many of CLASSES
    artists: tuple[str, ...] = ("emojione", "noto", "noto_v1", "openmoji")  # of all splits but test_art
    attribute_questions: int = 5  # of a picture
    relation_questions: int = 5
    pictures: tuple[int, ...] = (8000, 300, 800, 800)  # of each of SPLITS; 0: that split is not drawn
    assets: str | None = None  # folder of other photographs and icons (tools/make_vsearch_assets.py --all)

    def __post_init__(self):
        least, most = self.num_objects
        small, large = self.object_sides
        _require(self.seed >= 0, f"seed {self.seed} must not be negative")
        _require(
            len(self.pictures) == len(SPLITS) and min(self.pictures) >= 0,
            f"pictures {self.pictures} must be {len(SPLITS)} numbers, those of {', '.join(SPLITS)}",
        )
        _require(
            NUM_OPTIONS <= least <= most <= self.num_classes <= len(CLASSES),
            f"num_objects {self.num_objects} must rise from at least {NUM_OPTIONS} (one for each option) to at most "
            f"num_classes {self.num_classes}, which is at most {len(CLASSES)}",
        )
        unknown = [name for name in self.artists if name not in ARTISTS or name == OTHER_ARTIST]
        _require(
            not unknown and len(self.artists) == len(set(self.artists)) > 0,
            f"artists {self.artists} must be some of {', '.join(ARTISTS)}, each once, and not {OTHER_ARTIST}, whose "
            "objects are in test_art alone",
        )
        _require(4 <= small <= large, f"object_sides {self.object_sides} must rise from at least 4 pixels")
        _require(
            most * (large + 12) ** 2 <= 0.5 * self.picture_side**2,
            f"{most} objects of {large} pixels do not fit into a picture of {self.picture_side}; use fewer or smaller",
        )
        _require(
            0 <= self.attribute_questions <= least,
            f"attribute_questions {self.attribute_questions} must lie in 0..{least}: one for each object",
        )
        _require(
            0 <= self.relation_questions <= least * (least - 1) // 4,
            f"relation_questions {self.relation_questions} must lie in 0..{least * (least - 1) // 4}: half the pairs",
        )

    @property
    def asset_folder(self) -> Path:
        """Where photographs and icons are."""
        return vsearch_scenes.packaged_assets() if self.assets is None else Path(self.assets)

    @property
    def name(self) -> str:
        """Different for data sets of different content."""
        values = dataclasses.asdict(self) | {"assets": vsearch_scenes.fingerprint(self.asset_folder), "v": _VERSION}
        digest = hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()[:8]
        return f"{self.preset}-seed{self.seed}-{digest}"

    def num_pictures(self, split: str) -> int:
        """Of one of SPLITS."""
        _require(split in SPLITS, f"there is no split {split!r}; known: {', '.join(SPLITS)}")
        return self.pictures[SPLITS.index(split)]


PRESETS = {
    # Objects whose class can be told at a quarter of the resolution: a small model learns to search on them first.
    "large": VSearchConfig(preset="large", object_sides=(96, 128), pictures=(8000, 300, 0, 0)),
    # Few objects, too small for their class to be told at a quarter of the resolution.
    "standard": VSearchConfig(preset="standard"),
    # More objects than an eighth of the cells can hold; their class is weakly visible at a quarter of the resolution.
    "crowded": VSearchConfig(
        preset="crowded",
        num_objects=(12, 16),
        object_sides=(56, 72),
        attribute_questions=8,
        relation_questions=4,
        pictures=(8000, 300, 500, 500),
    ),
}


@dataclasses.dataclass(frozen=True)
class VisualQuestion:
    """One multiple-choice question about a picture."""

    form: str  # of FORMS
    targets: tuple[int, ...]  # indices of the objects that are asked about
    question: str
    words: tuple[str, ...]  # the options in a word each, in no telling order
    options: tuple[str, ...]  # the same as sentences
    answer: int  # index of the correct option


@dataclasses.dataclass(frozen=True)
class Example:
    """A picture with all its questions."""

    id: str  # "test-000012"
    photograph: str
    image: bytes  # JPEG
    objects: tuple[PlacedObject, ...]
    questions: tuple[VisualQuestion, ...]

    def picture(self) -> Image.Image:
        """RGB."""
        return Image.open(io.BytesIO(self.image)).convert("RGB")

    @functools.cached_property
    def side(self) -> int:
        """S, without decoding the picture."""
        return Image.open(io.BytesIO(self.image)).width

    def middles(self, grid: int) -> np.ndarray:
        """(objects, 2) int, column and row of a grid x grid in which the middle of each object lies."""
        boxes = np.array([placed.box for placed in self.objects])
        return ((boxes[:, :2] + boxes[:, 2:] / 2) * (grid / self.side)).astype(int)


def ask_colour(objects: Sequence[PlacedObject], target: int, words: Sequence[str]) -> VisualQuestion:
    """Asks for the colour of one object; `words` are the options."""
    name = objects[target].name
    return VisualQuestion(
        form=ATTRIBUTES,
        targets=(target,),
        question=f"What is the color of the {name}?",
        words=tuple(words),
        options=tuple(f"The color of the {name} is {word}." for word in words),
        answer=list(words).index(objects[target].colour),
    )


def ask_side(objects: Sequence[PlacedObject], target: int, other: int, words: Sequence[str] = SIDES) -> VisualQuestion:
    """Asks on which side of another object an object is, by the middles of their boxes.

    The options name the other object first, the side last: where only what answers reads high resolution, as here,
    both objects have then been looked for before their places are compared.
    """
    name, reference = objects[target].name, objects[other].name
    side = _side_of(objects[target], objects[other])
    return VisualQuestion(
        form=RELATIONS,
        targets=(target, other),
        question=f"Is the {name} on the left or right side of the {reference}?",
        words=tuple(words),
        options=tuple(f"Relative to the {reference}, the {name} is on the {word}." for word in words),
        answer=list(words).index(side),
    )


def caption(objects: Sequence[PlacedObject]) -> tuple[str, str]:
    """A demand and its answer, which names objects in this order, each with its colour."""
    return "Name some objects and their colors.", ", ".join(f"{o.name} is {o.colour}" for o in objects) + "."


def columns(objects: Sequence[PlacedObject], picture_side: int) -> tuple[str, str]:
    """A demand and its answer, which names objects in this order, each with the eighth of the picture it is in."""
    words = [COLUMNS[min(int(_middle(o) * len(COLUMNS) / picture_side), len(COLUMNS) - 1)] for o in objects]
    named = ", ".join(f"{o.name} {word}" for o, word in zip(objects, words, strict=True))
    return "Name some objects and their columns.", f"{named}."


def sides(objects: Sequence[PlacedObject]) -> tuple[str, str]:
    """A demand and its answer, which names objects in this order, each but the first on its side of the one before."""
    first, *others = objects
    told = [f"the {o.name} is on the {_side_of(o, before)}" for before, o in zip(objects, others, strict=False)]
    return "Name some objects, each relative to the last.", ", ".join([first.name, *told]) + "."


def generate(config: VSearchConfig, split: str, threads: int | None = None) -> Iterator[Example]:
    """The examples of a split, in order; each depends on the settings, the split and its number alone.

    Args:
        config: of which every field but `pictures` decides what an example shows.
        split: of SPLITS.
        threads: that draw; None: one a processor.

    Raises:
        VSearchError: no such split.
        vsearch_scenes.AssetError: missing photographs or icons.
    """
    count = config.num_pictures(split)
    assets = vsearch_scenes.load_assets(config.asset_folder)
    threads = threads or os.cpu_count() or 1
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        waiting: collections.deque[concurrent.futures.Future[Example]] = collections.deque()
        try:
            for index in range(count):
                waiting.append(pool.submit(draw_example, config, split, index, assets))
                if len(waiting) > 4 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def draw_example(config: VSearchConfig, split: str, index: int, assets: Assets) -> Example:
    """Example `index` of a split."""
    rng = np.random.default_rng([config.seed, SPLITS.index(split), index])
    photographs = assets.photographs["test" if split == "test_art" else split]
    artists = [OTHER_ARTIST] if split == "test_art" else config.artists
    name = sorted(photographs)[rng.integers(len(photographs))]
    while True:
        picture, objects = vsearch_scenes.draw_scene(
            rng,
            photographs[name],
            {artist: assets.sprites[artist] for artist in artists},
            count=int(rng.integers(*config.num_objects, endpoint=True)),
            num_classes=config.num_classes,
            object_sides=config.object_sides,
            picture_side=config.picture_side,
        )
        pairs = _pairs(objects, _LEAST_OFFSET * config.picture_side)
        if len(pairs) >= config.relation_questions:
            break
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=_QUALITY, subsampling=0)  # chroma at half resolution would blur small objects
    questions = [*_ask_colours(rng, objects, config.attribute_questions)]
    for k in rng.permutation(len(pairs))[: config.relation_questions]:
        target, other = pairs[k] if rng.random() < 0.5 else pairs[k][::-1]
        questions.append(ask_side(objects, target, other, [SIDES[j] for j in rng.permutation(2)]))
    return Example(f"{split}-{index:06d}", name, file.getvalue(), objects, tuple(questions))


def _ask_colours(rng: np.random.Generator, objects: Sequence[PlacedObject], count: int) -> Iterator[VisualQuestion]:
    seen = sorted({placed.colour for placed in objects}, key=list(COLOURS).index)
    for target in rng.permutation(len(objects))[:count]:
        # Only colours that are there: seeing the colours without the shapes leaves all four options open.
        others = [colour for colour in seen if colour != objects[target].colour]
        words = [objects[target].colour, *(others[k] for k in rng.permutation(len(others))[: NUM_OPTIONS - 1])]
        yield ask_colour(objects, int(target), [words[k] for k in rng.permutation(NUM_OPTIONS)])


def _pairs(objects: Sequence[PlacedObject], offset: float) -> list[tuple[int, int]]:
    """Pairs of objects of which one is clearly further left."""
    middles = [_middle(placed) for placed in objects]
    count = len(objects)
    return [(i, j) for i in range(count) for j in range(i + 1, count) if abs(middles[i] - middles[j]) >= offset]


def _side_of(placed: PlacedObject, other: PlacedObject) -> str:
    return SIDES[0] if _middle(placed) < _middle(other) else SIDES[1]


def _middle(placed: PlacedObject) -> float:
    return placed.box[0] + placed.box[2] / 2
