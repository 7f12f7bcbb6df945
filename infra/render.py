"""Fill a template of this folder with values from ``sizes.env`` or the environment.

Run: python -m infra.render TEMPLATE
"""

import os
import string
import sys
from pathlib import Path

SIZES = Path(__file__).with_name("sizes.env")


def sizes() -> dict[str, str]:
    """The values of ``sizes.env``; environment variables take precedence."""
    lines = (line.strip() for line in SIZES.read_text().splitlines())
    own = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return {name: os.environ.get(name, value) for name, value in own.items()}


def render(template: Path) -> str:
    """Fill in the ``${NAME}`` placeholders of a template; ``$$`` stands for a dollar sign.

    Raises:
        ValueError: the template cannot be read, or a name has no value.
    """
    try:
        return string.Template(template.read_text()).substitute(sizes())
    except OSError as error:
        raise ValueError(f"{template} cannot be read: {error.strerror}") from error
    except KeyError as error:
        raise ValueError(f"{template} has ${{{error.args[0]}}}, which {SIZES.name} has not") from error


def main() -> int:
    """Print a rendered template; returns the exit status."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 0 if {"-h", "--help"} & set(sys.argv) else 2
    try:
        print(render(Path(sys.argv[1])), end="")
    except ValueError as error:
        print(f"infra.render: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
