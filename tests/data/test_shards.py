"""Ingest: the Parquet contract, the shuffle, what is left out, what an interruption leaves."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data import ingestion
from data.catalog import open_source
from data.decoding import read_decoded
from data.digits import typeset
from data.images import decode
from data.ingestion import write_domain
from data.layout import Layout
from data.manifest import Manifest
from data.shards import read_rows
from tests.servers import ROOT


def npz(path: Path, rows: int = 50, shape: tuple[int, ...] = (8, 8), classes: int = 5, names: tuple[str, ...] = ()) -> Path:
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (rows, *shape), dtype=np.uint8)
    np.savez(path, x_train=x, y_train=np.arange(rows) % classes, classes=np.array(names or [str(each) for each in range(classes)]))
    return path


def image_folder(path: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 3) -> Path:
    for label, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (20 + index, 10), (label * 100, index * 10, 5)).save(path / name / f"{index}.png")
    return path


def ingest(source: Path | str, root: Path, domain: str | None = None, **options: object) -> Manifest:
    for reader in open_source(str(source), domain, root.parent):
        manifest = write_domain(reader, root, **options)  # type: ignore[arg-type]
    return manifest


def test_the_parquet_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = npz(tmp_path / "a.npz", rows=90)
    reader = open_source(str(source), "a", tmp_path)[0]
    layout = Layout("raw", (1, 8, 8), 0, rows_per_file=40)
    monkeypatch.setattr(ingestion, "choose_layout", lambda *_: layout)
    manifest = write_domain(reader, tmp_path / "set")
    files = manifest.split("a", "train").files
    assert len(files) == 3 and sum(file["rows"] for file in files) == 90
    table = pq.read_table([tmp_path / "set" / file["path"] for file in files], partitioning=None)
    assert {name: str(table.schema.field(name).type) for name in table.column_names} == {
        "id": "string", "row": "int64", "image": "binary", "label": "int32",
    }  # fmt: skip
    assert table["row"].to_pylist() == list(range(90))
    x = np.load(source)["x_train"]
    for identity, image, label in zip(*(table[name].to_pylist() for name in ("id", "image", "label")), strict=True):
        index = int(identity.split("/")[1])
        assert image == x[index].tobytes() and label == index % 5
    assert [int(each.split("/")[1]) for each in table["id"].to_pylist()] != list(range(90))
    ranged = np.concatenate([part.x.numpy() for part in read_decoded(tmp_path / "set", manifest, "a", "train", 35, 85)])
    whole = np.concatenate([part.x.numpy() for part in read_decoded(tmp_path / "set", manifest, "a", "train")])
    assert np.array_equal(ranged, whole[35:85])


def test_the_same_seed_gives_the_same_dataset_by_one_process_and_by_ray(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = npz(tmp_path / "a.npz")
    digests = [ingest(source, tmp_path / str(i) / "set", "a", seed=seed).digest() for i, seed in enumerate((0, 0, 1))]
    monkeypatch.setattr("data.shard_writer.SMALL", 0)
    by_ray = [ingest(source, tmp_path / f"ray{seed}" / "set", "a", seed=seed).digest() for seed in (0, 1)]
    assert digests[0] == digests[1] == by_ray[0] != digests[2] == by_ray[1]


def test_unreadable_images_are_left_out_counted_and_named(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "pets")
    (folder / "cat" / "torn.png").write_bytes((folder / "cat" / "0.png").read_bytes()[:50])
    (folder / "dog" / "empty.jpg").write_bytes(b"")
    manifest = ingest(folder, tmp_path / "set", size=16)
    assert manifest.split("pets", "train").rows == 6
    assert {item["id"] for item in manifest.domains["pets"].rejected} == {"cat/torn.png", "dog/empty.jpg"}
    with pytest.raises(ValueError, match="2 rows cannot be read"):
        ingest(folder, tmp_path / "strict", size=16, strict=True)
    assert not (tmp_path / "strict").exists()


def test_encoded_images_keep_their_bytes(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "pets")
    manifest = ingest(folder, tmp_path / "set", size=96)
    assert manifest.store == "encoded" and manifest.shape == [3, 96, 96]
    for batch in read_rows(tmp_path / "set", manifest, "pets", "train", ids=True):
        for identity, content in zip(batch.column("id").to_pylist(), batch.column("image").to_pylist(), strict=True):
            assert content == (folder / identity).read_bytes()
    assert [part.x.shape for part in read_decoded(tmp_path / "set", manifest, "pets", "train")] == [(6, 3, 96, 96)]


def test_nested_folders_are_domains_and_a_share_becomes_the_test_split(tmp_path: Path) -> None:
    for domain in ("photo", "sketch"):
        image_folder(tmp_path / "all" / domain, count=20)
    manifest = ingest(tmp_path / "all", tmp_path / "set", size=16, test_share=0.25)
    assert set(manifest.domains) == {"photo", "sketch"}
    rows = {name: split.rows for name, split in manifest.domains["photo"].splits.items()}
    assert rows["train"] + rows["test"] == 40 and 3 <= rows["test"] <= 18


def test_a_limit_takes_the_first_rows_of_the_shuffle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout("raw", (1, 8, 8), 0, rows_per_file=20)
    monkeypatch.setattr(ingestion, "choose_layout", lambda *_: layout)
    source = npz(tmp_path / "a.npz", rows=90)
    whole, some = (ingest(source, tmp_path / name, limit=limit) for name, limit in (("whole", 0), ("some", 31)))
    split = some.split("a", "train")
    assert split.rows == 31 == sum(split.labels) == sum(file["rows"] for file in split.files) and len(split.files) < len(whole.split("a", "train").files)

    def ids(manifest: Manifest, stop: int) -> list[str]:
        batches = read_rows(tmp_path / manifest.dataset, manifest, "a", "train", 0, stop, ids=True)
        return [each for batch in batches for each in batch.column("id").to_pylist()]

    assert ids(some, 31) == ids(whole, 31)


@pytest.mark.parametrize(("unreadable", "test_share"), [(0, 0.0), (0, 0.4), (70, 0.0)])
def test_rows_beyond_a_limit_are_not_decoded(unreadable: int, test_share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(120):
        file = tmp_path / "a" / str(index % 2) / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), index).save(file)
        if index < unreadable:
            file.write_bytes(b"no image")
    decoded: list[bytes] = []
    monkeypatch.setattr("data.shard_writer.decode", lambda content, *more: decoded.append(content) or decode(content, *more))
    made = {}
    for spare in (1000, 2):
        monkeypatch.setattr("data.shard_writer.SPARE", spare)
        decoded.clear()
        made[spare] = ingest(tmp_path / "a", tmp_path / str(spare) / "set", limit=20, test_share=test_share, size=8)
        made[spare].domains["a"].rejected.sort(key=lambda each: each["id"])
        assert len(decoded) == 120 if spare == 1000 else len(decoded) > 120 if unreadable else 20 <= len(decoded) < 80
    assert made[2].digest() == made[1000].digest() and made[2].split("a", "train").rows == 20


def test_a_domain_must_fit_the_dataset(tmp_path: Path) -> None:
    root = tmp_path / "set"
    ingest(npz(tmp_path / "a.npz"), root, "a")
    with pytest.raises(ValueError, match="already has domain 'a'"):
        ingest(tmp_path / "a.npz", root, "a")
    with pytest.raises(ValueError, match="no class in common"):
        ingest(npz(tmp_path / "b.npz", classes=4, names=("w", "x", "y", "z")), root, "b")
    with pytest.raises(ValueError, match=r"raw \[1, 16, 16\], but dataset"):
        ingest(tmp_path / "a.npz", root, "c", size=16)
    resized = ingest(npz(tmp_path / "d.npz", shape=(12, 12)), root, "d")
    assert resized.shape == [1, 8, 8] and set(resized.domains) == {"a", "d"}


def test_classes_are_the_union_and_labels_follow_their_names(tmp_path: Path) -> None:
    root = tmp_path / "set"
    first = ingest(npz(tmp_path / "a.npz", classes=3, names=("cat", "dog", "owl")), root, "a")
    both = ingest(npz(tmp_path / "b.npz", classes=3, names=("owl", "emu", "cat")), root, "b")
    assert both.classes == ["cat", "dog", "owl", "emu"]
    assert both.split("a", "train").labels == [*first.split("a", "train").labels, 0]
    assert both.split("b", "train").labels == [16, 0, 17, 17]  # of 50 rows in turn: owl 17, emu 17, cat 16
    assert both.domains["b"].notes == ["1 classes are new to the dataset: emu", "1 classes of the dataset are not in this domain: dog"]
    (batch,) = read_rows(root, both, "b", "train", ids=True)
    labels = dict(zip(batch.column("id").to_pylist(), batch.column("label").to_pylist(), strict=True))
    assert [labels[f"x_train/{row}"] for row in range(3)] == [2, 3, 0]


def test_features_are_stored_as_vectors(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(30, 7)).astype(np.float16)
    np.savez(tmp_path / "f.npz", x_train=x, y_train=np.arange(30) % 3, classes=np.array(["a", "b", "c"]))
    manifest = ingest(tmp_path / "f.npz", tmp_path / "set")
    assert (manifest.store, manifest.shape, manifest.classes) == ("feature", [7], ["a", "b", "c"])
    batch = next(iter(read_rows(tmp_path / "set", manifest, "f", "train", ids=True)))
    order = [int(each.split("/")[1]) for each in batch.column("id").to_pylist()]
    (part,) = read_decoded(tmp_path / "set", manifest, "f", "train")
    assert np.array_equal(part.x.numpy(), x[order].astype(np.float32))


def test_an_interrupted_ingest_leaves_nothing_that_a_reader_takes_for_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "set"
    first = ingest(npz(tmp_path / "a.npz"), root, "a")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ingestion, "_describe", stop)
    with pytest.raises(KeyboardInterrupt):
        ingest(tmp_path / "a.npz", root, "b")
    assert Manifest.read(root) == first
    assert sorted(each.name for each in root.iterdir()) == [".lock", "domain=a", "manifest.json"]


def test_the_next_ingest_removes_what_a_killed_one_left_and_no_more(tmp_path: Path) -> None:
    root = tmp_path / "set"
    script = (
        "import sys, time; from pathlib import Path; from data import ingestion; from data.readers.npz import npz_reader\n"
        "ingestion._describe = lambda *_: (print('staged', flush=True), time.sleep(600))\n"
        "ingestion.write_domain(npz_reader(Path(sys.argv[1]), sys.argv[3]), Path(sys.argv[2]))"
    )
    npz(tmp_path / "a.npz")

    def begin(name: str) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "a.npz"), str(root), name], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "staged\n"
        return process

    killed, alive = begin("x"), begin("y")
    folders = [each for each in root.glob(".staging-*") if each.is_dir()]
    assert len(folders) == 2
    killed.kill()
    killed.wait()
    try:
        ingest(tmp_path / "a.npz", root, "a")
        (kept,) = (each for each in root.glob(".staging-*") if each.is_dir())
        assert kept in folders and (kept / "domain").is_dir()
    finally:
        alive.kill()
        alive.wait()
    ingest(tmp_path / "a.npz", root, "b")
    assert sorted(each.name for each in root.iterdir()) == [".lock", "domain=a", "domain=b", "manifest.json"]


def test_a_torn_shard_and_a_newer_manifest_are_said(tmp_path: Path) -> None:
    root = tmp_path / "set"
    manifest = ingest(npz(tmp_path / "a.npz"), root, "a")
    shard = root / manifest.split("a", "train").files[0]["path"]
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cannot be read"):
        list(read_rows(root, manifest, "a", "train"))
    values = json.loads((root / "manifest.json").read_text()) | {"format": 99}
    (root / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="newer than this version"):
        Manifest.read(root)


def test_typeset_digits_are_a_function_of_seed_and_index() -> None:
    one, again, other = typeset("train", 13), typeset("train", 13), typeset("train", 13, seed=1)
    assert np.array_equal(one[0], again[0]) and not np.array_equal(one[0], other[0])
    assert one[1] == 3 and one[0].shape == (32, 32)
    assert one[0].max() - int(one[0].min()) > 60


def test_queries_are_drawn_of_each_class(tmp_path: Path) -> None:
    source = npz(tmp_path / "all.npz", rows=60)
    sets = {seed: ingest(source, tmp_path / f"set{seed}", seed=seed, test_per_class=3) for seed in (0, 1)}
    drawn = {}
    for seed, manifest in sets.items():
        assert manifest.split("all", "test").labels == [3] * 5 and manifest.split("all", "train").labels == [9] * 5
        parts = {split: list(pq.read_table([tmp_path / f"set{seed}" / each["path"] for each in manifest.split("all", split).files])["id"].to_pylist())
                 for split in ("train", "test")}  # fmt: skip
        assert len(set(parts["train"]) | set(parts["test"])) == 60
        drawn[seed] = set(parts["test"])
    assert drawn[0] != drawn[1]
    with pytest.raises(ValueError, match="class '0' of all has 12 rows: --test-per-class 12 leaves none to train on"):
        ingest(source, tmp_path / "none", test_per_class=12)
    assert not (tmp_path / "none").exists()


def test_queries_of_each_class_are_drawn_from_all_splits_of_a_source(tmp_path: Path) -> None:
    manifest = ingest("digits", tmp_path / "set", "handwritten", test_per_class=20)
    assert manifest.split("handwritten", "test").labels == [20] * 10
    assert manifest.split("handwritten", "train").rows == 1797 - 200


def test_as_many_classes_as_flickr25k_has(tmp_path: Path) -> None:
    manifest = ingest(npz(tmp_path / "f.npz", rows=1000, classes=250), tmp_path / "set", test_per_class=1)
    assert len(manifest.classes) == 250 and manifest.split("f", "test").labels == [1] * 250 and manifest.split("f", "train").rows == 750
