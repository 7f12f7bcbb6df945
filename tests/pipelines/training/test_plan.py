"""The steps of an epoch, and what a run says of them."""

from pathlib import Path
from typing import Any

import pytest

from pipelines import train
from pipelines.training.options import make_options
from pipelines.training.plan import Plan, make_plan, prepare


def planned(digits: Path, **more: Any) -> Plan:
    values = {"method": "dah", "dataset": str(digits), "source": "typeset", "target": "handwritten", "bits": 16, "per_class": 40, "workers": 0}
    return make_plan(prepare(make_options(values | more)), lambda: 1)


def test_an_epoch_is_a_pass_but_not_less_than_the_least_steps(digits: Path) -> None:
    assert planned(digits).rows == 4000 and planned(digits).batch == 400
    assert planned(digits).steps == 100 and planned(digits, least_steps=1).steps == 10
    assert planned(digits, least_steps=0, steps_per_epoch=3).steps == 3


def test_a_run_says_when_an_epoch_is_more_than_a_pass(digits: Path) -> None:
    assert train.describe(planned(digits, least_steps=1)) == "10 epochs of 10 steps of 400 rows a domain"
    assert train.describe(planned(digits)) == "10 epochs of 100 steps of 400 rows a domain, 10 passes over the larger domain each"


def test_a_paper_preset_brings_its_epochs(digits: Path) -> None:
    assert planned(digits, preset="paper", per_class=5).options.epochs == 300
    assert planned(digits, preset="paper", per_class=5, epochs=2).options.epochs == 2
    assert planned(digits, preset="program-digits").options.own["like_weight"] == 100
    with pytest.raises(ValueError, match="dah has no preset 'papr'"):
        planned(digits, preset="papr")


def test_a_file_of_weights_is_found_from_other_working_folders(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("weights.pth").touch()
    common = {"method": "dah", "dataset": str(digits), "source": "typeset", "target": "handwritten"}
    kept = {name: make_options(common | {"pretrained": name}).own["pretrained"] for name in ("weights.pth", "elsewhere.pth", "default", "none")}
    assert kept == {"weights.pth": str(tmp_path / "weights.pth"), "elsewhere.pth": "elsewhere.pth", "default": "default", "none": "none"}
