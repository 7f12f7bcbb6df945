"""Image lists as the field's datasets ship them, and the selection of classes."""

from pathlib import Path

import pytest
from PIL import Image

from data.catalog import open_source
from data.manifest import Manifest
from data.shards import read_rows
from pipelines import ingest


def office(root: Path) -> None:
    """Office-31's tree with two classes, and DomainNet's pair of lists for one of its domains."""
    for domain in ("amazon", "dslr"):
        for label, name in enumerate(("bike", "desk lamp")):
            for index in range(3 + label * (domain == "amazon")):
                path = root / domain / "images" / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (label * 90, index * 20, len(domain))).save(path)
    lines = [f"amazon/images/{name}/{index}.png {label}" for label, name in enumerate(("bike", "desk lamp")) for index in range(3)]
    (root / "amazon_train.txt").write_text("\n".join(lines[::2]) + "\n\n")
    (root / "amazon_test.txt").write_text("\n".join(lines[1::2]))


def labels(root: Path, manifest: Manifest, split: str) -> dict[str, str]:
    (batch,) = read_rows(root, manifest, "amazon", split, ids=True)
    return {i: manifest.classes[label] for i, label in zip(batch.column("id").to_pylist(), batch.column("label").to_pylist(), strict=True)}


def test_a_pair_of_lists_is_a_domain_with_its_splits(tmp_path: Path) -> None:
    office(tmp_path)
    ingest.run(ingest.Config(str(tmp_path / "amazon_train.txt"), dataset=str(tmp_path / "set"), size=8))
    manifest = Manifest.read(tmp_path / "set")
    assert manifest.classes == ["bike", "desk lamp"] and [*manifest.domains] == ["amazon"]
    found = {split: labels(tmp_path / "set", manifest, split) for split in ("train", "test")}
    assert len(found["train"]) == len(found["test"]) == 3
    assert all(Path(name).parent.name == label for rows in found.values() for name, label in rows.items())


@pytest.mark.parametrize("line", ["amazon/images/bike/0.png", "amazon/images/bike/0.png -1", "amazon/images/bike/0.png bike"])
def test_a_line_that_is_not_path_and_label_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"x.png 0\n{line}\n")
    with pytest.raises(ValueError, match="a.txt, line 2: .* is not `path label`"):
        open_source(str(tmp_path / "a.txt"), None, tmp_path)


def test_a_mark_of_utf_8_tabs_and_other_ends_of_lines_are_read(tmp_path: Path) -> None:
    office(tmp_path)
    lines = "amazon/images/bike/0.png\t0\r\namazon/images/desk lamp/1.png\t1\r\n"
    (tmp_path / "amazon_train.txt").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    ingest.run(ingest.Config(str(tmp_path / "amazon_train.txt"), dataset=str(tmp_path / "set"), size=8))
    manifest = Manifest.read(tmp_path / "set")
    assert manifest.classes == ["bike", "desk lamp"]
    assert labels(tmp_path / "set", manifest, "train") == {"amazon/images/bike/0.png": "bike", "amazon/images/desk lamp/1.png": "desk lamp"}


def test_a_list_without_a_split_in_its_name_is_read_alone(tmp_path: Path) -> None:
    office(tmp_path)
    (tmp_path / "amazon.txt").write_text("amazon/images/bike/2.png 0\namazon/images/desk lamp/2.png 1\n")
    alone = open_source(str(tmp_path / "amazon.txt"), None, tmp_path)[0]
    assert (alone.domain, alone.counts) == ("amazon", {"train": 2})
    assert open_source(str(tmp_path / "amazon_test.txt"), None, tmp_path)[0].counts == {"train": 3, "test": 3}
    (tmp_path / "amazon_query.txt").write_text("amazon/images/bike/2.png 0\n")
    with pytest.raises(ValueError, match="amazon_query.txt and amazon_test.txt are both the test split of 'amazon'"):
        open_source(str(tmp_path / "amazon_test.txt"), None, tmp_path)


def test_an_image_that_is_listed_twice_is_read_once_and_has_one_label(tmp_path: Path) -> None:
    office(tmp_path)
    lines = "amazon/images/bike/0.png 0\namazon/images/desk lamp/0.png 1\n./amazon/images/bike/0.png 0\n"
    (tmp_path / "a.txt").write_text(lines)
    reader = open_source(str(tmp_path / "a.txt"), None, tmp_path)[0]
    assert reader.counts == {"train": 2} and reader.notes == ("1 lines name an image that their list has already, and are left out",)
    (tmp_path / "a.txt").write_text(f"{lines}amazon/images/bike/0.png 1\n")
    with pytest.raises(ValueError, match="a.txt, line 4: amazon/images/bike/0.png has label 1, and 0 before"):
        open_source(str(tmp_path / "a.txt"), None, tmp_path)


def test_images_that_are_not_there_are_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("nowhere/x.png 0\n")
    with pytest.raises(ValueError, match="no image 'nowhere/x.png' in its folder or the two above"):
        open_source(str(tmp_path / "a.txt"), None, tmp_path)


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [("desk lamp", ["desk lamp"]), ("desk lamp,bike", ["desk lamp", "bike"]), ("3", ["bike", "desk lamp"]), ("FILE", ["desk lamp"])],
)
def test_classes_that_are_not_wanted_are_left_out(wanted: str, kept: list[str], tmp_path: Path) -> None:
    office(tmp_path / "office")
    (tmp_path / "names").write_text("desk lamp\n\n")
    wanted = wanted.replace("FILE", str(tmp_path / "names"))
    ingest.run(ingest.Config(str(tmp_path / "office"), dataset=str(tmp_path / "set"), size=8, classes=wanted))
    manifest = Manifest.read(tmp_path / "set")
    counts = {"bike": 3, "desk lamp": 4}
    assert manifest.classes == kept and manifest.split("amazon", "train").labels == [counts[name] for name in kept]
    assert manifest.domains["amazon"].notes[-1:] == (["the rows of 1 other classes are left out"] if len(kept) == 1 else manifest.domains["amazon"].notes[-1:])


@pytest.mark.parametrize(("wanted", "said"), [("cat", "no domain has class 'cat'"), ("9", "no class has 9 images in every domain")])
def test_classes_that_there_are_not_are_refused(wanted: str, said: str, tmp_path: Path) -> None:
    office(tmp_path / "office")
    with pytest.raises(ValueError, match=said):
        ingest.run(ingest.Config(str(tmp_path / "office"), dataset=str(tmp_path / "set"), size=8, classes=wanted))
