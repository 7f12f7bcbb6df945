"""Finds domains, splits and classes in a folder of images.

The layouts of the field are told apart by their levels, each of which is a domain, a split or a class. Folders that only wrap
others (``images/``) are looked through.

    <class>/<file>                       <split>/<class>/<file>                 <file> (no labels)
    <domain>/<class>/<file>              <domain>/<split>/<class>/<file>        <split>/<domain>/<class>/<file>
"""

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "query": "test",
    "val": "val", "valid": "val", "validation": "val",
}  # fmt: skip
WRAPPERS = frozenset({"images", "image", "imgs", "img", "jpegimages", "photos", "pictures", "data", "dataset"})
SKIPPED = frozenset({"__macosx", "@eadir", "thumbs", "thumbnails", ".thumbnails"})  # folders that hold copies or metadata
LAYOUTS = "<class>/<file>, <domain>/<class>/<file>, with a level <train|test|val> or without, or images without labels"


class Group(NamedTuple):
    """Image files of one class of a split of a domain; ``label`` is "" without classes."""

    domain: str
    split: str
    label: str
    files: tuple[str, ...]


@dataclass
class Folder:
    """A folder of the tree: its subfolders that contain images, and the images directly in it, as paths from the root."""

    folders: dict[str, "Folder"] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)

    def files(self) -> Iterator[str]:
        """All images below."""
        yield from self.images
        for each in self.folders.values():
            yield from each.files()


def is_skipped(path: str) -> bool:
    """Whether a relative path lies in a hidden or metadata folder, or is a hidden file."""
    return any(part.startswith(".") or part.lower() in SKIPPED for part in path.split("/"))


def tree(paths: Iterable[str]) -> Folder:
    """The tree of relative paths."""
    root = Folder()
    for path in sorted(paths):
        *parents, _ = path.split("/")
        place = root
        for parent in parents:
            place = place.folders.setdefault(parent, Folder())
        place.images.append(path)
    return root


def _unwrapped(folder: Folder) -> Folder:
    """The folder, or the one inside it if it only wraps that one."""
    while not folder.images and len(folder.folders) == 1:
        ((name, inner),) = folder.folders.items()
        if name.lower() in SPLITS or (inner.images and name.lower() not in WRAPPERS):
            break
        folder = inner
    return folder


def _is_class(folder: Folder) -> bool:
    """Whether a folder contains images directly, apart from wrappers."""
    return bool(_unwrapped(folder).images)


def interpret(root: Folder, name: str) -> tuple[list[Group], list[str]]:
    """The groups of images in a tree.

    Args:
        name: of the only domain, if the folders name none.

    Returns:
        The groups, and the images that lie beside the folders of a level, which belong to none.

    Raises:
        ValueError: the folders follow no known layout; says what they are.
    """
    loose: list[str] = []
    return _domains(_unwrapped(root), name, loose), loose


def _domains(folder: Folder, name: str, loose: list[str]) -> list[Group]:
    """The groups of a folder that is one domain, or contains several."""
    if not folder.folders or _splits(folder) or all(map(_is_class, folder.folders.values())):
        return _one_domain(folder, name, "", loose)
    _refuse_mixed(folder)
    loose += folder.images
    return [group for each, inner in folder.folders.items() for group in _one_domain(_unwrapped(inner), each, "", loose)]


def _one_domain(folder: Folder, domain: str, split: str, loose: list[str]) -> list[Group]:
    """The groups of one domain, or of one split of it."""
    if not folder.folders:
        return [Group(domain, split or "train", "", tuple(folder.images))]
    loose += folder.images
    if not split and _splits(folder):
        parts = [(SPLITS[each.lower()], _unwrapped(inner)) for each, inner in folder.folders.items()]
        if all(inner.folders and not any(map(_is_class, inner.folders.values())) for _, inner in parts):  # <split>/<domain>/<class>
            loose += [image for _, inner in parts for image in inner.images]
            return [group for part, inner in parts for each, below in inner.folders.items() for group in _one_domain(_unwrapped(below), each, part, loose)]
        return [group for part, inner in parts for group in _one_domain(inner, domain, part, loose)]
    _refuse_mixed(folder)
    if not all(map(_is_class, folder.folders.values())):
        raise ValueError(f"the folders of {domain!r} are nested too deeply ({', '.join([*folder.folders][:3])}): expected {LAYOUTS}")
    return [Group(domain, split or "train", unicodedata.normalize("NFC", each), tuple(inner.files())) for each, inner in folder.folders.items()]


def _splits(folder: Folder) -> bool:
    return bool(folder.folders) and all(each.lower() in SPLITS for each in folder.folders)


def _refuse_mixed(folder: Folder) -> None:
    """Refuse folders of which some contain images and others contain folders: their level would be a guess."""
    classes = [each for each, inner in folder.folders.items() if _is_class(inner)]
    others = [each for each in folder.folders if each not in classes]
    if classes and others:
        raise ValueError(
            f"folder {classes[0]!r} contains images but {others[0]!r} beside it contains folders, so their level is unclear: expected {LAYOUTS}"
        )
