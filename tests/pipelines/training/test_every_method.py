"""Every method of the registry is trained or fitted, resumed bit-identically, encoded and searched; its encoder is exported, as the registry keeps it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.encoder import HashEncoder
from models.registry import METHODS
from pipelines import encode, index, search, train
from tests.models.players import SHAPE, build
from tests.pipelines.training.resuming import assert_resumes_bit_identically

SMALL: dict[str, dict[str, Any]] = {
    "igan": {"stages": 2}, "ucdir": {"cluster_start": 0.0, "cluster_full": 0.4, "clusters_per_class": 1}, "protoot": {"clusters_per_class": 1},
    "jda": {"rounds": 1}, "ba": {"rounds": 2}, "adda": {"pretrained_share": 0.3},
}  # fmt: skip
STATE: dict[str, set[str]] = {  # what a checkpoint holds beside the encoder and its averaged copy
    "igan": {"discriminator"}, "sigan": {"critic", "pretrained"}, "dtn": {"critic", "pretrained"}, "cph": {"prototypes"}, "ucdir": {"memory"},
    "mstn": {"centroids"}, "adda": {"discriminator", "source_network"}, "ssdh": {"bounds"},
} | {name: {"memory"} for name in ("protoot", "id", "protonce", "cds", "pcs")} | {name: {"maps"} for name in ("tca", "jda", "gfk", "coral")}  # fmt: skip


def trained(digits: Path, storage: Path, method: str, **more: Any) -> dict[str, Any]:
    """A short run of three epochs of four steps, which keeps checkpoints of every third step."""
    kind = METHODS[method]
    size = {"per_class": 4, "batch": 32, "width": 16 if method in ("cph", "idr-ae") else 4, "pretrain_epochs": 1, "average": 0.9}
    small = {name: value for name, value in size.items() if hasattr(kind.Config(), name)}
    source = {} if kind.source_optional else {"source": "typeset"}
    options = {"target": "handwritten", "bits": 16, "epochs": 3, "steps_per_epoch": 4, "threads": 1, "workers": 0, "tracking": "none", "plots": False}
    steps = {} if kind.fitted else {"checkpoint_steps": 3}
    given = {"method": method, "dataset": str(digits), "storage": str(storage)} | source | options | steps | small | SMALL.get(method, {})
    return train.run(train.make_config(given | more))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_trained_resumed_and_searched(method: str, few_digits: Path, tmp_path: Path) -> None:
    whole = trained(few_digits, tmp_path / "runs", method)
    if METHODS[method].fitted:
        assert trained(few_digits, tmp_path / "again", method)["metrics"] == whole["metrics"]
    else:
        state = assert_resumes_bit_identically(whole, tmp_path / "runs", 3)
        rest = {name.split(".")[0] for name in state} - {"encoder", "generator", "autoencoder", "averaged", "taken", "extractor"}
        assert rest == STATE.get(method, set())
    runs, codes, at = str(tmp_path / "runs"), str(tmp_path / "codes"), str(tmp_path / "codes.index")
    encode.run(encode.Config(whole["run_id"], str(few_digits), out=codes, domain="typeset", split="train", storage=runs))
    index.run(index.Config(codes, out=at))
    found = search.run(search.Config(at, f"{few_digits}#handwritten/test#0-4", model=whole["run_id"], storage=runs, k=3))
    distances = np.array([[answer["distance"] for answer in each["answers"]] for each in found["queries"]])
    assert distances.shape == (5, 3) and (np.diff(distances, axis=1) >= 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_an_exported_encoder_gives_the_same_codes(method: str) -> None:
    encoder = HashEncoder(build(method).encoder()).eval()
    few, more = (torch.randint(0, 256, (n, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(n)) for n in (4, 7))
    exported = torch.export.export(encoder, (few,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    assert exported.module()(more).equal(encoder(more))
