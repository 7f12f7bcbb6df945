"""K-means on feature vectors that are divided among the ranks, with the same result on every rank."""

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from models.distributed import gather, rank, sum_over_ranks

ITERATIONS, RESTARTS = 20, 5
PART = 16384  # vectors compared with the centroids at once
BETTER = 1e-6  # share of the error by which a later start must be better: rounding does not choose


def kmeans(x: Tensor, clusters: int, generator: torch.Generator, numbers: Tensor | None = None) -> Tensor:
    """Lloyd's k-means with at most 20 iterations, the best of 5 random starts. All ranks call it together, each with its own vectors.

    Only sums over clusters are exchanged. The number of ranks changes the result by rounding alone.

    Args:
        x: (n, features), this rank's vectors; all ranks' together are at least ``clusters``.
        generator: chooses the vectors that are the first centroids; the same on every rank.
        numbers: (n,) int64, ascending, the numbers of this rank's vectors among all ranks'; None counts them in the order of the ranks.

    Returns:
        L2-normalised centroids (clusters, features), on the device of ``x``.

    Raises:
        ValueError: there are fewer vectors than clusters.
    """
    counts = gather(torch.tensor([len(x)], device=x.device)).tolist()
    total, first = sum(counts), sum(counts[: rank()])
    numbers = torch.arange(first, first + len(x), device=x.device) if numbers is None else numbers
    if total < clusters:
        raise ValueError(f"{total} images do not make {clusters} clusters: give fewer --clusters")
    best, least = x.new_zeros(clusters, x.shape[1]), float("inf")
    squares = float(sum_over_ranks(torch.stack([part.double().square().sum() for part in x.split(PART)]).sum()))
    for _ in range(RESTARTS):
        centroids = _vectors(x, numbers, torch.randperm(total, generator=generator)[:clusters])
        for _ in range(ITERATIONS):
            sums, sizes, distances = _cluster_sums(x, centroids)
            before, centroids = centroids, _means(sums, sizes).to(x.dtype)
            if torch.equal(centroids, before):  # then on every rank: all have the same sums
                break
        else:
            distances = _cluster_sums(x, centroids)[2]
        error = squares + float(distances)
        if error < least * (1 - BETTER):
            best, least = centroids, error
    return normalize(best)


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """The centroid that each vector is nearest to: (n, features), (clusters, features) -> (n,) int64."""
    half = centroids.square().sum(1) / 2
    return torch.cat([(half - part @ centroids.T).argmin(1) for part in x.split(PART)])


def _vectors(x: Tensor, numbers: Tensor, chosen: Tensor) -> Tensor:
    """The vectors of all ranks with the chosen numbers: (n, features), (n,) of this rank's, (clusters,) -> (clusters, features)."""
    chosen = chosen.to(x.device)
    found = x.new_zeros(len(chosen), x.shape[1])
    if len(numbers):
        place = torch.searchsorted(numbers, chosen).clamp(max=len(numbers) - 1)
        own = numbers[place] == chosen
        found[own] = x[place[own]]
    return sum_over_ranks(found)


def _cluster_sums(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Over all ranks, float64: each cluster's sum (clusters, features) and size (clusters,), and the squared distances less the vectors' squares."""
    clusters, width = centroids.shape
    half = centroids.square().sum(1) / 2
    found = torch.zeros(clusters * (width + 1) + 1, dtype=torch.float64, device=x.device)
    sums, sizes, error = found.split([clusters * width, clusters, 1])
    for part in x.split(PART):
        value, member = (half - part @ centroids.T).min(1)
        chosen = one_hot(member, clusters).to(x.dtype)
        sums += (chosen.T @ part).flatten()
        sizes += chosen.sum(0)
        error += 2 * value.double().sum()
    sums, sizes, error = sum_over_ranks(found).split([clusters * width, clusters, 1])
    return sums.view(clusters, width), sizes, error


def _means(sums: Tensor, sizes: Tensor) -> Tensor:
    """Each cluster's mean; an empty one takes half of the largest, as both start from nearly its mean."""
    means, sizes = sums / sizes.clamp(min=1).unsqueeze(1), sizes.clone()
    apart = 1 + torch.tensor([1, -1], device=sums.device).repeat(sums.shape[1] // 2 + 1)[: sums.shape[1]] / 1024
    for empty in (sizes == 0).nonzero().flatten().tolist():
        largest = int(sizes.argmax())
        means[empty], means[largest] = means[largest] * apart, means[largest] * (2 - apart)
        sizes[empty] = sizes[largest] = sizes[largest] / 2
    return means
