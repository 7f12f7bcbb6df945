"""Reads and checks the Parquet files of codes that ``hashbridge encode`` writes.

Columns: ``id`` string, ``label`` int32 (-1 if unknown), ``code`` binary of bits / 8 bytes, ``origin`` string (the image's
file, or DATASET#DOMAIN/SPLIT#ROW).
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from data import validation
from data.filesystem import read_table

PARTS = "part-*.parquet"
SCHEMA = pa.schema([("id", pa.string()), ("label", pa.int32()), ("code", pa.binary()), ("origin", pa.string())])


def _names(text: str) -> list[str]:
    """The class names of codes.

    Raises:
        ValueError: the text is not a JSON list of names.
    """
    names: list[str] = validation.parse_json(text)
    validation.check(names, [str], "its list of classes")
    return names


def read_codes(folder: Path) -> tuple[pa.Table, np.ndarray, dict[str, str]]:
    """Read a folder of codes.

    Returns:
        Its table, the packed codes (n, bits / 8) uint8, and ``bits`` and ``model``.

    Raises:
        ValueError: there are no codes, or they cannot be read.
    """
    if not folder.is_dir() or not list(folder.glob(PARTS)):
        raise ValueError(f"no codes at {folder}: give the folder that `hashbridge encode --out` wrote")
    try:
        table = pa.concat_tables([read_table(part) for part in sorted(folder.glob(PARTS), key=lambda each: each.name)])
        if [(each.name, each.type) for each in table.schema] != [(each.name, each.type) for each in SCHEMA] or any(c.null_count for c in table.columns):
            raise ValueError("it has other columns")
        meta = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        codes = np.frombuffer(b"".join(table["code"].to_pylist()), np.uint8).reshape(len(table), -1)
        known = {"classes": json.dumps(_names(meta["classes"]))} if "classes" in meta else {}
        return table, codes, {"bits": str(codes.shape[1] * 8), "model": meta["model"]} | known
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ValueError(f"codes at {folder} cannot be read ({str(error).splitlines()[0]}): encode again") from error
