"""Pictures from anywhere (path, bytes, PIL, numpy) to the normalised pixels that the vision tower was trained on.

The arithmetic is CLIPImageProcessor's after LLaVA's pad-to-square, down to the order of the float32 operations. Files
are treated as hostile: the header is checked against a pixel limit before anything is decoded, only raster formats
with a decoder of their own are opened (none that starts another program), and every failure is an `ImageError`.
"""

from __future__ import annotations

import functools
import io
import os
import re
import threading
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from flexattn_jax.config import VLMConfig
from flexattn_jax.files import FileError, read_bytes

ImageSource = str | os.PathLike | bytes | bytearray | memoryview | Image.Image | np.ndarray

MAX_PIXELS = 64 * 2**20
MAX_SIDE = 32_768  # a thin picture has few pixels, but becomes a square of its longer side
MAX_BYTES = 1 << 29  # of a picture's file, which some decoders read at once
MAX_SCANS = 100  # of a JPEG: each is a pass over all pixels, and a few bytes make one; genuine ones have 20 at most

_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
_ORIENTATION = 0x0112  # EXIF tag
_MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")  # of a JPEG's segment with a length, or its end
_START_OF_SCAN, _END_OF_IMAGE = b"\xda", b"\xd9"
_WARNINGS = threading.Lock()  # the filters of warnings belong to the whole process
_STRIP_SIDE = 8192  # larger squares are padded and resized strip by strip, to bound memory


class ImageError(ValueError):
    """A picture that cannot be used; the message names it and says what to do."""


