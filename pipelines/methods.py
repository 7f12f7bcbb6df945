"""Command: list the methods with their papers, hyper-parameters and defaults."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from models.method import Method
from models.registry import METHODS, find_method
from pipelines.console.config import positional


@dataclass
class Config:
    """Options of ``hashbridge methods``."""

    method: str = positional("show this method's fields alone", default="all")


def run(config: Config) -> dict[str, Any]:
    """Print each method with its presets and its fields: default, the presets' values, search range."""
    chosen = METHODS.values() if config.method == "all" else [find_method(config.method)]
    for method in chosen:
        default = asdict(method.Config())
        print(f"{method.name}: {(method.__doc__ or '').splitlines()[0]}\n  {method.reference}")
        for name, preset in method.presets.items():
            epochs = f"{preset.epochs} epochs" if preset.epochs else "epochs not named"
            print(f"  --preset {name}: {preset.table}; {epochs}")
        for each in fields(method.Config):
            meta = each.metadata
            span = f"{meta['low']:g}..{meta['high']:g}{' log' if meta['log'] else ''}" if meta["low"] is not None else ""
            span = "|".join(meta["choices"]) if meta["choices"] else span
            value = default[each.name]
            print(f"  --{each.name.replace('_', '-'):<20} {value!s:<14} {_others(method, each.name, value):<22} {span:<24} {meta['help']}")
        print()
    return {
        method.name: {"reference": method.reference, "defaults": asdict(method.Config()), "presets": {n: p._asdict() for n, p in method.presets.items()}}
        for method in chosen
    }


def _others(method: type[Method], field: str, default: Any) -> str:
    """A field's values in the presets that differ from the default, each value once: "paper 5, paper-svhn 20"."""
    values = {name: preset.values[field] for name, preset in method.presets.items() if preset.values.get(field, default) != default}
    main = values.get("paper")
    return ", ".join(f"{name} {value}" for name, value in values.items() if name == "paper" or value != main)
