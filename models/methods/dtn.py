"""DTN, domain transfer network (Taigman et al., ICLR 2017), on which SIGAN builds.

Symbols and pretraining as in ``models.methods.translator``; E is the paper's f. After pretraining E is fixed: f-constancy,
||E(x) - E(G(E(x)))||^2, trains G to keep a translated image's content. D tells three classes apart: translations of source
images, reconstructions of target images, target images (eq. 3-7).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from models.hyperparameters import Preset, hyperparameter
from models.method import RowSource
from models.methods.translator import Translator, TranslatorConfig
from models.networks.translation import total_variation

TRANSLATED, RECONSTRUCTED, REAL = 0, 1, 2


@dataclass(frozen=True)
class DTNConfig(TranslatorConfig):
    """Hyper-parameters of DTN. The defaults work best here."""

    constancy_weight: float = hyperparameter(15.0, "alpha, weight of the f-constancy", 1.0, 100.0, log=True)


class DTN(Translator):
    """Domain transfer network: f-constancy preserves the content of translated images."""

    name: ClassVar[str] = "dtn"
    reference: ClassVar[str] = "Taigman et al., Unsupervised Cross-domain Image Generation, ICLR 2017"
    Config: ClassVar[Any] = DTNConfig
    presets: ClassVar[dict[str, Preset]] = {  # the rate and the batches are those of a known re-implementation
        "paper": Preset("SVHN -> MNIST", 0, {
            "pretrain_epochs": 2, "reconstruction_weight": 15.0, "variation_weight": 0.0, "pseudo_weight": 0.0, "balance_weight": 0.0, "average": 0.0,
            "augment": False, "width": 64, "extractor": "none", "learning_rate": 3e-4, "final_rate": 1.0,
        }),
    }  # fmt: skip
    scores: ClassVar[int] = 3
    config: DTNConfig

    def begin_epoch(self, epoch: int, epochs: int, source: RowSource | None = None, target: RowSource | None = None) -> None:
        """After pretraining, E and F are the pretrained ones."""
        super().begin_epoch(epoch, epochs, source, target)
        if epoch == self.config.pretrain_epochs:
            for name, network in self.pretrained.items():
                self.networks[name].load_state_dict(network.state_dict())

    def translation(self, x_s: Tensor, labels: Tensor, x_t: Tensor, view: list[Tensor]) -> dict[str, Tensor]:
        """The terms of eq. 4-7 and the hash layer's; E and F receive no gradient."""
        c, n, encoder = self.config, len(x_s), self.pretrained["encoder"]
        h = encoder(torch.cat([x_s, x_t])).out
        made = self.generator(h).out
        again = encoder(made[:n]).out
        self.made = (made[:n].detach(), made[n:].detach(), x_t)
        terms = {"constancy": mse_loss(again, h[:n]), "reconstruction": mse_loss(made[n:], x_t)}
        if self.translates_pixels:
            terms["variation"] = total_variation(made)
        if c.adversarial_weight:
            scores = self.critic(made)
            terms["adversarial"] = cross_entropy(scores, torch.full((len(scores),), REAL, device=scores.device))
        return terms | self.hashed(torch.cat([h[:n], again]), torch.cat([labels, labels]))

    def weights(self, player: str) -> dict[str, float]:
        return super().weights(player) | {"constancy": self.config.constancy_weight}

    def judgement(self) -> dict[str, Tensor]:
        """The critic's cross-entropy over its three classes (eq. 3)."""
        assert self.made is not None
        kinds = torch.cat([torch.full((len(part),), kind) for kind, part in zip((TRANSLATED, RECONSTRUCTED, REAL), self.made, strict=True)])
        scores = self.critic(torch.cat(self.made))
        return {"critic": cross_entropy(scores, kinds.to(scores.device))}

    def failure(self, terms: dict[str, float]) -> str:
        """A critic without errors gives the generator no useful signal."""
        if terms.get("critic", 1.0) < 1e-4:
            return "the critic tells every translated image: lower --critic-rate"
        return ""
