"""The search space of a method: what its dataclass says, narrowed, widened or fixed by a file."""

from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from models.codes import check_bits
from pipelines.console.config import convert, flag, suggestion

BITS = (16, 32, 64, 128)
RESERVED = "bits"


class Trial(Protocol):
    """What a space needs of Optuna's trial."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...
    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


@dataclass(frozen=True)
class Dimension:
    """A searched field: between two bounds, or one of some values.

    Attributes:
        low, high: bounds, both included; whole numbers for a field of whole numbers.
        choices: the values, in place of bounds.
        when: the values of other fields with which it means anything; it is not drawn with others.
    """

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[Any, ...] = ()
    when: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def draw(self, trial: Trial, name: str) -> Any:
        """A value of a trial."""
        if self.choices:
            return trial.suggest_categorical(name, self.choices)
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high, log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Space:
    """What a search draws, and what stands fixed.

    Attributes:
        searched: name of a field, or ``bits``, to its dimension.
        fixed: every field of the method, and ``bits``, to its value where it is not drawn.
    """

    searched: dict[str, Dimension]
    fixed: dict[str, Any]

    def __call__(self, trial: Trial) -> dict[str, Any]:
        """Draw the values of a trial; those that mean nothing with the others stay fixed."""
        drawn: dict[str, Any] = {}
        for name in self._ordered():
            dimension = self.searched[name]
            if all((self.fixed | drawn)[other] in wanted for other, wanted in dimension.when.items()):
                drawn[name] = dimension.draw(trial, name)
        return drawn

    def _ordered(self) -> list[str]:
        """The searched names, each after those that it depends on."""
        ordered: list[str] = []
        while len(ordered) < len(self.searched):
            ordered += [
                name for name, each in self.searched.items()
                if name not in ordered and all(other in ordered or other not in self.searched for other in each.when)
            ]  # fmt: skip
        return ordered


def space_of(method: Any, own: dict[str, Any], given: dict[str, Any], named: set[str], bits: int, search_bits: bool) -> Space:
    """The space of a method.

    Every field with bounds is searched between them. A field that ``named`` has, or that is switched off by a zero where its
    search would be logarithmic, is fixed.

    Args:
        own: the method's fields with their values, where the search does not vary them.
        given: of a file: a field's name to a value that fixes it, a list to choose of, or a mapping with ``low``, ``high``
            and ``log``, of which any may be left out where the dataclass has it.
        named: fields that the user fixed by naming them.
        bits: code length, where it is not searched.
        search_bits: search it.

    Raises:
        ValueError: a name or a value is wrong.
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
    """A dimension or a fixed value, of a file's entry."""

    def checked(each: Any) -> Any:
        if known is not None:
            return convert(known, each)
        if isinstance(each, bool) or not isinstance(each, int):
            raise ValueError(f"{flag(name)} is {each!r}, but must be a whole number")
        return check_bits(each)

    if isinstance(value, list):
        if not value:
            raise ValueError(f"the space gives {name} no value to choose of")
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
