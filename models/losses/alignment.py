"""Terms that align each class of one domain with the same class of the other, and the pseudo-labels they need."""

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def class_means(codes: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mean code of each class.

    Args:
        codes: (n, bits).
        labels: (n,) int64; rows with label -1 are ignored.

    Returns:
        Means (classes, bits), zero for classes without rows, and a mask (classes,) bool of the classes with rows.
    """
    member = (labels.unsqueeze(0) == torch.arange(classes, device=labels.device).unsqueeze(1)).to(codes.dtype)
    count = member.sum(1, keepdim=True)
    return member @ codes / count.clamp(min=1), count.squeeze(1) > 0


def centroid_distance(source: Tensor, source_labels: Tensor, target: Tensor, target_labels: Tensor, classes: int) -> Tensor:
    """Sum over the classes of the Euclidean distance between their centres in the two domains (IGAN eq. 3).

    Args:
        source, target: (n, bits) and (m, bits), of whole (gathered) batches.
        source_labels, target_labels: (n,) and (m,) int64; -1 if unknown.

    Returns:
        Scalar; classes missing from either batch contribute nothing.
    """
    of_source, in_source = class_means(source, source_labels, classes)
    of_target, in_target = class_means(target, target_labels, classes)
    squared = (of_source - of_target).square().sum(1)
    return (squared + 1e-8).sqrt()[in_source & in_target].sum()  # the square root has no gradient at zero


def confident_classes(logits: Tensor, threshold: float) -> Tensor:
    """Pseudo-labels: the most likely class of each sample, if its probability exceeds a threshold (IGAN eq. 4).

    Args:
        logits: (n, classes), or log-probabilities.

    Returns:
        (n,) int64, -1 if no class is likely enough.
    """
    confidence, guess = logits.softmax(1).max(1)
    return guess.masked_fill(confidence <= threshold, -1)


def pseudo_label_loss(logits: Tensor, guesses: Tensor) -> Tensor:
    """Cross-entropy with pseudo-labels, summed over the samples that have one, divided by the number of all samples.

    Args:
        logits: (n, classes).
        guesses: (n,) int64, -1 if unknown.
    """
    return cross_entropy(logits, guesses, ignore_index=-1, reduction="sum") / len(guesses)


def imbalance_loss(logits: Tensor) -> Tensor:
    """Divergence of a batch's mean class probabilities from uniform, in nats: log N minus their entropy (Liang et al., ICML 2020, diversity).

    It keeps predictions from ignoring a class. It assumes that the classes are about equally frequent.

    Args:
        logits: (n, classes), of a whole (gathered) batch.

    Returns:
        Scalar in [0, log classes].
    """
    mean = logits.softmax(1).mean(0)
    return torch.special.xlogy(mean, mean).sum() + math.log(len(mean))
