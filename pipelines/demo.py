"""Command: the whole pipeline on the embedded digits: ingest, train a baseline and a method, register, promote, encode, index, search."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.filesystem import is_local, to_path
from models.registry import METHODS, find_method
from pipelines import encode, index, ingest, promote, register, search, train
from pipelines.console.config import option

NAME = "hashbridge-demo"
SIZE = 20  # pixels: larger images train longer and end no better here
SMALL = {"per_class": 5}  # a batch of 50 images of each domain
SETTINGS: dict[str, dict[str, Any]] = {  # chosen with the labels of the handwritten digits: an oracle's choice, for show
    "igan": {  # without its generators, which cost time and add nothing here
        "adversarial_weight": 0.0, "l1_weight": 0.0, "balance_weight": 3.0, "threshold": 0.95, "average": 0.97,
    },
}
BASELINES = {  # baseline by whether the method needs source labels
    True: ("source-only", "dpsh", "the hash loss on typeset digits alone"), False: ("itq", "itq", "principal components, rotated"),
}  # fmt: skip


@dataclass
class Config:
    """Options of ``hashbridge demo``."""

    method: str = option("igan", "the method to show beside source-only, or beside ITQ if it needs no labels", tuple(METHODS))
    out: str = option("runs/demo", "folder of everything that the demo makes; what an earlier demo left there is removed")
    epochs: int = option(30, "epochs of the method; the baseline takes a sixth")
    steps: int = option(100, "steps of an epoch")
    seed: int = option(0, "seed")

    def __post_init__(self) -> None:
        if not is_local(to_path(self.out)):
            raise ValueError(f"--out is {self.out}, but must be a local folder")


def _train(method: str, epochs: int, workers: int, config: Config, dataset: Path, runs: Path) -> dict[str, Any]:
    small = SMALL if hasattr(find_method(method).Config, "per_class") else {}
    return train.run(train.make_config({
        "method": method, "dataset": str(dataset), "source": "typeset", "target": "handwritten", "epochs": epochs,
        "steps_per_epoch": config.steps, "storage": str(runs), "seed": config.seed, "tracking": f"sqlite:///{runs.resolve()}/mlflow.db",
        "workers": workers, "threads": 1,  # a second thread gains nothing on images this small
    } | small | SETTINGS.get(method, {})))  # fmt: skip


def _needs_labels(name: str) -> bool:
    """Whether a method trains on the source's labels."""
    method = find_method(name)
    return method(method.Config(), (1, 32, 32), 10, 64).wants.source_labels


def _table(results: dict[str, dict[str, Any]]) -> None:
    columns = ("accuracy", "cross/map", "cross/precision_at_100", "target/map", "target/precision_at_100")
    print(f"\n{'typeset -> handwritten':<24}" + "".join(f"{name:>26}" for name in columns))
    for name, result in results.items():
        figures = [result["metrics"].get(each) for each in columns]
        print(f"{name:<24}" + "".join(f"{'-' if each is None else format(each, '.4f'):>26}" for each in figures))


def run(config: Config) -> dict[str, Any]:
    """Run the demo; returns both results, the model version and the search's answers."""
    started, out = time.monotonic(), Path(config.out)
    dataset, runs = out / "digits", out / "runs"
    if out.exists():
        if any(out.iterdir()) and not dataset.is_dir():
            raise ValueError(f"{out} contains files that are not from a demo: give another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    print("1. ingest: typeset digits with labels, real handwritten digits without")
    ingest.run(ingest.Config("digits", dataset=str(dataset), size=SIZE, seed=config.seed))
    labels = _needs_labels(config.method)
    shown, baseline, what = BASELINES[labels]
    print(f"\n2. {shown}: {what}")
    results = {shown: _train(baseline, max(1, config.epochs // 6), 0, config, dataset, runs)}
    print(f"\n3. {config.method}: learns from the handwritten digits, without their labels" + ("" if labels else " or those of the typeset ones"))
    results[config.method] = _train(config.method, config.epochs, 1, config, dataset, runs)
    _table(results)
    print("\n4. register, promote")
    uri = f"sqlite:///{runs.resolve()}/mlflow.db"
    run_id = results[config.method]["run_id"]
    version = register.run(register.Config(run_id, name=NAME, storage=str(runs), tracking=uri))
    promote.run(promote.Config(NAME, storage=str(runs), tracking=uri))
    print("\n5. encode the typeset digits, index them, search with handwritten ones")
    model = f"models:/{NAME}@champion"
    encode.run(encode.Config(model, str(dataset), out=str(out / "codes"), domain="typeset", split="train", storage=str(runs), tracking=uri))
    index.run(index.Config(str(out / "codes"), out=str(out / "typeset.index")))
    queries = f"{dataset}#handwritten/test#0-4"
    found = search.run(search.Config(str(out / "typeset.index"), queries, model, 5, str(out / "search.png"), str(runs), uri))
    seconds = time.monotonic() - started
    _table(results)
    plots = runs / run_id / "plots"
    print(f"\npictures: {plots}/retrievals.png, precision_recall.png, codes_tsne.png; {out}/search.png")
    print(f"model: {model} (version {version['version']}), tracked in {uri}; {seconds:.0f} s in all")
    return {"results": results, "model": version, "search": found, "pictures": str(plots), "seconds": seconds}
