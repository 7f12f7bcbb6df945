"""Terms that make two domains indistinguishable to a discriminator, and the reversed gradient that they train the encoder with."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from models.losses.alignment import class_means


class _Reversed(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a negative number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return -ctx.strength * gradient, None


def reversed_gradient(x: Tensor, strength: float) -> Tensor:
    """``x``, which receives ``-strength`` times its gradient (Ganin and Lempitsky, ICML 2015)."""
    reversed_: Tensor = _Reversed.apply(x, strength)  # type: ignore[no-untyped-call]
    return reversed_


def domain_loss(source: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of a discriminator of two domains: mean over each domain's samples, then over the domains (DANN, ADDA).

    The papers add the two domains; this mean is half of their sum, so a lambda of 1 here is one of 0.5 there.

    Args:
        source, target: (n,) and (m,) logits of "source".

    Returns:
        Scalar; log 2 if the discriminator cannot tell.
    """
    return (softplus(-source).mean() + softplus(target).mean()) / 2


def multilinear(features: Tensor, probabilities: Tensor) -> Tensor:
    """Outer product of each sample's features and class probabilities: (n, width), (n, classes) -> (n, width * classes) (Long et al., NeurIPS 2018)."""
    return (features.unsqueeze(2) * probabilities.unsqueeze(1)).flatten(1)


def moved_centroids(memory: Tensor, x: Tensor, labels: Tensor, kept: float) -> Tensor:
    """Centroids of classes, moved towards those of a batch (Xie et al., ICML 2018).

    Args:
        memory: (classes, width); receives no gradient.
        x: (n, width), of a whole (gathered) batch.
        labels: (n,) int64.
        kept: share of the memory in the result.

    Returns:
        (classes, width); a class without samples keeps its centroid.
    """
    means, present = class_means(x, labels, len(memory))
    return torch.where(present.unsqueeze(1), kept * memory.detach() + (1 - kept) * means, memory.detach())
