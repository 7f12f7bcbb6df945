"""ProtoOT, prototypical optimal transport for unsupervised cross-domain image retrieval (Li et al., AAAI 2024): no labels in either domain.

Networks, memory and codes as in ``models.methods.memory_contrast``, symbols too; q a query's feature x, p prototypes, which are the clusters' centres.
At the start of an epoch the memory is clustered, and transported to the prototypes: each image has one mass, each prototype the share of its cluster.
The prototypes become the transport's means, and an image belongs to the one that most of its mass goes to. From half of the training on, each
domain's memory is also transported to the other domain's prototypes.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from models.distributed import gather, sum_over_ranks
from models.hyperparameters import Preset, hyperparameter
from models.losses.contrastive import nearest_others, prototype_attraction
from models.memory_bank import MemoryBank
from models.method import RowSource
from models.methods.memory_contrast import DOMAINS, MemoryContrast, MemoryContrastConfig
from models.transport import transport

ROUNDS = 3  # of the transport


@dataclass(frozen=True)
class ProtoOTConfig(MemoryContrastConfig):
    """Hyper-parameters of ProtoOT. Its own are the paper's; the others were chosen with UCDIR."""

    neighbour_weight: float = hyperparameter(0.5, "weight of the nearest slot of another image", 0.05, 2.0, log=True)
    prototype_weight: float = hyperparameter(0.1, "weight of an image's own prototype", 0.01, 1.0, log=True)
    cross_weight: float = hyperparameter(0.01, "weight of an image's prototype of the other domain", 1e-3, 1.0, log=True)
    cross_start: float = hyperparameter(0.5, "share of the training after which that term begins", 0.0, 0.9)
    epsilon: float = hyperparameter(0.05, "entropy of the transport", 0.01, 0.5, log=True)


class PrototypeBank(MemoryBank):
    """A memory bank whose images also have a prototype of the other domain.

    Attributes:
        across: (own images,) int64, the number of that prototype; empty before the domains are compared.
    """

    DIVIDED: ClassVar[tuple[str, ...]] = (*MemoryBank.DIVIDED, "across")
    across: Tensor

    def __init__(self, clusters: int, width: int) -> None:
        super().__init__(clusters, width)
        self.register_buffer("across", torch.empty(0, dtype=torch.int64))

    def transported(self, prototypes: Tensor, shares: Tensor, epsilon: float) -> Tensor:
        """The transport (own images, prototypes) of all ranks' slots to prototypes (prototypes, width) with these shares; rows sum to 1."""
        near = self.slots @ prototypes.T
        return transport(((near - near.amax(1, keepdim=True)) / epsilon).exp(), shares, ROUNDS, divided=True)


class ProtoOT(MemoryContrast):
    """Contrast of each image with its domain's prototypes, which optimal transport assigns within and across the domains."""

    name: ClassVar[str] = "protoot"
    reference: ClassVar[str] = "Li et al., Unsupervised Cross-Domain Image Retrieval via Prototypical Optimal Transport, AAAI 2024"
    Config: ClassVar[Any] = ProtoOTConfig
    Bank: ClassVar[type[MemoryBank]] = PrototypeBank
    presets: ClassVar[dict[str, Preset]] = {
        "paper": Preset("DomainNet and Office-Home", 200, {
            "clusters_per_class": 1, "average": 0.999, "ranking": "trained", "views": "contrastive", "batch": 64, "network": "resnet50", "pretrained": "moco",
            "negatives": 0, "optimizer": "amsgrad", "learning_rate": 2.5e-4,
        }),
    }  # fmt: skip
    config: ProtoOTConfig

    def __init__(self, config: ProtoOTConfig, shape: tuple[int, ...], classes: int, bits: int) -> None:
        super().__init__(config, shape, classes, bits)
        self.crossing = False

    @torch.no_grad()
    def begin_epoch(self, epoch: int, epochs: int, source: RowSource | None = None, target: RowSource | None = None) -> None:
        """Find each domain's prototypes and its images' assignment; later also that to the other domain's prototypes."""
        c = self.config
        self.crossing = bool(c.cross_weight) and epoch >= c.cross_start * epochs
        for memory in self.memory.values():
            memory.cluster(memory.slots, self.draw())
            plan = memory.transported(memory.centroids, memory.sizes / memory.total, c.epsilon)
            memory.members = plan.argmax(1)
            memory.centroids.copy_(normalize(sum_over_ranks(plan.T @ memory.slots)))
        for domain, other in zip(DOMAINS, reversed(DOMAINS), strict=True):
            if self.crossing:
                there = self.memory[other]
                self.memory[domain].across = self.memory[domain].transported(there.centroids, there.sizes / there.total, c.epsilon).argmax(1)

    def contrasted(self, domain: str, x: Tensor, keys: Tensor, row: Tensor) -> dict[str, Tensor]:
        """Terms ``instance``, ``neighbour`` and ``prototype`` against the domain's other prototypes, and ``cross`` against those of the other domain."""
        memory, tau = self.memory[domain], self.config.temperature
        place = row - memory.first
        own = gather(memory.members[place])
        slots, mine = self.sampled(memory, row)
        if mine is None:
            mine = gather(row).unsqueeze(1) == torch.arange(memory.first, memory.first + len(slots), device=row.device)
        positives = {"instance": keys, "neighbour": nearest_others(keys, slots, mine), "prototype": memory.centroids[own]}
        terms = {name: prototype_attraction(x, positive, memory.centroids, own, tau) for name, positive in positives.items()}
        if self.crossing:
            other = "target" if domain == "source" else "source"
            prototypes, there = self.memory[other].centroids, gather(memory.across[place])
            terms["cross"] = prototype_attraction(x, prototypes[there], prototypes, there, tau)
        return terms

    def weights(self, player: str) -> dict[str, float]:
        c = self.config
        return {"instance": 1.0, "neighbour": c.neighbour_weight, "prototype": c.prototype_weight, "cross": c.cross_weight} | super().weights(player)
