"""Fill a template of this folder with the numbers of ``sizes.env``, or with those of the environment.

Run: python -m infra.render TEMPLATE
"""

import os
import string
import sys
from pathlib import Path

SIZES = Path(__file__).with_name("sizes.env")


def sizes() -> dict[str, str]:
    """Name and value of every line of ``sizes.env``; the environment goes before it."""
    lines = (line.strip() for line in SIZES.read_text().splitlines())
    own = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return {name: os.environ.get(name, value) for name, value in own.items()}


def render(template: Path) -> str:
    """A template with its ``${NAME}`` filled in; ``$$`` stands for a dollar.

    Raises:
        ValueError: it cannot be read, or has a name that there is no value for.
    """
    try:
        return string.Template(template.read_text()).substitute(sizes())
    except OSError as error:
        raise ValueError(f"{template} cannot be read: {error.strerror}") from error
    except KeyError as error:
        raise ValueError(f"{template} has ${{{error.args[0]}}}, which {SIZES.name} has not") from error


def main() -> int:
    """Print a rendered template; the exit status."""
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
