"""Feeding photographs: reading, views, training and evaluation beside the decoder and the network alone, on the same cores.

python -m tests.benchmarks.feeding [--photographs FOLDER] [--size 224] [--rows 1000] [--rounds 3] [--memory-rows 10000] [--gpu]

FOLDER holds <domain>/<class>/<file>; its images are repeated until there are as many rows as asked for.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torchvision.models import mobilenet_v2
from torchvision.transforms.v2 import functional as change

from data.batches import DomainLoader
from data.decoding import Decoder, batch_rows
from data.manifest import Embedding, Manifest
from models.allocator import keep_freed_memory
from models.encoder import encode_all
from models.networks.pretrained import open_backbone
from pipelines import embed, ingest, train
from pipelines.console.cli import set_default_environment
from pipelines.training.transfer import on_device
from tests.servers import ROOT

BATCH = 64
VIEWS: dict[str, dict[str, Any]] = {
    "no views": {}, "affine view": {"views": 1}, "crop view": {"views": 1, "view": {"kind": "crop"}},
    "two contrastive views": {"views": 2, "view": {"kind": "contrastive"}},
}  # fmt: skip


def repeated(source: Path, folder: Path, rows: int) -> Path:
    """Link a folder's images, again and again, until there are ``rows``; returns a folder of <class>/<file>."""
    files = sorted(path for path in source.rglob("*") if path.suffix in (".jpg", ".png") and "test" not in path.parts)
    for number in range(rows):
        file = files[number % len(files)]
        place = folder / file.parent.name / f"{number:06d}{file.suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(file)
    return folder


def dataset(source: Path, folder: Path, name: str, rows: int, size: int) -> Path:
    """Ingest repeated photographs as the domains ``a`` and ``b`` of a dataset, each with as many rows."""
    for domain in "ab":
        images = repeated(source, folder / f"{name}-{domain}", rows)
        with contextlib.redirect_stdout(sys.stderr):
            ingest.run(ingest.Config(str(images), dataset=str(folder / name), domain=domain, size=size, store="encoded"))
    return folder / name


def rate(work: Callable[[], int]) -> float:
    """Images a second of work that returns its number of images."""
    begun = time.perf_counter()
    return work() / (time.perf_counter() - begun)


def side_by_side(rounds: int, reference: Callable[[], float], others: dict[str, Callable[[], float]]) -> None:
    """Print the reference's rate, and each other's with its ratio to the mean of the references before and after it: machines drift."""
    alone, found = [reference()], {name: [] for name in others}  # type: ignore[var-annotated]
    for _ in range(rounds):
        for name, measure in others.items():
            speed = measure()
            alone.append(reference())
            found[name].append((speed, 2 * speed / (alone[-2] + alone[-1])))
    print(f"  {'alone':<44}{statistics.median(alone):>9,.0f} images/s")
    for name, each in found.items():
        speeds, ratios = zip(*each, strict=True)
        print(f"  {name:<44}{statistics.median(speeds):>9,.0f} images/s, ratio {statistics.median(ratios):.2f} of {', '.join(f'{r:.2f}' for r in ratios)}")


