"""The layout of a dataset's shards: store, shape and Parquet columns, the same for all its domains."""

from dataclasses import dataclass

import pyarrow as pa

from data.manifest import Manifest
from data.readers.base import Reader

ROWS_PER_FILE = 8192
RAW_LIMIT = 64  # pixels per side up to which images are stored raw by default


@dataclass(frozen=True)
class Layout:
    """How rows are stored: the manifest's ``store`` and ``shape``, the seed of the shuffle, rows per file."""

    store: str
    shape: tuple[int, ...]
    seed: int
    rows_per_file: int = ROWS_PER_FILE

    def schema(self) -> pa.Schema:
        """The Parquet schema of the shards."""
        column = (
            pa.field("feature", pa.list_(pa.float32(), self.shape[0])) if self.store == "feature" else pa.field("image", pa.binary())
        )
        return pa.schema([("id", pa.string()), ("row", pa.int64()), column, ("label", pa.int32())])


def choose_layout(reader: Reader, manifest: Manifest | None, size: int, channels: int, store: str, seed: int) -> Layout:
    """Choose the layout of a new domain: the user's options first, then the dataset's layout, then the source's own.

    Raises:
        ValueError: the layout does not fit the dataset's existing domains.
    """
    if len(reader.native) == 1:
        layout = Layout("feature", reader.native, seed)
    else:
        there = manifest.shape if manifest and manifest.store != "feature" else None
        size = size or (there[1] if there else max(reader.native, default=224))
        channels = channels or (there[0] if there else reader.channels or 3)
        default = manifest.store if there and manifest else "raw" if size <= RAW_LIMIT else "encoded"
        layout = Layout(store or default, (channels, size, size), seed)
    if layout.store == "encoded" and reader.native:
        raise ValueError(f"{reader.domain}: --store encoded keeps files as they are, but the source holds arrays: use --store raw")
    if manifest:
        check_fits(reader, manifest, layout)
    return layout


def check_fits(reader: Reader, manifest: Manifest, layout: Layout) -> None:
    if (list(layout.shape), layout.store) != (manifest.shape, manifest.store):
        raise ValueError(
            f"domain {reader.domain!r} would be {layout.store} {list(layout.shape)}, but dataset {manifest.dataset!r} is "
            f"{manifest.store} {manifest.shape}: give the same --size, --channels and --store, or another --dataset"
        )
    if reader.classes and manifest.classes and manifest.classes != list(reader.classes):
        odd = sorted(set(reader.classes) ^ set(manifest.classes))
        raise ValueError(
            f"domain {reader.domain!r} has {len(reader.classes)} classes, dataset {manifest.dataset!r} has "
            f"{len(manifest.classes)}, and they differ ({', '.join(odd[:4]) or 'in order'}): the domains of a dataset share their classes"
        )
