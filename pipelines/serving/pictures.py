"""The picture that a code was made from, as a small JPEG or PNG file."""

import io

import numpy as np
from PIL import Image

from data.decoding import stored_content
from data.filesystem import to_path
from data.images import thumbnail
from data.manifest import Manifest
from data.shards import read_rows
from pipelines.retrieval.queries import parse_rows

LONGEST, ENLARGED = 320, 96  # pixels of a picture's longer side; to which smaller arrays are enlarged, in whole steps


def read_picture(origin: str, values: tuple[float, float] | None = None) -> tuple[bytes, str]:
    """The picture of a row's origin, and its media type.

    Args:
        values: of image files, as in ``decode``.

    Raises:
        ValueError: it is no longer there, or it is a feature vector.
    """
    try:
        if "#" not in origin or to_path(origin).exists():
            return thumbnail(to_path(origin).read_bytes(), LONGEST, values), "image/jpeg"
        root, domain, split, start, stop = parse_rows(origin)
        manifest = Manifest.read(to_path(root))
        if manifest.store == "feature":
            raise ValueError("it is a feature vector")
        content = [stored_content(batch, manifest)[0] for batch in read_rows(to_path(root), manifest, domain, split, start, stop, labels=False)]
        if not content:
            raise ValueError(f"{domain}/{split} has no row {start}")
    except (OSError, ValueError) as error:
        raise ValueError(f"there is no picture: {str(error).splitlines()[0]}") from error
    return (thumbnail(content[0], LONGEST), "image/jpeg") if manifest.store == "encoded" else (_png(content[0], tuple(manifest.shape)), "image/png")


def _png(pixels: bytes, shape: tuple[int, ...]) -> bytes:
    """An array (channels, h, w) uint8 as a PNG file; each pixel of a small one becomes a square."""
    array = np.frombuffer(pixels, np.uint8).reshape(shape)
    image = Image.fromarray(array[0] if shape[0] == 1 else array.transpose(1, 2, 0))
    factor = max(1, ENLARGED // max(image.size))
    buffer = io.BytesIO()
    image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()
