"""Command: list the datasets of the catalogue."""

from dataclasses import asdict, dataclass
from typing import Any

from data.catalog import CATALOG


@dataclass
class Config:
    """``hashbridge datasets`` has no options of its own."""


def run(config: Config) -> dict[str, Any]:
    """Print the catalogue: name, source, classes, domains, licence."""
    print(f"{'name':<12} {'had by':<12} {'classes':>7}  {'domains':<58} licence")
    for name, entry in CATALOG.items():
        print(f"{name:<12} {entry.source:<12} {entry.classes:>7}  {', '.join(entry.domains):<58} {entry.licence}")
    print("\nembedded: no download. torchvision: downloaded by `hashbridge ingest NAME`. folder: `hashbridge ingest NAME=FOLDER`.")
    return {name: asdict(entry) for name, entry in CATALOG.items()}
