"""Pictures: exactly CLIPImageProcessor's arithmetic, and no hostile file gets past with anything but an ImageError."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flexattn_jax.config import FlexAttentionConfig, VisionConfig, VLMConfig
from flexattn_jax.inputs import images
from flexattn_jax.inputs.images import ImageError, content_mask, load_image, pad_to_square, preprocess

FIXTURES = Path(__file__).parents[1] / "fixtures" / "inputs"
SMALL = VLMConfig(VisionConfig(image_size=28), image_size=28, lowres_size=28)
FILL = (122, 116, 104)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_header_only(width: int, height: int) -> bytes:
    """A tiny file that claims to be a huge picture."""
    chunks = b"\x89PNG\r\n\x1a\n"
    for kind, body in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", b""),
        (b"IEND", b""),
    ):
        chunks += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return chunks


@pytest.mark.parametrize("name", ["landscape", "portrait", "square"])
def test_preprocess_equals_clip_image_processor(name):
    arrays = np.load(FIXTURES / "clip_pixels.npz")
    pixels, size = preprocess(load_image(arrays[f"{name}_picture"]), SMALL)
    assert size == arrays[f"{name}_picture"].shape[1::-1]
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, arrays[f"{name}_pixels"])


def test_preprocess_equals_the_released_code():
    config = VLMConfig(
        VisionConfig(image_size=168), flexattention=FlexAttentionConfig(), image_size=504, lowres_size=168
    )
    pixels, size = preprocess(load_image(FIXTURES / "golden.png"), config)
    assert (pixels.shape, size) == ((3, 504, 504), (700, 452))
    np.testing.assert_array_equal(pixels[:, ::18, ::18], np.load(FIXTURES / "golden.npz")["pixels"])


def test_pad_to_square_puts_the_odd_pixel_below():
    square = np.asarray(pad_to_square(Image.new("RGB", (5, 2), (1, 2, 3)), FILL))
    assert square[:, 0].tolist() == [list(FILL), [1, 2, 3], [1, 2, 3], list(FILL), list(FILL)]


@pytest.mark.parametrize("size", [(300, 41), (41, 300), (1, 300), (300, 1), (257, 256)])
def test_strips_give_the_same_bytes_as_the_whole_square(size, monkeypatch):
    image = picture(*size)
    whole = images._resize_padded(image, FILL, 28)
    monkeypatch.setattr(images, "_STRIP_SIDE", 64)
    np.testing.assert_array_equal(images._resize_padded(image, FILL, 28), whole)


@pytest.mark.parametrize("size", [(5000, 1), (1, 5000)])
def test_extreme_aspect_ratio(size):
    pixels, returned = preprocess(load_image(encoded(picture(*size))), SMALL)
    assert returned == size
    assert np.isfinite(pixels).all()


@pytest.mark.parametrize(
    ("size", "grid", "rows", "columns"),
    [
        ((1008, 1008), 24, (0, 24), (0, 24)),
        ((1008, 640), 24, (4, 20), (0, 24)),  # 184 / 1008 * 24 = 4.38
        ((571, 1008), 24, (0, 24), (5, 19)),
        ((700, 452), 12, (2, 10), (0, 12)),
        ((100, 99), 24, (0, 24), (0, 24)),
        ((5000, 1), 24, (11, 13), (0, 24)),
    ],
)
def test_content_mask_cases(size, grid, rows, columns):
    expected = np.zeros((grid, grid), bool)
    expected[slice(*rows), slice(*columns)] = True
    np.testing.assert_array_equal(content_mask(size, grid).reshape(grid, grid), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 24))
def test_content_mask_follows_its_definition(width, height, grid):
    margin = int((abs(width - height) // 2) / max(width, height) * grid)
    mask = content_mask((width, height), grid)
    for row in range(grid):
        for column in range(grid):
            line = row if width > height else column
            assert mask[row * grid + column] == (margin <= line < grid - margin)
    assert mask.any()  # a selection is always possible


def test_every_kind_of_source_gives_the_same_pixels(tmp_path):
    image = picture(7, 5)
    data = encoded(image)
    (tmp_path / "a.png").write_bytes(data)
    sources = [tmp_path / "a.png", str(tmp_path / "a.png"), data, bytearray(data), memoryview(data), image]
    for source in [*sources, np.asarray(image), np.asarray(image)[:, ::-1][:, ::-1]]:
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(image))


def test_the_callers_picture_is_not_changed():
    image = picture(4, 4)
    load_image(image).putpixel((0, 0), (0, 0, 0))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(picture(4, 4)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "RGBa"])
def test_8_bit_modes_become_rgb(mode):
    via = {"PA": "LA", "RGBa": "RGBA"}.get(mode, mode)
    white = Image.new("RGB", (3, 2), (255, 255, 255))
    image = Image.new("LAB", (3, 2), (255, 128, 128)) if mode == "LAB" else white.convert(via).convert(mode)
    loaded = load_image(image)
    assert (loaded.mode, loaded.size) == ("RGB", (3, 2))
    assert np.asarray(loaded).min() >= 254


def test_transparency_is_dropped_as_clip_image_processor_does():
    image = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert load_image(encoded(image)).getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.filterwarnings("error")
def test_palette_with_alpha_keeps_its_colours_without_a_warning():
    image = Image.new("P", (2, 1))
    image.putpalette([200, 100, 50, 1, 2, 3])
    image.putpixel((1, 0), 1)
    loaded = load_image(encoded(image, transparency=bytes([0, 128])))
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [(200, 100, 50), (1, 2, 3)]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(format):
    values = np.array([[0, 257, 32_768, 65_535]], np.uint16)
    loaded = np.asarray(load_image(encoded(Image.fromarray(values), format)))
    assert loaded[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]
    assert np.asarray(load_image(Image.fromarray(values.astype(np.int32))))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert load_image(data).getpixel((1, 1)) == (255, 0, 0)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(format):
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 20, 20))  # dark on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    loaded = load_image(encoded(image, format, exif=exif))
    assert loaded.size == (20, 40)
    assert loaded.getpixel((10, 5))[0] < 60  # dark above
    assert loaded.getpixel((10, 35))[0] > 200


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_corrupt_exif_block_costs_nothing_but_the_orientation():
    data = encoded(picture(8, 4), "PNG", exif=b"Exif\0\0II*\0garbage")
    assert load_image(data).size == (8, 4)


WHOLE = encoded(picture(64, 64))
HOSTILE = {
    "empty": (b"", "empty"),
    "text": (b"This is a text and no picture.", "not a picture"),
    "html": (b"<!DOCTYPE html><html>404</html>", "not a picture"),
    "header only": (WHOLE[:33], "beginning is damaged"),
    "magic only": (WHOLE[:8], "not a picture|damaged"),
    "truncated png": (WHOLE[: len(WHOLE) // 2], "damaged"),
    "truncated jpeg": (encoded(picture(64, 64), "JPEG")[:900], "damaged"),
    "truncated webp": (encoded(picture(64, 64), "WEBP")[:900], "damaged|not a picture"),
    "flipped bytes": (WHOLE[:60] + bytes(200) + WHOLE[260:], "damaged"),
    "bomb": (png_header_only(30_000, 30_000), "too many pixels"),
    "over the limit": (png_header_only(9000, 9000), "scale it down"),
    "too wide": (png_header_only(40_000, 1), "scale it down"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "not a picture"),
    "float": (encoded(Image.new("F", (2, 2), 0.5), "TIFF"), "8-bit or 16-bit"),
    "negative": (encoded(Image.new("I", (2, 2), -5), "TIFF"), "8-bit or 16-bit"),
}


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_bytes(case, tmp_path):
    data, message = HOSTILE[case]
    file = tmp_path / "evil picture.jpg"
    file.write_bytes(data)
    with pytest.raises(ImageError, match=message) as caught:
        load_image(file)
    assert str(file) in str(caught.value)
    assert "PIL" not in str(caught.value)
    with pytest.raises(ImageError, match=message):
        load_image(data)


def test_float_pixels_in_8_bit_range_are_not_guessed():
    with pytest.raises(ImageError, match="mode F"):
        load_image(Image.new("F", (2, 2), 0.5))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((4, 4), np.uint8), "uint8 in RGB order"),
        (np.zeros((4, 4, 4), np.uint8), "uint8 in RGB order"),
        (np.zeros((4, 4, 3), np.float32), "uint8 in RGB order"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (Image.new("RGB", (0, 3)), "no pixels"),
        (Image.new("La", (2, 2)), "mode La"),
        (7, "not int"),
        (None, "not NoneType"),
        ("nowhere/at all.png", "does not exist"),
        (".", "is a folder"),
        ("a\0b.png", "no valid path|does not exist"),
        ("x" * 5000, "cannot be read|does not exist"),
    ],
)
def test_unusable_sources(source, message):
    with pytest.raises(ImageError, match=message):
        load_image(source)


def test_the_pixel_limit_can_be_set():
    with pytest.raises(ImageError, match="scale it down"):
        load_image(picture(11, 10), max_pixels=100)
    assert load_image(picture(10, 10), max_pixels=100).size == (10, 10)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=8))
def test_damage_anywhere_is_a_picture_or_an_image_error(position, garbage):
    data = WHOLE[:position] + garbage + WHOLE[position + len(garbage) :]
    try:
        assert load_image(data).mode == "RGB"
    except ImageError as error:
        assert "picture" in str(error)
