"""Reads JSON that may be damaged or come from elsewhere, and checks its structure and types."""

import json
from typing import Any

NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "an object", list: "a list"}


def parse_json(text: str) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: it is not valid JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def check(value: Any, form: Any, where: str = "it") -> None:
    """Check that a JSON value has the expected structure.

    Args:
        form: a type; ``[form]`` for a list of such values; ``{name: form}`` for an object with at least these names;
            ``{str: form}`` for an object with any names.
        where: the value's path in the document, for messages.

    Raises:
        ValueError: it has another structure; says where.
    """
    kind = form if isinstance(form, type) else type(form)
    numeric = kind is float and isinstance(value, int) and abs(value) < 2**1023
    if not (isinstance(value, kind) or numeric) or (isinstance(value, bool) and kind not in (bool, object)):
        raise ValueError(f"{where} is not {NAMES[kind]}")
    if isinstance(form, list):
        for index, each in enumerate(value):
            check(each, form[0], f"{where}[{index}]")
    if isinstance(form, dict):
        every = form.get(str)
        for name in value if every else form:
            if name not in value:
                raise ValueError(f"{where} has no {name!r}")
            check(value[name], every or form[name], f"{where}.{name[:80]}")
