"""UCDIR, unsupervised cross-domain image retrieval (Hu and Lee, ECCV 2022): no labels in either domain.

Networks, memory and codes as in ``models.methods.memory_contrast``, symbols too; c centroid, tau temperature of the contrast, phi of the
cluster probabilities.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.distributed import gather
from models.hyperparameters import AblationRow, Preset, hyperparameter
from models.losses.contrastive import attraction, cluster_probabilities, contrast, distance_of_distance, self_entropy
from models.method import RowSource
from models.methods.memory_contrast import DOMAINS, MemoryContrast, MemoryContrastConfig

P_50 = "P@50, DomainNet"
DOMAINNET = {
    "cluster_weight": 1.0, "entropy_weight": 0.5, "distance_weight": 0.1, "clusters_per_class": 1, "negatives": 0, "average": 0.999, "ranking": "trained",
    "views": "contrastive", "batch": 64, "network": "resnet50", "pretrained": "moco", "optimizer": "sgd", "learning_rate": 2e-4,
}  # fmt: skip


@dataclass(frozen=True)
class UCDIRConfig(MemoryContrastConfig):
    """Hyper-parameters of UCDIR. The defaults work best here."""

    cluster_weight: float = hyperparameter(0.5, "alpha, weight of the cluster-wise contrast", 0.1, 2.0, log=True)
    cluster_start: float = hyperparameter(0.1, "T1, share of the training after which the cluster-wise contrast begins", 0.0, 0.5)
    cluster_full: float = hyperparameter(0.5, "T2, share of the training from which it, and the alignment, have their whole weight", 0.1, 0.9)
    cluster_filter: float = hyperparameter(0.2, "probability of its own cluster above which an image counts in it", 0.0, 0.9)
    entropy_weight: float = hyperparameter(1.0, "gamma, weight of the entropy of the cluster probabilities", 0.01, 3.0, log=True)
    distance_weight: float = hyperparameter(0.5, "beta, weight of the distance-of-distance", 0.01, 30.0, log=True)
    cluster_temperature: float = hyperparameter(0.1, "phi, temperature of the cluster probabilities", 0.01, 1.0, log=True)


class UCDIR(MemoryContrast):
    """Contrast within each domain by image and by cluster, and alignment of two domains' clusters by distances between samples."""

    name: ClassVar[str] = "ucdir"
    reference: ClassVar[str] = "Hu and Lee, Feature Representation Learning for Unsupervised Cross-domain Image Retrieval, ECCV 2022"
    Config: ClassVar[Any] = UCDIRConfig
    presets: ClassVar[dict[str, Preset]] = {
        "paper": Preset("Tables 2 and 3, DomainNet's 7 classes", 200, DOMAINNET),
        "paper-office-home": Preset("Table 1, Office-Home", 200, DOMAINNET | {
            "cluster_weight": 0.5, "entropy_weight": 1.0, "distance_weight": 0.5, "cluster_temperature": 0.01,
        }),
    }  # fmt: skip
    ablation: ClassVar[tuple[AblationRow, ...]] = (  # Table 3, means over its twelve directions
        AblationRow("instance (v1)", {"cluster_weight": 0.0, "entropy_weight": 0.0, "distance_weight": 0.0}, {P_50: 38.14}),
        AblationRow("+ cluster (v2)", {"entropy_weight": 0.0, "distance_weight": 0.0}, {P_50: 41.57}),
        AblationRow("+ entropy (v3)", {"distance_weight": 0.0}, {P_50: 44.61}),
        AblationRow("+ distance-of-distance", {}, {P_50: 47.09}),
    )
    config: UCDIRConfig

    def __init__(self, config: UCDIRConfig, shape: tuple[int, ...], classes: int, bits: int) -> None:
        super().__init__(config, shape, classes, bits)
        self.clustering, self.aligning = 0.0, False

    @torch.no_grad()
    def begin_epoch(self, epoch: int, epochs: int, source: RowSource | None = None, target: RowSource | None = None) -> None:
        """Set the weights of eq. 4 and, if a term needs it, encode each domain's plain images anew and cluster them (section 3.2)."""
        c, share = self.config, epoch / epochs
        self.clustering = c.cluster_weight * min(max((share - c.cluster_start) / max(c.cluster_full - c.cluster_start, 1e-9), 0.0), 1.0)
        self.aligning = share >= c.cluster_full and bool(c.entropy_weight or c.distance_weight)
        if self.clustering or self.aligning:
            for domain, rows in zip(DOMAINS, (source, target), strict=True):
                self.memory[domain].cluster(self._encoded(rows), self.draw())

    def weights(self, player: str) -> dict[str, float]:
        c = self.config
        own = {"instance": 1.0, "cluster": self.clustering, "entropy": c.entropy_weight, "distance": c.distance_weight}
        return own | super().weights(player)

    def contrasted(self, domain: str, x: Tensor, keys: Tensor, row: Tensor) -> dict[str, Tensor]:
        """Terms of eq. 3 and 10: the batch's x against all ranks' slots (eq. 1, 2), and the alignment."""
        c, memory = self.config, self.memory[domain]
        slots, own = self.sampled(memory, row)
        denominator = contrast(x, slots, c.temperature, None if own is None else keys, own)
        terms = {"instance": attraction(x, keys, denominator, c.temperature)}
        if self.clustering:
            member = gather(memory.members[row - memory.first])
            sure = cluster_probabilities(keys, memory.centroids, c.cluster_temperature).gather(1, member.unsqueeze(1)).squeeze(1)
            terms["cluster"] = attraction(x, memory.cluster_means()[member], denominator, c.temperature, sure > c.cluster_filter)
        return terms | (self._align(x) if self.aligning else {})

    def _align(self, x: Tensor) -> dict[str, Tensor]:
        """Entropy and distance-of-distance of one domain's batch by both domains' centroids (eq. 5-9)."""
        c = self.config
        one, other = (cluster_probabilities(x, self.memory[domain].centroids, c.cluster_temperature) for domain in DOMAINS)
        terms = {"entropy": self_entropy(one) + self_entropy(other)} if c.entropy_weight else {}
        return terms | ({"distance": distance_of_distance(one, other)} if c.distance_weight else {})
