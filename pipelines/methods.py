"""Command: list the methods with their papers, hyper-parameters and defaults."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from models.registry import METHODS, find_method
from pipelines.console.config import positional


@dataclass
class Config:
    """Options of ``hashbridge methods``."""

    method: str = positional("show this method's fields alone", default="all")


def run(config: Config) -> dict[str, Any]:
    """Print each method with its fields: default, the paper's value, search range."""
    chosen = METHODS.values() if config.method == "all" else [find_method(config.method)]
    for method in chosen:
        default, paper = asdict(method.Config()), asdict(method.Config.paper())
        print(f"{method.name}: {(method.__doc__ or '').splitlines()[0]}\n  {method.reference}")
        for each in fields(method.Config):
            meta = each.metadata
            span = f"{meta['low']:g}..{meta['high']:g}{' log' if meta['log'] else ''}" if meta["low"] is not None else ""
            span = "|".join(meta["choices"]) if meta["choices"] else span
            other = f"paper {paper[each.name]}" if paper[each.name] != default[each.name] else ""
            print(f"  --{each.name.replace('_', '-'):<20} {default[each.name]!s:<14} {other:<22} {span:<24} {meta['help']}")
        print()
    return {method.name: {"reference": method.reference, "defaults": asdict(method.Config())} for method in chosen}
