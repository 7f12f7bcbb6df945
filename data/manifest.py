"""The manifest of a dataset: it lists the Parquet shards, and only domains listed in it are complete."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Self

from data import validation
from data.filesystem import write_text

FORMAT = 1
NAME = "manifest.json"
LARGEST = 4096  # height and width of images
STORES = ("raw", "encoded", "jpeg", "feature")
SPLIT: dict[str, Any] = {"rows": int, "labels": [int], "unlabelled": int, "files": [{"path": str, "rows": int, "sha256": str}]}
DOMAIN = {"origin": {str: str}, "splits": {str: SPLIT}, "rejected": [{"id": str, "reason": str}]}
FORM = {"dataset": str, "classes": [str], "store": str, "shape": [int], "seed": int, "domains": {str: DOMAIN}, "format": int}


def _is_image(shape: list[int]) -> bool:
    """Whether a shape is (channels, height, width) of images."""
    return len(shape) == 3 and shape[0] in (1, 3) and all(0 < side <= LARGEST for side in shape[1:])


def _notes(domain: dict[str, Any]) -> list[str]:
    """A domain's notes; manifests of earlier versions have none.

    Raises:
        ValueError: they are not a list of texts.
    """
    notes: list[str] = domain.get("notes", [])
    validation.check(notes, [str], "notes")
    return notes


@dataclass
class Split:
    """One split of a domain.

    Attributes:
        rows: number of rows, numbered 0..rows-1 across the files in order.
        labels: rows of each class.
        unlabelled: rows with label -1.
        files: ``{"path", "rows", "sha256"}`` of each shard, paths relative to the dataset.
    """

    rows: int
    labels: list[int]
    unlabelled: int
    files: list[dict[str, Any]]


@dataclass
class Domain:
    """One domain: its origin, its splits, the rows that could not be read, and notes on what else its user must know."""

    origin: dict[str, str]
    splits: dict[str, Split]
    rejected: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Embedding:
    """How the features of a dataset were made.

    Attributes:
        backbone: name of the network, as ``models.networks.pretrained.open_backbone`` takes it.
        weights: digest of its weights, which lie in the dataset's ``backbone.safetensors``.
        size: side of its input in pixels.
        pool: pooling of its last features; "" for its own.
        preprocessing: what is done to an image before it, in words.
        views: random views of each image that are embedded beside it.
        kind: of the views, one of ``data.transforms.VIEWS``.
        images: path of the dataset of images.
        digest: of that dataset.
        shape: of its images.
    """

    backbone: str
    weights: str
    size: int
    pool: str
    preprocessing: str
    views: int
    kind: str
    images: str
    digest: str
    shape: list[int]

    FORM: ClassVar[dict[str, Any]] = {
        "backbone": str, "weights": str, "size": int, "pool": str, "preprocessing": str, "views": int, "kind": str, "images": str, "digest": str,
        "shape": [int],
    }  # fmt: skip

    @classmethod
    def of(cls, values: Any) -> Self | None:
        """An embedding from a JSON object; None from None.

        Raises:
            ValueError: the object is not a valid embedding; says why.
        """
        if values is None:
            return None
        validation.check(values, cls.FORM, "embedding")
        if not _is_image(values["shape"]) or not 0 < values["size"] <= LARGEST or not 0 <= values["views"] <= LARGEST:
            raise ValueError(f"embedding.shape is {values['shape'][:5]}, embedding.size is {values['size']}, embedding.views is {values['views']}")
        return cls(**{name: values[name] for name in cls.FORM})


@dataclass
class Manifest:
    """Everything a reader needs to know about a dataset before it opens a shard.

    Attributes:
        shape: (channels, height, width) of images, (features,) of feature vectors.
        store: ``raw`` (uint8 CHW), ``encoded`` (file bytes), ``jpeg`` (encoded anew at the dataset's size) or ``feature``.
        embedding: how ``hashbridge embed`` made the features; None for other datasets.
    """

    dataset: str
    classes: list[str]
    store: str
    shape: list[int]
    seed: int
    domains: dict[str, Domain] = field(default_factory=dict)
    format: int = FORMAT
    embedding: Embedding | None = None

    @property
    def compressed(self) -> bool:
        """Whether the rows are image files, which must be decoded."""
        return self.store in ("encoded", "jpeg")

    @property
    def views(self) -> int:
        """Embedded views of each row."""
        return self.embedding.views if self.embedding else 0

    @property
    def row_bytes(self) -> int:
        """Bytes of a decoded row, with its embedded views."""
        return math.prod(self.shape) * (1 + self.views) * (4 if self.store == "feature" else 1)

    def digest(self) -> str:
        """SHA-256 of the manifest, which includes the digests of all shards; 16 hex digits."""
        values = asdict(self)
        for domain in values["domains"].values():
            del domain["notes"]  # they follow from the rest
        if not self.embedding:
            del values["embedding"]  # digests of earlier versions stay the same
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def split(self, domain: str, split: str) -> Split:
        """Get a split of a domain.

        Raises:
            ValueError: it does not exist; lists those that do.
        """
        if domain not in self.domains:
            raise ValueError(f"dataset {self.dataset!r} has no domain {domain!r}: it has {', '.join(sorted(self.domains)) or 'none'}")
        splits = self.domains[domain].splits
        if split not in splits:
            raise ValueError(f"domain {domain!r} has no split {split!r}: it has {', '.join(sorted(splits))}")
        return splits[split]

    def write(self, root: Path) -> None:
        """Write ``root/manifest.json`` atomically."""
        write_text(root / NAME, json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, root: Path) -> Self:
        """Read a dataset's manifest.

        Raises:
            ValueError: there is no dataset, or its manifest is damaged or of a newer format.
        """
        path = root / NAME
        if not root.is_dir():
            raise ValueError(f"no dataset at {root}: the folder does not exist; make one with `hashbridge ingest`")
        if not path.is_file():
            raise ValueError(f"no dataset at {root}: it has no {NAME}; give the folder that `hashbridge ingest --dataset` wrote")
        try:
            values = validation.parse_json(path.read_text())
            validation.check(values, {"format": int})
            if values["format"] <= FORMAT:
                return cls._of(values)
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): ingest the dataset again") from error
        raise ValueError(f"{path} has format {values['format']}, newer than this version reads ({FORMAT}): update hashbridge")

    @classmethod
    def _of(cls, values: dict[str, Any]) -> Self:
        """Build a manifest from a JSON object.

        Raises:
            ValueError: the object is not a valid manifest; says why.
        """
        validation.check(values, FORM)
        domains = {
            name: Domain(d["origin"], {s: Split(*(v[each] for each in SPLIT)) for s, v in d["splits"].items()}, d["rejected"], _notes(d))
            for name, d in values["domains"].items()
        }
        manifest = cls(**{name: values[name] for name in FORM} | {"domains": domains, "embedding": Embedding.of(values.get("embedding"))})
        manifest._check()
        return manifest

    def _check(self) -> None:
        """Check that the manifest is consistent and that no path leaves the dataset's folder.

        Raises:
            ValueError: it is not; says where.
        """
        fits = len(self.shape) == 1 and 0 < self.shape[0] < 1 << 20 if self.store == "feature" else _is_image(self.shape)
        if self.store not in STORES or not fits or (self.embedding and self.store != "feature"):
            raise ValueError(f"store {self.store[:20]!r} does not allow shape {self.shape[:5]}")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("a class is named twice")
        for name, domain in self.domains.items():
            for split, part in domain.splits.items():
                counts = [part.rows, part.unlabelled, *part.labels, *(file["rows"] for file in part.files)]
                whole = part.rows == sum(part.labels) + part.unlabelled == sum(file["rows"] for file in part.files)
                if min(counts) < 0 or not whole or len(part.labels) != len(self.classes):
                    raise ValueError(f"the counts of {name}/{split} do not fit together")
                for file in part.files:
                    steps = PurePosixPath(file["path"]).parts
                    if steps[:2] != (f"domain={name}", f"split={split}") or len(steps) != 3 or steps[2] == "..":
                        raise ValueError(f"a shard of {name}/{split} lies elsewhere: {file['path'][:200]!r}")
