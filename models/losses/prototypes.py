"""Terms of class prototypes in two domains, and of relations that codes keep (CPH)."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from models.losses.alignment import class_means


def renewed_prototypes(memory: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """Add the mean direction of each class in a batch to its prototype, and scale to length 1 again.

    Args:
        memory: (classes, width), of length 1, or zero for a class that was never seen; receives no gradient.
        x: (n, width), of a whole (gathered) batch.
        labels: (n,) int64; rows with label -1 are ignored.

    Returns:
        (classes, width); a class without rows keeps its prototype.
    """
    means, present = class_means(x, labels, len(memory))
    return torch.where(present.unsqueeze(1), normalize(memory.detach() + normalize(means)), memory.detach())


def nearest_prototype(x: Tensor, prototypes: Tensor) -> Tensor:
    """The class (n,) int64 whose prototype (classes, width) has the largest cosine with each row (n, width); classes without a prototype are left out."""
    nearness = normalize(x) @ prototypes.T
    return nearness.masked_fill(~prototypes.any(1), -torch.inf).argmax(1)


def prototype_contrast(source: Tensor, target: Tensor, present: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each source prototype: its class's target prototype is the positive, the other source prototypes are the negatives (CPH).

    Args:
        source, target: (classes, width), of length 1; zero for classes that were never seen.
        present: (classes,) bool: the mean is over these classes; 0 if there are none.
    """
    near = source @ source.T / temperature
    unseen = ~source.any(1)
    own = torch.eye(len(source), dtype=torch.bool, device=source.device)
    logits = torch.where(own, ((source * target).sum(1) / temperature).diag(), near.masked_fill(unseen.unsqueeze(0), torch.finfo(near.dtype).min))
    losses = cross_entropy(logits, torch.arange(len(source), device=source.device), reduction="none")
    counts = present & ~unseen
    return (losses * counts).sum() / counts.sum().clamp(min=1)


def label_relation(codes: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Mean squared difference between the cosines of codes, clamped to 0..1, and ``scale`` times "same label" (0 or 1), over all pairs (CPH).

    Args:
        codes: (n, bits), relaxed.
        labels: (n,) int64; rows with label -1 are left out. 0 if there are no others.
    """
    known = labels >= 0
    if not known.any():
        return codes.sum() * 0
    unit, labels = normalize(codes[known]), labels[known]
    same = (labels.unsqueeze(1) == labels.unsqueeze(0)).to(codes.dtype)
    return ((unit @ unit.T).clamp(0, 1) - scale * same).square().mean()


def kept_relation(source: Tensor, target: Tensor, source_codes: Tensor, target_codes: Tensor) -> Tensor:
    """Mean squared difference between the cosines of features and those of codes, over all pairs of a source and a target row (CPH).

    Args:
        source, target: (n, width) and (m, width).
        source_codes, target_codes: (n, bits) and (m, bits), relaxed.
    """
    return (normalize(source) @ normalize(target).T - normalize(source_codes) @ normalize(target_codes).T).square().mean()
