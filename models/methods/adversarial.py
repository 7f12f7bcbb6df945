"""DANN, CDAN and MSTN, with our hash head: a discriminator of the domains, whose gradient is reversed where it enters the encoder.

DANN (Ganin et al., JMLR 2016) judges the codes; CDAN-M (Long et al., NeurIPS 2018) their outer product with the class probabilities; MSTN (Xie et al.,
ICML 2018) adds to DANN the distance of the classes' moving centroids in both domains.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.hyperparameters import Preset, hyperparameter
from models.losses.domains import domain_loss, moved_centroids, multilinear, reversed_gradient
from models.methods.adaptation import PLAIN, Adaptation, AdaptationConfig, Both

DOMAINS = ("source", "target")


def domain_discriminator(inputs: int, width: int) -> nn.Module:
    """Two hidden layers and a logit of "source": (batch, inputs) -> (batch,)."""
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1), nn.Flatten(0))


@dataclass(frozen=True)
class AdversarialConfig(AdaptationConfig):
    """Hyper-parameters of DANN and CDAN."""

    width: int = hyperparameter(1024, "units of each hidden layer of the discriminator")


class DANN(Adaptation):
    """A discriminator cannot tell the domains' codes apart."""

    name: ClassVar[str] = "dann"
    reference: ClassVar[str] = "Ganin et al., Domain-Adversarial Training of Neural Networks, JMLR 2016"
    Config: ClassVar[Any] = AdversarialConfig
    presets: ClassVar[dict[str, Preset]] = {"paper": Preset("its loss alone beside our hash head", 0, PLAIN)}
    config: AdversarialConfig

    @property
    def judged(self) -> int:
        """Width of what the discriminator takes."""
        return self.bits

    def added(self) -> dict[str, nn.Module]:
        return {"discriminator": domain_discriminator(self.judged, self.config.width)}

    def shown(self, u: Tensor, logits: Tensor) -> Tensor:
        """What the discriminator takes of a domain: (n, judged)."""
        return u

    def adapted(self, both: Both) -> dict[str, Tensor]:
        """Term ``domains``: the discriminator minimises it; the encoder gets its gradient times minus lambda."""
        judge = self.networks["discriminator"]
        shown = [reversed_gradient(self.shown(u, logits), self.strength) for u, logits in zip(both.u, both.logits, strict=True)]
        return {"domains": domain_loss(*map(judge, shown))}

    def weights(self, player: str) -> dict[str, float]:
        return super().weights(player) | {"domains": 1.0}


class CDAN(DANN):
    """A discriminator cannot tell the domains apart by codes and classes together; without entropy weights: CDAN-M."""

    name: ClassVar[str] = "cdan"
    reference: ClassVar[str] = "Long et al., Conditional Adversarial Domain Adaptation, NeurIPS 2018"

    @property
    def judged(self) -> int:
        return self.bits * self.classes

    def shown(self, u: Tensor, logits: Tensor) -> Tensor:
        return multilinear(u, logits.detach().softmax(1))  # a reading: the probabilities condition, they receive no gradient


@dataclass(frozen=True)
class MSTNConfig(AdversarialConfig):
    """Hyper-parameters of MSTN."""

    semantic_weight: float = hyperparameter(1.0, "share of lambda that weighs the distance of the centroids", 0.1, 10.0, log=True)
    kept: float = hyperparameter(0.7, "theta, share of the old centroids in the new", 0.0, 0.95)


class MSTN(DANN):
    """DANN, and the same place for each class's centroid in both domains; the target's classes are the classifier's guesses.

    The squared distance is a mean over classes and bits, so that its weight does not depend on their numbers.
    """

    name: ClassVar[str] = "mstn"
    reference: ClassVar[str] = "Xie et al., Learning Semantic Representations for Unsupervised Domain Adaptation, ICML 2018"
    Config: ClassVar[Any] = MSTNConfig
    config: MSTNConfig

    def __init__(self, config: MSTNConfig, shape: tuple[int, ...], classes: int, bits: int) -> None:
        super().__init__(config, shape, classes, bits)
        self.centroids = nn.ParameterDict({domain: nn.Parameter(torch.zeros(classes, bits), requires_grad=False) for domain in DOMAINS})

    def state_modules(self) -> nn.ModuleDict:
        """Also the centroids."""
        return nn.ModuleDict({**super().state_modules(), "centroids": self.centroids})

    def adapted(self, both: Both) -> dict[str, Tensor]:
        """Terms ``domains`` and ``semantic``; moves the centroids."""
        members = both.labels, both.logits[1].argmax(1)
        moved = [moved_centroids(self.centroids[d], u, y, self.config.kept) for d, u, y in zip(DOMAINS, both.u, members, strict=True)]
        for domain, centroids in zip(DOMAINS, moved, strict=True):
            self.centroids[domain].copy_(centroids.detach())
        return super().adapted(both) | {"semantic": (moved[0] - moved[1]).square().mean()}

    def weights(self, player: str) -> dict[str, float]:
        return super().weights(player) | {"semantic": self.strength * self.config.semantic_weight}
