"""Methods on pairs of a dataset's domains: accuracy, mAP and P@50 of the last epoch, means over seeds, with nothing chosen by the target's labels.

Run: python -m tests.benchmarks.transfer --dataset FOLDER [--pairs photo:sketch,sketch:photo] [--rows dah,igan] [--bits 64] [--seeds 0,1,2]
What is trained already is not trained again; several processes may train different rows or seeds in one --storage at a time.
"""

import argparse
import contextlib
import itertools
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score

from data.filesystem import write_text
from data.manifest import Manifest
from pipelines import ablate, train
from pipelines.console.cli import set_default_environment
from pipelines.retrieval import evaluation
from pipelines.retrieval.metrics import Encoded, cosine_precisions, labelled
from tests.benchmarks.ucdir import unit_rows

FLOAT, ORACLE = "features by cosine", "SuH (oracle)"
ROWS: dict[str, dict[str, Any]] = {
    "PCA": {"method": "pca"},
    "LSH": {"method": "lsh"},
    "ITQ": {"method": "itq"},
    "IDR-AE": {"method": "idr-ae", "epochs": 10},
    "UCDIR": {"method": "ucdir", "epochs": 10},
    "ProtoOT": {"method": "protoot", "epochs": 10},
    "source-only": {"method": "dpsh", "epochs": 10},
    "DAH": {"method": "dah", "epochs": 10},
    "CPH": {"method": "cph", "epochs": 10},
    "IGAN": {"method": "igan", "epochs": 10},
    "IGAN features": {"method": "igan", "preset": "features"},
} | {name.upper(): {"method": name, "epochs": 10} for name in ("tca", "jda", "gfk", "coral", "dan", "dann", "cdan", "mstn", "adda", "drcn")} | {
    "SGH": {"method": "sgh", "epochs": 10},
    "SSDH": {"method": "ssdh", "epochs": 10},
    "BA": {"method": "ba"},
    "BDNN": {"method": "bdnn"},
    "ID": {"method": "id", "epochs": 10},
    "ProtoNCE": {"method": "protonce", "epochs": 10},
    "CDS": {"method": "cds", "epochs": 10},
    "PCS": {"method": "pcs", "epochs": 10},
    ORACLE: {"method": "dpsh", "epochs": 10},
}  # fmt: skip
HEAD = "| | accuracy | mAP `cross` | `target` | P@50 `cross` | `target` |\n|---|---|---|---|---|---|"
COLUMNS = ("accuracy", "cross/map", "target/map", "cross/precision_at_50", "target/precision_at_50")


def trained(row: str, pair: tuple[str, str], seed: int, given: argparse.Namespace) -> dict[str, float]:
    """A row's figures on a pair for a seed; its run is trained where it is not there yet."""
    source, target = pair if row != ORACLE else (pair[1], pair[1])
    config = train.make_config({
        "dataset": given.dataset, "source": source, "target": target, "bits": given.bits, "seed": seed, "workers": 0, "threads": given.threads,
        "storage": str(Path(given.storage) / f"{given.bits} {row} {source} {target} {seed}".replace(" ", "-")), "tracking": "none", "plots": False,
    } | ROWS[row])  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        return {name: float(value) for name, value in ablate.result_of(config)["metrics"].items()}


def by_cosine(root: Path, manifest: Manifest, pair: tuple[str, str]) -> dict[str, float]:
    """Figures of the dataset's features themselves."""
    found: dict[str, float] = {}
    splits = {name: evaluation.encode_split(unit_rows, root, manifest, name) for name in (f"{pair[1]}/test", *(f"{domain}/train" for domain in pair))}
    for name, domain in (("cross", pair[0]), ("target", pair[1])):
        queries, database = splits[f"{pair[1]}/test"], splits[f"{domain}/train"]
        found |= {f"{name}/{key}": value for key, value in cosine_precisions(queries.codes, queries.labels, database.codes, database.labels).items()}
        found[f"{name}/map"] = mean_average_precision(queries, database)
    return found


