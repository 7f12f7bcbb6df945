"""Command: build a search index of codes, add and remove rows, measure its recall."""

from dataclasses import dataclass, field
from typing import Any

from data.filesystem import to_path
from pipelines.console.config import option, required
from pipelines.retrieval import index_changes
from pipelines.retrieval.code_files import read_codes

KINDS = ("flat", "hnsw", "ivf")


@dataclass
class Config:
    """Options of ``hashbridge index``."""

    codes: str = field(default="", metadata={"help": "folder that `hashbridge encode` wrote; none to --remove or only --measure", "positional": True})
    out: str = required("folder of the index")
    shards: int = option(1, "parts of the index; several are built by Ray tasks")
    kind: str = option("flat", "flat: exact; hnsw: graph; ivf: inverted lists", KINDS)
    neighbours: int = option(32, "hnsw: links of a node, 2 to 512")
    lists: int = option(0, "ivf: number of lists of a shard (default: square root of its rows)")
    add: bool = option(False, "add the codes to the index that is there")
    remove: str = option("", "text file of ids, a line each: remove them from the index that is there")
    measure: bool = option(False, "measure the recall of the 10 nearest on a sample of the index's own codes")
    recall: float = option(0.0, "hnsw, ivf: search so widely that this recall is reached on the sample, as 0.99")
    sample: int = option(1000, "codes of the sample")

    def __post_init__(self) -> None:
        if not 2 <= self.neighbours <= 512:
            raise ValueError(f"--neighbours is {self.neighbours}, but must be from 2 to 512")
        if self.lists < 0:
            raise ValueError(f"--lists is {self.lists}, but must not be negative")
        if not 0 <= self.recall <= 1:
            raise ValueError(f"--recall is {self.recall}, but must be from 0 to 1")
        for name in ("shards", "sample"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}, but must be at least 1")
        if self.recall and self.kind == "flat" and self.codes and not self.add:
            raise ValueError("--recall is for --kind hnsw or ivf: a flat index finds all")
        if self.remove and (self.codes or self.add):
            raise ValueError("--remove goes without codes and --add: change the index in two steps")
        if not (self.codes or self.remove or self.measure or self.recall):
            raise ValueError("CODES is missing: the folder that `hashbridge encode` wrote")
        if self.add and not self.codes:
            raise ValueError("CODES is missing: --add adds the codes of a folder")


def run(config: Config) -> dict[str, Any]:
    """Build or change the index; returns what it has then."""
    out = to_path(config.out)
    if config.remove:
        try:
            ids = [line for line in to_path(config.remove).read_text().splitlines() if line]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--remove {config.remove} cannot be read: {error}") from error
        manifest = index_changes.remove(out, ids)
        print(f"{len(set(ids)):,} ids removed")
    elif config.codes:
        table, _, meta = read_codes(to_path(config.codes))
        if config.add:
            manifest = index_changes.add(out, table, meta)
            print(f"{len(table):,} codes added")
        else:
            manifest = index_changes.create(out, table, meta, config.kind, config.shards, config.neighbours, config.lists)
    if config.measure or config.recall:
        manifest = index_changes.measure(out, config.sample, 10, config.recall)
        chosen = {name: value for name, value in manifest["parameters"].items() if name in ("ef", "probes")}
        told = "".join(f", with {name} {value}" for name, value in chosen.items())
        print("".join(f"recall {name.replace('_', ' ')}: {value:.4f}" for name, value in manifest["recall"].items()) + told)
    count, size = sum(shard["count"] for shard in manifest["shards"]), sum((out / shard["codes"]).stat().st_size for shard in manifest["shards"])
    parts = f", {len(manifest['shards'])} shards" if len(manifest["shards"]) > 1 else ""
    print(f"{manifest['kind']} index of {count:,} codes of {manifest['bits']} bits in {out} ({size:,} bytes{parts})")
    return {
        "out": str(out), "kind": manifest["kind"], "codes": count, "bits": manifest["bits"], "shards": len(manifest["shards"]),
        "version": manifest["version"], "recall": manifest["recall"],
    }  # fmt: skip
