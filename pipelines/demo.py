"""Command: the whole pipeline on the embedded digits or on photographs: ingest, train a baseline and a method, register, promote, encode, index, search."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data.catalog import open_source
from data.filesystem import is_local, to_path
from models.registry import METHODS, find_method
from pipelines import embed, encode, index, ingest, promote, register, search, serve, train
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
    True: ("source-only", "dpsh", "the hash loss on the source alone"), False: ("itq", "itq", "principal components, rotated"),
}  # fmt: skip


@dataclass
class Config:
    """Options of ``hashbridge demo``."""

    method: str = option("", "the method to show beside source-only, or beside ITQ if it needs no labels (default: igan; dah on photographs)", ("", *METHODS))
    photographs: str = option("", "folder of <domain>/<class>/<file>: show these instead of the embedded digits")
    source: str = option("", "photographs: the domain with labels, in which to find images (default: photo, else the first)")
    target: str = option("", "photographs: the domain without, to search with (default: sketch, else the next)")
    out: str = option("runs/demo", "folder of everything that the demo makes; what an earlier demo left there is removed")
    epochs: int = option(0, "epochs of the method; the baseline takes a sixth (default: 30; 10 on photographs)")
    steps: int = option(100, "steps of an epoch")
    seed: int = option(0, "seed")
    serve: bool = option(False, "at the end serve the index with a page, until interrupted")
    port: int = option(8000, "port of the page")

    def __post_init__(self) -> None:
        if not is_local(to_path(self.out)):
            raise ValueError(f"--out is {self.out}, but must be a local folder")
        if (self.source or self.target) and not self.photographs:
            raise ValueError("--source and --target choose domains of --photographs: give its folder")


class Shown(NamedTuple):
    """What a demo shows: the dataset of images, the one that methods train on, two of its domains, and a method with its settings."""

    images: Path
    dataset: Path
    source: str
    target: str
    method: str
    epochs: int
    settings: dict[str, Any]


def _digits(config: Config, out: Path) -> Shown:
    print("1. ingest: typeset digits with labels, real handwritten digits without")
    ingest.run(ingest.Config("digits=", dataset=str(out / "digits"), size=SIZE, seed=config.seed))
    method = config.method or "igan"
    small = SMALL if hasattr(find_method(method).Config, "per_class") else {}
    return Shown(out / "digits", out / "digits", "typeset", "handwritten", method, config.epochs or 30, small | SETTINGS.get(method, {}))


def _photographs(config: Config, out: Path) -> Shown:
    """Ingest and embed two domains of a folder.

    Raises:
        ValueError: it does not have them.
    """
    readers = {reader.domain: reader for reader in open_source(config.photographs, None, Path(ingest.Config.cache))}
    order = sorted(readers, key=lambda name: (name != "photo", name == "sketch", name))
    source = config.source or order[0]
    others = [name for name in order if name != source]
    target = config.target or ("sketch" if "sketch" in others else (others or [""])[0])
    for name in (source, target):
        if name not in readers or source == target:
            raise ValueError(f"{config.photographs} has the domains {', '.join(sorted(readers))}: give two of them by --source and --target")
    print(f"1. ingest {source} with labels and {target} without, and embed them by EfficientNet-Lite0")
    for name in (source, target):
        share = 0.0 if "test" in readers[name].counts else 0.2
        ingest.run(ingest.Config(config.photographs, dataset=str(out / "images"), domain=name, size=224, test_share=share, seed=config.seed))
    embed.run(embed.Config(str(out / "images"), out=str(out / "features")))
    return Shown(out / "images", out / "features", source, target, config.method or "dah", config.epochs or 10, {})


def _train(method: str, epochs: int, workers: int, config: Config, shown: Shown, runs: Path, settings: dict[str, Any]) -> dict[str, Any]:
    return train.run(train.make_config({
        "method": method, "dataset": str(shown.dataset), "source": shown.source, "target": shown.target, "epochs": epochs,
        "steps_per_epoch": config.steps, "storage": str(runs), "seed": config.seed, "tracking": f"sqlite:///{runs.resolve()}/mlflow.db",
        "workers": workers, "threads": 1,  # a second thread gains nothing on images this small
    } | settings))  # fmt: skip


def _needs_labels(name: str) -> bool:
    """Whether a method trains on the source's labels."""
    method = find_method(name)
    return method(method.Config(), (1, 32, 32), 10, 64).wants.source_labels


def _table(results: dict[str, dict[str, Any]], title: str) -> None:
    columns = ("accuracy", "cross/map", "cross/precision_at_100", "target/map", "target/precision_at_100")
    print(f"\n{title:<24}" + "".join(f"{name:>26}" for name in columns))
    for name, result in results.items():
        figures = [result["metrics"].get(each) for each in columns]
        print(f"{name:<24}" + "".join(f"{'-' if each is None else format(each, '.4f'):>26}" for each in figures))


def run(config: Config) -> dict[str, Any]:
    """Run the demo; returns both results, the model version and the search's answers."""
    started, out = time.monotonic(), Path(config.out)
    runs = out / "runs"
    if out.exists():
        if any(out.iterdir()) and not any((out / name / "manifest.json").is_file() for name in ("digits", "images")):
            raise ValueError(f"{out} contains files that are not from a demo: give another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    shown = (_photographs if config.photographs else _digits)(config, out)
    title = f"{shown.source} -> {shown.target}"
    labels = _needs_labels(shown.method)
    name, baseline, what = BASELINES[labels]
    small = {key: value for key, value in SMALL.items() if key in shown.settings}
    print(f"\n2. {name}: {what}")
    results = {name: _train(baseline, max(1, shown.epochs // 6), 0, config, shown, runs, small)}
    print(f"\n3. {shown.method}: learns from {shown.target}, without its labels" + ("" if labels else f" or those of {shown.source}"))
    results[shown.method] = _train(shown.method, shown.epochs, 1, config, shown, runs, shown.settings)
    _table(results, title)
    print("\n4. register, promote")
    uri = f"sqlite:///{runs.resolve()}/mlflow.db"
    run_id = results[shown.method]["run_id"]
    version = register.run(register.Config(run_id, name=NAME, storage=str(runs), tracking=uri))
    promote.run(promote.Config(NAME, storage=str(runs), tracking=uri))
    print(f"\n5. encode {shown.source}, index it, search with {shown.target}")
    model = f"models:/{NAME}@champion"
    encode.run(encode.Config(model, str(shown.images), out=str(out / "codes"), domain=shown.source, split="train", storage=str(runs), tracking=uri))
    index.run(index.Config(str(out / "codes"), out=str(out / f"{shown.source}.index")))
    queries = f"{shown.images}#{shown.target}/test#0-4"
    found = search.run(search.Config(str(out / f"{shown.source}.index"), queries, model, 5, str(out / "search.png"), str(runs), uri))
    seconds = time.monotonic() - started
    _table(results, title)
    plots = runs / run_id / "plots"
    print(f"\npictures: {plots}/retrievals.png, precision_recall.png, codes_tsne.png; {out}/search.png")
    print(f"model: {model} (version {version['version']}), tracked in {uri}; {seconds:.0f} s in all")
    if config.serve:
        print(f"\n6. serve {shown.source}: drop an image of {shown.target} on the page")
        serve.run(serve.Config(str(out / f"{shown.source}.index"), model, port=config.port, storage=str(runs), tracking=uri))
    return {"results": results, "model": version, "search": found, "pictures": str(plots), "seconds": seconds}
