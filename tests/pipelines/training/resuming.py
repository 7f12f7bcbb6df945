"""Cuts a finished run back by an epoch and resumes it."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from pipelines import train
from pipelines.training import checkpoint


def parameters(result: dict[str, Any]) -> dict[str, Tensor]:
    """What the checkpoint of a run's result holds."""
    return load_file(Path(result["checkpoint"]) / "model.safetensors")


def assert_resumes_bit_identically(whole: dict[str, Any], folder: Path, step: int = 0) -> dict[str, Tensor]:
    """Check that a copy of a run of three epochs, resumed in the third after so many steps, ends as the run did; returns its parameters."""
    part = folder / "part" / whole["run_id"]
    shutil.copytree(folder / whole["run_id"], part)
    shutil.rmtree(part / "checkpoints" / "epoch-00003")
    place = checkpoint.latest(part / "checkpoints")
    assert place is not None and place.name == "epoch-00002" + (f"-step-{step:08d}" if step else "")
    (part / "result.json").unlink()
    again = train.run(train.make_config({"resume": whole["run_id"], "storage": str(part.parent)}))
    one, other = parameters(whole), parameters(again)
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    assert again["metrics"] == whole["metrics"]
    terms = [json.loads((each / "progress.jsonl").read_text().splitlines()[-1])["terms"] for each in (folder / whole["run_id"], part)]
    assert terms[0] == terms[1]
    return one
