"""The service against FAISS alone and against a loop of `search` calls, on the same codes; all in one run.

A million random 64-bit codes in two shards. Clients are threads of one process with a connection each, on the same cores as the
service; each asks with a code, one question after another.

Run: python -m tests.benchmarks.serving [--codes N] [--seconds S]
"""

import argparse
import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
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


def measured(ask: Callable[[int], Callable[[], None]], clients: int, seconds: float) -> tuple[float, np.ndarray]:
    """Questions per second and their milliseconds, of clients that each ask one after another."""
    times: list[list[float]] = [[] for _ in range(clients)]
    started, end = threading.Barrier(clients + 1), [0.0]

    def client(number: int) -> None:
        question = ask(number)
        question()
        started.wait()
        while (now := time.perf_counter()) < end[0]:
            question()
            times[number].append(time.perf_counter() - now)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    end[0] = time.perf_counter() + 1e9
    for thread in threads:
        thread.start()
    started.wait()
    begun = time.perf_counter()
    end[0] = begun + seconds
    for thread in threads:
        thread.join()
    every = np.concatenate([np.array(each) for each in times]) * 1e3
    return len(every) / (time.perf_counter() - begun), every


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

        rates, p50, inner = {}, {}, list[float]()
        config = serve.Config(str(folder / "i"), port=free_port(), storage=str(folder / "runs"), cache=str(folder / "cache"))
        with serve.running(config) as url:
            place = urlsplit(url).netloc

            def served(number: int) -> Callable[[], None]:
                draw, connection = np.random.default_rng(number), http.client.HTTPConnection(place)

                def question() -> None:
                    body = json.dumps({"code": draw.bytes(8).hex(), "k": K})
                    connection.request("POST", "/search", body, {"content-type": "application/json"})
                    answer = connection.getresponse()
                    told = answer.read()
                    assert answer.status == 200, told
                    inner.append(json.loads(told)["milliseconds"]["total"])

                return question

            measured(served, 8, 3.0)
            for clients in CLIENTS:
                inner.clear()
                rates[clients], times = measured(served, clients, given.seconds)
                p50[clients] = float(np.median(times))
                row(f"service, {clients} clients (in the gateway {np.median(inner):.2f} ms)", rates[clients], times)
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

    def alone(size: int) -> Callable[[int], Callable[[], None]]:
        draw = np.random.default_rng(size)
        return lambda number: lambda: flat.search(draw.integers(0, 256, (size, 8), np.uint8), K)

    faiss.omp_set_num_threads(1)
    rate, times = measured(alone(1), 1, seconds)
    row("FAISS alone, one query at a time", rate, times)
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    for size in CLIENTS[1:]:
        rate, each = measured(alone(size), 1, seconds / 2)
        row(f"FAISS alone, batches of {size}, all cores", rate * size, each)
    return float(np.median(times))


def _write_query(dataset: Path, file: Path) -> None:
    from PIL import Image

    from pipelines.retrieval.queries import load_queries

    Image.fromarray(load_queries(f"{dataset}#handwritten/test#0-0", (1, 20, 20)).x[0, 0]).save(file)


if __name__ == "__main__":
    main()
