"""Unsupervised hashes of one domain, in the shape of IDR-AE's Table 1: mAP, P@1000, and how balanced and independent the bits are.

Run: python -m tests.benchmarks.hashes --dataset FOLDER --target mnist [--bits 32,64,128] [--seeds 0,1,2] [--epochs 10] [--storage runs/hashes]
"""

import argparse
import contextlib
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

from data.manifest import Manifest
from models.methods.idr_ae import IDRAE
from pipelines import train
from pipelines.console.cli import set_default_environment
from pipelines.reproduction.reuse import result_of
from pipelines.retrieval import evaluation
from pipelines.training.restore import load_method

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSH": ("lsh", {}), "SpecHash": ("spectral", {}), "ITQ": ("itq", {}), "KMH": ("kmeans-hash", {}),
} | {row.name.split()[0]: ("idr-ae", row.changes) for row in IDRAE.ablation}  # fmt: skip


def balance(bits: np.ndarray) -> tuple[float, float, float]:
    """Smallest and largest mean of a bit, and the mean absolute correlation of two bits; a bit that never changes correlates wholly.

    Args:
        bits: (n, bits) in {0, 1}.
    """
    means, moves = bits.mean(0), bits.std(0) > 0
    correlation = np.ones((bits.shape[1],) * 2)
    correlation[np.ix_(moves, moves)] = np.corrcoef(bits[:, moves].T)
    pairs = np.abs(correlation[np.triu_indices(len(correlation), 1)])
    return float(means.min()), float(means.max()), float(pairs.mean())


def measured(name: str, given: argparse.Namespace, bits: int, seed: int) -> dict[str, float]:
    """A row's figures for a code length and a seed; its run is trained where it is not there yet."""
    method, own = ROWS[name]
    config = train.make_config({
        "method": method, "dataset": given.dataset, "target": given.target, "bits": bits, "seed": seed, "epochs": given.epochs,
        "workers": 0, "threads": given.threads, "storage": given.storage, "tracking": "none", "plots": False,
    } | own)  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        result = result_of(config)
    root = Path(given.dataset)
    manifest = Manifest.read(root)
    encode = evaluation.MethodEncoder(load_method(Path(given.storage) / result["run_id"], manifest))
    codes = evaluation.encode_split(encode, root, manifest, f"{given.target}/train").codes
    low, high, correlation = balance(np.unpackbits(codes, axis=1).astype(np.float32))
    figures = result["metrics"]
    return {
        "map": figures["target/map"], "p@1000": figures.get("target/precision_at_1000", float("nan")), "p@50": figures["target/precision_at_50"],
        "lowest": low, "highest": high, "correlation": correlation, "seconds": result["seconds"],
    }  # fmt: skip


def main() -> None:
    """Print the table of each code length."""
    parser = argparse.ArgumentParser(description=__doc__)
    for option, default in {"dataset": "", "target": "", "bits": "32,64,128", "seeds": "0,1,2", "storage": "runs/hashes", "rows": ",".join(ROWS)}.items():
        parser.add_argument(f"--{option}", default=default)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    set_default_environment()
    try:
        for bits in map(int, given.bits.split(",")):
            shown = {name: [measured(name, given, bits, int(seed)) for seed in given.seeds.split(",")] for name in given.rows.split(",")}
            print(f"\n{given.target}, {bits} bits, query: test, database: train, seeds {given.seeds}: means (deviation of mAP)")
            print(f"{'':<10}{'mAP':>16}{'P@50':>9}{'P@1000':>9}{'bit means':>14}{'|correlation|':>15}{'seconds':>9}")
            for name, each in shown.items():
                mean = {key: statistics.mean(one[key] for one in each) for key in each[0]}
                spread = statistics.stdev(one["map"] for one in each) if len(each) > 1 else 0.0
                means = f"{min(one['lowest'] for one in each):.2f}..{max(one['highest'] for one in each):.2f}"
                print(
                    f"{name:<10}{mean['map']:>8.4f} ({spread:.4f}){mean['p@50']:>9.4f}{mean['p@1000']:>9.4f}{means:>14}{mean['correlation']:>15.3f}"
                    f"{mean['seconds']:>9.0f}", flush=True,
                )  # fmt: skip
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
