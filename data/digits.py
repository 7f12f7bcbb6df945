"""The embedded dataset: labelled typeset digits and real handwritten digits. No download.

``typeset`` is rendered with the fonts that matplotlib ships; image i depends only on the seed and i.
``handwritten`` is the UCI set of 1,797 digits that scikit-learn ships, in a fixed split.
"""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZE = 32
TYPESET = {"train": 4000, "test": 1000}
HANDWRITTEN = {"train": 1297, "test": 500}


@cache
def _fonts() -> list[str]:
    """Paths of matplotlib's text fonts whose digits look like digits, in a fixed order."""
    from matplotlib import get_data_path  # noqa: PLC0415

    wanted = ("DejaVuSans", "DejaVuSerif", "STIXGeneral", "cmb10", "cmr10", "cmss10", "cmtt10")
    folder = Path(get_data_path()) / "fonts" / "ttf"
    return [str(path) for path in sorted(folder.glob("*.ttf")) if path.stem.startswith(wanted) and "Display" not in path.stem]


def typeset(split: str, index: int, seed: int = 0) -> tuple[np.ndarray, int]:
    """Render one digit that fills the frame, with random font, stroke, rotation, slant, width, blur, contrast and noise.

    Args:
        split: ``train`` or ``test``.
        index: from 0; its last decimal digit is the label.

    Returns:
        Image (32, 32) uint8, bright on dark, and its label.
    """
    random = np.random.default_rng([seed, ("train", "test").index(split), index])
    label, side = index % 10, 4 * SIZE  # drawn four times as large, then reduced
    fonts = _fonts()
    font = ImageFont.truetype(fonts[random.integers(len(fonts))], int(0.85 * side))
    canvas = Image.new("L", (2 * side, 2 * side))
    ImageDraw.Draw(canvas).text((side, side), str(label), fill=255, font=font, anchor="mm", stroke_width=int(random.integers(0, 7)), stroke_fill=255)
    angle, slant = np.deg2rad(random.uniform(-12, 12)), random.uniform(-0.3, 0.3)
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) @ np.array([[1, slant], [0, 1]])
    shift = side - matrix @ np.full(2, side)
    canvas = canvas.transform(canvas.size, Image.Transform.AFFINE, (*matrix[0], shift[0], *matrix[1], shift[1]), Image.Resampling.BILINEAR)
    framed = _in_frame(canvas, side, random).filter(ImageFilter.GaussianBlur(random.uniform(0, 12)))
    ink = np.asarray(framed.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float64) / 255
    background, contrast = random.uniform(0, 10), random.uniform(200, 255)
    noisy = background + contrast * ink + random.normal(0, random.uniform(0, 12), ink.shape)
    return noisy.clip(0, 255).round().astype(np.uint8), label


def _in_frame(canvas: Image.Image, side: int, random: np.random.Generator) -> Image.Image:
    """The ink of a canvas, scaled to the height of a frame with a random margin, width and shift, as forms are scanned."""
    left, top, right, bottom = canvas.point(lambda value: 255 * (value > 64)).getbbox() or (0, 0, side, side)
    height = side * (1 - 2 * random.uniform(0.0, 0.12))
    width = min(side, (right - left) * height / (bottom - top) * random.uniform(0.85, 1.25))
    glyph = canvas.crop((left, top, right, bottom)).resize((max(8, int(width)), int(height)), Image.Resampling.BILINEAR)
    across, down = random.uniform(-0.06, 0.06) * side, random.uniform(-0.03, 0.03) * side
    frame = Image.new("L", (side, side))
    frame.paste(glyph, (int((side - glyph.width) / 2 + across), int((side - glyph.height) / 2 + down)))
    return frame


@cache
def _handwritten() -> tuple[np.ndarray, np.ndarray]:
    """All handwritten digits at 32x32, in a fixed shuffled order."""
    from sklearn.datasets import load_digits  # noqa: PLC0415

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    images = (digits.images[order] * (255 / 16)).round().astype(np.uint8)
    large = [np.asarray(Image.fromarray(each).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for each in images]
    return np.stack(large), digits.target[order].astype(np.int64)


def read(domain: str, split: str, start: int, stop: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Read rows ``start`` to ``stop`` of a split.

    Returns:
        Images (n, 32, 32) uint8 and labels (n,) int64.
    """
    if domain == "typeset":
        images, labels = zip(*(typeset(split, index, seed) for index in range(start, stop)), strict=True)
        return np.stack(images), np.array(labels)
    offset = 0 if split == "train" else HANDWRITTEN["train"]
    images, labels = _handwritten()
    return images[offset + start : offset + stop], labels[offset + start : offset + stop]
