"""The objectives of a search: label-free ones, and oracles, which use the target's labels.

Label-free objectives are computed from codes and class probabilities of the source's and target's training images and of the
source's test images. They never read the target's label column.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from data.manifest import Manifest
from data.shards import read_rows, to_arrays
from models.codes import pack
from models.method import Method
from pipelines.retrieval import metrics

ROWS = 4096  # rows per split used, the first of the shuffled rows
NEIGHBOURS = 0.05  # temperature of the soft neighbourhood density, as in the paper


class Outputs(NamedTuple):
    """The outputs of a method that the objectives are computed from.

    Attributes:
        source, target: relaxed codes of training images, (n, bits).
        source_labels: (n,) int64.
        held, held_labels: of the source's test split; empty if there is none.
        probabilities: the target's class log-probabilities, (n, classes); empty if the method has no classes.
    """

    source: Tensor
    source_labels: Tensor
    held: Tensor
    held_labels: Tensor
    target: Tensor
    probabilities: Tensor


@dataclass(frozen=True)
class Objective:
    """A figure of a trained method.

    Attributes:
        compute: returns nan if it cannot be computed.
        maximise: whether larger is better.
        help: its meaning and source.
        needs: subset of ``classes`` (the method's class probabilities), ``source`` and ``labels`` (the source's).
    """

    compute: Callable[[Outputs], float]
    maximise: bool
    help: str
    needs: tuple[str, ...] = ()


def source_map(seen: Outputs) -> float:
    """mAP of the source's test images against its training images; without a test split, of these against each other."""
    alone = not len(seen.held)
    query, labels = (seen.source, seen.source_labels) if alone else (seen.held, seen.held_labels)
    counted = metrics.distance_histograms(_packed(query), labels.numpy(), _packed(seen.source), seen.source_labels.numpy(), own=alone)
    return metrics.summarise(counted)["map"]


def entropy(seen: Outputs) -> float:
    """Mean entropy of the target's class probabilities, in nats."""
    return float(-(seen.probabilities.exp() * seen.probabilities).sum(1).mean())


def information(seen: Outputs) -> float:
    """Mutual information of target images and predicted classes: entropy of the mean prediction minus mean entropy, in nats."""
    mean = seen.probabilities.exp().mean(0)
    return float(-torch.special.xlogy(mean, mean).sum()) - entropy(seen)


def soft_neighbourhood_density(seen: Outputs) -> float:
    """Mean entropy of a target image's similarities to the others, by class probabilities (by codes if there are none)."""
    x = normalize(seen.probabilities.exp() if len(seen.probabilities) else seen.target)
    total = 0.0
    for rows in torch.arange(len(x)).split(512):
        logits = x[rows] @ x.T / NEIGHBOURS
        logits[torch.arange(len(rows)), rows] = -torch.inf
        near = logits.log_softmax(1)
        total += float(-torch.nan_to_num(near.exp() * near).sum())
    return total / len(x)


def a_distance(seen: Outputs) -> float:
    """Proxy A-distance, 2 (1 - 2 error), of a linear classifier that separates the domains' codes; error on held-out rows."""
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415  scikit-learn is slow to import

    n = min(len(seen.source), len(seen.target), 2000)
    x = torch.cat([seen.source[:n], seen.target[:n]]).numpy()
    domain = np.repeat([0, 1], n)
    order = np.random.default_rng(0).permutation(2 * n)
    train, test = order[:n], order[n:]
    error = 1 - LogisticRegression(max_iter=200).fit(x[train], domain[train]).score(x[test], domain[test])
    return float(2 * (1 - 2 * min(error, 1 - error)))


OBJECTIVES = {
    "source-map": Objective(source_map, True, "mAP of held-out source images", ("source", "labels")),
    "entropy": Objective(entropy, False, "entropy of the target's predictions (Morerio et al., ICLR 2018)", ("classes",)),
    "information": Objective(information, True, "mutual information of target images and predictions (Musgrave et al., 2022)", ("classes",)),
    "density": Objective(soft_neighbourhood_density, True, "soft neighbourhood density (Saito et al., ICCV 2021)"),
    "a-distance": Objective(
        a_distance,
        False,
        "distance of the domains' codes (Ben-David et al., NIPS 2007), by which the DAH paper chooses its weight of MMD",
        ("source",),
    ),
}


def _packed(codes: Tensor) -> np.ndarray:
    return pack(codes).numpy()


def _read(root: Path, manifest: Manifest, domain: str, split: str, labels: bool) -> tuple[Tensor, Tensor]:
    """The first rows of a split with their labels; empty if there is no such split."""
    rows = manifest.domains[domain].splits.get(split) if domain else None
    batches = list(read_rows(root, manifest, domain, split, stop=min(rows.rows, ROWS), labels=labels)) if rows else []
    if not batches:
        return torch.empty(0, *manifest.shape), torch.empty(0, dtype=torch.int64)
    known = [batch.column("label").to_numpy().astype(np.int64) for batch in batches] if labels else [np.empty(0, np.int64)]
    return torch.from_numpy(np.concatenate([to_arrays(batch, manifest) for batch in batches])), torch.from_numpy(np.concatenate(known))


@torch.no_grad()
def collect_outputs(method: Method, root: Path, manifest: Manifest, source: str, target: str) -> Outputs:
    """Codes and probabilities of the first rows of each split."""
    encoder = method.encoder().eval()

    def encoded(x: Tensor) -> Tensor:
        return torch.cat([encoder(part) for part in x.split(512)]) if len(x) else torch.empty(0, method.bits)

    x, labels = _read(root, manifest, source, "train", True)
    held, held_labels = _read(root, manifest, source, "test", True)
    of_target, _ = _read(root, manifest, target, "train", False)
    codes, probabilities = encoded(x), torch.empty(0)
    if method.can_classify:
        method.set_references(torch.where(codes > 0, 1.0, -1.0), labels)
        probabilities = torch.cat([method.classify(part) for part in of_target.split(512)])
    return Outputs(codes, labels, encoded(held), held_labels, encoded(of_target), probabilities)


def objectives(seen: Outputs) -> dict[str, float]:
    """All label-free objectives; nan for those that cannot be computed."""
    there = {"classes": len(seen.probabilities) > 0, "source": len(seen.source) > 0, "labels": bool((seen.source_labels >= 0).any())}
    return {name: each.compute(seen) if all(there[need] for need in each.needs) else float("nan") for name, each in OBJECTIVES.items()}