def one_at_a_time(images: torch.Tensor, draws: list[list[float]]) -> torch.Tensor:
    """Contrastive views by torchvision's functions, an image at a time."""
    made = []
    for image, d in zip(images, draws, strict=True):
        side = max(1, round(images.shape[3] * (0.2 + 0.8 * d[0]) ** 0.5))
        image = change.resized_crop(image, int((images.shape[2] - side) * d[1]), int((images.shape[3] - side) * d[2]), side, side, list(images.shape[2:]))
        if d[3] < 0.8:
            image = change.adjust_contrast(change.adjust_brightness(image, 0.6 + 0.8 * d[4]), 0.6 + 0.8 * d[5])
            image = change.adjust_hue(change.adjust_saturation(image, 0.6 + 0.8 * d[6]), 0.2 * d[7] - 0.1)
        if d[8] < 0.5:
            image = change.gaussian_blur(image, [2 * (images.shape[3] // 20) + 1] * 2, [0.1 + 1.9 * d[9]])
        made.append(image)
    return torch.stack(made).float()


def reading(root: Path, threads: int, rounds: int, device: torch.device) -> None:
    """Rows held or streamed, with and without views, beside the decoder alone with as many threads."""
    manifest = Manifest.read(root)
    stored = DomainLoader(root, manifest, "a", "train", BATCH)._stored_rows
    steps = len(stored.row) // BATCH

    def decoder() -> int:
        made = Decoder(manifest, threads)
        for start in range(0, steps * BATCH, BATCH):
            part = stored.take(np.arange(start, start + BATCH))
            made(part.content, part.row)
        return steps * BATCH

    def fed(cache_mb: int, **views: Any) -> float:
        loader = DomainLoader(root, manifest, "a", "train", BATCH, cache_mb=cache_mb, decoders=threads, pinned=device.type == "cuda", **views)
        if loader.cached:
            loader.cached_rows()
        batches = on_device(((batch,) for batch in loader.epoch(0, steps + 4)), device)
        for _ in range(4):  # the buffer fills, what samples is compiled
            (batch,) = next(batches)
            loader.with_views(batch, 0, 0)

        def work() -> int:
            for step, (batch,) in enumerate(batches):
                assert batch is not None
                loader.with_views(batch, 0, step)
            return steps * BATCH

        return rate(work)

    others: dict[str, Callable[[], float]] = {f"streamed, {name}": lambda views=views: fed(0, **views) for name, views in VIEWS.items()}  # type: ignore[misc]
    others |= {"held as stored, no views": lambda: fed(len(stored.row) * manifest.row_bytes // 2**20 - 1), "held decoded, no views": lambda: fed(2**20)}
    others |= {"held decoded, affine view": lambda: fed(2**20, views=1)}

    def old() -> int:
        x = Decoder(manifest, threads)(stored.content[:BATCH], stored.row[:BATCH])
        for seed in range(2):
            one_at_a_time(x, torch.rand(BATCH, 10, generator=torch.Generator().manual_seed(seed)).tolist())
        return BATCH

    print(f"\nreading {len(stored.row):,} photographs of {manifest.shape}, {threads} threads; alone: the decoder")
    side_by_side(rounds, lambda: rate(decoder), others | {"two contrastive views, an image at a time": lambda: rate(old)})


def training(root: Path, threads: int, rounds: int, device: torch.device) -> None:
    """Training steps of MobileNetV2 on streamed photographs, beside the same steps on tensors in memory."""
    manifest = Manifest.read(root)
    classes, shape, steps = len(manifest.classes), (BATCH, *manifest.shape), 8
    network = mobilenet_v2(num_classes=classes).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(network.parameters(), 1e-3)

    def step(x: torch.Tensor, label: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(network((x.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)), label).backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    x = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    label = torch.randint(0, classes, (BATCH,), device=device)

    def bare() -> int:
        for _ in range(steps):
            step(x, label)
        return steps * BATCH

    loader = DomainLoader(root, manifest, "a", "train", BATCH, cache_mb=0, decoders=threads, pinned=device.type == "cuda")

    def fed() -> float:
        batches = on_device(((batch,) for batch in loader.epoch(0, steps + 4)), device)
        for _ in range(4):
            next(batches)
        begun = time.perf_counter()
        for (batch,) in batches:
            assert batch is not None and batch.label is not None
            step(batch.x, batch.label)
        return steps * BATCH / (time.perf_counter() - begun)

    drawn = [(rows.content, rows.row) for rows in islice(loader._drawn(0), steps)]

    def decoding() -> float:
        """CPU seconds that decoding an image takes."""
        begun = time.process_time()
        for content, row in drawn:
            Decoder(manifest, 0)(content, row)
        return (time.process_time() - begun) / (steps * BATCH)

    print(f"\ntraining MobileNetV2 at {manifest.shape}, batch {BATCH}, {threads} threads; alone: its steps on tensors in memory")
    step(x, label)

    def without_decoding() -> float:
        """Images a second of the streamed training, less the decoders' own CPU time, spread over the cores."""
        return 1 / (1 / fed() - decoding() / threads)

    side_by_side(rounds, lambda: rate(bare), {"streamed": fed, "streamed, less the decoders' CPU time": without_decoding})


def embedding(root: Path, rounds: int, device: torch.device) -> None:
    """``embed`` in this process, without its start, beside its backbone alone on images in memory."""
    manifest, backbone = Manifest.read(root), open_backbone("efficientnet_lite0").to(device)
    items, size = embed._items(manifest), batch_rows(tuple(manifest.shape))
    rows = sum(item["stop"] - item["start"] for item in items)
    given = Embedding(backbone.name, backbone.digest(), backbone.size, "", backbone.preprocessing, 0, "", str(root), manifest.digest(), manifest.shape)
    x = torch.randint(0, 256, (size, *manifest.shape), dtype=torch.uint8)

    def alone() -> int:
        for _ in range(rows // size):
            encode_all(backbone, x)
        return rows // size * size

    def whole() -> int:
        with tempfile.TemporaryDirectory() as folder:
            work = embed._Embed(given, folder, device.type == "cuda", backbone)
            for item in items:
                work(item)
        return rows

    print(f"\nembedding {rows:,} photographs of {manifest.shape} by {backbone.name}; alone: the backbone")
    side_by_side(rounds, lambda: rate(alone), {"embed": lambda: rate(whole)})


def allocator(threads: int) -> None:
    """Training steps of MobileNetV2 at 96 pixels in two processes: one keeps the memory that it has freed."""
    script = (
        "import sys, time, torch; from torchvision.models import mobilenet_v2; from models.allocator import keep_freed_memory\n"
        f"torch.set_num_threads({threads}); {{}}; network = mobilenet_v2(num_classes=7); x = torch.rand({BATCH}, 3, 96, 96)\n"
        "for step in range(12):\n    begun = time.perf_counter(); network(x).sum().backward(); seconds = time.perf_counter() - begun\n"
        "    if step > 1: print(seconds)"
    )
    print(f"\ntraining MobileNetV2 at 96 pixels, batch {BATCH}, {threads} threads, median of 10 steps")
    found = {}
    for name, first in {"glibc's default": "0", "freed memory kept": "keep_freed_memory()", "glibc's default again": "0"}.items():
        done = subprocess.run([sys.executable, "-c", script.format(first)], cwd=ROOT, capture_output=True, text=True, check=True)
        found[name] = BATCH / statistics.median(map(float, done.stdout.split()))
        print(f"  {name:<44}{found[name]:>9,.0f} images/s")


PEAK = """import sys
from pipelines.console.cli import main
assert main(sys.argv[1:]) == 0
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))"""


def peak(arguments: list[str]) -> tuple[float, float]:
    """Peak memory in MiB, and seconds, of a command in a process of its own."""
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", PEAK, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024, time.perf_counter() - begun


def memory(source: Path, folder: Path, few: int, many: int, size: int, gpu: bool) -> None:
    """Peak memory of ``evaluate`` and ``encode`` on few and on many photographs; and the codes beside those of all rows in memory."""
    print(f"\npeak memory on {few:,} and {many:,} photographs a domain at {size} pixels, conv4, 64 bits")
    found: dict[str, list[float]] = {"evaluate": [], "encode": []}
    for rows in (few, many):
        root, storage = dataset(source, folder, f"memory{rows}", rows, size), folder / f"runs{rows}"
        with contextlib.redirect_stdout(sys.stderr):
            result = train.run(train.make_config({
                "method": "dpsh", "dataset": str(root), "source": "a", "target": "b", "network": "conv4", "per_class": 4, "epochs": 1, "steps_per_epoch": 2,
                "workers": 0, "tracking": "none", "plots": False, "storage": str(storage), "cache_mb": 0,
            }))  # fmt: skip
        on = ["--gpu"] if gpu else []
        for name, more in {"evaluate": [], "encode": [str(root), "--out", str(folder / f"codes{rows}")]}.items():
            used, seconds = peak([name, result["run_id"], *more, "--storage", str(storage), *on])
            found[name].append(used)
            print(f"  {name:<10}{rows:>8,} rows a domain: {used:,.0f} MiB, {seconds:.0f} s")
    for name, (low, high) in found.items():
        print(f"  {name:<10}the {many:,} take {high - low:,.0f} MiB more")
    _compare_codes(folder, folder / f"memory{few}", folder / f"runs{few}")


def _compare_codes(folder: Path, root: Path, storage: Path) -> None:
    from models.encoder import HashEncoder  # noqa: PLC0415
    from pipelines.retrieval.evaluation import MethodEncoder, encode_split  # noqa: PLC0415
    from pipelines.training.restore import load_method  # noqa: PLC0415

    (run,) = [each.parent for each in storage.glob("*/config.json")]
    manifest, method = Manifest.read(root), load_method(run)
    x = DomainLoader(root, manifest, "a", "train", 1, cache_mb=2**20).cached_rows().x
    whole = encode_all(HashEncoder(method.encoder()).eval(), x.contiguous()).numpy()
    streamed = encode_split(MethodEncoder(method), root, manifest, "a/train").codes
    print(f"  {int((whole != streamed).any(1).sum())} of {len(whole)} streamed codes differ from those of all rows in memory, 512 at a time")


def main() -> None:
    """Run the parts that are asked for, and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, default=ROOT.parent / "shared" / "data" / "pacs_sample")
    parser.add_argument("--parts", default="reading,training,embedding,memory,allocator")
    parser.add_argument("--gpu", action="store_true")
    for name, default in {"size": 224, "rows": 1000, "rounds": 3, "memory-few": 500, "memory-rows": 10_000, "threads": len(os.sched_getaffinity(0))}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    if "GOMP_SPINCOUNT" not in os.environ:  # read when torch was loaded
        os.execve(sys.executable, [sys.executable, "-m", "tests.benchmarks.feeding", *sys.argv[1:]], os.environ | {"GOMP_SPINCOUNT": "1000"})
    set_default_environment()
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    device = torch.device("cuda" if given.gpu else "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder, wanted = Path(name), given.parts.split(",")
        if "reading" in wanted:
            reading(dataset(given.photographs, folder, "large", given.rows, given.size), given.threads, given.rounds, device)
        if "training" in wanted:
            training(dataset(given.photographs, folder, "small", given.rows, 96), given.threads, given.rounds, device)
        if "embedding" in wanted:
            embedding(dataset(given.photographs, folder, "embedded", given.rows // 4, given.size), given.rounds, device)
        if "allocator" in wanted:
            allocator(given.threads)
        if "memory" in wanted:
            memory(given.photographs, folder, given.memory_few, given.memory_rows, given.size, given.gpu)


if __name__ == "__main__":
    main()
