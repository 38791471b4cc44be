"""Cuts the packaged demo benchmark (flexattn_jax/assets/demo/vstar) out of freely licensed photographs.

    python tools/make_demo_pictures.py --photographs=DIR

DIR holds the photographs under the file names of `QUESTIONS`, taken from the Debian package lomiri-wallpapers-16.04 and
-20.04 and from the wheels of scikit-image and scikit-learn (flexattn_jax/assets/demo/ATTRIBUTION.md says which is
which). The questions, answers and boxes below were written by hand while looking at the photographs; boxes are
x, y, width, height in pixels of the uncut photograph and are carried over to the cut one.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

from absl import app, flags
from PIL import Image

_PHOTOGRAPHS = flags.DEFINE_string("photographs", None, "Folder of the uncut photographs.", required=True)
_OUT = flags.DEFINE_string("out", "flexattn_jax/assets/demo/vstar", "Folder to write, in V* Bench's layout.")
_LONG_SIDE = flags.DEFINE_integer("long_side", 1200, "Longer side of a written picture in pixels; never enlarged.")

DOGS = "friends_by_Aitzol_Berasategi.jpg"
WINE = "Wine_by_Jakkub_Mede.jpg"
NUTHATCH = "Kleiber_by_Lukas_Baubkus.jpg"
DRAGONFLY = "Dragonfly_by_Bolly.jpg"
TOY_BIRD = "free_by_Peter_Nerlich.jpg"
CLOCK = "greentock_by_Peter_Nerlich.jpg"
BRUSHES = "Picture_1A_by_freespace.jpg"
FIG = "Picture_0B_by_freespace.jpg"
TABLE = "sunset_by_Aitzol_Berasategi.jpg"
MEADOW = "aitzgorri_by_Aitzol_Berasategi.jpg"
MOUNTAIN = "picosdeeuropa_by_Aitzol_Berasategi.jpg"
BRIDGE = "Bridge_by_Sander_Klootwijk.jpg"
DANDELION = "seeding_by_Clements_Engelhardt.jpg"
TOWER = "china.jpg"
ASTRONAUT = "astronaut.png"
COFFEE = "coffee.png"
ROCKET = "rocket.jpg"

Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Cut:
    """One question: the part of a photograph it is asked about (left, top, right, bottom; None: all of it)."""

    name: str
    photograph: str
    question: str
    options: tuple[str, ...]  # the first is correct, as in V* Bench
    targets: dict[str, Box]
    part: Box | None = None


def _colours(thing: str, *colours: str) -> tuple[str, ...]:
    return tuple(f"The color of {thing} is {colour}." for colour in colours)


def _materials(thing: str, *materials: str) -> tuple[str, ...]:
    return tuple(f"The material of {thing} is {material}." for material in materials)


def _sides(thing: str, other: str, side: str, wrong: str) -> tuple[str, ...]:
    place = {"left": "on the left side of", "right": "on the right side of", "above": "above", "below": "below"}
    return tuple(f"{thing} is {place[s]} {other}." for s in (side, wrong))


QUESTIONS = {
    "direct_attributes": [
        Cut(
            "dog_tag",
            DOGS,
            "What is the shape of the tag on the dog's collar?",
            tuple(f"The shape of the tag is a {shape}." for shape in ("bone", "heart", "star", "circle")),
            {"tag": (688, 1246, 42, 60)},
            (450, 600, 1650, 1800),
        ),
        Cut(
            "rope_hook",
            DOGS,
            "What is the color of the hook on the upper rope?",
            _colours("the hook", "silver", "red", "yellow", "black"),
            {"hook": (1190, 1960, 155, 130)},
            (500, 1000, 2056, 3088),
        ),
        Cut(
            "bottle_label",
            WINE,
            "What is the color of the label on the bottle?",
            _colours("the label", "white", "red", "green", "blue"),
            {"label": (1186, 880, 150, 260)},
        ),
        Cut(
            "bottle_stopper",
            WINE,
            "What is the material of the stopper of the bottle?",
            _materials("the stopper", "cork", "glass", "metal", "rubber"),
            {"stopper": (1240, 458, 50, 84)},
            (0, 0, 2560, 1800),
        ),
        Cut(
            "nuthatch_stripe",
            NUTHATCH,
            "What is the color of the stripe across the bird's eye?",
            _colours("the stripe", "black", "yellow", "red", "green"),
            {"stripe": (2900, 2000, 205, 105)},
            (1000, 300, 5800, 3391),
        ),
        Cut(
            "dragonfly_tail",
            DRAGONFLY,
            "What is the color of the dragonfly's tail?",
            _colours("the dragonfly's tail", "yellow", "red", "blue", "black"),
            {"dragonfly's tail": (1975, 1300, 300, 345)},
            (0, 300, 4224, 3000),
        ),
        Cut(
            "toy_bird_drawing",
            TOY_BIRD,
            "What is painted on the side of the bird?",
            tuple(f"A {thing} is painted on the side of the bird." for thing in ("flower", "heart", "fish", "number")),
            {"painted flower": (1296, 1635, 76, 118)},
        ),
        Cut(
            "brush_bristles",
            BRUSHES,
            "What is the color of the bristles of the small brush on the far right?",
            _colours("the bristles", "orange", "green", "blue", "white"),
            {"bristles of the small brush": (1082, 610, 122, 132)},
        ),
        Cut(
            "paint_speck",
            FIG,
            "What is the color of the speck of paint near the upper left corner?",
            _colours("the speck of paint", "orange", "blue", "green", "white"),
            {"speck of paint": (272, 88, 36, 56)},
        ),
        Cut(
            "round_table",
            TABLE,
            "What is the material of the round table?",
            _materials("the round table", "stone", "glass", "wood", "plastic"),
            {"round table": (2688, 1845, 1274, 486)},
        ),
        Cut(
            "valley_house",
            MEADOW,
            "What is the color of the house in the valley?",
            _colours("the house", "white", "red", "brown", "black"),
            {"house": (1928, 1086, 52, 26)},
            (700, 250, 3088, 1650),
        ),
        Cut(
            "cable_clamp",
            BRIDGE,
            "What is the color of the clamp that holds the four cables on the lower pipe?",
            _colours("the clamp", "white", "red", "black", "green"),
            {"clamp": (2725, 1460, 175, 130)},
            (1200, 700, 4352, 2448),
        ),
        Cut(
            "roof_ornament",
            TOWER,
            "What is the color of the ornament on the top of the roof?",
            _colours("the ornament", "brown", "white", "blue", "green"),
            {"ornament": (196, 29, 20, 19)},
        ),
        Cut(
            "suit_strap",
            ASTRONAUT,
            "What is the color of the strap that hangs from the collar?",
            _colours("the strap", "white", "blue", "yellow", "green"),
            {"strap": (238, 328, 36, 184)},
        ),
        Cut(
            "coffee_spoon",
            COFFEE,
            "What is the material of the spoon?",
            _materials("the spoon", "metal", "wood", "plastic", "paper"),
            {"spoon": (318, 66, 108, 262)},
        ),
        Cut(
            "rocket_emblem",
            ROCKET,
            "What is the color of the rim of the oval emblem on the rocket?",
            _colours("the rim of the emblem", "red", "green", "yellow", "purple"),
            {"emblem": (312, 142, 22, 16)},
        ),
    ],
    "relative_position": [
        Cut(
            "mill_bottle",
            WINE,
            "Is the coffee mill on the left or right side of the bottle?",
            _sides("The coffee mill", "the bottle", "right", "left"),
            {"coffee mill": (1862, 768, 400, 484), "bottle": (1184, 458, 166, 812)},
            (200, 200, 2560, 2400),
        ),
        Cut(
            "glass_bottle",
            WINE,
            "Is the wine glass on the left or right side of the bottle?",
            _sides("The wine glass", "the bottle", "left", "right"),
            {"wine glass": (955, 758, 204, 555), "bottle": (1184, 458, 166, 812)},
            (0, 100, 2000, 1600),
        ),
        Cut(
            "two_dogs",
            DOGS,
            "Is the dog with its tongue out above or below the other dog?",
            _sides("The dog with its tongue out", "the other dog", "above", "below"),
            {"dog with its tongue out": (620, 705, 460, 552), "other dog": (950, 1370, 436, 662)},
            (0, 300, 2056, 2700),
        ),
        Cut(
            "hook_post",
            DOGS,
            "Is the metal hook on the left or right side of the wooden post?",
            _sides("The metal hook", "the wooden post", "left", "right"),
            {"metal hook": (1190, 1960, 155, 130), "wooden post": (1782, 1867, 274, 833)},
            (700, 1500, 2056, 2700),
        ),
        Cut(
            "rock_path",
            MOUNTAIN,
            "Is the largest rock in the grass on the left or right side of the dirt path?",
            _sides("The largest rock", "the dirt path", "right", "left"),
            {"largest rock": (2484, 2165, 156, 166), "dirt path": (300, 1440, 1180, 1008)},
            (0, 1150, 3264, 2448),
        ),
        Cut(
            "leaf_dragonfly",
            DRAGONFLY,
            "Is the dry leaf on the twig on the left or right side of the dragonfly's head?",
            _sides("The dry leaf", "the dragonfly's head", "right", "left"),
            {"dry leaf": (3160, 1396, 172, 326), "dragonfly's head": (2365, 1040, 195, 165)},
            (900, 600, 4100, 2400),
        ),
        Cut(
            "clock_numerals",
            CLOCK,
            "Is the numeral 7 on the left or right side of the numeral 8?",
            _sides("The numeral 7", "the numeral 8", "right", "left"),
            {"numeral 7": (1367, 1338, 380, 456), "numeral 8": (548, 740, 638, 200)},
        ),
        Cut(
            "sun_dandelion",
            DANDELION,
            "Is the sun on the left or right side of the largest dandelion?",
            _sides("The sun", "the largest dandelion", "right", "left"),
            {"sun": (2960, 290, 230, 230), "largest dandelion": (710, 235, 1700, 1445)},
        ),
        Cut(
            "badge_patch",
            ASTRONAUT,
            "Is the rectangular name badge on the left or right side of the round patch?",
            _sides("The name badge", "the round patch", "right", "left"),
            {"name badge": (276, 338, 54, 41), "round patch": (133, 347, 76, 77)},
            (60, 200, 460, 512),
        ),
        Cut(
            "spoon_handle",
            COFFEE,
            "Is the spoon on the left or right side of the cup's handle?",
            _sides("The spoon", "the cup's handle", "right", "left"),
            {"spoon": (318, 66, 108, 262), "cup's handle": (195, 224, 68, 88)},
            (60, 40, 500, 400),
        ),
        Cut(
            "island_tower",
            TOWER,
            "Is the island in the lake on the left or right side of the tower?",
            _sides("The island", "the tower", "right", "left"),
            {"island": (422, 225, 80, 18), "tower": (62, 29, 310, 391)},
        ),
        Cut(
            "lamp_rocket",
            ROCKET,
            "Is the highest lamp on the left or right side of the rocket?",
            _sides("The highest lamp", "the rocket", "left", "right"),
            {"highest lamp": (75, 341, 17, 17), "rocket": (309, 126, 27, 281)},
        ),
    ],
}


def cut_box(box: Box, part: Box, scale: float) -> list[int]:
    """`box` (x, y, width, height) of the photograph, in pixels of its part after scaling."""
    x, y, width, height = box
    return [round((x - part[0]) * scale), round((y - part[1]) * scale), round(width * scale), round(height * scale)]


def write_question(cut: Cut, folder: pathlib.Path, photographs: pathlib.Path, long_side: int) -> None:
    """Writes `folder`/name.jpg and name.json."""
    with Image.open(photographs / cut.photograph) as opened:
        photograph = opened.convert("RGB")
    part = cut.part or (0, 0, *photograph.size)
    width, height = part[2] - part[0], part[3] - part[1]
    scale = min(1.0, long_side / max(width, height))
    size = (round(width * scale), round(height * scale))
    picture = photograph.crop(part).resize(size, Image.Resampling.LANCZOS)
    picture.save(folder / f"{cut.name}.jpg", quality=84 if scale < 1 else 90, optimize=True)
    fields = {
        "target_object": list(cut.targets),
        "bbox": [cut_box(box, part, scale) for box in cut.targets.values()],
        "question": cut.question,
        "options": list(cut.options),
    }
    (folder / f"{cut.name}.json").write_text(json.dumps(fields, indent=1) + "\n")


def main(_) -> None:
    for split, cuts in QUESTIONS.items():
        folder = pathlib.Path(_OUT.value) / split
        folder.mkdir(parents=True, exist_ok=True)
        for cut in cuts:
            write_question(cut, folder, pathlib.Path(_PHOTOGRAPHS.value), _LONG_SIDE.value)


if __name__ == "__main__":
    app.run(main)