def load_image(source: ImageSource, max_pixels: int | None = None) -> Image.Image:
    """The picture as PIL RGB.

    8-bit modes are converted as CLIPImageProcessor does it, by `convert("RGB")`: transparency is dropped, not
    composited. 16-bit grey is scaled to 0..255 (`convert` would clip it). Of an animation the first frame is taken.
    One deliberate difference from the reference: an EXIF orientation is applied, so that the model sees the picture
    upright, as a person does.

    Args:
        source: a path, the bytes of a file, a PIL image, or an (height, width, 3) uint8 RGB array.
        max_pixels: largest width x height that is decoded; None: MAX_PIXELS.

    Raises:
        ImageError: missing, empty, truncated, too large, or not a picture.
    """
    max_pixels = MAX_PIXELS if max_pixels is None else max_pixels
    if not isinstance(max_pixels, (int, np.integer)):
        raise ImageError(f"max_pixels is {max_pixels!r}; it must be a whole number, or None")
    if isinstance(source, np.ndarray):
        if source.ndim != 3 or source.shape[2] != 3 or source.dtype != np.uint8:
            raise ImageError(
                f"the array given as a picture has shape {source.shape} and type {source.dtype}; "
                "give (height, width, 3) uint8 in RGB order"
            )
        _check_size("the array given as a picture", source.shape[1], source.shape[0], max_pixels)
        return Image.fromarray(np.ascontiguousarray(source))
    if isinstance(source, Image.Image):
        return _decode(source, "the PIL picture", max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        name = f"the picture given as {len(data)} bytes"
        if not data:
            raise ImageError(f"{name} is empty")
        return _open(data, name, max_pixels)
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(f"a picture must be a path, bytes, a PIL image or a numpy array, not {type(source).__name__}")
    path = Path(source)
    name = f"picture {path}"
    try:
        data = read_bytes(path, MAX_BYTES)
    except FileNotFoundError as error:
        raise ImageError(f"{name} does not exist; check the path") from error
    except FileError as error:
        raise ImageError(f"{name} {error}; check the path and its permissions") from error
    if not data:
        raise ImageError(f"{name} is empty (0 bytes); copy or download it again")
    return _open(data, name, max_pixels)


def picture_size(data: bytes, name: str) -> tuple[int, int]:
    """(width, height) of the picture in a file's bytes, from its head alone, for boxes that are given in pixels.

    Raises:
        ImageError: as `load_image`; and for one with an EXIF orientation, since nobody says whether boxes mean the
            picture as stored or upright.
    """
    image = _open_head(data, name, MAX_PIXELS)
    if _orientation(image) != 1:
        raise ImageError(
            f"{name} has an EXIF orientation, so what its boxes mean is open; save it upright, without EXIF"
        )
    return image.size


def pad_to_square(image: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
    """`image` in the middle of a square of its longer side; an odd pixel goes below or to the right (LLaVA)."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), fill)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def stretch_to_square(image: Image.Image) -> Image.Image:
    """`image` stretched to a square of its longer side (PIL bicubic), as FlexAttention's RefCOCO script does.

    To bound memory the square has at most `_STRIP_SIDE` pixels a side.
    """
    side = min(max(image.size), _STRIP_SIDE)
    return image.resize((side, side), Image.Resampling.BICUBIC)


def preprocess(image: Image.Image, config: VLMConfig) -> tuple[np.ndarray, tuple[int, int]]:
    """Pads to a square with the mean colour, resizes (PIL bicubic) and normalises, as LLaVA with CLIPImageProcessor.

    Args:
        image: PIL RGB, as `load_image` returns it.
        config: of which `image_size` (S), `image_mean` and `image_std` are used.

    Returns:
        pixels (3, S, S) float32, and the (width, height) of the picture before padding, for `content_mask`.
    """
    fill = tuple(int(255 * mean) for mean in config.image_mean)
    resized = _resize_padded(image, fill, config.image_size)
    normalised = _normalised(tuple(config.image_mean), tuple(config.image_std))
    channels = np.asarray(resized).transpose(2, 0, 1)
    return np.stack([table[channel] for table, channel in zip(normalised, channels, strict=True)]), image.size


@functools.cache
def _normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """(3, 256) float32: what each channel's bytes become, a table since a picture has many more pixels than values."""
    # The published order: float64 product, rounded once to float32, then float32 mean and standard deviation.
    values = (np.arange(256) * (1 / 255)).astype(np.float32)
    return (values - np.float32(mean)[:, None]) / np.float32(std)[:, None]


def content_mask(size: tuple[int, int], grid: int) -> np.ndarray:
    """Which low-resolution tokens show the picture and which only the padding of `pad_to_square`.

    Rounds down twice, as the released code: a row or column that is padding only in part counts as picture.

    Args:
        size: (width, height) in pixels before padding.
        grid: g, tokens a side.

    Returns:
        (g * g,) bool, row-major; False on padding.
    """
    width, height = size
    margin = int((abs(width - height) // 2) / max(width, height) * grid)
    content = np.ones((grid, grid), bool)
    if margin > 0:
        lines = content if width > height else content.T
        lines[:margin] = False
        lines[-margin:] = False
    return content.reshape(-1)


def _resize_padded(image: Image.Image, fill: tuple[int, int, int], side: int) -> Image.Image:
    """`pad_to_square`, then bicubic to `side`; the same bytes in bounded memory where the square would be huge.

    PIL resizes rows first and columns second with an 8-bit picture between, so rows may be done strip by strip.
    """
    full = max(image.size)
    if full <= _STRIP_SIDE:
        return pad_to_square(image, fill).resize((side, side), Image.Resampling.BICUBIC)
    narrow = Image.new("RGB", (side, full), fill)
    left, top = (full - image.width) // 2, (full - image.height) // 2
    rows = max(1, _STRIP_SIDE**2 // full)
    for start in range(0, image.height, rows):
        stop = min(start + rows, image.height)
        strip = Image.new("RGB", (full, stop - start), fill)
        strip.paste(image.crop((0, start, image.width, stop)), (left, 0))
        narrow.paste(strip.resize((side, stop - start), Image.Resampling.BICUBIC), (0, top + start))
    return narrow.resize((side, side), Image.Resampling.BICUBIC)


def _check_size(name: str, width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels ({width} x {height})")
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise ImageError(
            f"{name} is {width} x {height} pixels; at most {max_pixels / 2**20:.3g} x 2**20 pixels and "
            f"{MAX_SIDE} a side are read: scale it down first"
        )


def _open_head(data: bytes, name: str, max_pixels: int) -> Image.Image:
    """The picture before its pixels are decoded."""
    if len(data) > MAX_BYTES:
        raise ImageError(f"{name} is larger than {MAX_BYTES >> 20} MiB; save it smaller")
    try:
        with _WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower and says more
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.UnidentifiedImageError as error:
        raise ImageError(
            f"{name} is not a picture, or its beginning is damaged; supported are {', '.join(_FORMATS)}"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} has far too many pixels to decode; scale it down first") from error
    except Exception as error:
        raise _damaged(name) from error
    _check_size(name, *image.size, max_pixels)
    if image.format in ("JPEG", "MPO") and _scans(data) > MAX_SCANS:
        raise ImageError(f"{name} is a JPEG of more than {MAX_SCANS} scans, which would take hours; save it again")
    return image


def _scans(data: bytes) -> int:
    """Scans of a JPEG, counted no further than one beyond MAX_SCANS."""
    count, place = 0, 2
    while count <= MAX_SCANS and (marker := _MARKER.search(data, place)):
        kind, place = marker[1], marker.end()
        if kind == _END_OF_IMAGE:
            break
        count += kind == _START_OF_SCAN
        place += int.from_bytes(data[place : place + 2], "big")
    return count


def _open(data: bytes, name: str, max_pixels: int) -> Image.Image:
    return _decode(_open_head(data, name, max_pixels), name, max_pixels)


def _decode(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    _check_size(name, *image.size, max_pixels)
    # Decoders meet hostile bytes with exceptions of every type, so all of them are turned into ours.
    try:
        image.load()
    except MemoryError as error:
        raise ImageError(f"{name} ({image.width} x {image.height}) does not fit in memory; scale it down") from error
    except Exception as error:
        raise _damaged(name) from error
    _check_size(name, *image.size, max_pixels)  # some decoders learn the true size only now
    try:
        return _to_rgb(_upright(image), name)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(
            f"{name} has pixels of mode {image.mode}, which have no RGB form here; save it as 8-bit RGB"
        ) from error


def _damaged(name: str) -> ImageError:
    return ImageError(f"{name} is damaged or truncated; copy or download it again")


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1 for upright."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a corrupt EXIF block says nothing about the orientation, and the pixels are fine
        return 1
    return orientation if orientation in range(1, 9) else 1


def _upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image) if _orientation(image) != 1 else image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scale_grey(image, name)
    if image.mode == "RGB":
        return image.copy()
    if isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours; Pillow warns when a palette goes to RGB at once
    return image.convert("RGB")


def _scale_grey(image: Image.Image, name: str) -> Image.Image:
    """16-bit grey, also in Pillow's 32-bit container, with 0..65535 mapped to 0..255."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65_535:
        raise ImageError(f"{name} has pixels outside 0..65535 (mode {image.mode}); save it as 8-bit or 16-bit")
    grey = (values.astype(np.uint32) * 255 + 32_767) // 65_535
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
