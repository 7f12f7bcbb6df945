"""Reader of folders of image files, in the layouts of the field."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from data.filesystem import list_files, to_path
from data.images import SUFFIXES
from data.readers.base import FILE_CHUNK, Chunk, Reader, Row, printable
from data.readers.layout import LAYOUTS, SPLITS, WRAPPERS, Group, interpret, is_skipped, tree


@dataclass(frozen=True)
class FolderReader(Reader):
    """Reads the image files of one domain; a chunk is a range of one class's sorted files.

    Attributes:
        path: the folder that the files' paths are relative to.
        groups: the files by split and class.
    """

    path: str = ""
    groups: tuple[Group, ...] = ()

    def chunks(self) -> list[Chunk]:
        labels = {name: label for label, name in enumerate(self.classes)}
        return [
            Chunk(group.split, start, min(start + FILE_CHUNK, len(group.files)), labels.get(group.label, -1), group.files[start : start + FILE_CHUNK])
            for group in self.groups
            for start in range(0, len(group.files), FILE_CHUNK)
        ]

    def read(self, chunk: Chunk) -> Iterator[Row]:
        root = to_path(self.path)
        for name in chunk.files:
            try:
                yield Row(printable(name), chunk.label, (root / name).read_bytes())
            except OSError as error:
                yield Row(printable(name), chunk.label, b"", error.strerror or str(error))

    def class_counts(self) -> dict[str, int]:
        counts = Counter[str]()
        for group in self.groups:
            counts[group.label] += len(group.files)
        return dict(counts)

    def without_listing(self) -> Self:
        return replace(self, groups=())


def image_files(folder: Path) -> list[Path]:
    """Image files below a folder, sorted, without those in hidden and metadata folders."""
    return [path for path in list_files(folder) if path.suffix.lower() in SUFFIXES and not is_skipped(path.relative_to(folder).as_posix())]


def folder_readers(path: Path, domain: str | None, classes: int | None = None) -> list[Reader]:
    """Open a folder: one reader per domain.

    The class names are the union of all its domains', so that labels agree.

    Args:
        domain: name of the domain, or which of several domain folders to read.
        classes: number of classes of a known dataset.

    Raises:
        ValueError: the folder has no images, follows no known layout, or the number of classes is wrong.
    """
    names = [each.relative_to(path).as_posix() for each in list_files(path)]
    if not names and not any(path.iterdir()):
        raise ValueError(f"{path} is empty: expected {LAYOUTS}")
    images = [name for name in names if Path(name).suffix.lower() in SUFFIXES and not is_skipped(name)]
    if not images:
        raise ValueError(f"{path} contains no image file ({', '.join(sorted(SUFFIXES))})")
    try:
        groups, loose = interpret(tree(images), domain or path.name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    found = sorted({group.domain for group in groups})
    if domain and domain not in found:
        raise ValueError(f"{path} has no domain folder {domain!r}: it has {', '.join(found)}")
    union = tuple(sorted({group.label for group in groups} - {""}))
    if classes is not None and len(union) != classes:
        raise ValueError(f"{path} has {len(union)} class folders, but this dataset has {classes}: is the copy complete?")
    notes = (*_looked_through(groups), *_left_out(names, loose))
    return [_reader(path, each, union, [group for group in groups if group.domain == each], notes) for each in found if domain in (None, each)]


def _reader(path: Path, domain: str, union: tuple[str, ...], groups: list[Group], notes: tuple[str, ...]) -> FolderReader:
    counts: dict[str, int] = {}
    for group in groups:
        counts[group.split] = counts.get(group.split, 0) + len(group.files)
    labelled = {group.label for group in groups} - {""}
    missing = [name for name in union if labelled and name not in labelled]
    if missing:
        notes = (*notes, f"no image of class {', '.join(missing[:5])}" + (f" and {len(missing) - 5} more" if len(missing) > 5 else ""))
    names = union if labelled else ()
    return FolderReader(domain, names, (), 0, counts, {"name": path.name}, notes, str(path.resolve()), tuple(groups))


def _looked_through(groups: list[Group]) -> tuple[str, ...]:
    """A note if the only domain lies in a folder of another name, which may be a domain's own."""
    outer = {name.split("/")[0] for group in groups for name in group.files if "/" in name}
    (name, *more), domains = outer or {""}, {group.domain for group in groups}
    known = domains | {group.label for group in groups} | WRAPPERS
    if not name or more or len(domains) > 1 or name in known or name.lower() in SPLITS:
        return ()
    return (f"folder {printable(name)!r} is read as domain {domains.pop()!r}",)


def _left_out(names: list[str], loose: list[str]) -> tuple[str, ...]:
    """Notes on files that are not read: skipped folders, images beside the class folders, and other kinds of files."""
    skipped = [name for name in names if is_skipped(name) and Path(name).suffix.lower() in SUFFIXES]
    others = Counter(Path(name).suffix.lower() or "without suffix" for name in names if Path(name).suffix.lower() not in SUFFIXES and not is_skipped(name))
    notes = []
    if skipped:
        notes.append(f"{len(skipped):,} images in hidden or metadata folders are left out, the first {printable(skipped[0])}")
    if loose:
        notes.append(f"{len(loose):,} images beside the class folders are left out, the first {printable(loose[0])}")
    if others:
        notes.append("files of other kinds are left out: " + ", ".join(f"{count:,} {kind}" for kind, count in sorted(others.items())))
    return tuple(notes)
