"""Hostile and odd pictures: the bytes of each, and what must become of it."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from flexattn_jax.inputs.images import MAX_SCANS

RED, BLUE = (200, 30, 40), (30, 60, 210)


class Picture(NamedTuple):
    """A case.

    make: the file's bytes.
    error: part of the sentence that refuses it; "": it is read.
    size: (width, height) as the model sees it, where it is read.
    corner: colour of the upper left pixel, where it is read; None: it does not matter.
    """

    make: Callable[[], bytes]
    error: str = ""
    size: tuple[int, int] = (0, 0)
    corner: tuple[int, int, int] | None = None


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def halves(size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image.convert(mode)


def rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(halves(), exif=exif)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_that_claims(width: int, height: int) -> bytes:
    """A file of a hundred bytes whose head announces any size."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + png_chunk(b"IDAT", zlib.compress(bytes(99))) + png_chunk(b"IEND", b"")


def png_with_text_bomb() -> bytes:
    """64 MB of text in a few kilobytes, before the pixels."""
    whole = saved(halves())
    bomb = png_chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(64 << 20)))
    return whole[:33] + bomb + whole[33:]


def jpeg_of_many_scans(more: int = 5000) -> bytes:
    """A progressive JPEG that ends in the same scan again and again, each of which passes over all pixels."""
    whole = saved(Image.new("L", (512, 512)), "JPEG", progressive=True)
    return whole[:-2] + whole[whole.rindex(b"\xff\xda") : -2] * more + whole[-2:]


def sixteen_bit() -> bytes:
    values = np.full((30, 40), 20_000, np.uint16)
    values[:, 20:] = 60_000
    return saved(Image.fromarray(values))


def animated(kind: str) -> bytes:
    return saved(halves(), kind, save_all=True, append_images=[halves().rotate(180)] * 3)


@functools.cache
def palette_with_alpha() -> bytes:
    image = halves().quantize(4)
    return saved(image, transparency=bytes([0, 128, 255, 255]))


HALVES = {"size": (40, 30), "corner": RED}

PICTURES: dict[str, Picture] = {
    "empty": Picture(lambda: b"", "is empty"),
    "truncated PNG": Picture(lambda: saved(halves())[:-30], "damaged or truncated"),
    "truncated JPEG": Picture(lambda: saved(Image.effect_noise((90, 90), 50), "JPEG")[:900], "damaged or truncated"),
    "truncated WebP": Picture(lambda: saved(halves(), "WEBP")[:60], "damaged"),
    "half a head": Picture(lambda: saved(halves())[:20], "damaged"),
    "a text": Picture(lambda: b"once upon a time" * 9, "not a picture"),
    "a page": Picture(lambda: b"<html><body>404 not found</body></html>", "not a picture"),
    "SVG": Picture(
        lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', "not a pic"
    ),
    "PostScript": Picture(lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n", "not a picture"),
    "60,000 x 60,000": Picture(lambda: png_that_claims(60_000, 60_000), "pixels"),
    "10,000 x 10,000": Picture(lambda: png_that_claims(10_000, 10_000), "10000 x 10000 pixels; at most"),
    "1 x 2 billion": Picture(lambda: png_that_claims(1, 2**31 - 1), "pixels"),
    "no width": Picture(lambda: png_that_claims(0, 40), "damaged|no pixels|not a picture"),
    "BMP that claims": Picture(lambda: _bmp_that_claims(60_000, 60_000), "pixels"),
    "text bomb": Picture(png_with_text_bomb, "damaged"),
    "many scans": Picture(jpeg_of_many_scans, f"more than {MAX_SCANS} scans"),
    "1 x 1": Picture(lambda: saved(Image.new("RGB", (1, 1), BLUE)), size=(1, 1), corner=BLUE),
    "1 x 5000": Picture(lambda: saved(Image.new("RGB", (1, 5000), BLUE)), size=(1, 5000), corner=BLUE),
    "CMYK": Picture(lambda: saved(halves(mode="CMYK"), "JPEG", quality=95), size=(40, 30)),
    "16-bit": Picture(sixteen_bit, size=(40, 30), corner=(78, 78, 78)),
    "1-bit": Picture(lambda: saved(halves(mode="1")), size=(40, 30)),
    "palette with alpha": Picture(palette_with_alpha, size=(40, 30)),
    "grey with alpha": Picture(lambda: saved(halves(mode="LA")), size=(40, 30)),
    "animated GIF": Picture(lambda: animated("GIF"), size=(40, 30), corner=RED),
    "animated PNG": Picture(lambda: animated("PNG"), **HALVES),
    "animated WebP": Picture(lambda: animated("WEBP"), size=(40, 30)),
    "EXIF upright": Picture(lambda: rotated(1), **HALVES),
    "EXIF turned over": Picture(lambda: rotated(3), size=(40, 30), corner=BLUE),
    "EXIF on its side": Picture(lambda: rotated(6), size=(30, 40), corner=RED),
    "EXIF on the other side": Picture(lambda: rotated(8), size=(30, 40), corner=BLUE),
    "EXIF of nonsense": Picture(lambda: rotated(77), **HALVES),
    "another suffix": Picture(lambda: saved(halves(), "BMP"), **HALVES),
}


def _bmp_that_claims(width: int, height: int) -> bytes:
    whole = bytearray(saved(halves(), "BMP"))
    whole[18:26] = struct.pack("<ii", width, height)
    return bytes(whole)
