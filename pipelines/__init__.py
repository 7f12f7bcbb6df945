"""The commands, one file each, and the packages behind them: training, retrieval, registry, console."""

from pathlib import Path

import data
import models

_HERE = Path(__file__).resolve().parent.parent
for _package in (data, models):
    _found = Path(_package.__file__ or "nowhere").resolve().parent
    if _found.parent != _HERE:
        raise ImportError(f"{_found} shadows hashbridge's own package {_found.name!r} in {_HERE}: rename it or take it off the path")
