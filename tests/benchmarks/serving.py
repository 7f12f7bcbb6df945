"""The service against FAISS alone and against a loop of `search` calls, on the same codes; all in one run.

A million random 64-bit codes in two shards. Clients are tasks of one process with a connection each, on the same cores as the
service; each asks with a code, one question after another, and reads no more of an answer than it needs.

Run: python -m tests.benchmarks.serving [--codes N] [--seconds S]
"""

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import faiss
import numpy as np
import pyarrow as pa

from pipelines import ingest, serve, train
from pipelines.retrieval import search_index
from pipelines.retrieval.code_files import SCHEMA
from pipelines.retrieval.index_changes import create
from tests.servers import ROOT, free_port

CLIENTS = (1, 8, 32)
K = 10


def measured(question: Callable[[], None], seconds: float) -> tuple[float, np.ndarray]:
    """Questions per second and their milliseconds, one after another."""
    times, begun = list[float](), time.perf_counter()
    while (now := time.perf_counter()) < begun + seconds:
        question()
        times.append(time.perf_counter() - now)
    return len(times) / (time.perf_counter() - begun), np.array(times) * 1e3


async def served(place: str, clients: int, seconds: float) -> tuple[float, np.ndarray, float]:
    """Questions per second, their milliseconds, and the median of those that the gateway says that it took, of clients that each ask one after another."""
    host, port = place.split(":")
    times, inner, begun = list[float](), list[float](), time.perf_counter()
    head = f"POST /search HTTP/1.1\r\nhost: {place}\r\ncontent-type: application/json\r\n"

    async def client(number: int) -> None:
        draw = np.random.default_rng(number)
        reader, writer = await asyncio.open_connection(host, int(port))
        while (now := time.perf_counter()) < begun + seconds:
            body = b'{"code": "%s", "k": %d}' % (draw.bytes(8).hex().encode(), K)
            writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            told = (await reader.readuntil(b"\r\n\r\n")).lower()
            content = await reader.readexactly(int(told.partition(b"content-length:")[2].partition(b"\r\n")[0]))
            times.append(time.perf_counter() - now)
            assert told.startswith(b"http/1.1 200"), content
            inner.append(float(content.partition(b'"total":')[2].partition(b"}")[0]))
        writer.close()

    await asyncio.gather(*map(client, range(clients)))
    return len(times) / (time.perf_counter() - begun), np.array(times) * 1e3, float(np.median(inner))


def row(name: str, rate: float, times: np.ndarray) -> None:
    p50, p95, p99 = np.percentile(times, (50, 95, 99))
    print(f"{name:<44}{rate:>10.1f}{p50:>10.2f}{p95:>10.2f}{p99:>10.2f}", flush=True)


def main() -> None:
    """Print rates, latencies and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codes", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=10.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ingest.run(ingest.Config("digits", dataset=str(folder / "set"), size=20))
        run = train.run(train.make_config({
            "method": "itq", "dataset": str(folder / "set"), "source": "typeset", "target": "handwritten", "bits": 64, "workers": 0,
            "storage": str(folder / "runs"), "tracking": "none", "plots": False,
        }))["run_id"]  # fmt: skip
        codes = np.random.default_rng(0).integers(0, 256, (given.codes, 8), np.uint8)
        ids = [f"image-{number:08}" for number in range(given.codes)]
        table = pa.table([ids, np.arange(given.codes, dtype=np.int32) % 10, [code.tobytes() for code in codes], ids], schema=SCHEMA)
        os.environ.update(serve.fast_environment(name))
        create(folder / "i", table, {"bits": "64", "model": run}, "flat", 2)
        del table, ids
        print(f"{given.codes:,} codes of 64 bits, {os.cpu_count()} cores, {K} answers a query\n{'':<44}{'queries/s':>10}{'p50 ms':>10}{'p95':>10}{'p99':>10}")

        faiss_p50 = _faiss_alone(codes, given.seconds)
        del codes

        rates, p50 = {}, {}
        config = serve.Config(str(folder / "i"), port=free_port(), storage=str(folder / "runs"), cache=str(folder / "cache"))
        with serve.running(config) as url:
            place = urlsplit(url).netloc
            asyncio.run(served(place, 8, 3.0))
            for clients in CLIENTS:
                rates[clients], times, inner = asyncio.run(served(place, clients, given.seconds))
                p50[clients] = float(np.median(times))
                row(f"service, {clients} clients (in the gateway {inner:.2f} ms)", rates[clients], times)
        image = folder / "query.png"
        _write_query(folder / "set", image)
        begun, calls = time.perf_counter(), 3
        for _ in range(calls):
            command = [sys.executable, "-m", "pipelines", "search", str(folder / "i"), str(image), "--storage", str(folder / "runs")]
            subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        each = (time.perf_counter() - begun) / calls
        print(f"{'a loop of `search` calls':<44}{1 / each:>10.2f}{each * 1e3:>10.0f}")
        print(f"\none client: the service takes {p50[1] - faiss_p50:.2f} ms more than FAISS alone (p50)")
        print(f"32 clients: {rates[32] / rates[1]:.2f} times the rate of one; one client: {rates[1] * each:.0f} times that of a loop of `search` calls")


def _faiss_alone(codes: np.ndarray, seconds: float) -> float:
    """Measure FAISS in this process; returns the median milliseconds of one query on one thread."""
    flat = search_index.build(codes, "flat")

    def alone(size: int) -> Callable[[], None]:
        draw = np.random.default_rng(size)
        return lambda: flat.search(draw.integers(0, 256, (size, 8), np.uint8), K)

    faiss.omp_set_num_threads(1)
    rate, times = measured(alone(1), seconds)
    row("FAISS alone, one query at a time", rate, times)
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    for size in CLIENTS[1:]:
        rate, each = measured(alone(size), seconds / 2)
        row(f"FAISS alone, batches of {size}, all cores", rate * size, each)
    return float(np.median(times))


def _write_query(dataset: Path, file: Path) -> None:
    from PIL import Image

    from pipelines.retrieval.queries import load_queries

    Image.fromarray(load_queries(f"{dataset}#handwritten/test#0-0", (1, 20, 20)).x[0, 0]).save(file)


if __name__ == "__main__":
    main()
