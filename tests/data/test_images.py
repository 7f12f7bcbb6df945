"""Decoding of image files of every mode."""

import io

import numpy as np
import pytest
from PIL import Image

from data.images import decode, decode_query, resize_arrays, thumbnail


def file_bytes(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


HALVES = np.zeros((16, 16, 3), np.uint8)
HALVES[:, 8:] = (200, 100, 50)
RGB = Image.fromarray(HALVES)


def is_halves(found: np.ndarray, tolerance: int = 12) -> bool:
    return bool(np.abs(found.transpose(1, 2, 0).astype(int) - HALVES).max() <= tolerance)


@pytest.mark.parametrize(
    "content",
    [
        file_bytes(RGB, "PNG"), file_bytes(RGB, "BMP"), file_bytes(RGB, "WEBP", lossless=True), file_bytes(RGB.quantize(4), "PNG"),
        file_bytes(RGB.quantize(4), "GIF"), file_bytes(RGB, "TIFF"),
        file_bytes(RGB.quantize(4), "GIF", save_all=True, append_images=[RGB.transpose(Image.Transpose.ROTATE_90).quantize(4)]),
    ],
    ids=["png", "bmp", "webp", "palette", "gif", "tiff", "animated"],
)  # fmt: skip
def test_colours_survive_every_format(content: bytes) -> None:
    assert is_halves(decode(content, 3, 16))


def test_cmyk_and_jpeg_come_near() -> None:
    assert is_halves(decode(file_bytes(RGB.convert("CMYK"), "TIFF"), 3, 16), tolerance=40)
    assert is_halves(decode(file_bytes(RGB.convert("CMYK"), "JPEG", quality=100, subsampling=0), 3, 16), tolerance=60)


def test_exif_rotation_is_undone() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated: turn it by 270 degrees to view
    turned = RGB.transpose(Image.Transpose.ROTATE_90)
    assert is_halves(decode(file_bytes(turned, "PNG", exif=exif), 3, 16))


def test_sixteen_bits_become_eight() -> None:
    deep = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    found = decode(file_bytes(Image.fromarray(deep), "PNG"), 1, 16)[0]
    assert np.abs(found.ravel().astype(int) - np.arange(256)).max() <= 1


@pytest.mark.parametrize(
    ("values", "white"),
    [(np.linspace(0, 4095, 256).astype(np.uint16), "4095 of 65535"), (np.linspace(0, 1.02, 256, dtype=np.float32), "1.02 of 255")],
    ids=["twelve bits", "beyond one"],
)  # fmt: skip
def test_a_query_that_would_be_nearly_black_is_refused_and_a_range_mends_it(values: np.ndarray, white: str) -> None:
    content = file_bytes(Image.fromarray(values.reshape(16, 16)), "TIFF")
    with pytest.raises(ValueError, match=f"its brightest value is {white}, so it is nearly black"):
        decode_query(content, 1, 16)
    found = decode_query(content, 1, 16, (0.0, float(values.max())))[0]
    assert np.abs(found.ravel().astype(int) - np.arange(256)).max() <= 1


def test_a_range_keeps_the_rotation_that_exif_tells() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(HALVES[..., 0].astype(np.uint16) * 20).transpose(Image.Transpose.ROTATE_90)
    assert is_halves(decode(file_bytes(turned, "TIFF", exif=exif), 1, 16, (0.0, 255 * 20.0)).repeat(3, 0) * (HALVES[0, 8] / 200).reshape(3, 1, 1))


def test_a_thumbnail_of_twelve_bits_is_as_light_as_its_range_says() -> None:
    content = file_bytes(Image.fromarray(np.full((32, 32), 4095, np.uint16)), "PNG")
    assert [decode(thumbnail(content, 8, values), 1, 8).max() for values in (None, (0.0, 4095.0))] == [16, 255]


def test_queries_without_any_light_or_of_eight_bits_are_as_they_are() -> None:
    for black in (np.zeros((8, 8), np.uint16), np.zeros((8, 8), np.float32), np.full((8, 8), 3, np.uint8)):
        assert decode_query(file_bytes(Image.fromarray(black), "TIFF"), 3, 8).max() == (3 if black.dtype == np.uint8 else 0)
    assert is_halves(decode_query(file_bytes(RGB, "PNG"), 3, 16, (0.0, 4095.0)))


def test_transparency_lies_over_white() -> None:
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    assert (decode(file_bytes(clear, "PNG"), 3, 8) == 255).all()


def test_any_size_and_both_channel_counts() -> None:
    content = file_bytes(Image.new("L", (37, 91), 77), "PNG")
    for channels in (1, 3):
        found = decode(content, channels, 20)
        assert found.shape == (channels, 20, 20) and found.dtype == np.uint8 and (found == 77).all()


@pytest.mark.parametrize(
    "content", [b"", b"not an image", file_bytes(RGB, "PNG")[:60], b"GIF89a" + b"\xff" * 40], ids=["empty", "text", "truncated", "garbage"]
)
def test_what_cannot_be_read_is_one_error_of_one_line(content: bytes) -> None:
    with pytest.raises(ValueError) as caught:
        decode(content, 3, 16)
    assert str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_claims_to_be_huge_is_refused() -> None:
    header = bytearray(file_bytes(Image.new("1", (8, 8)), "BMP"))
    header[18:26] = (60000).to_bytes(4, "little") * 2
    with pytest.raises(ValueError):
        decode(bytes(header), 1, 16)


def test_arrays_are_brought_to_shape() -> None:
    grey = np.full((2, 16, 16), 9, np.uint8)
    assert resize_arrays(grey, 3, 28).shape == (2, 3, 28, 28)
    assert np.array_equal(resize_arrays(grey, 1, 16)[:, 0], grey)
    colour = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8), dtype=np.uint8)
    assert np.array_equal(resize_arrays(colour, 3, 8), colour)
    assert np.array_equal(resize_arrays(colour.transpose(0, 2, 3, 1), 3, 8), colour)
