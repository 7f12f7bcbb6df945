"""ID, ProtoNCE, CDS and PCS, the rows beside UCDIR, with its networks, memory and codes (``models.methods.memory_contrast``): no labels in either domain.

ID (Wu et al., CVPR 2018) tells each image from all others, ProtoNCE (Li et al., ICLR 2021) also each cluster; both take the two domains as one set. CDS
(Kim et al. 2020) tells images apart within each domain and matches each with few of the other domain. PCS (Yue et al., CVPR 2021) tells the clusters of
each domain apart and matches images with few clusters of the other; its terms of labelled images are left out.
"""

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.clustering import kmeans, nearest
from models.distributed import gather, sum_over_ranks
from models.hyperparameters import Preset, hyperparameter
from models.losses.contrastive import attraction, cluster_probabilities, contrast, matching_entropy, prototype_loss, self_entropy
from models.memory_bank import MemoryBank
from models.method import RowSource
from models.methods.memory_contrast import DOMAINS, MemoryContrast, MemoryContrastConfig

SMOOTHING = 10  # alpha of the concentration
PAPER = Preset("its losses with UCDIR's networks and schedule, DomainNet's 7 classes", 200, {
    "clusters_per_class": 1, "negatives": 0, "average": 0.999, "ranking": "trained", "views": "contrastive", "batch": 64, "network": "resnet50",
    "pretrained": "moco", "optimizer": "sgd", "learning_rate": 2e-4,
})  # fmt: skip


class ConcentratedBank(MemoryBank):
    """A memory bank whose clusters have a temperature each.

    Attributes:
        concentration: (clusters,), phi; their mean is the contrast's temperature.
    """

    concentration: Tensor

    def __init__(self, clusters: int, width: int) -> None:
        super().__init__(clusters, width)
        self.register_buffer("concentration", torch.ones(clusters))


def cluster_together(banks: list[Any], generator: torch.Generator, temperature: float) -> None:
    """Cluster the slots of banks as one set: all get the same centroids, members and concentrations (Li et al., ICLR 2021).

    phi of a cluster of Z slots v around c is ``sum ||v - c|| / (Z log(Z + alpha))``.
    """
    together, before = torch.cat([bank.slots for bank in banks]), [0, *itertools.accumulate(bank.total for bank in banks)]
    numbers = [first + bank.first + torch.arange(len(bank.slots)) for first, bank in zip(before, banks, strict=False)]
    centroids = kmeans(together, len(banks[0].centroids), generator, torch.cat(numbers).to(together.device))
    members = nearest(together, centroids)
    far = torch.zeros(len(centroids), dtype=together.dtype, device=together.device)
    apart = sum_over_ranks(far.index_add(0, members, (together - centroids[members]).norm(dim=1)))
    size = sum_over_ranks(far.index_add(0, members, torch.ones_like(together[:, 0])))
    phi = apart / (size.clamp(min=1) * (size + SMOOTHING).log())
    phi = torch.where(size > 1, phi, phi.max())  # one slot tells nothing of its spread
    for bank, own in zip(banks, members.split([len(bank.slots) for bank in banks]), strict=True):
        bank.centroids.copy_(centroids)
        bank.members = own
        bank.concentration.copy_((phi / phi.mean() * temperature).clamp(temperature / 10, temperature * 10))


class ID(MemoryContrast):
    """Instance discrimination: each image against all images of both domains."""

    name: ClassVar[str] = "id"
    reference: ClassVar[str] = "Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, CVPR 2018"
    presets: ClassVar[dict[str, Preset]] = {"paper": PAPER}

    def instance(self, domains: tuple[str, ...], domain: str, x: Tensor, keys: Tensor, row: Tensor) -> Tensor:
        """The contrast of a domain's queries with the slots of these domains, of which it is the first."""
        denominators = []
        for each in domains:
            slots, own = self.sampled(self.memory[each], row)
            own = own if each == domain or own is None else torch.zeros_like(own)
            positive = keys if each == domain and own is not None else None
            denominators.append(contrast(x, slots, self.config.temperature, positive, own))
        return attraction(x, keys, torch.stack(denominators).logsumexp(0), self.config.temperature)

    def contrasted(self, domain: str, x: Tensor, keys: Tensor, row: Tensor) -> dict[str, Tensor]:
        """Term ``instance``."""
        return {"instance": self.instance((domain, other(domain)), domain, x, keys, row)}

    def weights(self, player: str) -> dict[str, float]:
        return {"instance": 1.0} | super().weights(player)


def other(domain: str) -> str:
    """The other domain."""
    return DOMAINS[1 - DOMAINS.index(domain)]


