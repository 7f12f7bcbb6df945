"""Terms that bring a class of one domain to the same class of the other, and the guesses of the classes that they need."""

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def class_means(codes: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mean code of each class.

    Args:
        codes: (n, bits).
        labels: (n,) int64; rows with a label of -1 are left out.

    Returns:
        (classes, bits), zero where a class has no row, and (classes,) bool: whether it has one.
    """
    member = (labels.unsqueeze(0) == torch.arange(classes, device=labels.device).unsqueeze(1)).to(codes.dtype)
    count = member.sum(1, keepdim=True)
    return member @ codes / count.clamp(min=1), count.squeeze(1) > 0


def centroid_distance(source: Tensor, source_labels: Tensor, target: Tensor, target_labels: Tensor, classes: int) -> Tensor:
    """Sum over the classes of the Euclidean distance of their centres in two domains (IGAN eq. 3).

    Args:
        source, target: (n, bits) and (m, bits), of whole (gathered) batches.
        source_labels, target_labels: (n,) and (m,) int64; -1 where unknown.

    Returns:
        Scalar; classes that one of the batches lacks contribute nothing.
    """
    of_source, in_source = class_means(source, source_labels, classes)
    of_target, in_target = class_means(target, target_labels, classes)
    squared = (of_source - of_target).square().sum(1)
    return (squared + 1e-8).sqrt()[in_source & in_target].sum()  # the root has no gradient at zero


def confident_classes(logits: Tensor, threshold: float) -> Tensor:
    """Pseudo-labels: the likeliest class of each sample where its probability is above a threshold (IGAN eq. 4).

    Args:
        logits: (n, classes), or log-probabilities.

    Returns:
        (n,) int64, -1 where no class is likely enough.
    """
    confidence, guess = logits.softmax(1).max(1)
    return guess.masked_fill(confidence <= threshold, -1)


def pseudo_label_loss(logits: Tensor, guesses: Tensor) -> Tensor:
    """Cross-entropy of samples towards their pseudo-labels, summed over those that have one, divided by all.

    Args:
        logits: (n, classes).
        guesses: (n,) int64, -1 where unknown.
    """
    return cross_entropy(logits, guesses, ignore_index=-1, reduction="sum") / len(guesses)


def imbalance_loss(logits: Tensor) -> Tensor:
    """Divergence of a batch's mean class probabilities from uniform ones, in nats: log N minus their entropy (Liang et al., ICML 2020, diversity).

    It keeps guesses from leaving a class out, and supposes that the classes are about as frequent.

    Args:
        logits: (n, classes), of a whole (gathered) batch.

    Returns:
        Scalar in [0, log classes].
    """
    mean = logits.softmax(1).mean(0)
    return torch.special.xlogy(mean, mean).sum() + math.log(len(mean))
