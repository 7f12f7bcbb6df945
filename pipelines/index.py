"""Command: build a search index of codes."""

from dataclasses import dataclass
from typing import Any

from data.filesystem import to_path
from pipelines.console.config import option, positional, required
from pipelines.retrieval import search_index
from pipelines.retrieval.code_files import read_codes

KINDS = ("flat", "hnsw", "ivf")


@dataclass
class Config:
    """Options of ``hashbridge index``."""

    codes: str = positional("folder that `hashbridge encode` wrote")
    out: str = required("file of the index")
    kind: str = option("flat", "flat: exact; hnsw: graph; ivf: inverted lists", KINDS)
    neighbours: int = option(32, "hnsw: links of a node, 2 to 512")
    lists: int = option(0, "ivf: number of lists (default: square root of the rows)")

    def __post_init__(self) -> None:
        if not 2 <= self.neighbours <= 512:
            raise ValueError(f"--neighbours is {self.neighbours}, but must be from 2 to 512")
        if self.lists < 0:
            raise ValueError(f"--lists is {self.lists}, but must not be negative")


def run(config: Config) -> dict[str, Any]:
    """Build and write the index; returns its size."""
    table, codes, meta = read_codes(to_path(config.codes))
    out = to_path(config.out)
    if out.is_dir():
        raise ValueError(f"{out} is a folder: give a file's name")
    index = search_index.build(codes, config.kind, config.neighbours, config.lists)
    size = search_index.write(index, config.kind, table, meta, out)
    print(f"{config.kind} index of {len(codes):,} codes of {codes.shape[1] * 8} bits in {out} ({size:,} bytes)")
    return {"out": str(out), "kind": config.kind, "codes": len(codes), "bits": codes.shape[1] * 8}
