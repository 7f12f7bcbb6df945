"""Decodes image files of any size and mode to uint8 arrays of one shape."""

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = frozenset({  # of the formats that Pillow reads by itself
    ".apng", ".avif", ".avifs", ".bmp", ".dib", ".gif", ".ico", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx",
    ".mpo", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp",
})  # fmt: skip
JPEG_QUALITY = 95  # of images that are stored re-encoded
LARGEST_PIXELS = 100_000_000  # larger images are refused as decompression bombs


def _eight_bit(image: Image.Image) -> Image.Image:
    """Convert 16-bit and float grey images to 8 bits; leave other modes unchanged."""
    if not image.mode.startswith(("I", "F")):
        return image
    grey = np.asarray(image, dtype=np.float64)
    return Image.fromarray(scaled(grey, 0.0, _top(image.mode, grey)))


def _top(mode: str, grey: np.ndarray) -> float:
    """The value that a grey image of a mode takes for white."""
    return 65535.0 if mode.startswith("I;16") or grey.max(initial=0) > 255 else 255.0 if grey.max(initial=0) > 1 else 1.0


def scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map ``low``..``high`` to 0..255, uint8; values beyond are cut."""
    return ((values.astype(np.float64).clip(low, high) - low) * (255.0 / (high - low))).round().astype(np.uint8)


class Brightness(NamedTuple):
    """Darkest and brightest value of an image, and the value that is taken for white; ``guessed`` if that depends on the brightest."""

    darkest: float
    brightest: float
    white: float
    guessed: bool

    @property
    def nearly_black(self) -> bool:
        """Whether so little of the range is used that the image is nearly black; one without any light is as it should be."""
        return 0 < self.brightest * 8 <= self.white

    @property
    def cut(self) -> bool:
        """Whether values lie beyond black or white."""
        return self.darkest < 0 or self.brightest > self.white


def _is_deep(image: Image.Image) -> bool:
    """Whether an image has more than 8 bits, and no more pixels than are decoded."""
    return image.mode.startswith(("I", "F")) and image.width * image.height <= LARGEST_PIXELS


def brightness(content: bytes | np.ndarray) -> Brightness | None:
    """Of a uint8 array or an image file of more than 8 bits; None for 8-bit files, features, and what cannot be read."""
    if isinstance(content, np.ndarray):
        return Brightness(float(content.min(initial=0)), float(content.max(initial=0)), 255.0, False) if content.dtype == np.uint8 else None
    if content[:3] == b"\xff\xd8\xff":  # a JPEG has 8 bits
        return None
    try:
        with Image.open(io.BytesIO(content)) as image:
            if not _is_deep(image):
                return None
            grey = np.asarray(image, dtype=np.float64)
            return Brightness(float(grey.min(initial=0)), float(grey.max(initial=0)), _top(image.mode, grey), not image.mode.startswith("I;16"))
    except Exception:  # decode says what is wrong with it
        return None


def with_range(content: bytes | np.ndarray, low: float, high: float) -> bytes | np.ndarray:
    """A uint8 array, or an image file of more than 8 bits, with ``low``..``high`` mapped to 0..255; other files are unchanged.

    Raises:
        Exception: what Pillow raises for a file that is not a readable image.
    """
    if isinstance(content, np.ndarray):
        return scaled(content, low, high)
    with Image.open(io.BytesIO(content)) as image:
        if not _is_deep(image):
            return content
        ImageOps.exif_transpose(image, in_place=True)  # the new file does not say how it lies
        buffer = io.BytesIO()
        Image.fromarray(scaled(np.asarray(image, dtype=np.float64), low, high)).save(buffer, "PNG")
    return buffer.getvalue()


def _flat(image: Image.Image) -> Image.Image:
    """Blend transparency onto white and convert palettes and other colour models; the result is L or RGB."""
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode in ("1", "LA") else "RGB")


def decode(content: bytes, channels: int, size: int, values: tuple[float, float] | None = None) -> np.ndarray:
    """Decode an image file as ``decode_rows`` does; returns (channels, size, size) uint8.

    Args:
        values: the lowest and highest value of files of more than 8 bits; None for those of their type.

    Raises:
        ValueError: the bytes are not a readable image; says why.
    """
    with _one_line_faults(content):
        array = decode_rows(bytes(with_range(content, *values)) if values else content, channels, size)
    return np.ascontiguousarray(array[None] if channels == 1 else array.transpose(2, 0, 1))


def decode_query(
    content: bytes, channels: int, size: int, values: tuple[float, float] | None = None, whites: list[float] | None = None
) -> np.ndarray:  # fmt: skip
    """Decode an image file that no dataset holds, as ``decode`` does.

    Args:
        whites: takes the value that is white if the file's own brightest value tells it; see ``one_white``.

    Raises:
        ValueError: it is not a readable image, or without ``values`` it would be nearly black, as those of 12 bits in 16.
    """
    seen = None if values else brightness(content)
    if seen and seen.nearly_black:
        raise ValueError(f"its brightest value is {seen.brightest:g} of {seen.white:g}, so it is nearly black: --range says what is white")
    image = decode(content, channels, size, values)
    if seen and seen.guessed and seen.brightest > 0 and whites is not None:
        whites.append(seen.white)
    return image


def one_white(whites: Mapping[float, int], where: str) -> None:
    """Check that float or 32-bit files, whose own brightest value tells what is white, agree on it.

    Args:
        whites: how many files have which value.

    Raises:
        ValueError: they do not.
    """
    if len(whites) > 1:
        shares = ", ".join(f"{white:g} for {count:,}" for white, count in sorted(whites.items()))
        raise ValueError(f"{where}: float or 32-bit images differ in what their brightest value makes white: {shares}: give --range LOW-HIGH for all")


def decode_rows(content: bytes, channels: int, size: int) -> np.ndarray:
    """Decode an image file: first frame, EXIF rotation applied, 8 bits, no transparency, resized to a square.

    Args:
        content: the file's bytes.
        channels: 1 for grey, 3 for RGB.
        size: height and width in pixels; the aspect ratio is not kept.

    Returns:
        Rows of pixels, (size, size) or (size, size, 3) uint8.

    Raises:
        ValueError: the bytes are not a readable image; says why.
    """
    with _one_line_faults(content):
        flat = _opened(content, "RGB" if channels == 3 else "L", (size, size))
        mode = "L" if channels == 1 else "RGB"
        flat = flat if flat.mode == mode else flat.convert(mode)
        if flat.size != (size, size):
            flat = flat.resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(flat)


def _opened(content: bytes, mode: str, size: tuple[int, int]) -> Image.Image:
    """An image file's first frame, upright, 8 bits, L or RGB; a JPEG may be decoded smaller, but not below ``size``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > LARGEST_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels is above the limit of {LARGEST_PIXELS:,}")
            image.draft(mode, size)
            ImageOps.exif_transpose(image, in_place=True)
            return _flat(_eight_bit(image))