def mean_average_precision(queries: Encoded, database: Encoded) -> float:
    """mAP by cosine, over the labelled queries of classes that the database has; its unlabelled rows are left out."""
    (asked, wanted), (rows, labels) = (labelled(each.codes, each.labels) for each in (queries, database))
    scores, alike = asked @ rows.T, wanted[:, None] == labels[None, :]
    return float(np.mean([average_precision_score(same, score) for same, score in zip(alike, scores, strict=True) if same.any()]))


def columns(found: list[dict[str, float]]) -> dict[str, list[float]]:
    """The values of each column."""
    return {column: [each[column] for each in found if column in each] for column in COLUMNS}


def line(row: str, cells: dict[str, list[float]]) -> str:
    """A row of the Markdown table: means, and the deviation of the mAP across domains."""
    shown = []
    for column in COLUMNS:
        values = cells.get(column, [])
        spread = f" ±{statistics.stdev(values):.3f}" if column == "cross/map" and len(values) > 1 else ""
        shown.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
    return f"| {row} | " + " | ".join(shown) + " |"


def report(found: dict[str, dict[tuple[str, str], list[dict[str, float]]]], pairs: list[tuple[str, str]], given: argparse.Namespace) -> str:
    """The tables as Markdown: of each pair, of both directions of two domains where they are there, and of all pairs."""
    both = [((a, b), (b, a)) for a, b in itertools.combinations(dict.fromkeys(itertools.chain(*pairs)), 2) if (a, b) in pairs and (b, a) in pairs]
    groups = {f"{a} -> {b}": [(a, b)] for a, b in pairs} | {f"{one[0]} <-> {one[1]}": [one, other] for one, other in both} | {f"all {len(pairs)}": pairs}
    text = []
    for name, group in groups.items():
        text.append(f"\n{name}, {given.bits} bits, seeds {given.seeds}, {Path(given.dataset).name}\n\n{HEAD}")
        for row, of in found.items():
            seeds = list(zip(*(of[pair] for pair in group), strict=True))  # for each seed, the figures of the group's pairs
            means = [{key: statistics.mean(each[key] for each in one) for key in one[0]} for one in seeds]
            text.append(line(row, columns(means)))
    return "\n".join(text)


def main() -> None:
    """Train what is not there yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--pairs", default="", help="source:target, ... (default: all)")
    parser.add_argument("--rows", default="", help=f"with commas (default: all): {FLOAT}, {', '.join(ROWS)}")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--storage", default="runs/transfer")
    parser.add_argument("--out", default="", help="file that the tables are written to, too")
    for option, default in {"bits": 64, "threads": 0}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    given = parser.parse_args()
    set_default_environment()
    root = Path(given.dataset)
    manifest = Manifest.read(root)
    every = list(itertools.permutations(manifest.domains, 2))
    pairs = [(a, b) for a, _, b in (each.partition(":") for each in given.pairs.split(","))] if given.pairs else every
    rows = given.rows.split(",") if given.rows else [FLOAT, *ROWS]
    if {*rows} - {FLOAT, *ROWS} or {*pairs} - {*every}:
        parser.error(f"no such rows or pairs: rows are {FLOAT}, {', '.join(ROWS)}; domains are {', '.join(manifest.domains)}")
    seeds = list(map(int, given.seeds.split(",")))
    found: dict[str, dict[tuple[str, str], list[dict[str, float]]]] = {row: {} for row in rows}
    for pair, row in itertools.product(pairs, rows):
        found[row][pair] = [by_cosine(root, manifest, pair)] * len(seeds) if row == FLOAT else [trained(row, pair, seed, given) for seed in seeds]
        print(f"{' -> '.join(pair)}: {line(row, columns(found[row][pair]))}", file=sys.stderr, flush=True)
    text = report(found, pairs, given)
    print(text)
    if given.out:
        write_text(Path(given.out), text + "\n")


if __name__ == "__main__":
    main()
