"""Photographs embedded by a pretrained backbone: the whole way, and what is refused."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from data.batches import DomainLoader
from data.manifest import Embedding, Manifest
from models.networks.pretrained import open_backbone
from pipelines import demo, embed, encode, evaluate, index, ingest, parts, register, search, train
from pipelines.console.cli import main
from pipelines.retrieval.code_files import read_codes
from pipelines.training.restore import dataset_backbone

SIDE = 96


@pytest.fixture(scope="module")
def sample(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PACS's sample: the dataset of photographs and sketches."""
    root = tmp_path_factory.mktemp("pacs")
    for domain in ("photo", "sketch"):
        ingest.run(ingest.Config(str(shared_data / "pacs_sample"), dataset=str(root / "images"), domain=domain, size=SIDE))
    return root / "images"


@pytest.fixture(scope="module")
def features(sample: Path) -> Path:
    """The same as features of EfficientNet-Lite0."""
    out = sample.with_name("features")
    embed.run(embed.Config(str(sample), out=str(out), size=SIDE))
    return out


def trained(root: Path, storage: Path, **more: Any) -> str:
    return str(train.run(train.make_config({
        "method": "dah", "dataset": str(root), "source": "photo", "target": "sketch", "workers": 0, "threads": 1, "epochs": 4, "steps_per_epoch": 20,
        "tracking": "none", "plots": False, "storage": str(storage),
    } | more))["run_id"])  # fmt: skip


