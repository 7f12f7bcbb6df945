"""The manifest of a dataset: what its Parquet shards hold, and the one sign that a domain is whole."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from data.places import write_text

FORMAT = 1
NAME = "manifest.json"


@dataclass
class Split:
    """One split of a domain.

    Attributes:
        rows: number of rows, numbered 0..rows-1 through the files in order.
        labels: rows of each class.
        unlabelled: rows whose label is -1.
        files: ``{"path", "rows", "sha256"}`` of each shard, the path relative to the dataset.
    """

    rows: int
    labels: list[int]
    unlabelled: int
    files: list[dict[str, Any]]


@dataclass
class Domain:
    """One domain: where it came from, its splits, and the rows that could not be read."""

    origin: dict[str, str]
    splits: dict[str, Split]
    rejected: list[dict[str, str]] = field(default_factory=list)


@dataclass
class Manifest:
    """Everything that a reader needs to know of a dataset before it opens a shard.

    Attributes:
        shape: (channels, height, width) of images, (features,) of feature vectors.
        store: ``raw`` (uint8 CHW), ``encoded`` (file bytes) or ``feature``.
    """

    dataset: str
    classes: list[str]
    store: str
    shape: list[int]
    seed: int
    domains: dict[str, Domain] = field(default_factory=dict)
    format: int = FORMAT

    def digest(self) -> str:
        """SHA-256 over everything that the dataset is, shards' digests among it; 16 hex digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def split(self, domain: str, split: str) -> Split:
        """The split of a domain.

        Raises:
            ValueError: there is none; says which there are.
        """
        if domain not in self.domains:
            raise ValueError(f"dataset {self.dataset!r} has no domain {domain!r}: it has {', '.join(sorted(self.domains)) or 'none'}")
        splits = self.domains[domain].splits
        if split not in splits:
            raise ValueError(f"domain {domain!r} has no split {split!r}: it has {', '.join(sorted(splits))}")
        return splits[split]

    def write(self, root: Path) -> None:
        """Write to ``root/manifest.json``, all or nothing."""
        write_text(root / NAME, json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, root: Path) -> Self:
        """Read a dataset's manifest.

        Raises:
            ValueError: there is no dataset, or its manifest is of a newer version or damaged.
        """
        path = root / NAME
        if not root.is_dir():
            raise ValueError(f"no dataset at {root}: the folder does not exist; make one with `hashbridge ingest`")
        if not path.is_file():
            raise ValueError(f"no dataset at {root}: it has no {NAME}; give the folder that `hashbridge ingest --dataset` wrote")
        try:
            values = json.loads(path.read_text())
            if values["format"] > FORMAT:
                raise ValueError(
                    f"{path} is of format {values['format']}, newer than this version reads ({FORMAT}): update hashbridge"
                )
            domains = {
                name: Domain(d["origin"], {s: Split(**v) for s, v in d["splits"].items()}, d["rejected"])
                for name, d in values.pop("domains").items()
            }
            return cls(**values, domains=domains)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): ingest the dataset again") from error
