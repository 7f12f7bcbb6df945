"""Codes per second of `encode` on a cluster of two nodes of one CPU each, beside the encoder alone on the same cores.

python -m tests.benchmarks.encoding [--rows 60000] [--size 28]
"""

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import torch

from data.decoding import batch_rows, read_decoded
from data.manifest import Manifest
from pipelines import encode, ingest, train
from pipelines.registry.encoders import Encoder, open_encoder
from pipelines.retrieval.code_files import read_codes
from tests.servers import ROOT


def alone(encoder: Encoder, x: np.ndarray) -> float:
    """Seconds that the encoder takes for rows in memory, in batches, with as many threads as the cluster has CPUs."""
    torch.set_num_threads(2)
    begun = time.perf_counter()
    size = batch_rows(x.shape[1:])
    for start in range(0, len(x), size):
        encoder(x[start : start + size])
    return time.perf_counter() - begun


def main() -> None:
    """Print rows a second of both, three times in turn, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--size", type=int, default=28)
    options = parser.parse_args()
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        dataset, mnist = str(root / "set"), str(ROOT.parent / "shared" / "data" / "mnist.npz")
        ingest.run(ingest.Config(mnist, dataset=dataset, domain="mnist", size=options.size, limit=options.rows))
        made = train.run(train.make_config({
            "method": "dpsh", "dataset": dataset, "source": "mnist", "target": "mnist", "epochs": 1, "steps_per_epoch": 2, "workers": 0,
            "tracking": "none", "plots": False, "storage": str(root / "runs"),
        }))  # fmt: skip
        manifest = Manifest.read(root / "set")
        x = torch.cat([part.x for part in read_decoded(root / "set", manifest, "mnist", "train")]).numpy()
        encoder = open_encoder(made["run_id"], str(root / "runs"), "")
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        nodes.add_node(num_cpus=1)
        import ray

        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
        print(f"{psutil.cpu_count()} cores, {len(x):,} rows of {manifest.shape}, {made['bits']} bits")
        for turn in range(3):
            seconds = alone(encoder, x)
            begun = time.time()
            out = root / f"codes-{turn}"
            encode.run(encode.Config(made["run_id"], str(root / "set"), out=str(out), split="train", storage=str(root / "runs"), workers=2))
            whole = time.time() - begun
            written = sorted(part.stat().st_mtime for part in out.iterdir())
            table, _, _ = read_codes(out)
            assert max(Counter(table["origin"].to_pylist()).values()) == 1 and len(table) == len(x)
            rows = (len(written) - 2) / len(written) * len(x)  # both encoders' first parts hold their start
            steady = rows / (written[-1] - written[1])
            print(
                f"encoder alone {len(x) / seconds:,.0f} rows/s; encode {len(x) / whole:,.0f} rows/s with its start of {written[0] - begun:.1f} s, "
                f"{steady:,.0f} after it; ratio {steady * seconds / len(x):.2f}, with the start {seconds / whole:.2f}"
            )
        ray.shutdown()
        nodes.shutdown()


if __name__ == "__main__":
    main()
