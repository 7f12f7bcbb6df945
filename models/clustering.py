"""K-means on feature vectors, with the same result on every rank."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from models.distributed import rank, world_size

ITERATIONS, RESTARTS = 20, 5


def kmeans(x: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """K-means with 20 iterations and the best of 5 starts. Rank 0 computes it and broadcasts the result.

    Args:
        x: (n, features), the same on every rank; n at least ``clusters``.
        generator: chooses the starts.

    Returns:
        L2-normalised centroids (clusters, features), on the device of ``x``.

    Raises:
        ValueError: there are fewer vectors than clusters.
    """
    if len(x) < clusters:
        raise ValueError(f"{len(x)} images do not make {clusters} clusters: give fewer --clusters")
    centroids = x.new_empty(clusters, x.shape[1])
    if rank() == 0:
        centroids.copy_(_centroids(x.detach().float().cpu(), clusters, int(torch.randint(2**31 - 1, (), generator=generator))))
    if world_size() > 1:
        dist.broadcast(centroids, 0)
    return normalize(centroids)


def _centroids(x: Tensor, clusters: int, seed: int) -> Tensor:
    """Centroids by faiss; by scikit-learn, which is slower, if faiss is not installed."""
    try:
        import faiss  # noqa: PLC0415
    except ImportError:
        from sklearn.cluster import KMeans  # noqa: PLC0415

        found = KMeans(clusters, n_init=RESTARTS, max_iter=ITERATIONS, random_state=seed).fit(x.numpy())
        return torch.from_numpy(found.cluster_centers_)
    search = faiss.Kmeans(
        x.shape[1], clusters, niter=ITERATIONS, nredo=RESTARTS, seed=seed, min_points_per_centroid=1, max_points_per_centroid=len(x)
    )  # fmt: skip
    search.train(x.numpy())
    return torch.from_numpy(search.centroids)
