"""Command: convert images or features to sharded Parquet and a manifest."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.catalog import open_source
from data.filesystem import is_local, to_path
from data.images import JPEG_QUALITY
from data.ingestion import write_domain
from data.layout import select_classes
from pipelines.console import cluster
from pipelines.console.config import flag, option, positional, required, value_range


@dataclass
class Config:
    """Options of ``hashbridge ingest``."""

    source: str = positional("a catalogue name, NAME=FOLDER, an .npz file, or a folder of <class>/<file> or <domain>/<class>/<file>")
    dataset: str = required("folder of the dataset, made where it is not")
    domain: str = option("", "name of the domain, or which of the source's domains to read")
    size: int = option(0, "height and width in pixels (default: the dataset's, else the source's, else 224)")
    channels: int = option(0, "1 for grey, 3 for RGB (default: the dataset's, else the source's)")
    store: str = option(
        "", f"raw: pixels; encoded: files as they are; jpeg: re-encoded at --size, quality {JPEG_QUALITY} (default: raw up to 64 pixels, else encoded)",
        ("raw", "encoded", "jpeg"),
    )  # fmt: skip
    test_share: float = option(0.0, "share of a source without a test split that becomes one")
    test_per_class: int = option(0, "images of each class that become the test split, drawn by the seed from all of the source's splits")
    limit: int = option(0, "rows of a split at most, drawn by the seed: a subset to search on; the others are not decoded (default: all)")
    seed: int = option(0, "seed of the shuffle")
    classes: str = option("", "classes to keep: names with commas, a file with a name a line, or the least number of images in every domain (default: all)")
    range: str = option("", "LOW-HIGH: values of arrays and of files of more than 8 bits that are black and white (default: those of their type)")
    strict: bool = option(False, "an image that cannot be read is an error")
    replace: bool = option(False, "write a domain anew that the dataset has already")
    cache: str = option(str(Path.home() / ".cache" / "hashbridge"), "where downloads go")

    def __post_init__(self) -> None:
        value_range(self.range)
        if self.size and not 8 <= self.size <= 2048:
            raise ValueError(f"--size is {self.size}, but must be from 8 to 2048 pixels")
        if self.channels not in (0, 1, 3):
            raise ValueError(f"--channels is {self.channels}, but must be 1 or 3")
        if not 0 <= self.test_share < 1:
            raise ValueError(f"--test-share is {self.test_share}, but must be at least 0 and below 1")
        if not is_local(to_path(self.cache)):
            raise ValueError(f"--cache is {self.cache}, but must be a local folder")
        if self.test_share and self.test_per_class:
            raise ValueError("--test-share and --test-per-class are two ways to make a test split: give one")
        for name in ("limit", "seed", "test_per_class"):
            if getattr(self, name) < 0:
                raise ValueError(f"{flag(name)} is {getattr(self, name)}, but must not be negative")


def _names(path: str) -> list[str]:
    """The names in a file, one a line; none if there is no such file."""
    file = to_path(path)
    return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()] if file.is_file() else []


def run(config: Config) -> dict[str, Any]:
    """Ingest every domain of the source; returns the rows of each split."""
    root = to_path(config.dataset)
    readers = open_source(config.source, config.domain or None, Path(config.cache))
    kept = select_classes(config.classes, _names(config.classes), readers) if config.classes else None
    result: dict[str, Any] = {"dataset": str(root), "domains": {}}
    for reader in readers:
        print(f"{reader.domain}: {sum(reader.counts.values()):,} rows to read ...", file=sys.stderr, flush=True)
        try:
            manifest = write_domain(
                reader, root.resolve(), size=config.size, channels=config.channels, store=config.store, seed=config.seed,
                test_share=config.test_share, test_per_class=config.test_per_class, limit=config.limit, strict=config.strict, replace=config.replace,
                start=cluster.connect, values=value_range(config.range), kept=kept,
            )  # fmt: skip
        except Exception as error:
            raise cluster.user_error(error) from error
        domain = manifest.domains[reader.domain]
        rows = {name: split.rows for name, split in domain.splits.items()}
        result["domains"][reader.domain] = {"rows": rows, "rejected": len(domain.rejected), "notes": domain.notes}
        counts = ", ".join(f"{count:,} {name}" for name, count in rows.items())
        print(f"{reader.domain}: {counts}; {manifest.store} {manifest.shape}; {len(manifest.classes)} classes")
        for note in domain.notes:
            print(f"  note: {note}")
        for item in domain.rejected[:5]:
            print(f"  left out {item['id']}: {item['reason']}")
        if len(domain.rejected) > 5:
            print(f"  and {len(domain.rejected) - 5} more: see {root / 'manifest.json'}")
    result["digest"] = manifest.digest()
    return result
