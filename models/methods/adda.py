"""ADDA, adversarial discriminative domain adaptation (Tzeng et al., CVPR 2017), with our hash head.

A network is trained on the source. Then a copy of it, the target's, learns to make a discriminator take target codes for codes that the first network,
now fixed, gives to source images; the classifier is fixed, too. The encoder is the target's network: it also encodes the source's images for searches
across the domains, where the paper has a network for each domain.
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.distributed import gather
from models.hyperparameters import Preset, hyperparameter
from models.losses.adversarial import generator_loss
from models.losses.domains import domain_loss
from models.method import Batch, Player, RowSource
from models.methods.adaptation import PLAIN, Adaptation, AdaptationConfig
from models.methods.adversarial import domain_discriminator
from models.optimisers import build_optimizer, set_learning_rate


@dataclass(frozen=True)
class ADDAConfig(AdaptationConfig):
    """Hyper-parameters of ADDA."""

    ramp: float = hyperparameter(0.0, "gamma: lambda grows from zero as 2 / (1 + exp(-gamma p)) - 1; 0 for all of it from the start")
    pretrained_share: float = hyperparameter(0.5, "share of the training that is of the source's network", 0.2, 0.8)
    adversarial_rate: float = hyperparameter(0.1, "share of the learning rate for the target's network and the discriminator", 0.01, 1.0, log=True)
    width: int = hyperparameter(500, "units of each hidden layer of the discriminator")


class ADDA(Adaptation):
    """The target's network deceives a discriminator of its codes and of the source network's."""

    name: ClassVar[str] = "adda"
    reference: ClassVar[str] = "Tzeng et al., Adversarial Discriminative Domain Adaptation, CVPR 2017"
    Config: ClassVar[Any] = ADDAConfig
    presets: ClassVar[dict[str, Preset]] = {"paper": Preset("its losses alone beside our hash head", 0, PLAIN)}
    config: ADDAConfig

    def __init__(self, config: ADDAConfig, shape: tuple[int, ...], classes: int, bits: int) -> None:
        super().__init__(config, shape, classes, bits)
        self.players["encoder"].partial = True  # the classifier is fixed after the pretraining
        judge = nn.ModuleDict({"judge": domain_discriminator(bits, config.width)})
        groups: list[dict[str, Any]] = [{"params": [*judge.parameters()], "share": 1.0}]
        self.players["discriminator"] = Player(judge, build_optimizer(config.optimizer, groups, config.learning_rate, 0.0))
        self.source_network = copy.deepcopy(self.network).requires_grad_(False)
        self.pretraining, self.shown = True, (torch.empty(0), torch.empty(0))

    def state_modules(self) -> nn.ModuleDict:
        """Also the source's network."""
        return nn.ModuleDict({**super().state_modules(), "source_network": self.source_network})

    def begin_epoch(self, epoch: int, epochs: int, source: RowSource | None = None, target: RowSource | None = None) -> None:
        """Pretrain in the first epochs; then keep the source's network."""
        if epochs < 2:
            raise ValueError("adda needs at least 2 --epochs: the first trains the source's network, the rest adapt the target's")
        first = min(max(1, round(self.config.pretrained_share * epochs)), epochs - 1)
        self.pretraining = epoch < first
        if epoch == first:
            self.network.load_state_dict(self.ema_networks["network"].state_dict())
            self.classifier.load_state_dict(self.ema_networks["classifier"].state_dict())
            self.source_network.load_state_dict(self.network.state_dict())

    def begin_step(self, progress: float) -> None:
        """Set the learning rates: a cosine to zero, in the second part of it times the adversarial share."""
        super().begin_step(progress)
        for player in self.players.values() if not self.pretraining else ():
            set_learning_rate(player.optimizer, self.config.learning_rate * self.config.adversarial_rate, 0.0, progress)

    def is_active(self, player: str) -> bool:
        return player == "encoder" or not self.pretraining

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        """Encoder: the head's terms, then ``deceiving``. Discriminator: ``domains``, on the output of the encoder's step."""
        assert batch.source is not None and batch.source.label is not None and batch.target is not None
        if player == "discriminator":
            judge = self.players["discriminator"].networks["judge"]
            return {"domains": domain_loss(*map(judge, self.shown))}
        if self.pretraining:
            u, labels = gather(self.network(self.seen(batch.source))[1]), gather(batch.source.label)
            return self.head_terms(u, self.classifier(u), labels)
        with torch.no_grad():
            of_source = gather(self.source_network.eval()(self.seen(batch.source))[1])
        of_target = gather(self.network(self.seen(batch.target))[1])
        self.shown = of_source, of_target.detach()
        return {"deceiving": generator_loss(self.players["discriminator"].networks["judge"](of_target), "gan")}

    def weights(self, player: str) -> dict[str, float]:
        return super().weights(player) | {"deceiving": self.strength, "domains": 1.0}
