"""Folders of photographs in the field's layouts: the meaning of their levels, what is left out, and what is refused."""

import hashlib
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from data.catalog import open_source
from data.ingestion import write_domain
from data.manifest import Manifest
from data.readers.folder import folder_readers

CLASSES = ("cat", "dog")


def images(*paths: Path, count: int = 3) -> None:
    """Different small pictures in each folder."""
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.frombytes("L", (16, 8), hashlib.shake_128(f"{path}/{index}".encode()).digest(128)).save(path / f"{index}.png")


def ingested(path: Path, root: Path, domain: str | None = None) -> Manifest:
    for reader in folder_readers(path, domain):
        manifest = write_domain(reader, root, size=8)
    return manifest


def found(manifest: Manifest) -> dict[str, dict[str, list[int]]]:
    """Rows of each class by domain and split."""
    return {name: {split: part.labels for split, part in domain.splits.items()} for name, domain in manifest.domains.items()}


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("{c}", {"set": {"train": [3, 3]}}),
        ("images/{c}", {"set": {"train": [3, 3]}}),
        ("{d}/{c}", {"a": {"train": [3, 3]}, "b": {"train": [3, 3]}}),
        ("{d}/images/{c}", {"a": {"train": [3, 3]}, "b": {"train": [3, 3]}}),
        ("wrap/{d}/{c}", {"a": {"train": [3, 3]}, "b": {"train": [3, 3]}}),
        ("{s}/{c}", {"set": {"train": [3, 3], "test": [3, 3], "val": [3, 3]}}),
        ("{d}/{s}/{c}", {name: {"train": [3, 3], "test": [3, 3], "val": [3, 3]} for name in "ab"}),
        ("{s}/{d}/{c}", {name: {"train": [3, 3], "test": [3, 3], "val": [3, 3]} for name in "ab"}),
        ("{c}/images", {"set": {"train": [3, 3]}}),
        ("{d}", None),  # two folders of images are two classes
    ],
)
def test_levels_are_domains_splits_and_classes(layout: str, expected: dict[str, dict[str, list[int]]] | None, tmp_path: Path) -> None:
    for domain in "ab":
        for split in ("Train", "test", "validation"):
            for name in CLASSES:
                images(tmp_path / "set" / layout.format(d=domain, s=split, c=name))
    manifest = ingested(tmp_path / "set", tmp_path / "out")
    if expected is None:
        assert manifest.classes == ["a", "b"] and [*manifest.domains] == ["set"]
        return
    assert manifest.classes == list(CLASSES) and found(manifest) == expected


def test_a_folder_of_one_domain_that_gets_another_name_is_said(tmp_path: Path) -> None:
    images(tmp_path / "set" / "studio" / "cat", tmp_path / "set" / "studio" / "dog")
    assert ingested(tmp_path / "set", tmp_path / "out", "street").domains["street"].notes == ["folder 'studio' is read as domain 'street'"]
    assert ingested(tmp_path / "set", tmp_path / "own", "studio").domains["studio"].notes == []


@pytest.mark.parametrize("layout", ["", "images", "wrap/images"])
def test_a_folder_of_images_alone_has_no_labels(layout: str, tmp_path: Path) -> None:
    images(tmp_path / "set" / layout)
    manifest = ingested(tmp_path / "set", tmp_path / "out", "target")
    assert manifest.classes == [] and manifest.split("target", "train").unlabelled == 3


@pytest.mark.parametrize("paths", [("cat", "dog/one", "dog/two"), ("a/cat", "a/dog/x", "a/dog/y", "b/cat")])
def test_folders_whose_level_is_unclear_are_refused(paths: tuple[str, ...], tmp_path: Path) -> None:
    images(*(tmp_path / "set" / path for path in paths))
    with pytest.raises(ValueError, match="so their level is unclear: expected <class>/<file>"):
        folder_readers(tmp_path / "set", None)


def test_levels_that_are_too_many_are_refused(tmp_path: Path) -> None:
    images(*(tmp_path / "set" / f"{d}/{k}/{c}/{i}" for d in "ab" for k in "kl" for c in CLASSES for i in "xy"))
    with pytest.raises(ValueError, match="nested too deeply"):
        folder_readers(tmp_path / "set", None)


