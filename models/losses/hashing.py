"""Terms that make codes of one class similar and codes of different classes dissimilar."""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from models.codes import signs


def pairwise_hash_loss(
    left: Tensor, left_labels: Tensor, right: Tensor, right_labels: Tensor, like_weight: float = 1.0, self_pairs: bool = True
) -> Tensor:
    """Negative log-likelihood of pair similarities, mean over labelled pairs (DAH eq. 4-5, DPSH eq. 4).

    ``-w_ij (s_ij t_ij - log(1 + exp(t_ij)))`` with ``t_ij = u_i . u_j / 2``; ``w_ij = like_weight`` if ``s_ij = 1``, otherwise 1.
    The papers sum over the n^2 pairs of a batch; this mean is the sum divided by n^2, so a weight g of another term beside the
    sum becomes g / n^2 beside the mean.

    Args:
        left, right: (n, bits) and (m, bits), relaxed codes in [-1, 1].
        left_labels, right_labels: (n,) and (m,) int64; pairs with label -1 are ignored.
        like_weight: weight of pairs of the same class.
        self_pairs: whether the pair of a sample with itself counts, if ``right`` is ``left``; otherwise it contributes zero to the mean over all pairs.

    Returns:
        Scalar, 0 if no pair is labelled.
    """
    logits = left @ right.T / 2
    like = left_labels.unsqueeze(1) == right_labels.unsqueeze(0)
    known = (left_labels >= 0).unsqueeze(1) & (right_labels >= 0).unsqueeze(0)
    weights = torch.where(like, like_weight, 1.0) * known
    if not self_pairs:
        weights = weights.fill_diagonal_(0.0)
    losses = softplus(logits) - like * logits
    return (weights * losses).sum() / known.sum().clamp(min=1)


def similarity_loss(codes: Tensor, labels: Tensor) -> Tensor:
    """Half the squared distance of scaled dot products to similarities in {-1, +1}, mean over pairs (IGAN eq. 1).

    Args:
        codes: (n, bits), relaxed codes in [-1, 1].
        labels: (n,) int64; pairs with label -1 are ignored.

    Returns:
        Scalar in [0, 2], 0 if no pair is labelled.
    """
    like = (labels.unsqueeze(1) == labels.unsqueeze(0)) * 2.0 - 1.0
    known = (labels >= 0).unsqueeze(1) & (labels >= 0).unsqueeze(0)
    errors = (codes @ codes.T / codes.shape[1] - like).square() * known
    return errors.sum() / known.sum().clamp(min=1) / 2


def structure_loss(codes: Tensor, similarities: Tensor) -> Tensor:
    """Squared distance of scaled dot products to guessed similarities, mean over all pairs; pairs of similarity 0 contribute nothing (SSDH).

    Args:
        codes: (n, bits), relaxed codes in [-1, 1].
        similarities: (n, n) in {-1, 0, 1}.
    """
    return ((codes @ codes.T / codes.shape[1] - similarities).square() * similarities.abs()).mean()


def quantisation_loss(codes: Tensor) -> Tensor:
    """Mean squared distance of relaxed codes to their signs (DAH eq. 5, IGAN eq. 2).

    Args:
        codes: (batch, bits), in [-1, 1].

    Returns:
        Scalar in [0, 1].
    """
    return (codes - signs(codes.detach())).square().mean()


def class_log_probabilities(queries: Tensor, codes: Tensor, labels: Tensor, classes: int, scale: float) -> Tensor:
    """Log-probability of each class by similarity to labelled codes (DAH eq. 6).

    ``p_ij ~ sum_k exp(scale * u_i . u_k^j)`` over the codes k of class j; the paper's scale is 1.

    Args:
        queries: (n, bits), real.
        codes: (m, bits), real.
        labels: (m,) int64 in [0, classes).
        classes: number of classes.
        scale: inverse temperature of the dot product.

    Returns:
        (n, classes), float; -inf for classes without codes.
    """
    logits = scale * queries @ codes.T
    top = logits.amax(1, keepdim=True).detach()
    sums = logits.new_zeros(len(queries), classes).index_add(1, labels, (logits - top).exp())
    floor = torch.finfo(sums.dtype).tiny
    return (sums.clamp(min=floor).log() - sums.sum(1, keepdim=True).log()).masked_fill(
        torch.bincount(labels, minlength=classes) == 0, -torch.inf
    )


def entropy_loss(log_probabilities: Tensor) -> Tensor:
    """Mean entropy of class distributions (DAH eq. 7).

    Args:
        log_probabilities: (n, classes); classes with probability zero contribute nothing.

    Returns:
        Scalar in [0, log(classes)].
    """
    probabilities = log_probabilities.exp()
    terms = torch.where(probabilities > 0, probabilities * log_probabilities.clamp(min=-1e4), 0.0)
    return -terms.sum(1).mean()
