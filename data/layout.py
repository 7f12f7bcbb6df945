"""The layout of a dataset's shards: store, shape and Parquet columns, the same for all its domains."""

import re
from dataclasses import dataclass

import pyarrow as pa

from data.manifest import Manifest
from data.readers.base import Reader

ROWS_PER_FILE = 8192
RAW_LIMIT = 64  # pixels per side up to which images are stored raw by default


@dataclass(frozen=True)
class Layout:
    """How rows are stored: the manifest's ``store`` and ``shape``, the seed of the shuffle, rows per file, embedded views of each row."""

    store: str
    shape: tuple[int, ...]
    seed: int
    rows_per_file: int = ROWS_PER_FILE
    views: int = 0

    def schema(self) -> pa.Schema:
        """The Parquet schema of the shards."""
        column = (
            pa.field("feature", pa.list_(pa.float32(), self.shape[0])) if self.store == "feature" else pa.field("image", pa.binary())
        )
        views = [pa.field("views", pa.list_(pa.float32(), self.views * self.shape[0]))] if self.views else []
        return pa.schema([("id", pa.string()), ("row", pa.int64()), column, *views, ("label", pa.int32())])


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
        raise ValueError(f"{reader.domain}: --store encoded keeps files as they are, but the source holds arrays: use --store raw or jpeg")
    if manifest:
        check_fits(reader, manifest, layout)
    return layout


def check_fits(reader: Reader, manifest: Manifest, layout: Layout) -> None:
    if (list(layout.shape), layout.store) != (manifest.shape, manifest.store):
        raise ValueError(
            f"domain {reader.domain!r} would be {layout.store} {list(layout.shape)}, but dataset {manifest.dataset!r} is "
            f"{manifest.store} {manifest.shape}: give the same --size, --channels and --store, or another --dataset"
        )
    if reader.classes and manifest.classes and not set(reader.classes) & set(manifest.classes):
        raise ValueError(
            f"domain {reader.domain!r} and dataset {manifest.dataset!r} have no class in common ({', '.join(reader.classes[:3])} against "
            f"{', '.join(manifest.classes[:3])}): the domains of a dataset share their classes"
        )


DROPPED = -2  # in place of the label of a class that is not kept


def select_classes(wanted: str, names: list[str], readers: list[Reader]) -> list[str]:
    """The classes to keep.

    Args:
        wanted: ``--classes``: names with commas, or the least number of images that a class has in every domain.
        names: of a file of names; empty if ``wanted`` is not a file.

    Raises:
        ValueError: no class is left, or a name is in no domain.
    """
    labelled = [reader for reader in readers if reader.classes]
    there = {name for reader in labelled for name in reader.classes}
    if wanted.isdecimal():
        counts = [reader.class_counts() for reader in labelled]
        kept = sorted(name for name in there if all(each.get(name, 0) >= int(wanted) for each in counts))
        if not kept:
            raise ValueError(f"no class has {wanted} images in every domain: give a smaller --classes")
        return kept
    kept = names or [each.strip() for each in wanted.split(",")]
    unknown = [name for name in kept if name not in there]
    if labelled and unknown:
        raise ValueError(f"--classes: no domain has class {unknown[0]!r}: there are {', '.join(sorted(there)[:10])}")
    return kept


def merge_classes(reader: Reader, classes: list[str], kept: list[str] | None = None) -> tuple[list[str], list[int], list[str]]:
    """The classes of a dataset after a domain has joined it, in an order that keeps the labels of its other domains.

    Args:
        classes: of the dataset so far.
        kept: the classes to keep; None for all.

    Returns:
        The classes, the dataset's label of each of the reader's labels (``DROPPED`` if the class is not kept), and notes on classes that only one of them
        has, and on names that are almost the same.
    """
    new = [name for name in (reader.classes if kept is None or not reader.classes else kept) if name not in classes]
    merged, notes = classes + new, []
    if classes and new:
        notes.append(f"{len(new)} classes are new to the dataset: {', '.join(new[:5])}")
    missing = [name for name in classes if reader.classes and name not in reader.classes]
    if missing:
        notes.append(f"{len(missing)} classes of the dataset are not in this domain: {', '.join(missing[:5])}")
    others = [name for name in reader.classes if kept is not None and name not in kept]
    if others:
        notes.append(f"the rows of {len(others)} other classes are left out")
    return merged, [DROPPED if name in others else merged.index(name) for name in reader.classes], notes + _alike(merged)


def _alike(classes: list[str]) -> list[str]:
    """A note on classes whose names, which are not numbers, differ in case, spaces, hyphens and underscores alone."""
    spelt: dict[str, list[str]] = {}
    for name in classes:
        spelt.setdefault(re.sub(r"[\s_-]", "", name.casefold()), []).append(name)
    pairs = [" and ".join(map(repr, names)) for form, names in spelt.items() if len(names) > 1 and any(map(str.isalpha, form))]
    return [f"{len(pairs)} names are spelt in more than one way, and taken for different classes: {', '.join(pairs[:5])}"] if pairs else []
