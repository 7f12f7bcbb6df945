"""A cluster of two nodes, one of which is lost during work."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch

from data.manifest import Manifest
from pipelines import embed, encode, train
from pipelines.console import cluster
from pipelines.console.cli import main
from pipelines.retrieval.code_files import read_codes
from tests.pipelines.training.disturbed import config, equal, final, wait_for_epoch
from tests.servers import Head, kill_tree


@ray.remote(num_cpus=1)
class Ballast:
    """Takes a CPU of the first node, so that work is also done on the other node."""

    def ready(self) -> None:
        """Whether it is there."""


class Second:
    """The second node, of one CPU, beside a first with so many CPUs taken. When it is lost, the first has room for its work."""

    def __init__(self, head: Head, taken: int) -> None:
        self.ballast, self.lost = [Ballast.remote() for _ in range(taken)], ""
        ray.get([each.ready.remote() for each in self.ballast])
        self.node = head.add_node()
        wait_for_nodes(2)

    def remove(self) -> None:
        """Kill the node with all its processes."""
        if not self.lost:
            self.lost = kill_tree(self.node.pid)
            for each in self.ballast:
                ray.kill(each)

    def remove_when(self, ready: Callable[[], object]) -> threading.Thread:
        """Kill the node as soon as a condition holds."""

        def watch() -> None:
            end = time.monotonic() + 120
            while not ready() and time.monotonic() < end:
                time.sleep(0.01)
            self.remove()

        thread = threading.Thread(target=watch)
        thread.start()
        return thread


def wait_for_nodes(count: int) -> None:
    """Wait until the cluster has so many nodes."""
    end = time.monotonic() + 60
    while cluster.count_nodes() != count and time.monotonic() < end:
        time.sleep(0.1)
    assert cluster.count_nodes() == count


@pytest.fixture
def second(ray_cluster: Head, digits: Path, request: pytest.FixtureRequest) -> Iterator[Second]:
    """The second node; one of the first's two CPUs is taken unless a test says more."""
    node = Second(ray_cluster, getattr(request, "param", 1))
    yield node
    node.remove()
    wait_for_nodes(1)


def test_a_node_lost_in_training(second: Second, digits: Path, undisturbed: dict[str, torch.Tensor], tmp_path: Path) -> None:
    assert [cluster.threads_each(workers) for workers in (1, 2, 3)] == [2, 1, 1]  # of nodes of two CPUs and one: no worker is spread over both
    with pytest.raises(ValueError, match="2 workers need 3 CPUs each, but the cluster's nodes have (2, 1|1, 2)"):
        train.run(config(digits, tmp_path / "wide", threads=3, tracking="none"))
    with pytest.raises(ValueError, match="is a local file, but the cluster has 2 nodes"):
        train.run(config(digits, tmp_path / "refused", tracking=f"sqlite:///{tmp_path}/mlflow.db"))
    assert not list((tmp_path / "refused").iterdir())
    thread = second.remove_when(lambda: list(tmp_path.glob("runs/*/progress.jsonl")) and wait_for_epoch(tmp_path / "runs"))
    result = train.run(config(digits, tmp_path / "runs", checkpoint_steps=2))
    thread.join()
    assert "RayTrainWorker" in second.lost and equal(final(tmp_path / "runs" / result["run_id"]), undisturbed)


@pytest.mark.parametrize("second", [2], indirect=True)  # so trials run on the second node alone
def test_a_node_lost_in_a_search(second: Second, digits: Path, tmp_path: Path) -> None:
    thread = second.remove_when(lambda: (tmp_path / "s" / "trial-0000" / "judged.jsonl").exists())
    line = f"tune dah --dataset {digits} --source typeset --target handwritten --bits 16 --per-class 4 --epochs 4 --steps-per-epoch 20 --trials 2"
    assert main([*line.split(), *f"--study s --storage {tmp_path} --stop none --tracking none --threads 1 --concurrency 2".split()]) == 0
    thread.join()
    ended = [json.loads(each.read_text()) for each in sorted(tmp_path.glob("s/*/trial.json"))]
    assert "ImplicitFunc" in second.lost and [each["epoch"] for each in ended] == [4, 4]


def test_a_node_lost_in_encoding(second: Second, digits: Path, tmp_path: Path) -> None:
    run = train.run(config(digits, tmp_path, workers=0, epochs=1))["run_id"]

    def coded(name: str, workers: int) -> dict[str, bytes]:
        encode.run(encode.Config(run, str(digits), out=str(tmp_path / name), storage=str(tmp_path), workers=workers))
        table, codes, _ = read_codes(tmp_path / name)
        assert len(set(table["origin"].to_pylist())) == len(table) == len(codes)
        return dict(zip(table["origin"].to_pylist(), map(bytes, codes), strict=True))

    thread = second.remove_when(lambda: list(tmp_path.glob(".disturbed.*/*.parquet")))
    disturbed = coded("disturbed", 2)
    thread.join()
    assert "ray::" in second.lost and disturbed == coded("here", 0)


def test_a_node_lost_in_embedding(second: Second, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "batch_rows", lambda shape: 1)  # parts of 16 images

    def embedded(name: str, workers: int) -> pa.Table:
        embed.run(embed.Config(str(photographs), out=str(tmp_path / name), size=32, workers=workers))
        parts = [pq.read_table(path) for path in sorted((tmp_path / name).rglob("*.parquet"))]
        assert len(parts) > 10
        return pa.concat_tables(parts)

    thread = second.remove_when(lambda: list(tmp_path.glob(".disturbed.embedding/*/*/*.parquet")))
    disturbed = embedded("disturbed", 2)
    thread.join()
    here, rows = embedded("here", 0), sum(part.rows for of in Manifest.read(photographs).domains.values() for part in of.splits.values())
    assert "ray::" in second.lost and len(disturbed) == rows
    assert all(disturbed[name].equals(here[name]) for name in ("id", "row", "label"))
    found, wanted = (np.stack(table["feature"].to_numpy()) for table in (disturbed, here))
    np.testing.assert_allclose(found, wanted, atol=1e-4)  # by one thread and by several
