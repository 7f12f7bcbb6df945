"""Photographs on a GPU: training, encoding and evaluation beside the same networks on tensors that lie on the GPU; two runs that share it.

python -m tests.benchmarks.gpu [--dataset FOLDER] [--repeat 10] [--methods dah,ucdir] [--network torchvision:resnet50] [--precision bf16] [--cpu]

It needs simplejpeg, but no mlflow, and with --dataset no ray; of a dataset the first two domains are taken. Without one, the images below
--photographs, which holds <domain>/<class>/<file>, are repeated until there are as many rows as asked for, and ingested. --repeat reads each shard
of a split so many times, as if it were a larger split: what a command does once, as to open files, is then a smaller part of its time.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from data.batches import DomainLoader
from data.manifest import Manifest
from data.rows import DomainBatch
from models.encoder import HashEncoder
from models.networks.precision import set_precision
from pipelines import train
from pipelines.retrieval.evaluation import MethodEncoder, encode_split, evaluate_run
from pipelines.training.launch import deterministic, loaders
from pipelines.training.loop import Trainer
from pipelines.training.plan import make_plan, prepare
from tests.benchmarks.feeding import dataset, peak, rate, side_by_side
from tests.servers import ROOT


@dataclass
class Held:
    """The batches of a loader without its work: one batch that lies on the device, again and again; its views are made in each step, or once."""

    loader: DomainLoader
    batch: DomainBatch
    again: bool = True

    def epoch(self, epoch: int, steps: int, first: int = 0) -> Iterator[DomainBatch]:
        """The same batch for each step."""
        return iter([self.batch] * (steps - first))

    def with_views(self, batch: DomainBatch, epoch: int, step: int) -> DomainBatch:
        """The batch with its views."""
        return self.loader.with_views(batch._replace(views=()), epoch, step) if self.again else batch


def repeated_shards(root: Path, folder: Path, times: int) -> Path:
    """A dataset in ``folder`` whose splits have each shard of a dataset's so many times, numbered on."""
    manifest = Manifest.read(root)
    for domain in manifest.domains.values():
        for split in domain.splits.values():
            shards, first = split.files * times, 0
            for number, shard in enumerate(shards):
                table = pq.read_table(root / shard["path"])
                numbered = table.set_column(table.schema.get_field_index("row"), "row", pa.array(range(first, first + len(table))))
                place = Path(shard["path"]).with_name(f"part-{number:05d}.parquet")
                (folder / place).parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(numbered, folder / place, row_group_size=2048)
                shards[number], first = shard | {"path": str(place)}, first + len(table)
            split.files, split.rows, split.labels, split.unlabelled = shards, first, [times * count for count in split.labels], split.unlabelled * times
    manifest.write(folder)
    return folder


