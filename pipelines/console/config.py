"""Typed configuration: dataclasses filled from the command line and YAML files. Each value is checked on entry."""

import argparse
import difflib
import math
import re
import reprlib
from collections.abc import Iterable
from dataclasses import MISSING, Field, field, fields
from typing import Any, NoReturn

import yaml

from data.filesystem import to_path
from models.hyperparameters import is_choice

RANGE = "LOW-HIGH: values of image files of more than 8 bits that are black and white (default: those of their type)"
NO_RANGE = "--range is for image files, and a dataset's images have theirs since ingest"


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """Declare a dataclass field as an option, ``--its-name``."""
    return field(default=default, metadata={"help": help, "choices": choices})


def positional(help: str, default: str = "") -> Any:
    """Declare a dataclass field as a positional argument; required unless it has a default."""
    return field(default=default, metadata={"help": help, "positional": True, "required": not default})


def required(help: str) -> Any:
    """Declare a dataclass field as a required option."""
    return field(default="", metadata={"help": help, "required": True})


def value_range(text: str) -> tuple[float, float] | None:
    """The lowest and highest value of an option ``--range``; None if it is not given.

    Raises:
        ValueError: it is not a range.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)", text)
    if text and (not found or float(found[1]) >= float(found[2])):
        raise ValueError(f"--range is {text!r}, but must be LOW-HIGH, such as 0-4095")
    return (float(found[1]), float(found[2])) if found else None


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ValueError with one line instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def flag(name: str) -> str:
    """The command-line form of a field's name."""
    return "--" + name.replace("_", "-")


def add_fields(parser: argparse._ActionsContainer, wanted: Iterable[Field], hidden: bool = False) -> None:
    """Add an argument for each dataclass field. Arguments that are not given are absent from the parsed result.

    Args:
        hidden: accept the arguments without showing them in the help text.
    """
    for each in wanted:
        default = each.default if each.default is not MISSING else None
        meta, kind = each.metadata, type(default)
        text = meta.get("help", "").replace("%", "%%")
        if meta.get("positional"):
            parser.add_argument(each.name, nargs="?", default=argparse.SUPPRESS, help=text, metavar=each.name.upper())
            continue
        shown = "" if meta.get("required") or default in ("", None) or "(default:" in text else f" (default: {default})"
        common: dict[str, Any] = {"dest": each.name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS if hidden else text + shown}
        if kind is bool:
            parser.add_argument(flag(each.name), action=argparse.BooleanOptionalAction, **common)
        else:
            if meta.get("choices"):
                common["metavar"] = "{" + ",".join(meta["choices"]) + "}"
            names = [flag(each.name)] if len(each.name) > 1 else [f"-{each.name}"]
            parser.add_argument(*names, type=str, **({"metavar": kind.__name__.upper()} | common))


def suggestion(name: str, known: Iterable[str]) -> str:
    """A hint at the closest known name, or ""."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f": did you mean {near[0]}?" if near else ""


_PASSWORD = re.compile(r"(?<=://)[^/@\s]*:[^/@\s]*(?=@)|(?<=[?&]password=)[^&\s]+")


def mask_passwords(text: str) -> str:
    """Mask user names and passwords in the URIs of a text."""
    return _PASSWORD.sub("***", text)


def _check_open(name: str, value: Any) -> None:
    """Refuse a password in an option, where it would be visible in the process list and saved with the run."""
    if isinstance(value, str) and _PASSWORD.search(value):
        raise ValueError(
            f"{flag(name)} contains a password, which the process list and the run would reveal: leave it out and set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or PGPASSWORD"
        )


def convert(each: Field, value: Any) -> Any:
    """Convert a value to the field's type.

    Raises:
        ValueError: it cannot be converted; says what is expected.
    """
    kind: type = type(each.default)
    meant = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    wrong = ValueError(f"{flag(each.name)} is {reprlib.repr(value)}, but must be {meant}")
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise wrong
    if value is None or isinstance(value, bool | dict | list):
        raise wrong
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise wrong
    try:
        converted = kind(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None
    if kind is float and not math.isfinite(converted):
        raise wrong
    choices = each.metadata.get("choices")
    if choices and not is_choice(converted, choices):
        raise ValueError(f"{flag(each.name)} is {value!r}, but must be one of {', '.join(choices)}{suggestion(str(value), choices)}")
    return converted


def read_yaml(path: str) -> dict[str, Any]:
    """Read a YAML file as a mapping, with the safe loader.

    Raises:
        ValueError: the file is missing or not a mapping.
    """
    try:
        text = to_path(path).read_text()
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("it contains YAML aliases")  # nested aliases can expand to more than the memory
        values = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"config {path} cannot be read: {(str(error).splitlines() or [''])[0][:300]}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"config {path} must be a mapping, such as `bits: 64`")
    return {key.replace("-", "_"): value for key, value in values.items()}


def build(kind: type, values: dict[str, Any], where: str = "option") -> Any:
    """Build a config dataclass from values, all checked.

    Raises:
        ValueError: a name is unknown, a value has the wrong type, or a required one is missing.
    """
    known = {each.name: each for each in fields(kind) if each.init}
    for name, value in values.items():
        _check_open(name, value)
        if name not in known:
            raise ValueError(f"no {where} {flag(name)}{suggestion(flag(name), map(flag, known))}")
    for each in known.values():
        if each.metadata.get("required") and not values.get(each.name):
            shown = each.name.upper() if each.metadata.get("positional") else flag(each.name)
            raise ValueError(f"{shown} is missing: {each.metadata['help']}")
    plain = {name: value if known[name].default is MISSING else convert(known[name], value) for name, value in values.items()}
    return kind(**plain)