def test_sketches_find_photographs_of_their_class_without_a_hub(sample: Path, features: Path, shared_data: Path, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    run = trained(features, storage, tracking="")
    register.run(register.Config(run, name="sketches", storage=str(storage)))
    model = "models:/sketches@challenger"
    found = {}
    for name, (encoder, rows) in {"features": (run, features), "images": (run, sample), "registered": (model, sample)}.items():
        encode.run(encode.Config(encoder, str(rows), out=str(tmp_path / name), domain="photo", storage=str(storage)))
        table, codes, _ = read_codes(tmp_path / name)
        found[name] = dict(zip(table["id"].to_pylist(), map(bytes, codes), strict=True))
    assert len(found["features"]) == 168 and found["features"] == found["images"] == found["registered"]
    figures = [evaluate.run(evaluate.Config(run, dataset=str(root), storage=str(storage), out=str(tmp_path)))["metrics"] for root in (features, sample)]
    assert figures[0] == figures[1] and figures[0]["cross/map"] > 0.3  # chance is 0.15
    index.run(index.Config(str(tmp_path / "registered"), out=str(tmp_path / "index.faiss")))
    folder = shared_data / "pacs_sample" / "sketch" / "test"
    answers = search.run(search.Config(str(tmp_path / "index.faiss"), str(folder), k=5, storage=str(storage), grid=str(tmp_path / "grid.png")))["queries"]
    right = [near["class"] == Path(each["query"]).parent.name for each in answers for near in each["answers"]]
    assert len(answers) == 42 and np.mean(right) > 2 / 7 and (tmp_path / "grid.png").stat().st_size > 10_000


def test_features_are_the_backbones_in_the_images_order(sample: Path, features: Path) -> None:
    images, made = Manifest.read(sample), Manifest.read(features)
    assert made.shape == [1280] and made.classes == images.classes and made.embedding is not None
    assert (made.embedding.backbone, made.embedding.digest, made.embedding.shape) == ("efficientnet_lite0", images.digest(), [3, SIDE, SIDE])
    assert {name: of.splits["train"].labels for name, of in made.domains.items()} == {name: of.splits["train"].labels for name, of in images.domains.items()}
    (shard,) = images.split("sketch", "test").files
    (other,) = made.split("sketch", "test").files
    stored, table = pq.read_table(sample / shard["path"]), pq.read_table(features / other["path"])
    assert table["id"].to_pylist() == stored["id"].to_pylist() and table["label"].to_pylist() == stored["label"].to_pylist()
    backbone = open_backbone("efficientnet_lite0", size=SIDE)
    from data.decoding import read_decoded  # noqa: PLC0415

    x = torch.cat([part.x for part in read_decoded(sample, images, "sketch", "test")])
    with torch.no_grad():
        wanted = backbone(x[:8])
    torch.testing.assert_close(torch.tensor(table["feature"].to_pylist()[:8]), wanted, atol=1e-3, rtol=1e-3)


def test_all_workers_have_the_weights_that_lie_in_the_folder(sample: Path, tmp_path: Path) -> None:
    out = tmp_path / "random"
    embed.run(embed.Config(str(sample), out=str(out), size=32, weights="none"))
    made = Manifest.read(out)
    assert made.embedding is not None
    item = embed._items(Manifest.read(sample))[0]
    embed._Embed(made.embedding, str(tmp_path / "again"), backbone=dataset_backbone(out, made.embedding))(item)
    assert (tmp_path / "again" / item["path"]).read_bytes() == (out / item["path"]).read_bytes()
    other = replace(made.embedding, weights="0" * 16)
    with pytest.raises(ValueError, match="is not the backbone that made the features"):
        embed._Embed(other, str(out))


def digests(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(root.rglob("*")) if path.is_file()}


def test_parts_decoded_elsewhere_give_the_same_features(sample: Path, tmp_path: Path) -> None:
    """What decoding tasks hand to embedding actors on GPU nodes."""
    manifest, backbone = Manifest.read(sample), open_backbone("efficientnet_lite0", "none", 32)
    embedding = Embedding(
        "efficientnet_lite0", backbone.digest(), 32, "", backbone.preprocessing, 1, "drawing", str(sample), manifest.digest(), manifest.shape
    )  # fmt: skip
    item = embed._items(manifest)[-1]
    for name in ("here", "apart"):
        worker = embed._Embed(embedding, str(tmp_path / name), backbone=backbone)
        assert worker(parts.Decode(str(sample), tuple(manifest.shape))(item) if name == "apart" else item) == {"part": item["part"]}
    here, apart = (pq.read_table(tmp_path / name / item["path"]) for name in ("here", "apart"))
    assert here.equals(apart) and len(here) == item["stop"] - item["start"]


def test_an_embedding_that_was_cut_off_goes_on_where_it_was(sample: Path, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    work = embed._Embed.__call__

    def counted(self: Any, item: dict[str, Any]) -> dict[str, Any]:
        called.append(item["path"])
        if len(called) == 3:
            raise KeyboardInterrupt
        return work(self, item)

    config = embed.Config(str(sample), out=str(tmp_path / "features"), size=SIDE)
    monkeypatch.setattr(embed._Embed, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        embed.run(config)
    assert not (tmp_path / "features").exists()
    with pytest.raises(ValueError, match="unfinished embedding of other images or by another backbone"):
        embed.run(embed.Config(str(sample), out=str(tmp_path / "features"), size=64))
    embed.run(config)
    assert len(called) == 5 and called[2] == called[3]  # the first two of four were kept
    assert digests(tmp_path / "features") == digests(features) and [each.name for each in tmp_path.iterdir()] == ["features"]


def test_methods_train_on_embedded_views_and_two_workers_get_those_of_one(sample: Path, tmp_path: Path) -> None:
    out = tmp_path / "viewed"
    embed.run(embed.Config(str(sample), out=str(out), size=32, views=3))
    manifest = Manifest.read(out)
    assert manifest.views == 3 and manifest.row_bytes == 4 * 1280 * 4
    part = {"root": out, "manifest": manifest, "domain": "photo", "split": "train", "views": 2, "seed": 5}
    for cache in (0, 1024):
        loader, halves = DomainLoader(batch=8, cache_mb=cache, **part), [DomainLoader(batch=4, rank=rank, world=2, cache_mb=cache, **part) for rank in (0, 1)]
        batch = loader.with_views(next(loader.epoch(0, 1)), 0, 0)
        table = pq.read_table(out / manifest.split("photo", "train").files[0]["path"])
        pool = torch.cat([torch.tensor(table[name].to_pylist()).view(len(table), -1, 1280) for name in ("feature", "views")], 1)
        stored = pool[batch.row]
        assert torch.equal(batch.x, stored[:, 0]) and not torch.equal(batch.views[0], batch.views[1])
        chosen = [(view.unsqueeze(1) == stored).all(2).float().argmax(1) for view in batch.views]
        assert all((view.unsqueeze(1) == stored).all(2).any(1).all() for view in batch.views)
        own = [each.with_views(next(each.epoch(0, 1)), 0, 0) for each in halves]
        for number in range(2):
            found = [(each.views[number].unsqueeze(1) == pool[each.row]).all(2).float() for each in own]
            assert torch.equal(torch.cat([each.argmax(1) for each in found]), chosen[number])
        assert {number for view in chosen for number in view.tolist()} == {0, 1, 2, 3}  # the image itself is one of them
        rows = next(loader.rows())
        assert torch.equal(rows.x, pool[rows.row, 0]) and torch.equal(rows.views[0], pool[rows.row, 1:])
    assert trained(out, tmp_path / "runs", epochs=1, steps_per_epoch=2)
    held = DomainLoader(batch=1, **part).cached_rows()  # as a search holds them for all its trials
    for views in (0, 1):
        batch = next(DomainLoader(batch=8, held=held, **part | {"views": views}).epoch(0, 1))
        assert batch.x.shape == (8, 1280) and [view.shape for view in batch.views] == [(8, 3, 1280)] * views


def test_features_of_another_backbone_are_refused(sample: Path, features: Path, tmp_path: Path) -> None:
    run = trained(features, tmp_path, epochs=1, steps_per_epoch=1)
    embed.run(embed.Config(str(sample), out=str(tmp_path / "other"), size=64))
    with pytest.raises(ValueError, match="takes features of efficientnet_lite0 .* has those of efficientnet_lite0 .*to 64x64"):
        evaluate.run(evaluate.Config(run, dataset=str(tmp_path / "other"), storage=str(tmp_path)))
    (features / "backbone.safetensors").rename(features / "away")
    try:
        with pytest.raises(ValueError, match="has lost backbone.safetensors"):
            encode.run(encode.Config(run, str(sample), out=str(tmp_path / "c"), storage=str(tmp_path)))
    finally:
        (features / "away").rename(features / "backbone.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{features} --out {out}", "holds features, not images"),
        ("{images} --out {features}", "exists already"),
        ("{images} --out {out} --backbone resnet50", "no backbone 'resnet50': give efficientnet_lite0, timm:NAME or torchvision:NAME"),
        ("{images} --out {out} --backbone timm:resnet5", "timm 1.0.31 has no network 'resnet5': did you mean"),
        ("{images} --out {out} --backbone torchvision:mobilenetv2", "did you mean mobilenet_v2"),
        ("{images} --out {out} --backbone torchvision:resnet18 --weights {out}.pth", "weights '{out}.pth' of torchvision:resnet18 cannot be loaded"),
        ("{images} --out {out} --workers -1", "--workers is -1, but must not be negative"),
        ("{images} --out {out} --kind flip", "--kind is 'flip', but must be one of affine, crop, contrastive"),
        ("{images} --out .", "--out is '.', but must name a folder"),
    ],
)
def test_what_cannot_be_embedded_is_one_line(
    arguments: str, message: str, sample: Path, features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"images": sample, "features": features, "out": tmp_path / "out"}
    assert main(["embed", *arguments.format(**places).split()]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message.format(**places) in said[-1] and not (tmp_path / "out").exists()


def test_damaged_embeddings_of_a_manifest_are_refused(features: Path, tmp_path: Path) -> None:
    values = json.loads((features / "manifest.json").read_text())
    for wrong in ({"size": "big"}, {"shape": [3, 96]}, {"size": 10**9}, {"weights": None}):
        (tmp_path / "manifest.json").write_text(json.dumps(values | {"embedding": values["embedding"] | wrong}))
        with pytest.raises(ValueError, match=r"damaged \(embedding"):
            Manifest.read(tmp_path)


def test_the_demo_removes_no_folder_that_is_not_a_demos(shared_data: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match="contains files that are not from a demo"):
        demo.run(demo.Config(photographs=str(shared_data / "pacs_sample"), out=str(tmp_path)))
    assert (tmp_path / "images" / "mine.jpg").exists()