class Utilisation:
    """Samples what nvidia-smi says of the first GPU while a block runs."""

    def __enter__(self) -> "Utilisation":
        wanted = ["--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits", "--id=0", "--loop-ms=100"]
        self.process = subprocess.Popen(["nvidia-smi", *wanted], stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.terminate()
        self.samples = [tuple(map(float, line.split(","))) for line in self.process.communicate()[0].splitlines() if line.count(",") == 1]

    def __str__(self) -> str:
        if not self.samples:
            return "nvidia-smi gave no samples"
        busy, memory = zip(*self.samples, strict=True)
        return f"nvidia-smi: mean utilisation {statistics.mean(busy):.0f} % of {len(busy)} samples, at most {max(memory) / 1024:.1f} GiB"


def options(root: Path, storage: Path, method: str, given: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Options of a run on the benchmark's dataset."""
    source, target = [*Manifest.read(root).domains][:2]
    return {
        "method": method, "dataset": str(root), "source": source, "target": target, "network": given.network, "pretrained": "none", "workers": 0,
        "precision": given.precision, "gpu": not given.cpu, "tracking": "none", "plots": False, "storage": str(storage), "cache_mb": 0,
        "threads": given.threads, "steps_per_epoch": given.steps,
    } | more  # fmt: skip


def training(root: Path, storage: Path, method: str, given: argparse.Namespace, device: torch.device) -> None:
    """Steps of a method on streamed photographs, beside the same loop on a batch that lies on the device."""
    config = train.make_config(options(root, storage, method, given))
    setup = prepare(config)
    plan = make_plan(setup, lambda: given.threads)
    own, networks = loaders(plan, setup, 0, 1), setup.method.state_modules()
    set_precision(networks, given.precision)

    def trainer(source: Any, target: Any) -> Trainer:
        return Trainer(setup.method, source, target, 1, plan.steps, 0, storage / "none", {}, lambda record: None, device)

    def held(loader: DomainLoader | None, again: bool) -> Held | None:
        if loader is None:
            return None
        batch = next(loader.epoch(0, 1)).to(device)
        return Held(loader, batch if again else loader.with_views(batch, 0, 0), again)

    fed, begun = trainer(*own), time.perf_counter()
    setup.method.begin(*own)
    setup.method.start_epoch(0, 1, *own)
    start = time.perf_counter() - begun
    setup.method.start_epoch = lambda *_: None  # type: ignore[method-assign]  what it does once an epoch is not a step
    variants = {name: trainer(*(held(each, again) for each in own)) for name, again in {"views made": True, "views made once": False}.items()}

    def speed(each: Trainer) -> float:
        return float(each._epoch()["images_per_second"])

    print(f"\n{method}, {given.network}, {given.precision}, batch {plan.batch} a domain of {setup.manifest.shape}, {plan.steps} steps a measurement, "
          f"{plan.decoders} decoders; alone: the loop on one batch that lies on the device")  # fmt: skip
    for each in (fed, *variants.values()):
        speed(each)  # kernels are chosen, buffers are made
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    side_by_side(given.rounds, lambda: speed(variants["views made"]),
                 {"streamed photographs": lambda: speed(fed), "one batch, views made once": lambda: speed(variants["views made once"])})  # fmt: skip
    print(f"  before the first step (filling and clustering a memory): {start:.1f} s")
    if device.type == "cuda":
        with Utilisation() as busy:
            speeds = [speed(fed) for _ in range(given.rounds)]
        most = torch.cuda.max_memory_allocated(device) / 2**30
        print(f"  streamed again: {statistics.median(speeds):,.0f} images/s; {busy}; torch took at most {most:.1f} GiB")
        deterministic(False)
        speed(fed)
        print(f"  without the deterministic kernels: {speed(fed):,.0f} images/s")
        deterministic(True)


def sharing(root: Path, storage: Path, given: argparse.Namespace) -> None:
    """Images a second of a run in a process of its own, and of two of them at once."""
    arguments = options(root, storage, given.methods.split(",")[0], given, epochs=3, threads=max(1, given.threads // 2))
    flags = [flag for name, value in arguments.items() if name != "method" for flag in _flags(name, value)]

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pipelines", "train", arguments["method"], *flags, "--json"]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def speeds(runs: list[subprocess.Popen[str]]) -> list[float]:
        return [json.loads(run.communicate()[0].splitlines()[-1])["images_per_second"] for run in runs]

    (alone,), both = speeds([start()]), speeds([start(), start()])
    print(f"\n{arguments['method']} in a process of its own: {alone:,.0f} images/s; two at once: {both[0]:,.0f} and {both[1]:,.0f}, "
          f"in sum {sum(both) / alone:.2f} of one")  # fmt: skip


def _flags(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}"] if value else [f"--no-{flag}"] if name == "plots" else []
    return [f"--{flag}", str(value)]


def encoding(root: Path, storage: Path, given: argparse.Namespace, device: torch.device) -> None:
    """Encoding and evaluation of photographs, beside the encoder on the same number of rows that lie on the device."""
    with contextlib.redirect_stdout(sys.stderr):
        result = train.run(train.make_config(options(root, storage, "dah", given, epochs=1, steps_per_epoch=2, per_class=4)))
    manifest, run = Manifest.read(root), storage / result["run_id"]
    setup = prepare(train.make_config(options(root, storage, "dah", given)))
    method = setup.method.to(device).train(False)
    encoder, encode = HashEncoder(method.encoder()).eval(), MethodEncoder(method)
    source, target = [*manifest.domains][:2]
    rows = manifest.split(source, "train").rows
    every = rows + sum(split.rows for split in manifest.domains[target].splits.values())
    batch = next(DomainLoader(root, manifest, source, "train", given.encoded).epoch(0, 1)).x.to(device)

    def alone() -> int:
        done = 0
        with torch.no_grad():
            while done < rows:
                encoder(batch).cpu()
                done += len(batch)
        return done

    def evaluated() -> int:
        evaluate_run(run, root, manifest, plots=False, gpu=device.type == "cuda")
        return every

    print(f"\n{given.network} in float32, {rows:,} rows a split of {manifest.shape}; alone: the encoder, {len(batch)} rows at a time that lie on the device")
    alone()
    side_by_side(given.rounds, lambda: rate(alone), {
        "encode a split": lambda: rate(lambda: len(encode_split(encode, root, manifest, f"{source}/train").codes)),
        "evaluate, with loading and metrics": lambda: rate(evaluated),
    })  # fmt: skip
    used, seconds = peak(["evaluate", result["run_id"], "--storage", str(storage), *([] if given.cpu else ["--gpu"])])
    print(f"  evaluate as a command: {seconds:.1f} s, {used:,.0f} MiB")


def main() -> None:
    """Run the parts that are asked for, and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, help="an ingested one, in place of --photographs")
    parser.add_argument("--photographs", type=Path, default=ROOT.parent / "shared" / "data" / "pacs_sample")
    parser.add_argument("--parts", default="training,sharing,encoding")
    parser.add_argument("--methods", default="dah,ucdir", help="of the training; the first also shares the GPU")
    parser.add_argument("--network", default="torchvision:resnet50")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "float32"))
    parser.add_argument("--cpu", action="store_true", help="run the same on the CPU")
    for name, default in {"repeat": 1, "size": 224, "rows": 4000, "rounds": 3, "steps": 30, "encoded": 256, "threads": len(os.sched_getaffinity(0))}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device("cpu" if given.cpu else "cuda", *([] if given.cpu else [0]))
    if not given.cpu:
        deterministic(True)
    with tempfile.TemporaryDirectory() as name:
        folder, wanted = Path(name), given.parts.split(",")
        root = given.dataset or dataset(given.photographs, folder, "photographs", given.rows, given.size)
        root = repeated_shards(root, folder / "repeated", given.repeat) if given.repeat > 1 else root
        if "training" in wanted:
            for method in given.methods.split(","):
                training(root, folder / "runs", method, given, device)
        if "sharing" in wanted:
            sharing(root, folder / "runs", given)
        if "encoding" in wanted:
            encoding(root, folder / "runs", given, device)


if __name__ == "__main__":
    main()