@contextlib.contextmanager
def _one_line_faults(content: bytes) -> Iterator[None]:
    """Turn what decoders raise into a ValueError of one line."""
    try:
        yield
    except UnidentifiedImageError:
        raise ValueError("not an image" if content else "empty file") from None
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, ArithmeticError, MemoryError) as error:
        raise ValueError(str(error).splitlines()[0] if str(error) else type(error).__name__) from None
    except Exception as error:  # decoders also raise errors of their own libraries (struct.error, zlib.error, bomb errors)
        raise ValueError(f"{type(error).__name__}: {error}") from None


def thumbnail(content: bytes, longest: int, values: tuple[float, float] | None = None) -> bytes:
    """An image file as a JPEG file without metadata, its longer side at most ``longest`` pixels, its aspect ratio kept; ``values`` as in ``decode``.

    Raises:
        ValueError: the bytes are not a readable image; says why.
    """
    with _one_line_faults(content):
        image = _opened(bytes(with_range(content, *values)) if values else content, "RGB", (longest, longest))
        image.thumbnail((longest, longest))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        return buffer.getvalue()


def to_jpeg(image: np.ndarray, quality: int = JPEG_QUALITY) -> bytes:
    """Encode an image (channels, h, w) uint8 as a JPEG file, colours at full resolution."""
    buffer = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def resize_arrays(images: np.ndarray, channels: int, size: int) -> np.ndarray:
    """Convert a stack of uint8 arrays to one shape, as ``decode`` does for files.

    Args:
        images: (n, h, w), (n, h, w, 3 or 1) or (n, 3 or 1, h, w) uint8.

    Returns:
        (n, channels, size, size) uint8.
    """
    if images.ndim == 4 and images.shape[3] not in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim == 4 and images.shape[3] == 1:
        images = images.squeeze(3)
    mode = "L" if channels == 1 else "RGB"
    rows = [
        np.asarray(Image.fromarray(each).convert(mode).resize((size, size), Image.Resampling.BILINEAR)) for each in images
    ] if images.shape[1:3] != (size, size) or (images.ndim == 3) != (channels == 1) else images
    stack = np.asarray(rows, dtype=np.uint8).reshape(len(images), size, size, channels)
    return np.ascontiguousarray(stack.transpose(0, 3, 1, 2))
