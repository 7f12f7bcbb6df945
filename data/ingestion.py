"""Ingests one domain of a dataset.

The shards are written to a staging folder, moved into place as a whole, and entered into the manifest last. Readers start
from the manifest, so they never see an incomplete domain.
"""

import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data.filesystem import move, remove
from data.images import one_white
from data.layout import Layout, check_fits, choose_layout, merge_classes
from data.locks import file_lock, is_leased, lease
from data.manifest import Domain, Manifest, Split
from data.readers.base import Reader
from data.shard_writer import draw_queries, write_parts

MOST_COMPARED = 20_000_000  # rows of a domain up to which exact copies are looked for
STAGING, LEASED = ".staging-", ".lease"  # prefix of staging folders, suffix of their lease files


def _describe(reader: Reader, parts: list[dict[str, Any]], classes: int) -> Domain:
    domain = Domain(reader.origin, {})
    for item in parts:
        name, part = item["part"].split("/")
        split = domain.splits.setdefault(name, Split(0, [0] * classes, 0, []))
        split.rows += int(item["rows"])
        split.unlabelled += int(item["unlabelled"])
        for label, count in enumerate(item["labels"]):
            split.labels[label] += int(count)
        path = f"domain={reader.domain}/split={name}/part-{part}.parquet"
        split.files.append({"path": path, "rows": int(item["rows"]), "sha256": item["sha256"]})
        for line in item["rejected"]:
            identity, _, reason = line.partition("\n")
            domain.rejected.append({"id": identity, "reason": reason})
    return domain


def write_domain(
    reader: Reader, root: Path, *, size: int = 0, channels: int = 0, store: str = "", seed: int = 0,
    test_share: float = 0.0, test_per_class: int = 0, limit: int = 0, strict: bool = False, replace: bool = False, start: Callable[[], object] = lambda: None,
    values: tuple[float, float] | None = None, kept: list[str] | None = None,
) -> Manifest:  # fmt: skip
    """Write a domain's shards and add the domain to the dataset's manifest.

    Args:
        root: the dataset's folder; created if it does not exist.
        size, channels, store: see ``choose_layout``; 0 and "" choose automatically.
        test_share: share of the rows that become split ``test``, selected by their ids; only for sources without a test split.
        test_per_class: rows of each class that become split ``test``, drawn from all of the source's splits; the others are ``train``.
        limit: maximum rows per split, the first ones of the shuffle; 0 keeps all.
        strict: treat an unreadable row as an error.
        replace: overwrite the domain if it exists.
        start: connects to Ray, which is used for large domains.
        kept: the classes to keep, in the order of their labels; None for all.
        values: lowest and highest value of arrays and of 16-bit files, mapped to black and white.

    Raises:
        ValueError: the domain does not fit the dataset, exists already, or (``strict``) has an unreadable row.
    """
    if not reader.domain.strip(" .") or set("/\\=#") & set(reader.domain) or not reader.domain.isprintable():
        raise ValueError(f"{reader.domain!r} cannot name a domain: give --domain a name without / \\ = and #")
    manifest = Manifest.read(root) if (root / "manifest.json").exists() else None
    if manifest and reader.domain in manifest.domains and not replace:
        raise ValueError(f"dataset {root.name!r} already has domain {reader.domain!r}: give --replace to overwrite it")
    if test_share and "test" in reader.counts:
        raise ValueError(f"{reader.domain} has a test split of its own: leave --test-share out")
    others = manifest if manifest and set(manifest.domains) - {reader.domain} else None
    layout = choose_layout(reader, others, size, channels, store, seed)
    created = not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    try:
        with _staging_folder(root) as staging:
            merged, places, notes = merge_classes(reader, others.classes if others else [], kept)
            test = draw_queries(reader, test_per_class, seed, places) if test_per_class else test_share
            parts = write_parts(reader, layout, staging, test, limit, start, places, values)
            domain = _describe(reader, parts, len(merged))
            domain.notes += [*reader.notes, *notes, *_copies(parts), *([] if values else _light(reader.domain, parts))]
            if strict and domain.rejected:
                first = domain.rejected[0]
                raise ValueError(f"{len(domain.rejected)} rows cannot be read, the first {first['id']!r} ({first['reason']})")
            if not any(split.rows for split in domain.splits.values()):
                first = domain.rejected[0]
                raise ValueError(f"{reader.domain}: no row can be read; the first is {first['id']!r} ({first['reason']})")
            with file_lock(root / ".lock"):
                return _commit(root, staging / "domain", reader, layout, domain, merged, places, kept)
    finally:
        if created and not (root / "manifest.json").exists() and not list(root.glob(f"{STAGING}*")):
            remove(root)


