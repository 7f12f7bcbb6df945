"""Pseudo-labels for all target rows at once: class probabilities with equal shares of the classes, spread over each row's nearest neighbours.

A classifier that was trained on another domain errs on whole clusters of the target. Its mean over neighbours, and the demand that no
class takes more than its share, decide for the cluster as one.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from models.transport import transport

NEIGHBOURS, STEPS, KEPT = 10, 20, 0.9  # neighbours of a row; steps of the propagation; share of a step that comes from the neighbours
SHARPNESS = 3  # power of the cosine similarity that weighs a neighbour
ROUNDS = 50  # of the Sinkhorn iteration
PART = 512  # rows that are compared with all others at once


def neighbour_graph(features: Tensor, neighbours: int = NEIGHBOURS) -> tuple[Tensor, Tensor]:
    """Each row's nearest neighbours by cosine similarity.

    Args:
        features: (n, width), n at least 2. Takes n^2 * width multiplications.

    Returns:
        Their numbers (n, k) int64 and weights (n, k), which sum to 1; k is ``neighbours``, or n - 1 if that is less.
    """
    rows, k = normalize(features), min(neighbours, len(features) - 1)
    near, far = [], []
    for start in range(0, len(rows), PART):
        similar = rows[start : start + PART] @ rows.T
        own = torch.arange(len(similar), device=rows.device)
        similar[own, own + start] = -torch.inf
        values, places = similar.topk(k, 1)
        near.append(places)
        far.append(values.clamp(min=1e-6) ** SHARPNESS)
    weights = torch.cat(far)
    return torch.cat(near), weights / weights.sum(1, keepdim=True)


def propagate(probabilities: Tensor, graph: tuple[Tensor, Tensor]) -> Tensor:
    """Spread class probabilities (n, classes) over a neighbour graph: z <- a W z + (1 - a) p (Zhou et al., NeurIPS 2003, with a graph whose rows sum to 1)."""
    places, weights = graph
    spread = probabilities
    for _ in range(STEPS):
        spread = KEPT * (spread[places] * weights.unsqueeze(2)).sum(1) + (1 - KEPT) * probabilities
    return spread


def equal_shares(probabilities: Tensor) -> Tensor:
    """Scale class probabilities (n, classes) until each class has the same share of all rows (Sinkhorn and Knopp 1967); rows sum to 1."""
    classes = probabilities.shape[1]
    return transport(probabilities + 1e-9, probabilities.new_full((classes,), 1 / classes), ROUNDS)


def propagated_classes(probabilities: Tensor, graph: tuple[Tensor, Tensor]) -> Tensor:
    """The class of each row, (n,) int64, of class probabilities (n, classes) that are balanced, propagated and balanced again."""
    return equal_shares(propagate(equal_shares(probabilities), graph)).argmax(1)
