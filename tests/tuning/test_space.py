"""Search spaces: what is drawn, what is fixed, and what a file may contain."""

from dataclasses import asdict, fields
from typing import Any

import optuna
import pytest

from models.registry import METHODS, find_method
from tuning.search import SAMPLERS
from tuning.space import BITS, Space, space_of
from tuning.study import START_UP, sampler_of


def space(method: str = "dah", given: dict[str, Any] | None = None, named: set[str] | None = None, search_bits: bool = False) -> Space:
    """A method's space around its defaults."""
    kind = find_method(method)
    return space_of(kind, asdict(kind.Config()), given or {}, named or set(), 64, search_bits)


def draws(found: Space, count: int = 200) -> list[dict[str, Any]]:
    """What random trials draw."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [found(study.ask()) for _ in range(count)]


@pytest.mark.parametrize("method", [name for name, each in METHODS.items() if not each.fitted])
def test_every_draw_lies_in_the_fields_bounds_and_makes_a_config(method: str) -> None:
    kind = find_method(method)
    bounds = {each.name: each.metadata for each in fields(kind.Config) if each.metadata["low"] is not None}
    found = space(method)
    assert found.searched and set(found.searched) <= set(bounds)
    for drawn in draws(found, 50):
        assert all(bounds[name]["low"] <= value <= bounds[name]["high"] for name, value in drawn.items())
        kind(kind.Config(**asdict(kind.Config()) | drawn), (1, 28, 28), 10, 64)


def test_a_field_that_means_nothing_is_not_drawn() -> None:
    found = draws(space("idr-ae", {"matching": ["none", "critic", "bitwise"]}))
    seen = {name: [drawn for drawn in found if drawn["matching"] == name] for name in ("none", "critic", "bitwise")}
    assert all(seen.values())
    assert not any("matching_weight" in drawn or "penalty_weight" in drawn for drawn in seen["none"])
    assert all("matching_weight" in drawn and "penalty_weight" in drawn for drawn in seen["critic"])
    assert all("matching_weight" in drawn and "penalty_weight" not in drawn for drawn in seen["bitwise"])


def test_what_is_named_or_off_stays_fixed() -> None:
    assert "mmd_weight" not in space(named={"mmd_weight"}).searched
    assert "mmd_weight" in space("dah").searched and "mmd_weight" not in space("dpsh").searched


def test_a_file_narrows_widens_and_fixes() -> None:
    given = {
        "like_weight": {"low": 200.0, "high": 300.0},
        "dropout": 0.25,
        "learning_rate": [0.001, 0.01],
        "bits": [32, 64],
        "per_class": {"high": 8, "low": 4},
    }
    found = space(given=given)
    assert "dropout" not in found.searched and found.fixed["dropout"] == 0.25
    for drawn in draws(found):
        assert 200 <= drawn["like_weight"] <= 300 and drawn["learning_rate"] in (0.001, 0.01)
        assert drawn["bits"] in (32, 64) and drawn["per_class"] in (4, 5, 6, 7, 8)
    assert {drawn["bits"] for drawn in draws(space(search_bits=True))} == set(BITS)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"like_wait": 1.0}, "did you mean like_weight"), ({"dropout": {"low": 0.5, "high": 0.1}}, "must grow"),
        ({"mmd_weight": {"low": 0.0, "high": 1.0}}, "from above 0"), ({"dropout": []}, "an empty list"), ({"bits": [33]}, "multiple of 8"),
        ({"dropout": {"lowest": 0.1}}, "lowest"), ({"dropout": "much"}, "must be a number"), ({"network": {"low": 1, "high": 2}}, "must be one of"),
        ({"bits": {"low": 16, "high": 64}}, "give a list"), ({"augment": {"log": True}}, "give low and high"),
    ],
)  # fmt: skip
def test_nonsense_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        space(given=given)


def test_a_space_without_a_choice_is_refused() -> None:
    everything = {each.name for each in fields(find_method("dah").Config)}
    with pytest.raises(ValueError, match="nothing to search"):
        space(named=everything)


def test_no_option_of_a_command_hides_a_methods_field() -> None:
    from tuning import search

    own = {each.name for method in METHODS.values() for each in fields(method.Config)}
    assert not own & {each.name for each in fields(search.Config)}


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_within_the_bounds(name: str) -> None:
    """Also after it has begun to learn from what it drew."""
    found = space(named={"views", "network"})
    study = optuna.create_study(sampler=sampler_of(name, 0), direction="maximize")
    rates = []
    for _ in range(START_UP + 4):
        trial = study.ask()
        drawn = found(trial)
        for field, value in drawn.items():
            assert found.searched[field].low <= value <= found.searched[field].high
        rates.append(drawn["learning_rate"])
        study.tell(trial, -drawn["learning_rate"])
    assert len(set(rates)) > START_UP  # the best may be at a bound, and be drawn again
