"""DRCN, deep reconstruction-classification networks (Ghifary et al., ECCV 2016), with our hash head.

The codes of target images are also decoded to those images. The paper takes turns between the two losses, here they are one; it adds noise to what is
encoded, here the views are random and the decoder makes the view.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from models.distributed import gather
from models.hyperparameters import Preset, hyperparameter
from models.method import Batch
from models.methods.adaptation import PLAIN, Adaptation, AdaptationConfig, Both
from models.networks.generative import Generator
from models.networks.layers import unit


@dataclass(frozen=True)
class DRCNConfig(AdaptationConfig):
    """Hyper-parameters of DRCN."""

    adaptation_weight: float = hyperparameter(0.4, "(1 - lambda) / lambda, weight of the reconstruction; lambda 0.7 in the paper", 1e-2, 10.0, log=True)
    ramp: float = hyperparameter(0.0, "gamma: the weight grows from zero as 2 / (1 + exp(-gamma p)) - 1; 0 for all of it from the start")
    width: int = hyperparameter(16, "channels of the outermost hidden layer of the decoder")


class DRCN(Adaptation):
    """Codes that classify the source and reconstruct the target."""

    name: ClassVar[str] = "drcn"
    reference: ClassVar[str] = "Ghifary et al., Deep Reconstruction-Classification Networks for Unsupervised Domain Adaptation, ECCV 2016"
    Config: ClassVar[Any] = DRCNConfig
    presets: ClassVar[dict[str, Preset]] = {"paper": Preset("its losses alone beside our hash head", 0, PLAIN)}
    config: DRCNConfig

    def added(self) -> dict[str, nn.Module]:
        if len(self.shape) == 3 and min(self.shape[1:]) >= 64:
            raise ValueError(f"drcn reconstructs digits or features, not images of {self.shape[1]}x{self.shape[2]} pixels: embed photographs first")
        return {"decoder": Generator(self.bits, self.shape, self.config.width)}

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        """The head's terms, and ``reconstruction``."""
        assert batch.target is not None
        self.wanted = unit(self.seen(batch.target), len(self.shape) == 3)
        return super().losses(player, batch)

    def adapted(self, both: Both) -> dict[str, Tensor]:
        """Term ``reconstruction``: the squared error of the target's images or features, relative to their variance."""
        error = (self.networks["decoder"](both.own) - self.wanted).square().mean()
        return {"reconstruction": error / gather(self.wanted).var(0).mean().clamp(min=1e-8)}

    def weights(self, player: str) -> dict[str, float]:
        return super().weights(player) | {"reconstruction": self.strength}
