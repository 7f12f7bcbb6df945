"""Contrastive terms within one domain, and terms that align two domains without labels (UCDIR, ProtoOT, and the rows beside them)."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from models.distributed import gather


def contrast(queries: Tensor, slots: Tensor, temperature: float, positives: Tensor | None = None, own: Tensor | None = None) -> Tensor:
    """Logarithm of the denominator of eq. 1 and 2: the sum of exp(x . x'_a / tau) over all ranks' memory slots.

    Args:
        queries: (n, width), L2-normalised, of the whole batch.
        slots: (m, width), L2-normalised; this rank's slots of the domain, or those of a sample; there may be none.
        positives: (n, width), with a sample: each query's own slot, which always counts exactly once.
        own: (n, m) bool, with ``positives``: where the sample contains a query's own slot.

    Returns:
        (n,).
    """
    logits = queries @ slots.T / temperature
    if own is not None:
        logits = logits.masked_fill(own, torch.finfo(logits.dtype).min)  # not -inf, whose gradient is undefined where nothing else is left
    whole = gather(logits.logsumexp(1).unsqueeze(0)).logsumexp(0)
    return whole if positives is None else torch.logaddexp(whole, (queries * positives).sum(1) / temperature)


def attraction(queries: Tensor, positives: Tensor, denominator: Tensor, temperature: float, counts: Tensor | None = None) -> Tensor:
    """Mean of -log(exp(x . x'_p / tau) / denominator) over the queries (eq. 1; eq. 2 with the mean of the positives' slots).

    The mean of x . x'_p over the positives is x . (their mean), so the cluster term needs no pairs.

    Args:
        queries, positives: (n, width).
        denominator: (n,), from ``contrast``.
        counts: (n,) bool mask: the mean is over these queries; 0 if there are none.
    """
    losses = denominator - (queries * positives).sum(1) / temperature
    return losses.mean() if counts is None else (losses * counts).sum() / counts.sum().clamp(min=1)


def cluster_probabilities(x: Tensor, centroids: Tensor, temperature: float) -> Tensor:
    """Probability of each cluster (eq. 5): (n, width), (clusters, width) -> (n, clusters)."""
    return (x @ centroids.T / temperature).softmax(1)


def distance_of_distance(one: Tensor, other: Tensor) -> Tensor:
    """Squared difference between a pair's cosine distances in two spaces (eq. 6-8), summed over all pairs and divided by the number of samples.

    Eq. 8 is the sum alone. The other terms, sums in the paper, are means over the samples here, so this one is divided by the same number.

    Args:
        one, other: (n, clusters), cluster probabilities of the same samples, by the centroids of domain A and of domain B.
    """
    left, right = normalize(one), normalize(other)
    return (left @ left.T - right @ right.T).square().sum() / len(one)


def self_entropy(probabilities: Tensor) -> Tensor:
    """Mean entropy of cluster probabilities (n, clusters), in nats (eq. 9)."""
    return -torch.special.xlogy(probabilities, probabilities).sum(1).mean()


def neighbour_loss(codes: Tensor, features: Tensor, code_temperature: float, temperature: float) -> Tensor:
    """Cross-entropy between the neighbour distributions of codes and of features, mean over the samples.

    The neighbours of a sample are the other samples of the batch. Their probabilities are a softmax of cosine similarities (for
    codes: of scaled dot products) over a temperature, as in stochastic neighbour embedding (Hinton and Roweis, NIPS 2002).

    Args:
        codes: (n, bits), relaxed codes in [-1, 1].
        features: (n, width), L2-normalised; they receive no gradient.
    """
    n = len(codes)
    others = ~torch.eye(n, dtype=torch.bool, device=codes.device)
    near = (codes @ codes.T / codes.shape[1] / code_temperature)[others].view(n, n - 1).log_softmax(1)
    wanted = (features @ features.T / temperature).detach()[others].view(n, n - 1).softmax(1)
    return -(wanted * near).sum(1).mean()


def prototype_attraction(queries: Tensor, positives: Tensor, prototypes: Tensor, own: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy of each query's positive against all prototypes but its own (ProtoOT).

    Args:
        queries, positives: (n, width), L2-normalised.
        prototypes: (clusters, width), L2-normalised.
        own: (n,) int64, the number of each query's own prototype.
    """
    near = queries @ prototypes.T / temperature
    others = near.scatter(1, own.unsqueeze(1), torch.finfo(near.dtype).min).logsumexp(1)
    positive = (queries * positives).sum(1) / temperature
    return (torch.logaddexp(positive, others) - positive).mean()


@torch.no_grad()
def nearest_others(keys: Tensor, slots: Tensor, own: Tensor) -> Tensor:
    """The slot, of all ranks' slots, that is nearest to each key and of another image: (n, width) (ProtoOT).

    Args:
        keys: (n, width), L2-normalised, of the whole batch.
        slots: (m, width), this rank's.
        own: (n, m) bool, where a slot is of the key's own image.
    """
    if len(slots):
        best, place = (keys @ slots.T).masked_fill(own, -2.0).max(1)
        found = slots[place]
    else:
        best, found = keys.new_full((len(keys),), -3.0), torch.zeros_like(keys)
    chosen = gather(best.unsqueeze(0)).argmax(0)
    return gather(found.unsqueeze(0))[chosen, torch.arange(len(keys), device=keys.device)]


def prototype_loss(queries: Tensor, prototypes: Tensor, member: Tensor, concentration: Tensor) -> Tensor:
    """Mean cross-entropy of each query's own prototype among all prototypes, each with a temperature of its own (ProtoNCE; Li et al., ICLR 2021).

    Args:
        queries: (n, width), L2-normalised.
        prototypes: (clusters, width), L2-normalised.
        member: (n,) int64, the number of each query's prototype.
        concentration: (clusters,), phi, the prototypes' temperatures.
    """
    return cross_entropy(queries @ prototypes.T / concentration, member)


def matching_entropy(queries: Tensor, slots: Tensor, temperature: float) -> Tensor:
    """Mean entropy, in nats, of each query's softmax over all ranks' memory slots of the other domain (CDS; Kim et al. 2020).

    Args:
        queries: (n, width), L2-normalised, of the whole batch.
        slots: (m, width), L2-normalised; this rank's; there may be none.
    """
    logits = queries @ slots.T / temperature
    denominator = gather(logits.logsumexp(1).unsqueeze(0)).logsumexp(0)
    expected = gather(((logits - denominator.unsqueeze(1)).exp() * logits).sum(1).unsqueeze(0)).sum(0)
    return (denominator - expected).mean()
