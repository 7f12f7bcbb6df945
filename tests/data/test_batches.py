"""Batches: fixed steps, balanced draws, and independence from everything but their arguments."""

import contextlib
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from scipy.ndimage import gaussian_filter

from data import transforms
from data.batches import DomainLoader
from data.decoding import Decoder, read_decoded, read_pictures
from data.images import decode
from data.manifest import Manifest
from data.rows import DomainBatch
from data.sampling import sample_colour
from data.transforms import affine_view, contrastive_view, crop_view, drawing_view, random_view, seeded_generator
from pipelines import ingest


def source(root: Path, **options: object) -> DomainLoader:
    settings: dict[str, object] = {"domain": "typeset", "split": "train", "batch": 30}
    return DomainLoader(root, Manifest.read(root), **(settings | options))  # type: ignore[arg-type]


def same(left: list[DomainBatch], right: list[DomainBatch]) -> bool:
    return len(left) == len(right) and all(torch.equal(a.x, b.x) and torch.equal(a.row, b.row) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("cache_mb", [1024, 0], ids=["memory", "stream"])
def test_steps_are_fixed_and_epochs_differ_but_repeat_exactly(digits: Path, cache_mb: int) -> None:
    first = list(source(digits, cache_mb=cache_mb).epoch(0, 7))
    assert [len(batch.x) for batch in first] == [30] * 7
    assert same(first, list(source(digits, cache_mb=cache_mb).epoch(0, 7)))
    assert not same(first, list(source(digits, cache_mb=cache_mb).epoch(1, 7)))
    assert not same(first, list(source(digits, cache_mb=cache_mb, seed=1).epoch(0, 7)))


@pytest.mark.parametrize("cache_mb", [1024, 0], ids=["memory", "stream"])
def test_rows_are_what_the_dataset_holds_under_their_number(digits: Path, cache_mb: int) -> None:
    everything = source(digits).cached_rows()
    for batch in source(digits, cache_mb=cache_mb, per_class=3).epoch(0, 3):
        assert torch.equal(batch.x, everything.x[batch.row])
        assert batch.label is not None and everything.label is not None
        assert torch.equal(batch.label, everything.label[batch.row])


@pytest.mark.parametrize("cache_mb", [1024, 0], ids=["memory", "stream"])
def test_balanced_draws_have_k_of_each_class(digits: Path, cache_mb: int) -> None:
    for batch in source(digits, cache_mb=cache_mb, per_class=4).epoch(2, 5):
        assert batch.label is not None
        assert torch.bincount(batch.label).tolist() == [4] * 10


def test_a_pass_from_memory_sees_every_row_once(digits: Path) -> None:
    rows = torch.cat([batch.row for batch in source(digits, batch=40).epoch(0, 100)])
    assert sorted(rows.tolist()) == list(range(4000))


def test_workers_share_the_rows_without_overlap(digits: Path) -> None:
    held = [set(source(digits, rank=rank, world=3).cached_rows().row.tolist()) for rank in range(3)]
    assert set.union(*held) == set(range(4000)) and sum(map(len, held)) == 4000


def test_the_label_column_is_not_read_where_it_is_not_wanted(digits: Path) -> None:
    target = source(digits, domain="handwritten", labels=False)
    assert target.cached_rows().label is None
    assert next(iter(target.epoch(0, 1))).label is None


def test_a_worker_without_a_class_is_said(digits: Path) -> None:
    crowded = source(digits, domain="handwritten", per_class=1, world=400, rank=1)
    with pytest.raises(ValueError, match="has no row of class"):
        next(iter(crowded.epoch(0, 1)))


def test_views_do_not_depend_on_the_number_of_workers() -> None:
    images = torch.randint(0, 256, (8, 1, 16, 16), generator=seeded_generator(1), dtype=torch.uint8)
    whole = random_view(images, seeded_generator(5))
    halves = [random_view(images[rank * 4 : rank * 4 + 4], seeded_generator(5), rank, 2) for rank in range(2)]
    torch.testing.assert_close(torch.cat(halves), whole)
    assert not torch.equal(whole, images.float())


def test_the_identity_transform_changes_nothing() -> None:
    images = torch.randint(0, 256, (4, 3, 12, 12), generator=seeded_generator(1), dtype=torch.uint8)
    torch.testing.assert_close(affine_view(images, seeded_generator(0), degrees=0, shift=0, scale=0, shear=0), images.float(), atol=1e-2, rtol=0)


@pytest.mark.parametrize("shape", [(7, 3, 33, 20), (1, 3, 1, 5), (3, 3, 64, 64)])
def test_colour_images_are_sampled_as_torch_does_it_on_any_number_of_threads(shape: tuple[int, ...]) -> None:
    images = torch.randint(0, 256, shape, generator=seeded_generator(1), dtype=torch.uint8)
    matrix = torch.tensor([1.0, 0, 0, 0, 1, 0]) + torch.randn(len(images), 6, generator=seeded_generator(2)) * 0.5  # also far outside
    wanted, before, found = transforms._sample(images, matrix), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(sample_colour(images, matrix))
    torch.set_num_threads(before)
    torch.testing.assert_close(found[0], wanted, atol=1e-2, rtol=0)
    assert found[0].min() >= 0 and found[0].max() <= 255 and all(torch.equal(each, found[0]) for each in found[1:])
    turned = images.permute(0, 1, 3, 2)  # not contiguous
    assert torch.equal(sample_colour(turned, matrix), sample_colour(turned.contiguous(), matrix))


def test_a_views_scale_bounds_its_change_of_size() -> None:
    images = torch.zeros(64, 1, 32, 32, dtype=torch.uint8)
    images[:, :, 8:24, 8:24] = 255  # a square of a quarter of the image
    for scale in (0.0, 0.4):
        views = affine_view(images, seeded_generator(3), degrees=0, shift=0, scale=scale, shear=0)
        sides = (views > 127).float().sum((1, 2, 3)).sqrt()
        assert sides.min() >= 16 / (1 + scale) - 1 and sides.max() <= 16 / (1 - scale) + 1
        assert (sides.max() - sides.min() > 8) == (scale > 0)
    assert torch.equal(random_view(images, seeded_generator(3), scale=0.4), affine_view(images, seeded_generator(3), scale=0.4))


def test_contrastive_views_do_not_depend_on_the_number_of_workers_and_keep_a_plain_image() -> None:
    for channels in (1, 3):
        images = torch.randint(0, 256, (8, channels, 32, 32), generator=seeded_generator(1), dtype=torch.uint8)
        whole = random_view(images, seeded_generator(5), kind="contrastive", crop=0.3)
        halves = [random_view(images[rank * 4 : rank * 4 + 4], seeded_generator(5), rank, 2, kind="contrastive", crop=0.3) for rank in range(2)]
        assert torch.equal(torch.cat(halves), whole) and whole.shape == images.shape and whole.dtype == torch.float32
        assert whole.min() >= 0 and whole.max() <= 255 and all(not torch.equal(*pair) for pair in zip(whole, images.float(), strict=True))
    black = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    assert random_view(black, seeded_generator(0), kind="contrastive").max() == 0


def test_drawings_are_lines_where_a_photograph_is_darker_than_around() -> None:
    images = torch.randint(0, 256, (4, 3, 64, 64), generator=seeded_generator(1), dtype=torch.uint8)
    whole = random_view(images, seeded_generator(5), kind="drawing")
    halves = [random_view(images[rank * 2 : rank * 2 + 2], seeded_generator(5), rank, 2, kind="drawing") for rank in range(2)]
    assert torch.equal(torch.cat(halves), whole) and whole.shape == images.shape and torch.equal(whole[:, 0], whole[:, 2])
    for side in (32, 64, 448):  # lines at every size
        halves = torch.full((4, 1, side, side), 200, dtype=torch.uint8)
        halves[..., side // 2 :] = 40
        assert (drawing_view(halves, seeded_generator(2))[:, 0, side // 3] < 60).any(1).all()
    scene = torch.full((8, 1, 224, 224), 200, dtype=torch.uint8)
    scene[..., 112:] = 40  # dark on the right
    drawn = {flip: drawing_view(scene, seeded_generator(2), flip=flip)[:, 0, 100] for flip in (0.0, 1.0)}
    assert torch.equal(drawn[0.0].flip(1), drawn[1.0])
    dark = drawn[0.0] < 60
    assert dark.any(1).all() and (dark.float().argmax(1) == 112).all()  # a thin line on its dark side
    assert dark.sum(1).max() <= 4 and drawn[0.0][:, 30].min() > 250
    deviation = (0.8 + 0.4 * torch.rand(8, 2, generator=seeded_generator(2))[0, 0]).item()
    near, wide = (gaussian_filter(scene[0, 0].double().numpy() / 255, each, mode="nearest", truncate=8 / each) for each in (deviation, 1.6 * deviation))
    alone = 255 * (1 + np.tanh(200 * np.minimum(near - 0.98 * wide, 0)))
    np.testing.assert_allclose(drawn[0.0][0].numpy(), alone[100], atol=2)


def test_a_contrastive_views_crop_and_flip_are_bounded() -> None:
    edge = torch.zeros(64, 1, 32, 32, dtype=torch.uint8)
    edge[..., 16:] = 255  # the right half is white
    mirrored = {flip: contrastive_view(edge, seeded_generator(2), crop=1.0, flip=flip)[:, 0].mean(1)[:, [2, -3]].diff(dim=1) < 0 for flip in (0.0, 0.5, 1.0)}
    assert not mirrored[0.0].any() and mirrored[1.0].all() and 0.3 < mirrored[0.5].float().mean() < 0.7
    square = torch.zeros(64, 1, 32, 32, dtype=torch.uint8)
    square[:, :, 12:20, 12:20] = 255
    grown = (contrastive_view(square, seeded_generator(3), crop=0.25, flip=0.0) > 60).float().mean((1, 2, 3)) * 32 * 32 / 64
    assert grown.max() <= 4 * 1.4 and grown.max() > 2  # a crop of a quarter of the area shows the square four times as large


def test_views_are_those_of_torchvisions_steps_one_image_at_a_time() -> None:
    from torchvision.transforms.v2 import functional as change  # noqa: PLC0415

    images = torch.randint(0, 256, (6, 3, 40, 40), generator=seeded_generator(1)).float()
    images = change.gaussian_blur(images, [5, 5], [2.0, 2.0])  # as smooth as photographs
    draws = torch.rand(6, 13, generator=seeded_generator(5))
    draws[:, 5], draws[:, 10] = 0.0, torch.tensor([0.0, 1, 1, 1, 1, 1])  # all recoloured, the first made grey
    found = transforms._recoloured(images, draws[:, 5:11])
    wanted = torch.stack([_recoloured_alone(image / 255, draw) * 255 for image, draw in zip(images, draws.tolist(), strict=True)])
    torch.testing.assert_close(found, wanted, atol=0.6, rtol=0)
    blurred = transforms._blurred(images, torch.full((6,), 0.35))
    torch.testing.assert_close(blurred[..., 4:-4, 4:-4], change.gaussian_blur(images, [5, 5], [0.35] * 2)[..., 4:-4, 4:-4], atol=1e-2, rtol=0)
    cropped, crops = crop_view(images, seeded_generator(7), crop=0.3, flip=1.0), torch.rand(6, 5, generator=seeded_generator(7))
    scale_y, top, scale_x, left = (transforms._crop_matrix(crops, images.shape[2:], 0.3, 1.0)[:, i] for i in (4, 5, 0, 2))
    for i, image in enumerate(images):
        tall, wide = round(40 * float(scale_y[i])), round(40 * -float(scale_x[i]))
        y, x = round(((float(top[i]) + 1) * 40 - tall) / 2), round(((float(left[i]) + 1) * 40 - wide) / 2)
        alone = change.horizontal_flip(change.resized_crop(image, y, x, tall, wide, [40, 40], antialias=False))
        torch.testing.assert_close(cropped[i, :, 3:-3, 3:-3], alone[:, 3:-3, 3:-3], atol=1e-2, rtol=0)


def _recoloured_alone(image: torch.Tensor, draw: list[float]) -> torch.Tensor:
    from torchvision.transforms.v2 import functional as change  # noqa: PLC0415

    image = change.adjust_contrast(change.adjust_brightness(image, 0.6 + 0.8 * draw[6]), 0.6 + 0.8 * draw[7])
    image = change.adjust_hue(change.adjust_saturation(image, 0.6 + 0.8 * draw[8]), 0.2 * draw[9] - 0.1)
    return change.rgb_to_grayscale(image, 3) if draw[10] < 0.2 else image


def photos(root: Path, **options: object) -> DomainLoader:
    return source(root, **({"domain": "photo", "batch": 16} | options))


@pytest.mark.parametrize("cache_mb", [1024, 1, 0], ids=["decoded", "stored", "stream"])
@pytest.mark.parametrize("per_class", [0, 5])
def test_batches_of_photographs_do_not_depend_on_the_number_of_decoders(photographs: Path, cache_mb: int, per_class: int) -> None:
    one, *others = (list(photos(photographs, cache_mb=cache_mb, per_class=per_class, decoders=n).epoch(1, 9)) for n in (0, 1, 2, 4, 6))
    assert all(same(one, other) for other in others) and one[0].x.shape == (per_class * 3 or 16, 3, 80, 80)
    rest = list(photos(photographs, cache_mb=cache_mb, per_class=per_class, decoders=2).epoch(1, 9, first=4))
    assert same(one[4:], rest)


def test_photographs_held_decoded_or_stored_give_the_same_batches(photographs: Path) -> None:
    decoded, stored = (photos(photographs, cache_mb=each) for each in (1024, 1))
    assert "rows in memory, 2 MiB" in decoded.memory and "in memory as they are stored" in stored.memory
    assert "streamed through a buffer" in photos(photographs, cache_mb=0).memory
    assert same(list(decoded.epoch(0, 8)), list(stored.epoch(0, 8)))
    everything = decoded.cached_rows()
    for cache_mb in (1024, 1, 0):
        rows = list(photos(photographs, cache_mb=cache_mb).rows())
        assert torch.equal(torch.cat([part.x for part in rows]), everything.x)
        assert torch.cat([part.row for part in rows]).tolist() == list(range(90))


@pytest.mark.parametrize("decoders", [0, 2, 6])
def test_an_image_that_cannot_be_decoded_is_an_error_and_no_hang(photographs: Path, decoders: int) -> None:
    loader = photos(photographs, cache_mb=1, decoders=decoders)
    loader._stored_rows.content[17] = b"no image"
    with pytest.raises(ValueError, match="the image of row 17 cannot be decoded"):
        list(loader.epoch(0, 12))


def test_a_decoder_that_dies_is_an_error_and_no_hang(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise SystemExit("killed")

    monkeypatch.setattr("data.decoding.decode_rows", killed)
    with pytest.raises(SystemExit, match="killed"):
        next(photos(photographs, cache_mb=1, decoders=2).epoch(0, 5))


def serving() -> list[psutil.Process]:
    """The decoding processes of this process."""
    found = []
    for each in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # also one that was killed before and that nobody has waited for
            found += [each] if "decoder_process" in " ".join(each.cmdline()) else []
    return found


def wait_until_ended(processes: list[psutil.Process]) -> None:
    """Wait for processes that were killed; their parent still asks for their exit codes."""
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            while each.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)


def test_a_decoding_process_that_is_killed_is_an_error_in_one_line_and_no_hang(photographs: Path) -> None:
    loader = photos(photographs, cache_mb=1, decoders=5)
    before = list(loader.epoch(0, 3))
    assert serving()
    with pytest.raises(ChildProcessError, match="has died .exit code -9.*fewer --decoders"):
        for _ in range(20):  # a thread whose process died while it had nothing to do starts another
            batches = loader.epoch(0, 40)
            next(batches)
            killed = serving()
            for each in killed:
                each.kill()
            list(batches)
    wait_until_ended(killed)  # the others that were killed with it
    assert same(list(loader.epoch(0, 3)), before)


def test_the_shuffle_buffer_is_bounded_in_bytes(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.batches.BUFFER_MB", 0.05)
    loader = photos(photographs, cache_mb=0)
    assert 1 < loader._buffer < 90
    assert sorted(set(torch.cat([batch.row for batch in loader.epoch(0, 60)]).tolist())) == list(range(90))


def test_an_epoch_that_is_left_early_leaves_no_thread_at_work(photographs: Path) -> None:
    before = threading.active_count()
    for _ in range(3):
        batches = photos(photographs, cache_mb=0, decoders=2).epoch(0, 1000)
        next(batches)
        batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() <= before + 2


def test_rows_are_decoded_in_batches_of_one_size(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.shards.FILES_READ", 7)
    monkeypatch.setattr("data.decoding.ROWS", 12)
    manifest = Manifest.read(photographs)
    parts = list(read_decoded(photographs, manifest, "photo", "train", 3, 80, ids=True))
    assert [len(part.x) for part in parts] == [12] * 6 + [5] and [row for part in parts for row in part.row] == list(range(3, 80))
    everything = photos(photographs).cached_rows()
    assert torch.equal(torch.cat([part.x for part in parts]), everything.x[3:80])
    found = read_pictures(photographs, manifest, "photo/train", [5, 77, 5])
    assert list(found) == [5, 77] and all(np.array_equal(image, everything.x[row]) for row, image in found.items())


def test_photographs_can_be_stored_as_jpeg_at_the_datasets_size(photographs: Path, tmp_path: Path) -> None:
    ingest.run(ingest.Config(str(photographs.parent / "photo"), domain="photo", dataset=str(tmp_path / "set"), size=80, store="jpeg"))
    manifest = Manifest.read(tmp_path / "set")
    assert manifest.store == "jpeg"
    plain, again = (
        torch.cat([part.x for part in read_decoded(root, Manifest.read(root), "photo", "train")]) for root in (photographs, tmp_path / "set")
    )  # fmt: skip
    assert plain.shape == again.shape and 0 < (plain.float() - again.float()).abs().mean() < 2
    with pytest.raises(ValueError, match="give the same --size, --channels and --store"):
        ingest.run(ingest.Config(str(photographs.parent / "photo"), domain="other", dataset=str(tmp_path / "set"), size=80, store="encoded"))


@pytest.mark.parametrize("channels", [1, 3])
def test_what_ingest_stores_as_jpeg_is_decoded_to_pillows_pixels(photographs: Path, tmp_path: Path, channels: int) -> None:
    root = tmp_path / "set"
    ingest.run(ingest.Config(str(photographs.parent / "photo"), domain="photo", dataset=str(root), size=80, store="jpeg", channels=channels))
    manifest = Manifest.read(root)
    decoded = torch.cat([part.x for part in read_decoded(root, manifest, "photo", "train", threads=2)])
    files = pq.read_table(root / manifest.split("photo", "train").files[0]["path"]).column("image").to_pylist()
    assert torch.equal(decoded, torch.from_numpy(np.stack([decode(content, channels, 80) for content in files])))
    other = photographs / Manifest.read(photographs).split("photo", "train").files[0]["path"]
    large = pq.read_table(other).column("image")[0].as_py()
    for content, why in ((b"", "empty file"), (files[0][:-300], "Premature end"), (b"no image", "JPEG"), (large, "90x70 pixels in a dataset of 80x80")):
        with pytest.raises(ValueError, match=f"row 7 cannot be decoded .*{why}"):
            Decoder(manifest, 0)(np.array([content], object), np.array([7]))
