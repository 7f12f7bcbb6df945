"""Checkpoints: safetensors for tensors, JSON for the rest. Nothing in them is ever unpickled.

A checkpoint is a folder ``epoch-00012`` with ``model.safetensors``, ``optimizer.safetensors``, ``state.json`` and the
SHA-256 of each in ``digests.json``. It is there whole or not at all: on this machine it is renamed into its place, in a
bucket the digests come last, and without them it is none. One that storage has damaged since is passed over. At an epoch's
end random states need no place in it, as every draw is a function of (seed, epoch, rank); in the middle,
``epoch-00012-step-00000300``, it has what the loop was at.
"""

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data import validation
from data.filesystem import atomic_folder, local_copy, remove
from models.method import Method

FORMAT = 2  # of 1 there were no digests
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
DIGESTS = "digests.json"
FORM = {"epoch": int, "step": int, "method": str, "shape": [int], "classes": int, "bits": int, "optimizers": dict, "config": dict}


def _flatten(value: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of nested dicts and lists out; what is left is JSON, each tensor a ``{"tensor": name}``."""
    if isinstance(value, Tensor):
        tensors[prefix] = value.detach().cpu().clone().contiguous()
        return {"tensor": prefix}
    if isinstance(value, dict):
        return {"dict": [[key, _flatten(each, f"{prefix}/{key}", tensors)] for key, each in value.items()]}
    if isinstance(value, list | tuple):
        parts = [_flatten(each, f"{prefix}/{index}", tensors) for index, each in enumerate(value)]
        return {"tuple": parts} if isinstance(value, tuple) else parts
    return value


def _restore(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo :func:`_flatten`."""
    if isinstance(value, dict):
        if "tuple" in value:
            return tuple(_restore(each, tensors) for each in value["tuple"])
        return tensors[value["tensor"]] if "tensor" in value else {k: _restore(v, tensors) for k, v in value["dict"]}
    return [_restore(each, tensors) for each in value] if isinstance(value, list) else value


class Snapshot(NamedTuple):
    """What a checkpoint will hold, on the CPU and apart from what is trained on."""

    name: str
    model: dict[str, Tensor]
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Position(NamedTuple):
    """How far a checkpoint's training was: epochs done, and within the next one steps done and what the loop was at."""

    epoch: int
    step: int
    loop: dict[str, Any]


def snapshot(method: Method, epoch: int, config: dict[str, Any], step: int = 0, loop: dict[str, Any] | None = None) -> Snapshot:
    """Take the state of a training.

    Args:
        epoch: number of epochs done.
        config: the run's configuration, kept for whoever reads the checkpoint.
        step, loop: in the middle of an epoch, its steps done, and numbers and tensors by name that the loop goes on with.
    """
    tensors: dict[str, Tensor] = {}
    optimizers = {name: _flatten(player.optimizer.state_dict(), name, tensors) for name, player in method.players.items()}
    model = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in method.state_modules().state_dict().items()}
    state = {
        "format": FORMAT, "epoch": epoch, "step": step, "loop": _flatten(loop or {}, "loop", tensors), "method": method.name,
        "shape": list(method.shape), "classes": method.classes, "bits": method.bits, "optimizers": optimizers, "config": config,
    }  # fmt: skip
    return Snapshot(f"epoch-{epoch:05d}" + (f"-step-{step:08d}" if step else ""), model, tensors, state)


def write(folder: Path, taken: Snapshot) -> Path:
    """Write a snapshot into the run's folder of checkpoints.

    Raises:
        OSError: it could not be written; the checkpoints before it are untouched.
    """
    place = folder / taken.name
    try:
        with atomic_folder(place, last=DIGESTS) as partial:
            save_file(taken.model, partial / "model.safetensors")
            save_file(taken.tensors, partial / "optimizer.safetensors")
            (partial / "state.json").write_text(json.dumps(taken.state))
            (partial / DIGESTS).write_text(json.dumps(_digests(partial)))
    except SafetensorError as error:
        raise OSError(f"checkpoint {place} could not be written ({error}); the one before it is kept") from error
    except OSError as error:
        raise OSError(error.errno, f"checkpoint {place} could not be written ({error.strerror or error}); the one before it is kept") from error
    return place


def _digests(place: Path) -> dict[str, str]:
    found = {}
    for name in FILES:
        with (place / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def is_intact(place: Path) -> bool:
    """Whether a checkpoint's files are as they were written."""
    try:
        if not (place / DIGESTS).exists():
            return read_state(place)["format"] == 1
        return validation.parse_json((place / DIGESTS).read_text()) == _digests(place)
    except (OSError, ValueError):
        return False


def latest(folder: Path) -> Path | None:
    """The checkpoint that is furthest on and whole, None where there is none at all.

    Raises:
        ValueError: there are some, and all are damaged.
    """
    found = [each for each in reversed(_all(folder)) if re.fullmatch(r"epoch-\d{5}(-step-\d{8})?", each.name)]
    for each in found:
        if is_intact(each):
            return each
        print(f"note: checkpoint {each} is damaged, and passed over", file=sys.stderr)
    if found:
        raise ValueError(f"every checkpoint in {folder} is damaged: remove them to train from the beginning")
    return None


def prune(folder: Path, keep: int) -> None:
    """Remove all but the latest ``keep`` checkpoints."""
    for old in _all(folder)[:-keep]:
        remove(old)


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch-*"), key=lambda each: each.name)


def read_state(place: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        ValueError: there is none, it is damaged, or of a newer format.
    """
    try:
        state = validation.parse_json((place / "state.json").read_text())
        validation.check(state, {"format": int})
        if state["format"] <= FORMAT:
            validation.check({"step": 0} | state, FORM)
    except (OSError, ValueError) as error:
        raise ValueError(f"no readable checkpoint at {place} ({type(error).__name__}: {error})") from error
    if state["format"] > FORMAT:
        raise ValueError(f"checkpoint {place} is of format {state['format']}, newer than this version reads: update hashbridge")
    return state


def _tensors(path: Path) -> dict[str, Tensor]:
    with local_copy(path) as file:
        return load_file(file)


def load(place: Path, method: Method, optimizers: bool = True) -> Position:
    """Bring a method to a checkpoint's state.

    Args:
        optimizers: whether the optimisers' states are wanted too.

    Returns:
        How far it is; without the optimisers, without what the loop was at.

    Raises:
        ValueError: it is damaged, or of another method, shape or code length.
    """
    state = read_state(place)
    is_, wanted = ([state[k] for k in ("method", "shape", "classes", "bits")], [method.name, list(method.shape), method.classes, method.bits])
    if is_ != wanted:
        raise ValueError(
            f"checkpoint {place} is of {is_[0]} ({is_[3]} bits, shape {is_[1]}, {is_[2]} classes), "
            f"not of {wanted[0]} ({wanted[3]} bits, shape {wanted[1]}, {wanted[2]} classes)"
        )
    loop: dict[str, Any] = {}
    try:
        method.state_modules().load_state_dict(_tensors(place / "model.safetensors"))
        if optimizers:
            tensors = _tensors(place / "optimizer.safetensors")
            for name, player in method.players.items():
                player.optimizer.load_state_dict(_restore(state["optimizers"][name], tensors))
            loop = _restore(state["loop"], tensors) if state["format"] > 1 else {}
    except (SafetensorError, OSError, KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint {place} is damaged or of other settings ({reason})") from error
    return Position(int(state["epoch"]), int(state.get("step", 0)), loop)