@contextmanager
def _staging_folder(root: Path) -> Iterator[Path]:
    """Yield a new folder for a domain's shards. It is leased inside the block and removed afterwards.

    First removes the folders that killed ingests left in the dataset.
    """
    staging, lock = root / f"{STAGING}{uuid.uuid4().hex[:8]}", root / ".lock"
    with ExitStack() as stack:
        with file_lock(lock):
            for left in {each.name.removesuffix(LEASED) for each in root.glob(f"{STAGING}*")}:
                if not is_leased(root / f"{left}{LEASED}"):
                    remove(root / left)
                    (root / f"{left}{LEASED}").unlink(missing_ok=True)
            stack.enter_context(lease(root / f"{staging.name}{LEASED}"))
        try:
            yield staging
        finally:
            remove(staging)


def _light(domain: str, parts: list[dict[str, Any]]) -> list[str]:
    """Notes if the values of the images use so little of their type's range that all are nearly black, or go beyond it.

    Raises:
        ValueError: the white of float or 32-bit files, which their own brightest value tells, is not the same for all.
    """
    found = [json.loads(item["light"]) for item in parts]
    one_white(sum((Counter({float(white): count for white, count in each["guessed"].items()}) for each in found), Counter[float]()), domain)
    bright, white = (max((each[name] for each in found), default=0.0) for name in ("brightest", "white"))
    cut, notes = sum(each["cut"] for each in found), []
    if white > 0 and bright * 8 <= white:
        notes.append(f"the brightest value is {bright:g} of {white:g}, so the images are nearly black: give --range 0-{bright:g} if that is white")
    if cut:
        notes.append(f"{cut:,} images have values below 0 or above {white:g}, which are cut: give --range LOW-HIGH")
    return notes


def _copies(parts: list[dict[str, Any]]) -> list[str]:
    """Notes on exact copies of an image in several splits or classes; none are looked for above ``MOST_COMPARED`` rows."""
    if sum(item["rows"] for item in parts) > MOST_COMPARED:
        return []
    seen = [np.frombuffer(item["seen"], np.int64).reshape(2, -1) for item in parts]
    digests, labels = np.concatenate([each[0] for each in seen]), np.concatenate([each[1] for each in seen])
    names = sorted({item["part"].split("/")[0] for item in parts})
    splits = np.concatenate([np.full(each.shape[1], names.index(item["part"].split("/")[0])) for item, each in zip(parts, seen, strict=True)])
    _, first, which = np.unique(digests, return_index=True, return_inverse=True)
    notes = []
    for what, values in (("split", splits), ("class", labels)):
        count = int((values != values[first][which]).sum())
        if count:
            notes.append(f"{count:,} images are exact copies of an image in another {what}")
    return notes


def _commit(root: Path, built: Path, reader: Reader, layout: Layout, domain: Domain, classes: list[str], places: list[int], kept: list[str] | None) -> Manifest:
    """Move a finished domain into place, then add it to the current manifest.

    Raises:
        ValueError: another ingest has changed the dataset's classes meanwhile.
    """
    fresh = Manifest(root.name, classes, layout.store, list(layout.shape), layout.seed)
    manifest = Manifest.read(root) if (root / "manifest.json").exists() else fresh
    if set(manifest.domains) - {reader.domain}:
        check_fits(reader, manifest, layout)  # another ingest may have committed first
        classes, now, _ = merge_classes(reader, manifest.classes, kept)
        if now != places:
            raise ValueError(f"another ingest has changed the classes of {root.name!r} meanwhile: ingest {reader.domain!r} again")
    else:
        manifest.store, manifest.shape, manifest.classes = layout.store, list(layout.shape), classes
    place = root / f"domain={reader.domain}"
    if reader.domain in manifest.domains:  # until the new manifest is written, the domain does not exist
        del manifest.domains[reader.domain]
        manifest.write(root)
    remove(place)
    move(built, place)
    manifest.domains[reader.domain] = domain
    manifest.classes = classes
    for split in (split for each in manifest.domains.values() for split in each.splits.values()):
        split.labels += [0] * (len(manifest.classes) - len(split.labels))  # classes that came later
    manifest.write(root)
    return manifest
