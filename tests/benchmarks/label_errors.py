"""How many of the errors of adapted classifiers do classifiers that were trained on the target's own labels make, too?

Run: python -m tests.benchmarks.label_errors --storage FOLDER --adapted RUN,RUN,RUN --own RUN,RUN,RUN
The runs are of one dataset and target. What the second kind gets wrong as well is bound by the labels and the network rather than by the adaptation.
"""

import argparse
from pathlib import Path

import numpy as np

from data.manifest import Manifest
from pipelines.console.cli import set_default_environment
from pipelines.retrieval import evaluation
from pipelines.training import runs
from pipelines.training.restore import load_method


def errors(folder: Path) -> np.ndarray:
    """(queries,) bool: the labelled test images of a run's target that its classifier gets wrong."""
    config = runs.read_config(folder)
    root = Path(config["dataset"])
    manifest = Manifest.read(root)
    method = load_method(folder, manifest)
    encode = evaluation.MethodEncoder(method)
    references = evaluation.encode_split(encode, root, manifest, f"{config['source']}/train")
    evaluation.set_references(method, references, references.labels)
    query, _ = evaluation.protocol_splits(manifest, config["source"], config["target"], "target")
    found = evaluation.encode_split(encode, root, manifest, query, guesses=lambda x, _: method.classify(x).argmax(1))
    return np.asarray((found.more["guesses"] != found.labels) & (found.labels >= 0))


def main() -> None:
    """Print the errors of each run, and how many of the first kind the second kind makes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default="runs")
    parser.add_argument("--adapted", required=True, help="ids of runs, with commas")
    parser.add_argument("--own", required=True, help="ids of runs whose source and target are the same domain, with commas")
    given = parser.parse_args()
    set_default_environment()
    wrong = {kind: [errors(runs.find_run(each, given.storage)) for each in getattr(given, kind).split(",")] for kind in ("adapted", "own")}
    for kind, found in wrong.items():
        print(f"{kind}: errors {', '.join(str(int(each.sum())) for each in found)} of {len(found[0]):,}")
    some, every = np.any(wrong["own"], 0), np.all(wrong["own"], 0)
    for place, found in enumerate(wrong["adapted"]):
        by_some, by_all = int((found & some).sum()), int((found & every).sum())
        print(f"adapted run {place}: of {int(found.sum())} errors {by_some} are made by some of the others, {by_all} by all")
    shared = np.all(wrong["adapted"], 0)
    by_some, by_all = int((shared & some).sum()), int((shared & every).sum())
    print(f"all adapted runs make {int(shared.sum())} errors; of these some of the others make {by_some}, all {by_all}")


if __name__ == "__main__":
    main()
