"""Reader of image lists, as Office-31, Office-Home and DomainNet ship them: a line ``path label`` per image.

A list is a domain, or one of its splits if its name ends with one: ``clipart_train.txt`` and ``clipart_test.txt``.
"""

from pathlib import Path

from data.readers.folder import FolderReader
from data.readers.layout import SPLITS, Group


def _split_of(path: Path) -> tuple[str, str]:
    """Domain and split that a list's name says; "train" if it says none."""
    stem, _, last = path.stem.rpartition("_")
    return (stem, SPLITS[last.lower()]) if stem and last.lower() in SPLITS else (path.stem, "train")


def _read(path: Path) -> list[tuple[str, int]]:
    """Paths and labels of a list.

    Raises:
        ValueError: a line is not ``path label``; says which.
    """
    rows = []
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
        rows.append((name.strip(), int(label)))
    if not rows:
        raise ValueError(f"{path} lists no image")
    return rows


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


def list_reader(path: Path, domain: str | None) -> FolderReader:
    """Open an image list, with the lists of the same domain's other splits beside it.

    Raises:
        ValueError: a line is wrong, or the images are not there.
    """
    name, _ = _split_of(path)
    beside = sorted(each for each in path.parent.glob("*.txt") if _split_of(each)[0] == name)
    lists = {_split_of(each)[1]: _read(each) for each in beside}
    every = [row for rows in lists.values() for row in rows]
    names, root = _names(every), _root(path, every[0][0])
    files: dict[tuple[str, str], list[str]] = {}
    for split, rows in lists.items():
        for file, label in rows:
            files.setdefault((split, names[label]), []).append(file)
    groups = tuple(Group(domain or name, split, label, tuple(paths)) for (split, label), paths in files.items())
    classes = tuple(names[label] for label in sorted(names))
    counts = {split: len(rows) for split, rows in lists.items()}
    return FolderReader(domain or name, classes, (), 0, counts, {"name": path.name}, (), str(root.resolve()), groups)
