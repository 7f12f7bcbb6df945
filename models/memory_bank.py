"""Memory bank of the momentum encoder's features, which UCDIR and ProtoOT cluster and compare with (Hu and Lee, ECCV 2022, section 3.2).

It is divided among the ranks: each keeps the slots of its own rows.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from models.clustering import PART, kmeans, nearest
from models.distributed import own_rows, sum_over_ranks


class MemoryBank(nn.Module):
    """One domain's memory bank: an L2-normalised feature for each of this rank's images, and the clusters of all ranks' images.

    Attributes:
        total: images of the domain, over all ranks.
        first: row number of this rank's first image.
        slots: (own images, width); a checkpoint has all ranks' slots.
        members: (own images,) int64, the cluster of each image; empty before the first clustering. A checkpoint has all ranks'.
        centroids: (clusters, width), L2-normalised.
        sums: (clusters, width), the sum of each cluster's slots.
        sizes: (clusters,), the number of each cluster's images.
        DIVIDED: the names of what is divided among the ranks.
    """

    DIVIDED: ClassVar[tuple[str, ...]] = ("slots", "members")
    slots: Tensor
    members: Tensor
    centroids: Tensor
    sums: Tensor
    sizes: Tensor
    total, first = 0, 0

    def __init__(self, clusters: int, width: int) -> None:
        super().__init__()
        for name in ("centroids", "sums"):
            self.register_buffer(name, torch.zeros(clusters, width))
        self.register_buffer("sizes", torch.zeros(clusters))
        self.register_buffer("slots", torch.zeros(0, width))
        self.register_buffer("members", torch.empty(0, dtype=torch.int64))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        own = {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
        self.total = len(own[f"{prefix}slots"])
        self.first, stop = own_rows(self.total)
        if f"{prefix}sums" not in own:  # of a version that did not save them
            own |= dict(zip((f"{prefix}sums", f"{prefix}sizes"), self._counted(own[f"{prefix}members"], own[f"{prefix}slots"]), strict=True))
        for name in self.DIVIDED:
            part = own[prefix + name] = own[prefix + name][self.first : stop]
            setattr(self, name, torch.empty_like(part, dtype=getattr(self, name).dtype, device=self.centroids.device))
        super()._load_from_state_dict(own, prefix, *rest)

    def fill(self, features: Tensor, total: int) -> None:
        """Begin with the features (own images, width) as slots, of ``total`` images of all ranks."""
        self.first, stop = own_rows(total)
        if len(features) != stop - self.first:
            raise ValueError(f"this rank has {len(features)} images of {total}, but must have rows {self.first} to {stop}")
        self.slots, self.total = features, total

    def cluster(self, features: Tensor, generator: torch.Generator) -> None:
        """Cluster the domain's images anew by their features (own images, width)."""
        self.centroids.copy_(kmeans(features, len(self.centroids), generator))
        self.members = nearest(features, self.centroids)
        sums, sizes = self._counted(self.members, self.slots)
        self.sums.copy_(sum_over_ranks(sums))
        self.sizes.copy_(sum_over_ranks(sizes))

    def _counted(self, members: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Sums (clusters, width) of the values (n, width) of each cluster's members (n,), and their numbers (clusters,); zeros if there are no members."""
        sums, sizes = values.new_zeros(self.sums.shape), values.new_zeros(len(self.sizes))
        for each, value in zip(members.split(PART), values.split(PART), strict=False):
            if len(each):
                chosen = one_hot(each, len(sums)).to(value.dtype)
                sums += chosen.T @ value
                sizes += chosen.sum(0)
        return sums, sizes

    def store(self, row: Tensor, key: Tensor) -> None:
        """Write this rank's part of a batch, rows (n,) and features (n, width), into its slots; of a row that is there twice the last."""
        own = row - self.first
        position = torch.arange(len(own), device=own.device)
        last = torch.where(own.unsqueeze(1) == own, position, -1).amax(1)
        if len(self.members):
            changes = (key - self.slots[own]) * (last == position).unsqueeze(1)
            self.sums += sum_over_ranks(self._counted(self.members[own], changes)[0])
        self.slots[own] = key[last]

    def sample(self, chosen: Tensor) -> Tensor:
        """The places in ``slots`` of those rows (n,) that are this rank's."""
        own = chosen - self.first
        return own[(own >= 0) & (own < len(self.slots))].to(self.slots.device)

    def cluster_means(self) -> Tensor:
        """Mean slot of each cluster, (clusters, width): the mean over the positives of eq. 2."""
        return self.sums / self.sizes.clamp(min=1).unsqueeze(1)
