"""Reads Parquet shards by row range, and checks them against the manifest."""

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.filesystem import open_parquet
from data.layout import Layout
from data.manifest import Manifest

ROWS_READ, FILES_READ = 2048, 256  # rows of a record batch: of pixels or features, and of image files


def read_rows(
    root: Path, manifest: Manifest, domain: str, split: str, start: int = 0, stop: int | None = None, *,
    labels: bool = True, ids: bool = False, views: bool = False, order: list[int] | None = None,
) -> Iterator[pa.RecordBatch]:  # fmt: skip
    """Yield record batches of the rows ``start`` to ``stop`` of a split, in row order or with the files in a given ``order``.

    Without ``labels`` the label column is not read; ``views`` also reads those of embedded images.

    Raises:
        ValueError: a shard is missing or does not match the manifest.
    """
    files = manifest.split(domain, split).files
    ends = list(accumulate(file["rows"] for file in files))
    stop = ends[-1] if stop is None else stop
    columns = ["row", "feature" if manifest.store == "feature" else "image"] + ["label"] * labels + ["id"] * ids + ["views"] * views
    for index in order if order is not None else range(len(files)):
        first, end = ends[index] - files[index]["rows"], ends[index]
        if end <= start or first >= stop:
            continue
        path = root / files[index]["path"]
        try:
            with open_parquet(path) as file:
                if file.metadata.num_rows != files[index]["rows"]:
                    raise ValueError(f"{path} has {file.metadata.num_rows} rows, the manifest says {files[index]['rows']}: ingest the domain again")
                stored = Layout(manifest.store, tuple(manifest.shape), manifest.seed, views=manifest.views).schema()
                if any(name not in file.schema_arrow.names or file.schema_arrow.field(name).type != stored.field(name).type for name in columns):
                    raise ValueError(f"shard {path} does not have the columns of the manifest's {manifest.store}: ingest the domain again")
                groups, skipped = _groups(file.metadata, start - first, stop - first)
                first += skipped
                for batch in file.iter_batches(FILES_READ if manifest.compressed else ROWS_READ, groups, columns):
                    if reason := _wrong(batch, manifest, first):
                        raise ValueError(f"shard {path} is damaged ({reason}): ingest the domain again")
                    low, high = max(0, start - first), min(len(batch), stop - first)
                    if high > low:
                        yield batch.slice(low, high - low)
                    first += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"shard {path} cannot be read ({str(error).splitlines()[0]}): ingest the domain again") from error


def _groups(metadata: pq.FileMetaData, low: int, high: int) -> tuple[list[int], int]:
    """The row groups of a file that hold its rows ``low`` to ``high``, and the number of rows before them."""
    ends = list(accumulate(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)))
    groups = [i for i, end in enumerate(ends) if end > low and end - metadata.row_group(i).num_rows < high]
    return groups, ends[groups[0] - 1] if groups and groups[0] else 0


def _wrong(batch: pa.RecordBatch, manifest: Manifest, first: int) -> str:
    """Describe what is wrong with a shard's rows, the first of which has number ``first``; "" if nothing is."""
    if any(column.null_count for column in batch.columns):
        return "a value is missing"
    if not np.array_equal(batch.column("row").to_numpy(), np.arange(first, first + len(batch))):
        return "its rows are not numbered in order"
    if "label" in batch.schema.names:
        labels = batch.column("label").to_numpy()
        if len(labels) and not -1 <= labels.min() <= labels.max() < max(len(manifest.classes), 1):
            return "a label is of no class"
    if manifest.store == "raw" and len(batch) and pc.min_max(pc.binary_length(batch.column("image"))) != _both(int(np.prod(manifest.shape))):
        return "an image has another size"
    return ""


def _both(length: int) -> pa.StructScalar:
    return pa.scalar({"min": length, "max": length}, pa.struct([("min", pa.int32()), ("max", pa.int32())]))

