"""The search space of a method: declared by its dataclass; narrowed, widened or fixed by a file."""

from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from models.codes import check_bits
from pipelines.console.config import convert, flag, suggestion

BITS = (16, 32, 64, 128)
RESERVED = "bits"


class Trial(Protocol):
    """The part of Optuna's trial interface that a space uses."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...
    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


@dataclass(frozen=True)
class Dimension:
    """The range of a searched field: an interval, or a list of values.

    Attributes:
        low, high: inclusive bounds; integers for an integer field.
        choices: the values, instead of bounds.
        when: values of other fields that this field depends on; it is not drawn otherwise.
    """

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[Any, ...] = ()
    when: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def draw(self, trial: Trial, name: str) -> Any:
        """Draw a value for a trial."""
        if self.choices:
            return trial.suggest_categorical(name, self.choices)
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high, log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Space:
    """What a search draws, and what stays fixed.

    Attributes:
        searched: the range of each searched field, or ``bits``.
        fixed: the value of every other field, and of ``bits`` if it is not searched.
    """

    searched: dict[str, Dimension]
    fixed: dict[str, Any]

    def __call__(self, trial: Trial) -> dict[str, Any]:
        """Draw the values of a trial. Fields whose conditions do not hold keep their fixed values."""
        drawn: dict[str, Any] = {}
        for name in self._ordered():
            dimension = self.searched[name]
            if all((self.fixed | drawn)[other] in wanted for other, wanted in dimension.when.items()):
                drawn[name] = dimension.draw(trial, name)
        return drawn

    def _ordered(self) -> list[str]:
        """The searched names; each comes after those it depends on."""
        ordered: list[str] = []
        while len(ordered) < len(self.searched):
            ordered += [
                name for name, each in self.searched.items()
                if name not in ordered and all(other in ordered or other not in self.searched for other in each.when)
            ]  # fmt: skip
        return ordered


def space_of(method: Any, own: dict[str, Any], given: dict[str, Any], named: set[str], bits: int, search_bits: bool) -> Space:
    """Build the search space of a method.

    Every field with bounds is searched. A field is fixed if ``named`` contains it, or if its value is zero (switched off) and its
    search would be logarithmic.

    Args:
        own: the method's hyper-parameters; values of fields that are not searched.
        given: from a file: for each field a fixed value, a list of choices, or a mapping with ``low``, ``high`` and ``log``;
            missing entries come from the dataclass.
        named: fields that the user fixed on the command line.
        bits: code length, if it is not searched.
        search_bits: search the code length.

    Raises:
        ValueError: a name or value is wrong.
    """
    known = {each.name: each for each in fields(method.Config)}
    searched: dict[str, Dimension] = {}
    for name, each in known.items():
        meta = each.metadata
        if meta["low"] is not None and name not in named and not (meta["log"] and not own[name]):
            searched[name] = Dimension(meta["low"], meta["high"], meta["log"], when=meta["when"])
    fixed: dict[str, Any] = own | {RESERVED: bits}
    if search_bits:
        searched[RESERVED] = Dimension(choices=BITS)
    for name, value in given.items():
        if name != RESERVED and name not in known:
            raise ValueError(f"the space has {name!r}, but method {method.name} has no such field{suggestion(name, [*known, RESERVED])}")
        found = _read(name, value, known.get(name))
        if isinstance(found, Dimension):
            searched[name] = found
        else:
            searched.pop(name, None)
            fixed[name] = found
    if not searched:
        raise ValueError("the space leaves nothing to search: every field is fixed")
    return Space(searched, fixed)


def _read(name: str, value: Any, known: Any) -> Any:
    """Convert a file's entry to a range or a fixed value."""

    def checked(each: Any) -> Any:
        if known is not None:
            return convert(known, each)
        if isinstance(each, bool) or not isinstance(each, int):
            raise ValueError(f"{flag(name)} is {each!r}, but must be a whole number")
        return check_bits(each)

    if isinstance(value, list):
        if not value:
            raise ValueError(f"the space gives {name} an empty list")
        return Dimension(choices=tuple(map(checked, value)), when=known.metadata["when"] if known else {})
    if not isinstance(value, dict):
        return checked(value)
    meta = known.metadata if known else {"low": None, "high": None, "log": False, "when": {}}
    unknown = set(value) - {"low", "high", "log"}
    if unknown:
        raise ValueError(f"the space gives {name} {', '.join(sorted(unknown))}, but a range has low, high and log")
    low, high, log = (value.get(part, meta[part]) for part in ("low", "high", "log"))
    if low is None or high is None or name == RESERVED:
        raise ValueError(f"the space gives {name} a range: give " + ("a list, as [32, 64]" if name == RESERVED else "low and high"))
    low, high = checked(low), checked(high)
    if not low < high or (log and low <= 0):
        raise ValueError(f"the space gives {name} the range {low}..{high}{' log' if log else ''}, but it must grow" + (" from above 0" if log else ""))
    return Dimension(low, high, bool(log), when=meta["when"])