@dataclass(frozen=True)
class ProtoNCEConfig(MemoryContrastConfig):
    """Hyper-parameters of ProtoNCE."""

    prototype_weight: float = hyperparameter(1.0, "weight of the clusters' contrast", 0.1, 3.0, log=True)
    cluster_start: float = hyperparameter(0.1, "share of the training after which it begins", 0.0, 0.5)


class ProtoNCE(ID):
    """ID, and each image against the clusters of both domains' images; one number of clusters, where the paper has several."""

    name: ClassVar[str] = "protonce"
    reference: ClassVar[str] = "Li et al., Prototypical Contrastive Learning of Unsupervised Representations, ICLR 2021"
    Config: ClassVar[Any] = ProtoNCEConfig
    Bank: ClassVar[type[MemoryBank]] = ConcentratedBank
    config: ProtoNCEConfig

    def __init__(self, config: ProtoNCEConfig, shape: tuple[int, ...], classes: int, bits: int) -> None:
        super().__init__(config, shape, classes, bits)
        self.clustering = False

    @torch.no_grad()
    def begin_epoch(self, epoch: int, epochs: int, source: RowSource | None = None, target: RowSource | None = None) -> None:
        """Cluster the slots of both domains."""
        self.clustering = epoch >= self.config.cluster_start * epochs
        if self.clustering:
            cluster_together([self.memory[domain] for domain in DOMAINS], self.draw(), self.config.temperature)

    def contrasted(self, domain: str, x: Tensor, keys: Tensor, row: Tensor) -> dict[str, Tensor]:
        """Terms ``instance`` and ``prototype``."""
        terms, memory = super().contrasted(domain, x, keys, row), self.memory[domain]
        if self.clustering:
            terms["prototype"] = prototype_loss(x, memory.centroids, gather(memory.members[row - memory.first]), memory.concentration)
        return terms

    def weights(self, player: str) -> dict[str, float]:
        return {"prototype": self.config.prototype_weight} | super().weights(player)


@dataclass(frozen=True)
class MatchingConfig(MemoryContrastConfig):
    """Hyper-parameters of CDS and PCS."""

    matching_weight: float = hyperparameter(1.0, "weight of the entropy across the domains", 0.01, 3.0, log=True)
    matching_temperature: float = hyperparameter(0.1, "temperature of the matching", 0.02, 0.5, log=True)


class CDS(ID):
    """Instance discrimination within each domain, and a low entropy of each image's similarities to the other domain's."""

    name: ClassVar[str] = "cds"
    reference: ClassVar[str] = "Kim et al., Cross-domain Self-supervised Learning for Domain Adaptation with Few Source Labels, 2020"
    Config: ClassVar[Any] = MatchingConfig
    config: MatchingConfig

    def contrasted(self, domain: str, x: Tensor, keys: Tensor, row: Tensor) -> dict[str, Tensor]:
        """Terms ``instance`` and ``matching``."""
        slots, _ = self.sampled(self.memory[other(domain)], row)
        matching = matching_entropy(x, slots, self.config.matching_temperature)
        return {"instance": self.instance((domain,), domain, x, keys, row), "matching": matching}

    def weights(self, player: str) -> dict[str, float]:
        return {"matching": self.config.matching_weight} | super().weights(player)


class PCS(MemoryContrast):
    """Contrast with the clusters of each domain, and a low entropy of each image's similarities to the other domain's clusters."""

    name: ClassVar[str] = "pcs"
    reference: ClassVar[str] = "Yue et al., Prototypical Cross-domain Self-supervised Learning for Few-shot Unsupervised Domain Adaptation, CVPR 2021"
    Config: ClassVar[Any] = MatchingConfig
    Bank: ClassVar[type[MemoryBank]] = ConcentratedBank
    presets: ClassVar[dict[str, Preset]] = {"paper": PAPER}
    config: MatchingConfig

    @torch.no_grad()
    def begin_epoch(self, epoch: int, epochs: int, source: RowSource | None = None, target: RowSource | None = None) -> None:
        """Cluster the slots of each domain."""
        for memory in self.memory.values():
            cluster_together([memory], self.draw(), self.config.temperature)

    def contrasted(self, domain: str, x: Tensor, keys: Tensor, row: Tensor) -> dict[str, Tensor]:
        """Terms ``prototype`` and ``matching``."""
        memory, there = self.memory[domain], self.memory[other(domain)]
        member = gather(memory.members[row - memory.first])
        matching = self_entropy(cluster_probabilities(x, there.centroids, self.config.matching_temperature))
        return {"prototype": prototype_loss(x, memory.centroids, member, memory.concentration), "matching": matching}

    def weights(self, player: str) -> dict[str, float]:
        return {"prototype": 1.0, "matching": self.config.matching_weight} | super().weights(player)
