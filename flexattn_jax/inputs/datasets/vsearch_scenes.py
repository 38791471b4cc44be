"""The pictures of vsearch: a crop of a photograph with small, coloured objects drawn into it.

Objects come from sheets of grey icons, one sheet an artist, so that every class can take every colour. They are turned,
scaled, lit as the place they stand in and drawn with a soft edge and shadow.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from flexattn_jax.files import packaged

CLASSES = (
    *("umbrella", "key", "bicycle", "gift", "guitar", "camera", "telephone", "bell", "saxophone", "anchor"),
    *("rocket", "airplane", "car", "fish", "crown", "hat", "boot", "dress", "trophy", "banana"),
    *("cactus", "mushroom", "butterfly", "crab", "helicopter", "bus", "tractor", "clock", "book", "balloon"),
    *("shoe", "shirt", "backpack", "apple", "carrot", "leaf", "lock", "tulip", "turtle", "duck"),
)
COLOURS = {
    "red": (214, 26, 32),
    "orange": (250, 134, 10),
    "yellow": (252, 222, 24),
    "green": (30, 160, 52),
    "blue": (28, 96, 226),
    "purple": (146, 44, 186),
}
ARTISTS = ("emojione", "fluent", "fluent_flat", "noto", "noto_v1", "openmoji", "twemoji")

SPRITE_SIDE = 96
SPRITE_COLUMNS = 8

Box = tuple[int, int, int, int]  # left, top, width, height in pixels of the picture

_GAP = 6  # pixels between two objects, and between an object and the border
_TURN = 8.0  # degrees either way
_LEAST_CROP = 0.45  # of a photograph's shorter side
_VISIBLE = [255 * (alpha >= 40) for alpha in range(256)]  # alpha from which a pixel counts as the object's
_SHADOW = 0.4
_AMBIENT = 0.12  # share of the surroundings in an object's colour
_LIGHT = (0.8, 1.2)  # range of a photograph's brightness and contrast
_ATTEMPTS = 60  # to place an object before the whole arrangement is drawn anew


class AssetError(ValueError):
    """A folder of photographs and icons that cannot be used; the message says what is expected there."""


@dataclasses.dataclass(frozen=True)
class PlacedObject:
    """One object in a picture."""

    name: str  # of CLASSES
    colour: str  # of COLOURS
    box: Box
    artist: str  # of ARTISTS


@dataclasses.dataclass(frozen=True)
class Assets:
    """What pictures are drawn from."""

    photographs: dict[str, dict[str, Image.Image]]  # split -> name -> RGB
    sprites: dict[str, dict[str, Image.Image]]  # artist -> class -> (SPRITE_SIDE, SPRITE_SIDE) LA


def packaged_assets() -> Path:
    """The folder of photographs and icons that ships with the package."""
    return packaged("vsearch")


@functools.lru_cache(maxsize=2)
def load_assets(folder: Path) -> Assets:
    """Reads `folder`/photographs/SPLIT/NAME.webp and `folder`/icons/ARTIST.png.

    Raises:
        AssetError: a folder or sheet is missing or cannot be decoded.
    """
    photographs: dict[str, dict[str, Image.Image]] = {}
    for split in ("train", "validation", "test"):
        files = sorted((folder / "photographs" / split).glob("*.webp"))
        if not files:
            raise AssetError(
                f"{folder / 'photographs' / split} holds no photographs; a vsearch asset folder has "
                "photographs/{train,validation,test}/NAME.webp and icons/ARTIST.png (tools/make_vsearch_assets.py)"
            )
        photographs[split] = {file.stem: _open(file, "RGB") for file in files}
    sprites = {}
    for artist in ARTISTS:
        sheet = _open(folder / "icons" / f"{artist}.png", "LA")
        sprites[artist] = {name: _cell(sheet, index) for index, name in enumerate(CLASSES)}
    return Assets(photographs, sprites)


def fingerprint(folder: Path) -> str:
    """A name for the content of an asset folder: data sets drawn from other assets are other data sets."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("photographs/*/*.webp"), *folder.glob("icons/*.png")]):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


def draw_scene(
    rng: np.random.Generator,
    photograph: Image.Image,
    sprites: dict[str, dict[str, Image.Image]],
    count: int,
    num_classes: int,
    object_sides: tuple[int, int],
    picture_side: int,
) -> tuple[Image.Image, tuple[PlacedObject, ...]]:
    """One picture.

    Classes are all different; colours repeat only where there are more objects than colours. Classes, colours, places
    and sizes are independent of each other, so that no text about the picture gives an answer away.

    Args:
        rng: decides everything.
        photograph: RGB, of any size.
        sprites: artist -> class -> icon; each object's artist is drawn from them.
        count: objects.
        num_classes: the first so many of CLASSES are used.
        object_sides: least and greatest longer side of an object's box in pixels, both included.
        picture_side: S.

    Returns:
        RGB of S x S, and its objects in the order in which they were drawn.
    """
    pixels = np.array(_crop(rng, photograph, picture_side))
    names = [CLASSES[k] for k in rng.permutation(num_classes)[:count]]
    rounds = -(-count // len(COLOURS))
    colours = [list(COLOURS)[k] for _ in range(rounds) for k in rng.permutation(len(COLOURS))][:count]
    artists = [str(rng.choice(sorted(sprites))) for _ in names]
    icons = [_turned(rng, sprites[a][n], object_sides) for a, n in zip(artists, names, strict=True)]
    corners = _arrange(rng, [icon.size for icon in icons], picture_side)
    objects = []
    for name, colour, artist, icon, (x, y) in zip(names, colours, artists, icons, corners, strict=True):
        _paint(pixels, icon, COLOURS[colour], x, y)
        objects.append(PlacedObject(name, colour, (x, y, icon.width, icon.height), artist))
    return Image.fromarray(pixels), tuple(objects)


def _crop(rng: np.random.Generator, photograph: Image.Image, side: int) -> Image.Image:
    length = rng.uniform(_LEAST_CROP, 1.0) * min(photograph.size)
    left, top = rng.uniform(0, photograph.width - length), rng.uniform(0, photograph.height - length)
    box = (left, top, left + length, top + length)
    crop = photograph.resize((side, side), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    brightness, contrast = rng.uniform(*_LIGHT, size=2)
    tones = np.clip((np.arange(256) - 128) * contrast + 128 * brightness, 0, 255)
    return crop.point(tones.round().astype(int).tolist() * 3)


def _turned(rng: np.random.Generator, sprite: Image.Image, sides: tuple[int, int]) -> Image.Image:
    """LA: the icon turned a little, cut out and scaled to a drawn size."""
    angle = rng.uniform(-_TURN, _TURN)
    if sides[1] <= SPRITE_SIDE // 2:  # turning costs by the pixel
        sprite = sprite.reduce(2)
    turned = sprite.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    box = turned.getchannel("A").point(_VISIBLE).getbbox()
    width, height = box[2] - box[0], box[3] - box[1]
    scale = rng.integers(sides[0], sides[1], endpoint=True) / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return turned.resize(size, Image.Resampling.BOX if scale < 0.5 else Image.Resampling.BICUBIC, box=box)


def _arrange(rng: np.random.Generator, sizes: list[tuple[int, int]], side: int) -> list[tuple[int, int]]:
    """Left upper corners at which boxes of these (width, height) neither touch nor leave the picture."""
    while True:
        placed: list[Box] = []
        for width, height in sizes:
            for _ in range(_ATTEMPTS):
                x = int(rng.integers(_GAP, side - _GAP - width, endpoint=True))
                y = int(rng.integers(_GAP, side - _GAP - height, endpoint=True))
                if all(_apart((x, y, width, height), other) for other in placed):
                    placed.append((x, y, width, height))
                    break
            else:
                break
        if len(placed) == len(sizes):
            return [(x, y) for x, y, _, _ in placed]


def _apart(a: Box, b: Box) -> bool:
    across = a[0] + a[2] + _GAP <= b[0] or b[0] + b[2] + _GAP <= a[0]
    return across or a[1] + a[3] + _GAP <= b[1] or b[1] + b[3] + _GAP <= a[1]


def _paint(pixels: np.ndarray, icon: Image.Image, colour: tuple[int, int, int], x: int, y: int) -> None:
    """Draws an LA icon into (S, S, 3) uint8 at (x, y), in a colour and in the light of that place."""
    height, width = icon.height, icon.width
    reach = max(2, height // 10)  # of the shadow
    top, left = max(0, y - reach), max(0, x - reach)
    region = pixels[top : y + height + 2 * reach, left : x + width + 2 * reach]
    shade = Image.new("L", (region.shape[1], region.shape[0]))
    shade.paste(icon.getchannel("A"), (x - left + reach // 2, y - top + reach))
    shade = np.asarray(shade.filter(ImageFilter.GaussianBlur(reach / 2)), np.float32)
    lit = region * (1 - (_SHADOW / 255) * shade)[..., None]

    here = lit[y - top : y - top + height, x - left : x - left + width]
    around = here.mean(axis=(0, 1))
    light = float(around.mean()) / 255
    grey, alpha = (np.asarray(icon.getchannel(channel)) for channel in "LA")
    body = (1 - _AMBIENT) * min(1.08, 0.7 + 0.5 * light) * _shades(colour)[grey] + _AMBIENT * around
    cover = (alpha.astype(np.float32) / 255)[..., None]
    here += cover * (np.minimum(body, 255) - here)
    region[...] = lit.round()


@functools.lru_cache(maxsize=len(COLOURS))
def _shades(colour: tuple[int, int, int]) -> np.ndarray:
    """(256, 3) float32: from the colour's shade through the colour itself (at 128) to its highlight."""
    mid = np.array(colour, np.float32)
    stops = np.stack([0.2 * mid, mid, 0.35 * mid + 0.65 * 255])
    return np.stack([np.interp(np.arange(256), (0, 128, 255), stops[:, c]) for c in range(3)], axis=1).astype(
        np.float32
    )


def _open(file: Path, mode: str) -> Image.Image:
    try:
        with Image.open(file) as picture:
            return picture.convert(mode)
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read"
        raise AssetError(f"{file} {reason}; make the assets again with tools/make_vsearch_assets.py") from error


def _cell(sheet: Image.Image, index: int) -> Image.Image:
    x, y = index % SPRITE_COLUMNS * SPRITE_SIDE, index // SPRITE_COLUMNS * SPRITE_SIDE
    return sheet.crop((x, y, x + SPRITE_SIDE, y + SPRITE_SIDE))
