"""The objectives of a search: label-free ones, and oracles, which use the target's labels.

Label-free objectives are computed from codes and class probabilities of the source's and target's training images and of the
source's test images. They never read the target's label column.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from data.decoding import Decoded, read_decoded
from data.manifest import Manifest
from models.codes import pack
from models.method import Method, classify_encoded
from pipelines.retrieval import metrics

ROWS = 4096  # rows per split used, the first of the shuffled rows
SOME, NEAR = 2000, 10  # rows whose neighbours are looked for, and how many neighbours
SIDE = 16  # pixels to which images are shrunk before their neighbours are looked for
NEIGHBOURS = 0.05  # temperature of the soft neighbourhood density, as in the paper


class Outputs(NamedTuple):
    """The outputs of a method that the objectives are computed from.

    Attributes:
        source, target: relaxed codes of training images, (n, bits).
        source_labels: (n,) int64.
        held, held_labels: of the source's test split; empty if there is none.
        probabilities: the target's class log-probabilities, (n, classes); empty if the method has no classes.
        inputs: the target's first rows as vectors, (at most ``SOME``, features): features, or small images.
    """

    source: Tensor
    source_labels: Tensor
    held: Tensor
    held_labels: Tensor
    target: Tensor
    probabilities: Tensor
    inputs: Tensor


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


def rank(seen: Outputs) -> float:
    """Effective rank of the target's relaxed codes: the exponential of the entropy of their singular values, shares of one."""
    values = torch.linalg.svdvals(seen.target)
    shares = values / values.sum().clamp_min(1e-12)
    return float((-torch.special.xlogy(shares, shares).sum()).exp())


def balance(seen: Outputs) -> float:
    """Mean entropy of the target's bits, in bits: 1 if each bit is set in half of the codes."""
    ones = (seen.target > 0).double().mean(0)
    return float(-(torch.special.xlogy(ones, ones) + torch.special.xlogy(1 - ones, 1 - ones)).mean() / math.log(2))


def _nearest(queries: Tensor, rows: Tensor, own: bool = False) -> Tensor:
    """Places of the ``NEAR`` rows of largest cosine to each query, (n, NEAR); ``own`` leaves a query itself out."""
    similar = normalize(queries) @ normalize(rows).T
    if own:
        similar.fill_diagonal_(-torch.inf)
    return similar.topk(min(NEAR, len(rows) - own), 1).indices


def mutual(seen: Outputs) -> float:
    """Share of the target's nearest source images, by relaxed codes, that have the target image among their own nearest."""
    source, target = seen.source[:SOME], seen.target[:SOME]
    there, back = _nearest(target, source), _nearest(source, target)
    return float((back[there] == torch.arange(len(target))[:, None, None]).any(2).double().mean())


def kept(seen: Outputs) -> float:
    """Share of a target image's nearest, as features or small images, that are among its nearest by relaxed codes."""
    before, after = _nearest(seen.inputs, seen.inputs, own=True), _nearest(seen.target[: len(seen.inputs)], seen.target[: len(seen.inputs)], own=True)
    return float((before[:, :, None] == after[:, None]).any(2).double().mean())


ORACLES = ("oracle/accuracy", "oracle/cross/map", "oracle/target/map")  # see target labels
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
    "rank": Objective(rank, True, "effective rank of the target's codes (RankMe, Garrido et al., ICML 2023)"),
    "balance": Objective(balance, True, "entropy of the target's bits"),
    "mutual": Objective(mutual, True, "nearest neighbours across the domains that are so in both directions", ("source",)),
    "kept": Objective(kept, True, "nearest neighbours in the target that are so before and after encoding"),
}


def _small(images: Tensor) -> Tensor:
    """Images as vectors of few pixels, (n, features), less the mean of each."""
    pixels = adaptive_avg_pool2d(images.float(), SIDE).flatten(1)
    return pixels - pixels.mean(1, keepdim=True)


def _packed(codes: Tensor) -> np.ndarray:
    return pack(codes).numpy()


def _read(root: Path, manifest: Manifest, domain: str, split: str, labels: bool) -> Iterator[Decoded]:
    """The first rows of a split; none if there is no such split."""
    rows = manifest.domains[domain].splits.get(split) if domain else None
    return read_decoded(root, manifest, domain, split, stop=min(rows.rows, ROWS), labels=labels, threads=0) if rows else iter(())


@torch.no_grad()
def collect_outputs(method: Method, root: Path, manifest: Manifest, source: str, target: str) -> Outputs:
    """Codes and probabilities of the first rows of each split."""
    encoder, device = method.encoder().eval(), method.device

    inputs = list[Tensor]()

    def outputs(split: str, domain: str, labels: bool, classify: bool = False, keep: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        codes, known, guesses = [torch.empty(0, method.bits)], [torch.empty(0, dtype=torch.int64)], [torch.empty(0, method.classes)]
        for part in _read(root, manifest, domain, split, labels):
            x = part.x.to(device)
            relaxed = encoder(x)
            codes.append(relaxed.cpu())
            if keep and sum(map(len, inputs)) < SOME:
                inputs.append((_small(x) if x.ndim == 4 else x).cpu())
            known += [] if part.label is None else [torch.from_numpy(part.label)]
            if classify:
                guesses.append(classify_encoded(method, x, relaxed).cpu())
        return torch.cat(codes), torch.cat(known), torch.cat(guesses)

    codes, labels, _ = outputs("train", source, True)
    held, held_labels, _ = outputs("test", source, True)
    if method.can_classify:
        method.set_references(torch.where(codes > 0, 1.0, -1.0).to(device), labels.to(device))
    of_target, _, probabilities = outputs("train", target, False, method.can_classify, keep=True)
    return Outputs(codes, labels, held, held_labels, of_target, probabilities, torch.cat(inputs)[:SOME])


def objectives(seen: Outputs) -> dict[str, float]:
    """All label-free objectives; nan for those that cannot be computed."""
    there = {"classes": len(seen.probabilities) > 0, "source": len(seen.source) > 0, "labels": bool((seen.source_labels >= 0).any())}
    return {name: each.compute(seen) if all(there[need] for need in each.needs) else float("nan") for name, each in OBJECTIVES.items()}


def maximised(name: str) -> bool:
    """Whether larger values of an objective are better."""
    return name in ORACLES or (name in OBJECTIVES and OBJECTIVES[name].maximise)


def default_objective(classifies: bool, source: bool, labelled: bool) -> str:
    """What orders the trials of such methods best, by the tables of docs/tuning.md.

    Args:
        classifies: whether the method has class probabilities.
        source: whether there is a source.
        labelled: whether the source has labels.
    """
    return "information" if classifies else "source-map" if labelled else "balance" if source else "rank"
