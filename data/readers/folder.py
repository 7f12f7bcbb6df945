"""Reader of folders of image files: ``<class>/<file>``, ``<domain>/<class>/<file>``, or files without labels."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.filesystem import list_files, to_path
from data.images import SUFFIXES
from data.readers.base import FILE_CHUNK, Chunk, Reader, Row, printable


@dataclass(frozen=True)
class FolderReader(Reader):
    """Reads a folder ``<class>/<file>``, or of files without labels; a chunk is a range of one class's sorted files."""

    path: str = ""
    files: tuple[int, ...] = ()

    def chunks(self) -> list[Chunk]:
        return [
            Chunk("train", start, min(start + FILE_CHUNK, count), label if self.classes else -1)
            for label, count in enumerate(self.files)
            for start in range(0, count, FILE_CHUNK)
        ]

    def read(self, chunk: Chunk) -> Iterator[Row]:
        root = to_path(self.path)
        folder = root / self.classes[chunk.label] if self.classes else root
        for path in image_files(folder)[chunk.start : chunk.stop]:
            yield Row(printable(path.relative_to(root).as_posix()), chunk.label, path.read_bytes())


def image_files(folder: Path) -> list[Path]:
    """Image files below a folder, sorted, without hidden files."""
    return [path for path in list_files(folder) if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]


def _folders(path: Path) -> list[Path]:
    return sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))


def folder_readers(path: Path, domain: str | None, classes: int | None = None) -> list[Reader]:
    """Open a folder: ``<class>/<file>``, ``<domain>/<class>/<file>``, or ``<file>`` without labels.

    Args:
        domain: name of the domain, or which of several domain folders to read.
        classes: number of classes of a known dataset.

    Raises:
        ValueError: the folder has no images, a class has none, or the number of classes is wrong.
    """
    folders = _folders(path)
    if not folders and not any(path.iterdir()):
        raise ValueError(f"{path} is empty: expected <class>/<file>, <domain>/<class>/<file>, or images without labels")
    if not folders:
        return [_folder_reader(path, domain or path.name, classes)]
    nested = all(_folders(each) and not any(p.suffix.lower() in SUFFIXES for p in each.iterdir()) for each in folders)
    if not nested:
        return [_folder_reader(path, domain or path.name, classes)]
    if domain and domain not in {each.name for each in folders}:
        raise ValueError(f"{path} has no domain folder {domain!r}: it has {', '.join(each.name for each in folders)}")
    return [_folder_reader(each, each.name, classes) for each in folders if domain in (None, each.name)]


def _folder_reader(path: Path, domain: str, classes: int | None) -> Reader:
    folders = _folders(path)
    parts = folders or [path]
    counts = tuple(len(image_files(part)) for part in parts)
    empty = [part.name for part, count in zip(parts, counts, strict=True) if not count]
    if not sum(counts):
        raise ValueError(f"{path} contains no image file ({', '.join(sorted(SUFFIXES))})")
    if empty:
        raise ValueError(f"{path}: no image in class {', '.join(empty[:5])}: remove the folder or add images")
    if classes is not None and len(folders) != classes:
        raise ValueError(f"{path} has {len(folders)} class folders, but this dataset has {classes}: is the copy whole?")
    names = tuple(folder.name for folder in folders)
    return FolderReader(domain, names, (), 0, {"train": sum(counts)}, {"name": path.name}, str(path.resolve()), counts)
