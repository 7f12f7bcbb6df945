"""Work on many images in parts: each is decoded, given to a network and written to a file of its own, here or by actors of Ray Data."""

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from data.decoding import batch_rows, decode_files, read_decoded, split_name
from data.filesystem import to_path
from data.manifest import Manifest
from data.readers.base import printable
from pipelines.console import cluster


class Batch(NamedTuple):
    """Decoded rows (n, ...) with their ids, labels and origins, the images that could not be read, and what is white by files' own brightest values."""

    x: np.ndarray
    ids: list[str]
    labels: list[int]
    origins: list[str]
    lost: list[str]
    whites: list[float]


class Decode:
    """Decodes one part after another: in the process that works on it, or in tasks of its own, so that CPU nodes feed GPU nodes.

    A part is ``split``, ``start`` and ``stop`` of a dataset's rows, or ``files``, a JSON list of names below a folder.
    """

    def __init__(self, path: str, shape: tuple[int, ...], threads: int | None = None, values: tuple[float, float] | None = None) -> None:
        """Args:
        values: of ``files``, as in ``decode``.
        """
        self.root, self.shape, self.threads, self.values = to_path(path), shape, threads, values

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """A part with all its rows as plain values, for ``batches`` in another process."""
        batches = list(self.batches(item))
        lost, whites = [line for batch in batches for line in batch.lost], [white for batch in batches for white in batch.whites]
        whole = [np.ascontiguousarray(batch.x) for batch in batches if len(batch.x)]
        columns = {name: [value for batch in batches for value in getattr(batch, name)] for name in ("ids", "labels", "origins")}
        told = {"lost": json.dumps(lost), "whites": json.dumps(whites), "rows": json.dumps(columns)}
        return item | told | {"files": "", "x": b"".join(x.tobytes() for x in whole)}

    def batches(self, item: dict[str, Any]) -> Iterator[Batch]:
        """The rows of a part in batches of the size that a network takes at once, decoded here if other tasks have not."""
        if "x" in item:
            return self._taken(item)
        return self._rows(item["split"], item["start"], item["stop"]) if item["split"] else self._files(json.loads(item["files"]))

    def _taken(self, item: dict[str, Any]) -> Iterator[Batch]:
        rows, kind = json.loads(item["rows"]), np.uint8 if len(self.shape) == 3 else np.float32
        x, size = np.frombuffer(item["x"], kind).reshape(-1, *self.shape), batch_rows(self.shape)
        yield Batch(x[:0], [], [], [], json.loads(item["lost"]), json.loads(item["whites"]))
        for part in (slice(start, start + size) for start in range(0, len(x), size)):
            yield Batch(x[part].copy(), rows["ids"][part], rows["labels"][part], rows["origins"][part], [], [])

    def _rows(self, name: str, start: int, stop: int) -> Iterator[Batch]:
        manifest, origin = Manifest.read(self.root), f"{self.root.resolve()}#{name}"
        for part in read_decoded(self.root, manifest, *split_name(name), start, stop, ids=True, threads=self.threads):
            assert part.id is not None
            yield Batch(part.x.numpy(), part.id, part.labels.tolist(), [f"{origin}#{row}" for row in part.row], [], [])

    def _files(self, names: list[str]) -> Iterator[Batch]:
        paths = [self.root / name if self.root.is_dir() else self.root for name in names]
        whites, size = list[float](), batch_rows(self.shape)
        decoded = zip(names, paths, decode_files(paths, self.shape, self.threads, self.values, whites), strict=True)
        while block := list(islice(decoded, size)):
            read = [(name, path, image) for name, path, image in block if isinstance(image, np.ndarray)]
            lost = [f"{printable(name)}: {image}" for name, _, image in block if not isinstance(image, np.ndarray)]
            told = [whites.pop() for _ in range(len(whites))]  # decoding threads may append meanwhile
            x = np.stack([image for _, _, image in read]) if read else np.empty((0, *self.shape), np.uint8)
            yield Batch(x, [printable(name) for name, _, _ in read], [-1] * len(read), [printable(str(path.resolve())) for _, path, _ in read], lost, told)


def on_ray(items: list[dict[str, Any]], worker: type, given: dict[str, Any], workers: int, decode: Decode | None) -> list[dict[str, Any]]:
    """Work on all parts by a pool of actors of one core each, or of one GPU each where other tasks decode.

    Args:
        items: the parts, each with its number ``part``.
        worker: class of the actors; a call takes a part and returns what it says of it.
        given: arguments of its constructor.
        workers: actors; at least one is made.
        decode: decodes the parts in tasks of their own; None if the actors do.

    Returns:
        What the actors say, in the order of the parts.

    Raises:
        ValueError: the cluster has fewer GPUs than actors that need one.
    """
    ray, workers = cluster.connect(), max(1, workers)
    if decode and ray.cluster_resources().get("GPU", 0) < workers:
        raise ValueError(f"--gpu needs {workers} GPUs, but the cluster has {ray.cluster_resources().get('GPU', 0):g}: fewer --workers")
    parts: Any = ray.data.from_items(items, override_num_blocks=len(items))
    if decode:
        parts = parts.map(decode.__call__)
    resources = {"num_gpus": 1} if decode else {"num_cpus": 1}
    told = parts.map(worker, fn_constructor_kwargs=given, compute=ray.data.ActorPoolStrategy(size=workers), **resources).take_all()
    return sorted(told, key=lambda item: int(item["part"]))
