"""Reader of image lists, as Office-31, Office-Home and DomainNet ship them: a line ``path label`` per image.

A list is a domain, or one of its splits if its name ends with one: ``clipart_train.txt`` and ``clipart_test.txt``.
"""

import posixpath
from pathlib import Path

from data.readers.base import printable
from data.readers.folder import FolderReader
from data.readers.layout import SPLITS, Group


def _split_of(path: Path) -> tuple[str, str]:
    """Domain and split that a list's name says; "train" if it says none."""
    stem, _, last = path.stem.rpartition("_")
    return (stem, SPLITS[last.lower()]) if stem and last.lower() in SPLITS else (path.stem, "train")


def _read(path: Path) -> tuple[dict[str, int], int]:
    """The label of each image of a list by its path, and the number of lines that name an image again.

    Raises:
        ValueError: a line is not ``path label``, or gives an image another label; says which.
    """
    rows, again = dict[str, int](), 0
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error.reason}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        *names, label = line.strip().rsplit(None, 1)  # a space, or a tab
        name = "".join(names)
        if not name or not label.isdecimal() or len(label) > 6:
            raise ValueError(f"{path}, line {number}: {line[:80]!r} is not `path label`, with the label a class index from 0")
        name = posixpath.normpath(name.strip())
        again += name in rows
        if rows.setdefault(name, int(label)) != int(label):
            raise ValueError(f"{path}, line {number}: {printable(name)} has label {label}, and {rows[name]} before: an image has one label")
    if not rows:
        raise ValueError(f"{path} lists no image")
    return rows, again


def _root(path: Path, first: str) -> Path:
    """The folder that a list's paths are relative to: its own, or one of the two above."""
    for folder in (path.parent, *list(path.resolve().parents)[1:3]):
        if (folder / first).exists():
            return folder
    raise ValueError(f"{path}: no image {first!r} in its folder or the two above: put the list beside the images")


def _names(rows: list[tuple[str, int]]) -> dict[int, str]:
    """Class names by label: the images' folders, if each label has its own; otherwise the numbers."""
    folders: dict[int, set[str]] = {}
    for name, label in rows:
        folders.setdefault(label, set()).add(Path(name).parent.name)
    own = {label: next(iter(names)) for label, names in folders.items() if len(names) == 1}
    if len(own) == len(folders) == len(set(own.values())) and all(own.values()):
        return own
    return {label: str(label) for label in folders}


def _of_domain(path: Path, name: str) -> dict[str, Path]:
    """The lists of a domain by split. One whose name says no split is the domain, whatever lies beside it."""
    if path.stem == name:
        return {"train": path}
    lists: dict[str, Path] = {}
    for each in sorted(path.parent.glob("*.txt")):
        domain, split = _split_of(each)
        if domain == name != each.stem and lists.setdefault(split, each) != each:
            raise ValueError(f"{lists[split]} and {each.name} are both the {split} split of {name!r}: leave one there")
    return lists


def list_reader(path: Path, domain: str | None) -> FolderReader:
    """Open an image list; one of a split, with the lists of the same domain's other splits beside it.

    Raises:
        ValueError: a line is wrong, the images are not there, or two lists are of one split.
    """
    name, _ = _split_of(path)
    read = {split: _read(each) for split, each in _of_domain(path, name).items()}
    lists = {split: [*rows.items()] for split, (rows, _) in read.items()}
    every = [row for rows in lists.values() for row in rows]
    names, root = _names(every), _root(path, every[0][0])
    files: dict[tuple[str, str], list[str]] = {}
    for split, rows in lists.items():
        for file, label in rows:
            files.setdefault((split, names[label]), []).append(file)
    groups = tuple(Group(domain or name, split, label, tuple(paths)) for (split, label), paths in files.items())
    classes = tuple(names[label] for label in sorted(names))
    counts = {split: len(rows) for split, rows in lists.items()}
    again = sum(count for _, count in read.values())
    notes = (f"{again:,} lines name an image that their list has already, and are left out",) if again else ()
    return FolderReader(domain or name, classes, (), 0, counts, {"name": path.name}, notes, str(root.resolve()), groups)
