"""What the adaptation rows of the papers' tables share: our hash head and classifier, trained on the labelled source; a row adds one term.

Symbols: u relaxed code, s source, t target, p share of the training that is done. The classifier takes u, as IGAN's does, so that each row has
both an accuracy and codes. The papers of these rows have no codes: the hash terms, the random views and the EMA copy are ours, and the same in all.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from models.distributed import gather
from models.hyperparameters import hyperparameter
from models.losses.hashing import quantisation_loss, similarity_loss
from models.method import Batch, DomainView, Method, Player, Wants, chosen_view
from models.networks.build import NETWORKS, build_network
from models.networks.layers import CodesOnly, HashNetwork
from models.optimisers import build_optimizer, set_learning_rate

PLAIN = {"augment": False, "average": 0.0}  # what the presets of all papers leave out


@dataclass(frozen=True)
class HeadConfig:
    """Hyper-parameters of the hash head and its training."""

    hash_weight: float = hyperparameter(1.0, "weight of the hash term", 1e-2, 10.0, log=True)
    relaxation_weight: float = hyperparameter(0.1, "weight of the relaxation beside the hash term", 1e-3, 1.0, log=True)
    average: float = hyperparameter(0.99, "decay of the averaged copy that encodes; 0 for no copy", 0.9, 0.999)
    augment: bool = hyperparameter(True, "train on randomly transformed views")
    views: str = hyperparameter("affine", "kind of the views: affine; crop, of photographs: random crops and mirror images", choices=("affine", "crop"))
    crop: float = hyperparameter(0.2, "crop views: smallest share of the image's area", 0.08, 0.6, when={"views": ("crop",)})
    per_class: int = hyperparameter(20, "source images per class in a batch", 5, 40)
    pretrained: str = hyperparameter("default", "weights of AlexNet or a pretrained backbone: default, file path, or none")
    norm: bool = hyperparameter(True, "batch-norm in the trunk")
    dropout: float = hyperparameter(0.3, "dropout before the last trunk layer", 0.0, 0.6)
    optimizer: str = hyperparameter("adam", "optimiser", choices=("adam", "sgd"))
    learning_rate: float = hyperparameter(2e-3, "first learning rate; a cosine to zero", 1e-4, 1e-2, log=True)
    weight_decay: float = hyperparameter(5e-4, "weight decay", 1e-5, 1e-2, log=True)


@dataclass(frozen=True)
class AdaptationConfig(HeadConfig):
    """Hyper-parameters of the rows that train a network."""

    adaptation_weight: float = hyperparameter(1.0, "lambda, weight of the term that the method adds", 1e-2, 10.0, log=True)
    ramp: float = hyperparameter(10.0, "gamma: lambda grows from zero as 2 / (1 + exp(-gamma p)) - 1; 0 for all of it from the start")
    network: str = hyperparameter("auto", "network; auto: EfficientNet-Lite0 from 64 pixels, AlexNet there with papers", choices=NETWORKS)
    freeze: float = hyperparameter(0.0, "share of a pretrained backbone's layers, from the input on, that stay as they are")
    train_norm: bool = hyperparameter(False, "batch-norms of a pretrained backbone take the moments of the batches, not those of its weights")
    pretrained_rate: float = hyperparameter(0.1, "share of the learning rate for pretrained layers")
    depth_decay: float = hyperparameter(1.0, "share of a pretrained layer's learning rate that the layer before it gets")


class Both(NamedTuple):
    """A whole (gathered) batch of both domains, each pair source first.

    Attributes:
        layers: outputs (n, width) of the fully connected layers before their nonlinearity.
        u: (n, bits).
        logits: (n, classes).
        labels: (n,) int64, of the source.
        own: (own part of the batch, bits), this rank's part of the target's u.
    """

    layers: list[tuple[Tensor, Tensor]]
    u: tuple[Tensor, Tensor]
    logits: tuple[Tensor, Tensor]
    labels: Tensor
    own: Tensor


class HashHead(Method):
    """Base class: a hash network and a classifier on its codes."""

    config: HeadConfig

    def __init__(self, config: HeadConfig, shape: tuple[int, ...], classes: int, bits: int) -> None:
        super().__init__(config, shape, classes, bits)
        self.network: Any = self.build_network()
        self.classifier = nn.Linear(bits, classes)
        kept = nn.ModuleDict({"network": self.network, "classifier": self.classifier})
        self.networks = nn.ModuleDict({**kept, **self.added()})
        fresh = [parameter for name, part in self.networks.items() if name != "network" for parameter in part.parameters()]
        groups = [*self.network_groups(), {"params": fresh, "share": 1.0}]
        self.players = {"encoder": Player(self.networks, build_optimizer(config.optimizer, groups, config.learning_rate, config.weight_decay))}
        self.track_average(kept, config.average)

    def build_network(self) -> nn.Module:
        """The network of the codes; a hash network where nothing else is said."""
        raise NotImplementedError

    def network_groups(self) -> list[dict[str, Any]]:
        """Its parameter groups."""
        groups: list[dict[str, Any]] = self.network.parameter_groups(1.0)
        return groups

    def added(self) -> dict[str, nn.Module]:
        """Networks that the method adds to the encoder's player."""
        return {}

    @property
    def wants(self) -> Wants:
        c = self.config
        return Wants(True, True, c.per_class, batch_size=0, views=int(c.augment), view=chosen_view(c.views, c.crop))

    def begin_step(self, progress: float) -> None:
        """Set the learning rates."""
        for player in self.players.values():
            set_learning_rate(player.optimizer, self.config.learning_rate, 0.0, progress)

    def seen(self, part: DomainView) -> Tensor:
        """What a step takes of a domain's part of a batch."""
        return part.views[0] if self.config.augment else part.x

    def head_terms(self, u: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The terms of the source's codes and labels."""
        return {"classification": cross_entropy(logits, labels), "hash": similarity_loss(u, labels), "relaxation": quantisation_loss(u)}

    def weights(self, player: str) -> dict[str, float]:
        c = self.config
        return {"classification": 1.0, "hash": c.hash_weight, "relaxation": c.hash_weight * c.relaxation_weight}

    def encoder(self) -> nn.Module:
        """The EMA copy if there is one: input -> codes."""
        return CodesOnly(self.ema_networks["network"]).eval()

    def classify_codes(self, codes: Tensor) -> Tensor:
        """Class log-probabilities by the classifier on the relaxed codes."""
        return log_softmax(self.ema_networks["classifier"](codes), 1)


class Adaptation(HashHead):
    """Base class of the rows that train a network: a row gives the term of both domains in ``adapted``."""

    Config: ClassVar[Any] = AdaptationConfig
    config: AdaptationConfig

    def __init__(self, config: AdaptationConfig, shape: tuple[int, ...], classes: int, bits: int) -> None:
        super().__init__(config, shape, classes, bits)
        self.strength = 0.0

    def build_network(self) -> HashNetwork:
        c = self.config
        return build_network(c.network, self.shape, self.bits, c.norm, c.dropout, c.pretrained, c.freeze, c.train_norm)

    def network_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.network.parameter_groups(self.config.pretrained_rate, self.config.depth_decay)
        return groups

    def begin_step(self, progress: float) -> None:
        """Set the learning rates and lambda (DANN)."""
        super().begin_step(progress)
        c = self.config
        self.strength = c.adaptation_weight * (2 / (1 + math.exp(-c.ramp * progress)) - 1 if c.ramp else 1.0)

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        """The head's terms, and those of ``adapted``."""
        assert batch.source is not None and batch.source.label is not None and batch.target is not None
        x_s, x_t = self.seen(batch.source), self.seen(batch.target)
        layers, u = self.network(torch.cat([x_s, x_t]))

        def whole(each: Tensor) -> tuple[Tensor, Tensor]:
            return gather(each[: len(x_s)]), gather(each[len(x_s) :])

        u_s, u_t = whole(u)
        logits = self.classifier(u_s), self.classifier(u_t)
        both = Both([whole(layer) for layer in layers], (u_s, u_t), logits, gather(batch.source.label), u[len(x_s) :])
        return self.head_terms(u_s, both.logits[0], both.labels) | self.adapted(both)

    def adapted(self, both: Both) -> dict[str, Tensor]:
        """The method's own terms."""
        raise NotImplementedError
