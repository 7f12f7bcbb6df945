"""How a method declares its hyper-parameters, presets and ablation table. The command line reads these before torch is loaded."""

from dataclasses import field, fields
from fnmatch import fnmatchcase
from typing import Any, NamedTuple


class AblationRow(NamedTuple):
    """A row of a paper's ablation table.

    Attributes:
        name: the row's terms, as the paper writes them.
        changes: the hyper-parameters that differ from the full method, with their values.
        figures: the paper's figures in percent, by "source -> target" or by metric and data.
        method: another method, which the row is trained with; "" for the table's own.
    """

    name: str
    changes: dict[str, Any]
    figures: dict[str, float]
    method: str = ""


class Preset(NamedTuple):
    """A paper's setting, or one of ours for other data than the defaults'.

    Attributes:
        table: whose setting it is: the paper's table or section, or "ours", and its data.
        epochs: the setting's epochs; 0 if the paper names none.
        values: the hyper-parameters that differ from the defaults.
    """

    table: str
    epochs: int
    values: dict[str, Any]


def hyperparameter(
    default: Any, help: str, low: Any = None, high: Any = None, log: bool = False, choices: Any = None, when: dict[str, tuple[Any, ...]] | None = None
) -> Any:
    """Declare a hyper-parameter: default, meaning and search range in one place.

    Args:
        low, high: bounds of the search; None excludes it from the search.
        log: search on a logarithmic scale.
        choices: the allowed values, if they are few; ``*`` stands for any text in one.
        when: values of other fields that this field depends on; it is only searched if they hold.
    """
    return field(default=default, metadata={"help": help, "low": low, "high": high, "log": log, "choices": choices, "when": when or {}})


def is_choice(value: Any, choices: tuple[Any, ...]) -> bool:
    """Whether a value is among the choices of a field, or is a text that matches one with ``*``."""
    return value in choices or any(isinstance(each, str) and "*" in each and fnmatchcase(str(value), each) for each in choices)


def check_fields(config: Any) -> None:
    """Check a config's values against the choices and signs of its fields.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """
    for each in fields(config):
        value, choices = getattr(config, each.name), each.metadata.get("choices")
        if choices is not None and not is_choice(value, choices):
            raise ValueError(f"{each.name} is {value!r}, but must be one of {', '.join(map(str, choices))}")
        if isinstance(value, int | float) and not value >= 0:
            raise ValueError(f"{each.name} is {value}, but must not be negative")