def test_what_is_left_out_is_counted_and_named(tmp_path: Path) -> None:
    root = tmp_path / "set"
    images(root / "cat", root / "dog", root / "cat" / ".ipynb_checkpoints", root / "__MACOSX" / "cat", root / "@eaDir")
    Image.new("L", (8, 8)).save(root / "cover.png")
    for name in ("cat/a.heic", "cat/b.heic", "readme.txt"):
        (root / name).write_bytes(b"x")
    manifest = ingested(root, tmp_path / "out")
    assert found(manifest) == {"set": {"train": [3, 3]}}
    assert manifest.domains["set"].notes == [
        "9 images in hidden or metadata folders are left out, the first @eaDir/0.png",
        "1 images beside the class folders are left out, the first cover.png",
        "files of other kinds are left out: 2 .heic, 1 .txt",
    ]


def test_exact_copies_across_splits_and_classes_are_counted(tmp_path: Path) -> None:
    root = tmp_path / "set"
    images(*(root / split / name for split in ("train", "test") for name in CLASSES))
    (root / "test" / "cat" / "copy.png").write_bytes((root / "train" / "cat" / "1.png").read_bytes())
    (root / "train" / "dog" / "copy.png").write_bytes((root / "train" / "cat" / "2.png").read_bytes())
    notes = ingested(root, tmp_path / "out").domains["set"].notes
    assert sorted(notes) == ["1 images are exact copies of an image in another class", "1 images are exact copies of an image in another split"]


def test_links_are_followed_once_and_dangling_ones_are_counted(tmp_path: Path) -> None:
    images(tmp_path / "elsewhere", tmp_path / "set" / "cat")
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "cat" / "again").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    manifest = ingested(tmp_path / "set", tmp_path / "out")
    assert found(manifest) == {"set": {"train": [3, 3]}}
    assert manifest.domains["set"].rejected == [{"id": "cat/gone.jpg", "reason": "No such file or directory"}]


def test_a_class_that_a_domain_lacks_is_a_note(tmp_path: Path) -> None:
    images(tmp_path / "set" / "a" / "cat", tmp_path / "set" / "a" / "dog", tmp_path / "set" / "b" / "dog", tmp_path / "set" / "b" / "owl")
    manifest = ingested(tmp_path / "set", tmp_path / "out")
    assert manifest.classes == ["cat", "dog", "owl"]
    assert found(manifest) == {"a": {"train": [3, 3, 0]}, "b": {"train": [0, 3, 3]}}
    assert manifest.domains["a"].notes == ["no image of class owl"] and manifest.domains["b"].notes == ["no image of class cat"]


def test_names_that_are_almost_the_same_are_a_note(tmp_path: Path) -> None:
    for domain, names in (("a", ("alarm_clock", "Mug", "1-2")), ("b", ("Alarm Clock", "Mug ", "12"))):
        images(*(tmp_path / "set" / domain / name for name in names))
    note = "2 names are spelt in more than one way, and taken for different classes: 'Alarm Clock' and 'alarm_clock', 'Mug' and 'Mug '"
    assert all(domain.notes[1:] == [note] for domain in ingested(tmp_path / "set", tmp_path / "out").domains.values())


def test_one_name_in_two_unicode_forms_is_one_class(tmp_path: Path) -> None:
    for domain, form in (("a", "NFC"), ("b", "NFD")):
        images(tmp_path / "set" / domain / unicodedata.normalize(form, "café"), tmp_path / "set" / domain / "bar")
    assert ingested(tmp_path / "set", tmp_path / "out").classes == ["bar", "café"]


def test_a_folder_named_as_an_entry_of_the_catalogue_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    with pytest.raises(ValueError, match="give digits= for the entry, or ./digits for the folder"):
        open_source("digits", None, tmp_path)
    assert {reader.domain for reader in open_source("digits=", None, tmp_path)} == {"typeset", "handwritten"}
    with pytest.raises(ValueError, match="digits is embedded, not read from photos"):
        open_source("digits=photos", None, tmp_path)
    with pytest.raises(ValueError, match="digits is empty"):
        open_source("./digits", None, tmp_path)
