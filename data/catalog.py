"""The catalogue: datasets known by name, with domains, classes, licence and source."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from data.filesystem import to_path
from data.readers.base import Reader
from data.readers.embedded import digits_reader
from data.readers.folder import folder_readers
from data.readers.image_list import list_reader
from data.readers.npz import npz_reader
from data.readers.torchvision import torchvision_reader


@dataclass(frozen=True)
class Entry:
    """A dataset of the catalogue.

    Attributes:
        source: ``embedded``, ``torchvision`` (downloaded) or ``folder`` (the user gives the path).
        classes: number of classes.
        size, channels: of its images; size 0 if it varies.
    """

    domains: tuple[str, ...]
    classes: int
    source: str
    licence: str
    size: int = 0
    channels: int = 3


CATALOG = {
    "digits": Entry(("typeset", "handwritten"), 10, "embedded", "matplotlib's fonts; UCI digits, CC BY 4.0", 32, 1),
    "mnist": Entry(("mnist",), 10, "torchvision", "CC BY-SA 3.0", 28, 1),
    "usps": Entry(("usps",), 10, "torchvision", "research use", 16, 1),
    "svhn": Entry(("svhn",), 10, "torchvision", "non-commercial use", 32, 3),
    "cifar10": Entry(("cifar10",), 10, "torchvision", "unstated; cite Krizhevsky 2009", 32, 3),
    "places365": Entry(("places365",), 365, "torchvision", "CC BY; images by their owners", 0, 3),
    "office31": Entry(("amazon", "dslr", "webcam"), 31, "folder", "research use"),
    "office-home": Entry(("Art", "Clipart", "Product", "Real World"), 65, "folder", "research use"),
    "domainnet": Entry(("clipart", "infograph", "painting", "quickdraw", "real", "sketch"), 345, "folder", "research use"),
    "flickr25k": Entry(("flickr25k",), 24, "folder", "Creative Commons, image by image"),
}


def open_source(source: str, domain: str | None, cache: Path) -> list[Reader]:
    """Open a source by the name that the user gives.

    Args:
        source: a catalogue name (``digits``; ``digits=`` where a folder has that name), ``NAME=FOLDER`` (``office31=photos``), an ``.npz`` file or a folder.
        domain: name of the domain, or which one of several to read.
        cache: folder for downloads.

    Returns:
        One reader per domain.

    Raises:
        ValueError: the source does not exist or has the wrong form.
    """
    name, _, path = source.partition("=")
    if name in CATALOG:
        if source == name and to_path(source).exists():
            raise ValueError(f"{name} is an entry of the catalogue, and here a folder, too: give {name}= for the entry, or ./{name} for the folder")
        return _catalogued(name, path, domain, cache)
    given = to_path(source)
    if not given.exists():
        near = difflib.get_close_matches(source, CATALOG, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no file, folder or catalogue entry {source!r}{hint} (see `hashbridge datasets`)")
    if given.is_dir():
        return folder_readers(given, domain)
    if given.suffix == ".npz":
        return [npz_reader(given, domain or given.stem)]
    if given.suffix == ".txt":
        return [list_reader(given, domain)]
    raise ValueError(f"{source} is neither a folder, an .npz file nor an image list (.txt): give one of these or a catalogue entry")


def _catalogued(name: str, path: str, domain: str | None, cache: Path) -> list[Reader]:
    entry = CATALOG[name]
    if entry.source == "folder":
        if not path:
            raise ValueError(f"{name} is read from a folder: give its path as {name}=FOLDER, with {'/'.join(entry.domains)} in it")
        folder = to_path(path)
        if not folder.is_dir():
            raise ValueError(f"{name}: no folder at {path}")
        missing = [each for each in entry.domains if not (folder / each).is_dir()]
        if missing and len(entry.domains) > 1 and domain not in entry.domains:
            raise ValueError(f"{name} at {path} lacks the domain folder {', '.join(missing)}")
        return folder_readers(folder, domain, entry.classes)
    if path:
        raise ValueError(f"{name} is {'embedded' if entry.source == 'embedded' else 'downloaded'}, not read from {path}: give {name}, or the folder alone")
    if entry.source == "embedded":
        wanted = [domain] if domain else list(entry.domains)
        unknown = set(wanted) - set(entry.domains)
        if unknown:
            raise ValueError(f"{name} has no domain {unknown.pop()!r}: it has {', '.join(entry.domains)}")
        return [digits_reader(each) for each in wanted]
    names = tuple(map(str, range(10))) if entry.channels == 1 or name == "svhn" else ()
    return [torchvision_reader(name, cache / name, names, entry.size, entry.channels)]
