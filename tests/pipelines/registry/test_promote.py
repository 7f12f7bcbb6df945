"""Promotion: refused, accepted, undone and raced, between an LSH and an ITQ encoder of the same digits."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import promote, register
from pipelines.console.cli import main
from pipelines.registry import versions
from pipelines.registry.connection import connect


def registered(runs: dict[str, Any], model: str, *which: str) -> promote.Config:
    """Register runs as versions of a model, the last as challenger; the promotion that is then due."""
    for each in which:
        register.run(register.Config(runs[each], name=model, storage=runs["storage"], tracking=runs["uri"]))
        if each != which[-1]:
            promote.run(promote.Config(model, tracking=runs["uri"]))
    return promote.Config(model, tracking=runs["uri"])


def champion(runs: dict[str, Any], model: str) -> tuple[int, dict[str, str]]:
    """Number and tags of the champion."""
    found = versions.version_tags(runs["uri"], model, "champion")
    assert found is not None
    return found


def test_the_better_is_promoted_and_the_promotion_undone(runs: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    decision = promote.run(registered(runs, "up", "worse", "better"))
    figures = decision["figures"]
    assert decision["promoted"] and figures["queries"] == 500 and 0 < figures["low"] < figures["difference"] < figures["high"]
    assert figures["difference"] == pytest.approx(figures["challenger"] - figures["champion"])
    number, tags = champion(runs, "up")
    assert number == 2 and tags["champion_before"] == "1" and float(tags["promotion.low"]) == pytest.approx(figures["low"], rel=1e-4)
    capsys.readouterr()
    assert main(["promote", "up", "--rollback", "--tracking", runs["uri"]]) == 0
    assert "version 1 is the champion again, in place of 2" in capsys.readouterr().out
    assert champion(runs, "up")[0] == 1
    assert main(["promote", "up", "--rollback", "--tracking", runs["uri"]]) == 2
    assert "no earlier champion" in capsys.readouterr().err


def test_the_worse_and_the_hardly_better_are_refused(runs: dict[str, Any]) -> None:
    decision = promote.run(registered(runs, "down", "better", "worse"))
    assert not decision["promoted"] and decision["figures"]["high"] < 0 and champion(runs, "down")[0] == 1
    config = registered(runs, "margin", "worse", "better")
    config.margin = 0.9
    assert not promote.run(config)["promoted"] and champion(runs, "margin")[0] == 1


def test_other_data_and_protocols_are_refused(runs: dict[str, Any], digits: Path) -> None:
    config = registered(runs, "other", "worse", "better")
    client = connect(runs["uri"])
    client.set_model_version_tag("other", "2", "protocol", "cross")
    with pytest.raises(ValueError, match="was not measured under protocol target, but under cross"):
        promote.run(config)
    client.set_model_version_tag("other", "2", "protocol", "cross+target")
    client.set_model_version_tag("other", "2", "dataset_digest", "another")
    with pytest.raises(ValueError, match="version 2 has dataset_digest another"):
        promote.run(config)
    client.set_model_version_tag("other", "1", "dataset_digest", "another")
    with pytest.raises(ValueError, match="is not the one that the versions belong to"):
        promote.run(config)


def test_of_two_promotions_at_once_one_wins(runs: dict[str, Any]) -> None:
    config = registered(runs, "race", "worse", "better")
    start, decisions, refused = threading.Barrier(2), [], []

    def race() -> None:
        start.wait()
        try:
            decisions.append(promote.run(config)["promoted"])
        except ValueError as error:
            refused.append(str(error))

    racers = [threading.Thread(target=race) for _ in range(2)]
    for each in racers:
        each.start()
    for each in racers:
        each.join()
    assert decisions.count(True) == 1 and len(decisions) + len(refused) == 2
    assert all("another promotion of 'race' is running" in text for text in refused)
    assert champion(runs, "race")[0] == 2


def test_a_dead_promotion_does_not_bar_the_next_for_ever(runs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = registered(runs, "dead", "worse", "better")
    connect(runs["uri"]).create_registered_model("dead.promotion")
    with pytest.raises(ValueError, match="another promotion"):
        promote.run(config)
    monkeypatch.setattr(versions, "LEFT", 0)
    assert promote.run(config)["promoted"]


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    covered = sum(low <= 0.1 <= high for low, high in (promote.interval(random.normal(0.1, 1.0, 200), 0.9, seed) for seed in range(100)))
    assert 82 <= covered <= 97
