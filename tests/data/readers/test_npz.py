"""Arrays as people save them: what is refused, what is a note, and what their values mean."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.decoding import read_decoded
from data.ingestion import write_domain
from data.manifest import Manifest
from data.readers.folder import folder_readers
from data.readers.npz import npz_reader

X = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path / "a.npz", **arrays)
    return path / "a.npz"


def pixels(root: Path, manifest: Manifest) -> np.ndarray:
    (domain,) = manifest.domains
    return np.concatenate([part.x.numpy() for part in read_decoded(root, manifest, domain, "train")])


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"y_train": np.where(np.arange(40) % 9, np.arange(40) % 3, 255)}, "labels go up to 255, but only 4 occur: use -1 for unknown labels"),
        ({"y_train": np.arange(40) % 2, "classes": np.array(["cat", "cat"])}, "class 'cat' is named twice"),
        ({"y_train": np.arange(40) % 2, "classes": np.array(["caf\u00e9", "cafe\u0301"])}, "is named twice"),
        ({"y_train": np.array(["cat", "dog"] * 20)}, "y_train contains text: give class indices"),
        ({"y_train": np.array([b"cat", b"dog"] * 20)}, "y_train contains text: give class indices"),
        ({"y_train": np.array([0, None] * 20, dtype=object)}, "y_train.npy' contains Python objects"),
    ],
)
def test_labels_that_do_not_fit_are_refused(arrays: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        npz_reader(saved(tmp_path, x_train=X, **arrays), "a")


def test_labels_from_one_and_classes_without_rows_are_notes(tmp_path: Path) -> None:
    reader = npz_reader(saved(tmp_path, x_train=X, y_train=1 + np.arange(40) % 4), "a")
    assert reader.notes == ("1 classes have no row: 0", "no row has label 0: are the labels counted from 1?")
    named = npz_reader(saved(tmp_path, x_train=X, y_train=np.arange(40) % 2, classes=np.array([b"cat", b"dog", b"owl"])), "a")
    assert named.classes == ("cat", "dog", "owl") and named.notes == ("1 classes have no row: owl",)


@pytest.mark.parametrize("shape", [(40, 8, 8), (40, 1, 8, 8), (40, 8, 8, 1)])
def test_one_channel_may_be_an_axis(shape: tuple[int, ...], tmp_path: Path) -> None:
    manifest = write_domain(npz_reader(saved(tmp_path, x_train=X.reshape(shape)), "a"), tmp_path / "set")
    assert manifest.shape == [1, 8, 8]
    assert sorted(map(bytes, pixels(tmp_path / "set", manifest).reshape(40, -1))) == sorted(map(bytes, X.reshape(40, -1)))


def test_arrays_of_zeros_and_ones_are_said_to_be_dark_and_a_range_mends_them(tmp_path: Path) -> None:
    path = saved(tmp_path, x_train=(X > 128).astype(np.uint8))
    dark = write_domain(npz_reader(path, "a"), tmp_path / "dark")
    assert dark.domains["a"].notes == ["the brightest value is 1 of 255, so the images are nearly black: give --range 0-1 if that is white"]
    bright = write_domain(npz_reader(path, "a"), tmp_path / "bright", values=(0.0, 1.0))
    assert not bright.domains["a"].notes and set(np.unique(pixels(tmp_path / "bright", bright))) == {0, 255}


@pytest.mark.parametrize(("size", "store"), [(16, "raw"), (96, "encoded")])
def test_twelve_bits_in_sixteen_are_said_to_be_dark_and_a_range_mends_them(size: int, store: str, tmp_path: Path) -> None:
    for index in range(4):
        (tmp_path / "x" / "cat").mkdir(parents=True, exist_ok=True)
        values = np.linspace(0, 4095, size * size).reshape(size, size).astype(np.uint16) // (index + 1)
        Image.fromarray(values).save(tmp_path / "x" / "cat" / f"{index}.png")
    (reader,) = folder_readers(tmp_path / "x", None)
    dark = write_domain(reader, tmp_path / "dark", size=size, channels=1)
    assert dark.store == store and "the brightest value is 4095 of 65535" in dark.domains["x"].notes[0]
    bright = write_domain(reader, tmp_path / "bright", size=size, channels=1, values=(0.0, 4095.0))
    assert not bright.domains["x"].notes
    assert pixels(tmp_path / "dark", dark).max() == 16 and pixels(tmp_path / "bright", bright).max() == 255


@pytest.mark.parametrize("tops", [(1, 1, 1.02), (255, 300, 255), (0.5, 200, 255)])
def test_float_files_whose_white_is_not_the_same_are_refused(tops: tuple[float, ...], tmp_path: Path) -> None:
    (tmp_path / "x" / "cat").mkdir(parents=True)
    for index, top in enumerate((*tops, 0)):  # the last is black: it tells nothing of white
        Image.fromarray(np.linspace(0, top, 256, dtype=np.float32).reshape(16, 16)).save(tmp_path / "x" / "cat" / f"{index}.tiff")
    (reader,) = folder_readers(tmp_path / "x", None)
    with pytest.raises(ValueError, match=r"x: float or 32-bit images differ in what .* makes white: \d+ for [12], \d+ for [12]: give --range"):
        write_domain(reader, tmp_path / "set", size=16)
    assert not (tmp_path / "set").exists()
    made = write_domain(reader, tmp_path / "set", size=16, values=(0.0, max(tops)))
    assert not made.domains["x"].notes
    assert sorted(pixels(tmp_path / "set", made).max((1, 2, 3)).tolist()) == sorted(round(255 * top / max(tops)) for top in (*tops, 0))


def test_values_that_are_cut_are_counted(tmp_path: Path) -> None:
    (tmp_path / "x" / "cat").mkdir(parents=True)
    for index, (low, high) in enumerate(((0, 60_000), (-5, 60_000), (0, 90_000))):
        Image.fromarray(np.linspace(low, high, 256).astype(np.int32).reshape(16, 16)).save(tmp_path / "x" / "cat" / f"{index}.tiff")
    (reader,) = folder_readers(tmp_path / "x", None)
    found = write_domain(reader, tmp_path / "set", size=16).domains["x"]
    assert found.notes == ["2 images have values below 0 or above 65535, which are cut: give --range LOW-HIGH"]


@pytest.mark.parametrize("name", ["a/b", "..", "a#b", "a=b", "a\nb", " "])
def test_a_name_that_no_folder_can_have_is_no_domain(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot name a domain"):
        write_domain(npz_reader(saved(tmp_path, x_train=X), name), tmp_path / "set")
