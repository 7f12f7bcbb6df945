"""Checkpoints: safetensors for tensors, JSON for the rest. Nothing is ever unpickled.

A checkpoint is a folder ``epoch-00012`` with ``model.safetensors``, ``optimizer.safetensors``, ``state.json`` and their SHA-256
in ``digests.json``. It is written atomically: renamed into place on this machine; in a bucket the digests are uploaded last,
and a checkpoint without them is incomplete. A damaged checkpoint is skipped. A checkpoint at the end of an epoch needs no
random state, because every draw depends only on (seed, epoch, rank); one within an epoch, ``epoch-00012-step-00000300``,
also saves the state of the loop.
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
from data.readers.base import printable
from models.method import Method

FORMAT = 2  # format 1 had no digests
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
DIGESTS = "digests.json"
NAME = re.compile(r"epoch-\d{5}(-step-\d{8})?")  # of a checkpoint's folder
FORM = {"epoch": int, "step": int, "method": str, "shape": [int], "classes": int, "bits": int, "optimizers": dict, "config": dict}


def _flatten(value: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of nested dicts and lists into ``tensors``; the rest is JSON, with ``{"tensor": name}`` for each tensor."""
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
    """Inverse of ``_flatten``."""
    if isinstance(value, dict):
        if "tuple" in value:
            return tuple(_restore(each, tensors) for each in value["tuple"])
        return tensors[value["tensor"]] if "tensor" in value else {k: _restore(v, tensors) for k, v in value["dict"]}
    return [_restore(each, tensors) for each in value] if isinstance(value, list) else value


class Snapshot(NamedTuple):
    """The content of a checkpoint, copied to the CPU."""

    name: str
    model: dict[str, Tensor]
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Position(NamedTuple):
    """The position of a checkpoint in training: finished epochs, finished steps of the next epoch, and the state of the loop."""

    epoch: int
    step: int
    loop: dict[str, Any]


def snapshot(method: Method, epoch: int, config: dict[str, Any], step: int = 0, loop: dict[str, Any] | None = None) -> Snapshot:
    """Copy the state of a training run.

    Args:
        epoch: number of finished epochs.
        config: the run's options, for readers of the checkpoint.
        step, loop: within an epoch: finished steps, and the numbers and tensors that the loop continues with.
    """
    tensors: dict[str, Tensor] = {}
    optimizers = {name: _flatten(player.optimizer.state_dict(), name, tensors) for name, player in method.players.items()}
    model = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in method.whole_state().items()}
    state = {
        "format": FORMAT, "epoch": epoch, "step": step, "loop": _flatten(loop or {}, "loop", tensors), "method": method.name,
        "shape": list(method.shape), "classes": method.classes, "bits": method.bits, "optimizers": optimizers, "config": config,
    }  # fmt: skip
    return Snapshot(f"epoch-{epoch:05d}" + (f"-step-{step:08d}" if step else ""), model, tensors, state)


def write(folder: Path, taken: Snapshot) -> Path:
    """Write a snapshot into the run's folder of checkpoints.

    Raises:
        OSError: it could not be written; earlier checkpoints are not affected.
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
    """Whether a checkpoint's files match their digests."""
    try:
        if not (place / DIGESTS).exists():
            return read_state(place)["format"] == 1
        return validation.parse_json((place / DIGESTS).read_text()) == _digests(place)
    except (OSError, ValueError):
        return False


def latest(folder: Path) -> Path | None:
    """The most advanced intact checkpoint; None if there are no checkpoints.

    Raises:
        ValueError: all checkpoints are damaged.
    """
    found = [each for each in reversed(_all(folder)) if NAME.fullmatch(each.name)]
    for each in found:
        if is_intact(each):
            return each
        print(f"note: checkpoint {each} is damaged and skipped", file=sys.stderr)
    if found:
        raise ValueError(f"every checkpoint in {folder} is damaged: remove them to train from the beginning")
    return None


def prune(folder: Path, keep: int) -> None:
    """Remove all but the last ``keep`` checkpoints."""
    for old in _all(folder)[:-keep]:
        remove(old)


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch-*"), key=lambda each: each.name)


def _check_sizes(state: dict[str, Any]) -> None:
    """Check that networks can have a state's sizes.

    Raises:
        ValueError: they cannot.
    """
    most = {1: 1 << 20, 3: 4096}.get(len(state["shape"]), 0)
    if not all(0 < side <= most for side in state["shape"]) or not most or not 0 <= state["classes"] <= 1_000_000:
        raise ValueError(f"its shape is {state['shape'][:4]} with {state['classes']} classes")


def read_state(place: Path) -> dict[str, Any]:
    """Read the JSON part of a checkpoint.

    Raises:
        ValueError: it is missing, damaged, or of a newer format.
    """
    try:
        state = validation.parse_json((place / "state.json").read_text())
        validation.check(state, {"format": int})
        if state["format"] <= FORMAT:
            validation.check({"step": 0} | state, FORM)
            _check_sizes(state)
    except (OSError, ValueError) as error:
        raise ValueError(f"no readable checkpoint at {place} ({type(error).__name__}: {error})") from error
    if state["format"] > FORMAT:
        raise ValueError(f"checkpoint {place} has format {state['format']}, newer than this version reads: update hashbridge")
    return state


def _tensors(path: Path) -> dict[str, Tensor]:
    with local_copy(path) as file:
        return load_file(file)


def load(place: Path, method: Method, optimizers: bool = True) -> Position:
    """Load a checkpoint into a method.

    Args:
        optimizers: also load the optimisers' states and the state of the loop.

    Returns:
        The checkpoint's position.

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
        reason = printable(" ".join(str(error).split())[:200]) or type(error).__name__
        raise ValueError(f"checkpoint {place} is damaged, of other settings or of another version ({reason})") from error
    return Position(int(state["epoch"]), int(state.get("step", 0)), loop)
