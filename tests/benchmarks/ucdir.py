"""UCDIR's Table 3 on two domains, both directions of one training: P@50, P@100, P@200 by features, and by codes of the head and of ITQ.

Run: python -m tests.benchmarks.ucdir --dataset FOLDER --source usps --target mnist [--bits 64] [--seeds 0] [--epochs 10] [--rows 0,1,2,3]
"""

import argparse
import contextlib
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data.manifest import Manifest
from models.methods.ucdir import UCDIR
from pipelines import train
from pipelines.console.cli import set_default_environment
from pipelines.reproduction.cosine import unit_rows
from pipelines.reproduction.reuse import result_of
from pipelines.retrieval import evaluation, metrics
from pipelines.retrieval.metrics import Encoded
from pipelines.training.restore import load_method

KS = (50, 100, 200)
Figures = dict[str, dict[str, float]]


def by_features(features: dict[str, np.ndarray], splits: dict[str, Encoded], pairs: list[tuple[str, str]]) -> Figures:
    """P@k by cosine, for each pair of a query and a database split."""
    return {
        f"{query} in {database}": metrics.cosine_precisions(features[query], splits[query].labels, features[database], splits[database].labels)
        for query, database in pairs
    }


def by_codes(codes: dict[str, np.ndarray], splits: dict[str, Encoded], pairs: list[tuple[str, str]]) -> Figures:
    """P@k by Hamming distance, for each pair of a query and a database split."""
    return {
        f"{query} in {database}": metrics.summarise(
            metrics.distance_histograms(codes[query], splits[query].labels, codes[database], splits[database].labels), KS
        )
        for query, database in pairs
    }  # fmt: skip


def measured(folder: Path, root: Path, manifest: Manifest, splits: dict[str, Encoded], pairs: list[tuple[str, str]]) -> dict[str, Figures]:
    """A run's figures by features, by the head's codes, and by ITQ's."""
    method = load_method(folder, manifest)
    assert isinstance(method, UCDIR)
    found: dict[str, Figures] = {}
    for kind in ("head", "itq"):
        method.config = replace(method.config, codes=kind)
        encode, also = evaluation.MethodEncoder(method), {} if found else evaluation.features_of(method)
        encoded = {name: evaluation.encode_split(encode, root, manifest, name, **also) for name in splits}
        if also:
            found["features"] = by_features({name: each.more["features"] for name, each in encoded.items()}, splits, pairs)
        codes = {name: each.codes for name, each in encoded.items()}
        found[f"{method.bits}-bit codes, {kind}"] = by_codes(codes, splits, pairs)
    return found


def show(name: str, found: list[dict[str, Figures]]) -> None:
    """Print a row's means over the seeds: of each direction, and of both."""
    for how in found[0]:
        directions = list(found[0][how])
        means = [[statistics.mean(each[how][direction][f"precision_at_{k}"] for each in found) for k in KS] for direction in directions]
        cells = [" ".join(f"{100 * value:5.1f}" for value in each) for each in [*means, [statistics.mean(column) for column in zip(*means, strict=True)]]]
        print(f"{name:<24}{how:<22}" + "".join(f"{cell:>26}" for cell in cells), flush=True)


def main() -> None:
    """Train what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for option, default in {"dataset": "", "source": "", "target": "", "seeds": "0", "rows": "0,1,2,3", "storage": "runs/ucdir"}.items():
        parser.add_argument(f"--{option}", default=default)
    for option, default in {"bits": 64, "epochs": 10, "steps-per-epoch": 0, "threads": 0}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    given = parser.parse_args()
    set_default_environment()
    manifest = Manifest.read(Path(given.dataset))
    names = [f"{domain}/{split}" for domain in (given.source, given.target) for split in ("test", "train")]
    root = Path(given.dataset)
    splits = {name: evaluation.encode_split(lambda x: x, root, manifest, name) for name in names}  # the codes are the rows themselves
    pairs = [(f"{given.source}/test", f"{given.target}/train"), (f"{given.target}/test", f"{given.source}/train")]
    print(f"{'P@50, 100, 200':<46}" + "".join(f"{name:>26}" for name in [*(f"{a} in {b}" for a, b in pairs), "mean"]))
    show("raw pixels", [{"cosine": by_features({name: unit_rows(each.codes) for name, each in splits.items()}, splits, pairs)}])
    for row in (UCDIR.ablation[int(number)] for number in given.rows.split(",")):
        found = []
        for seed in map(int, given.seeds.split(",")):
            options: dict[str, Any] = {
                "method": "ucdir", "dataset": given.dataset, "source": given.source, "target": given.target, "bits": given.bits, "seed": seed,
                "epochs": given.epochs, "steps_per_epoch": given.steps_per_epoch, "workers": 0, "threads": given.threads,
                "storage": given.storage, "tracking": "none", "plots": False,
            }  # fmt: skip
            with contextlib.redirect_stdout(sys.stderr):
                result = result_of(train.make_config(options | row.changes))
            found.append(measured(Path(given.storage) / result["run_id"], root, manifest, splits, pairs))
        show(row.name, found)


if __name__ == "__main__":
    main()
