"""The rows of a shard in a file that is mapped into memory: only the rows of answers are read from disk.

A row of the shard's Parquet file costs the reading of its whole group; in the mapped file it costs microseconds.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.filesystem import open_parquet
from pipelines.retrieval.sharded_index import Record

WIDE = pa.schema([("id", pa.large_string()), ("label", pa.int32()), ("code", pa.large_binary()), ("origin", pa.large_string())])
DOMAIN = r"#(?P<domain>[^#]*)/[^/#]*#[0-9]+$"  # of an origin DATASET#DOMAIN/SPLIT#ROW


class MappedRows:
    """The rows of a shard by place, and by id.

    Attributes:
        labels: (rows,) int32.
        domains: names of the domains of images that came from datasets, "" of others.
        domain: (rows,) int32, places in ``domains``.
    """

    def __init__(self, parquet: Path) -> None:
        """Copy the rows of a Parquet file to a file of this process, which is removed with it.

        Raises:
            OSError: there is no room for it, or the rows cannot be read.
        """
        folder = Path(tempfile.mkdtemp(prefix="hashbridge-rows-"))
        try:
            with open_parquet(parquet) as file:
                table = file.read(WIDE.names).cast(WIDE).combine_chunks()
            with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, WIDE) as writer:
                writer.write_table(table)
            order = pc.sort_indices(table["id"]).to_numpy()
            np.save(folder / "order.npy", order.astype(np.int64))
            domains = pc.fill_null(pc.struct_field(pc.extract_regex(table["origin"], DOMAIN), "domain"), "").combine_chunks().dictionary_encode()
            self.domains, self.domain = domains.dictionary.to_pylist(), domains.indices.to_numpy(zero_copy_only=False).astype(np.int32)
            self.labels = table["label"].to_numpy().copy()
            del table
            self.order = np.load(folder / "order.npy", mmap_mode="r")
            self.table = pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow"))).read_all()
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # what is mapped or open stays until it is let go

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, places: np.ndarray) -> list[Record]:
        """``id``, ``label``, ``origin`` and ``domain`` of the rows at these places."""
        rows = self.table.select(["id", "label", "origin"]).take(pa.array(places)).to_pylist()
        return [row | {"domain": self.domains[self.domain[place]]} for row, place in zip(rows, places.tolist(), strict=True)]

    def find(self, name: str) -> int | None:
        """The place of an id; None if it is not here."""
        ids, low, high = self.table["id"].chunk(0), 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if ids[int(self.order[middle])].as_py() < name:
                low = middle + 1
            else:
                high = middle
        return int(self.order[low]) if low < len(self) and ids[int(self.order[low])].as_py() == name else None

    def codes(self, places: np.ndarray) -> np.ndarray:
        """The packed codes (places, bits / 8) uint8 of rows."""
        found = self.table["code"].chunk(0).take(pa.array(places)).to_pylist()
        return np.frombuffer(b"".join(found), np.uint8).reshape(len(places), -1)

    def matching(self, label: int | None, domain: str) -> np.ndarray:
        """Places of the rows of a label (None for any) and a domain ("" for any), in the order of their ids."""
        kept = np.ones(len(self), bool) if label is None else self.labels == label
        if domain:
            kept &= self.domain == (self.domains.index(domain) if domain in self.domains else -1)
        order = np.asarray(self.order)
        return order[kept[order]]
