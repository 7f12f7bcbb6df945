"""SGH, stochastic generative hashing (Dai et al., ICML 2017).

Symbols: x feature vector, h in {0, 1} its code, q(h|x) Bernoulli of a linear layer, p(x|h) Gaussian around a linear decoder, theta the bits' prior. The
description length E_q[-log p(x, h) + log q(h|x)] is minimised; h is drawn, and the gradient goes through its probability.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from models.distributed import drawn_bits
from models.hyperparameters import Preset, hyperparameter
from models.method import Batch, Method, Player, Wants
from models.networks.extractors import EXTRACTORS, Extractor
from models.optimisers import build_optimizer, set_learning_rate


@dataclass(frozen=True)
class SGHConfig:
    """Hyper-parameters of SGH."""

    prior_weight: float = hyperparameter(1.0, "weight of the codes' divergence from the prior", 1e-2, 10.0, log=True)
    extractor: str = hyperparameter("auto", "what makes vectors of images: none takes the pixels; auto: EfficientNet-Lite0 from 64 pixels", choices=EXTRACTORS)
    pretrained: str = hyperparameter("default", "the extractor's weights: default, torchvision name, file path, or none")
    batch: int = hyperparameter(256, "images in a batch of a domain", 64, 512)
    average: float = hyperparameter(0.99, "decay of the averaged copy that encodes; 0 is the paper (no copy)", 0.9, 0.999)
    learning_rate: float = hyperparameter(1e-3, "first learning rate", 1e-4, 1e-2, log=True)
    final_rate: float = hyperparameter(0.1, "last learning rate, as a share of the first: log-spaced between, cosine if 0; 1 in the paper")


class _Relaxed(nn.Module):
    """Logits of bits to 2 q - 1 in [-1, 1]."""

    def forward(self, logits: Tensor) -> Tensor:
        return torch.tanh(logits / 2)


class SGH(Method):
    """An autoencoder with a linear encoder and decoder, of random binary codes."""

    name: ClassVar[str] = "sgh"
    reference: ClassVar[str] = "Dai et al., Stochastic Generative Hashing, ICML 2017"
    Config: ClassVar[Any] = SGHConfig
    presets: ClassVar[dict[str, Preset]] = {"paper": Preset("its loss; rates are our readings", 0, {"average": 0.0, "final_rate": 1.0})}
    table: ClassVar[tuple[str, ...]] = ("target/map", "target/precision_at_1000")
    source_optional: ClassVar[bool] = True
    config: SGHConfig

    def __init__(self, config: SGHConfig, shape: tuple[int, ...], classes: int, bits: int) -> None:
        super().__init__(config, shape, classes, bits)
        self.extractor = Extractor(config.extractor, shape, config.pretrained).requires_grad_(False).eval()
        features = self.extractor.features
        self.networks = nn.ModuleDict({"encoder": nn.Linear(features, bits), "decoder": nn.Linear(bits, features)})
        self.others = nn.ParameterDict({"prior": nn.Parameter(torch.zeros(bits)), "variance": nn.Parameter(torch.zeros(()))})  # theta's and rho's logarithms
        self.networks["others"] = self.others
        groups: list[dict[str, Any]] = [{"params": [*self.networks.parameters()], "share": 1.0}]
        self.players = {"autoencoder": Player(self.networks, build_optimizer("adam", groups, config.learning_rate, 0.0))}
        self.track_average(self.networks, config.average)

    @property
    def wants(self) -> Wants:
        return Wants(source_labels=False, target=True, per_class=0, batch_size=self.config.batch, views=0)

    def state_modules(self) -> nn.ModuleDict:
        """Also the extractor."""
        return nn.ModuleDict({**super().state_modules(), "extractor": self.extractor})

    def begin_step(self, progress: float) -> None:
        set_learning_rate(self.players["autoencoder"].optimizer, self.config.learning_rate, self.config.final_rate, progress)

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        """Terms ``reconstruction`` and ``prior``: nats for each feature, means over the images."""
        parts = [part.x for part in batch if part is not None]
        with torch.no_grad():
            x = self.extractor(torch.cat(parts))
        logits = self.networks["encoder"](x)
        h = torch.cat([drawn_bits(each, self.draw()) for each in logits.sigmoid().split([len(part) for part in parts])])
        variance = self.others["variance"]
        error = (self.networks["decoder"](h) - x).square().mean()
        return {"reconstruction": (error * torch.exp(-variance) + variance) / 2, "prior": self._divergence(logits) / x.shape[1]}

    def _divergence(self, logits: Tensor) -> Tensor:
        """Divergence of the bits' probabilities from the prior, in nats: sum over the bits, mean over the images."""
        prior, on = self.others["prior"], logits.sigmoid()
        each = on * (logsigmoid(logits) - logsigmoid(prior)) + (1 - on) * (logsigmoid(-logits) - logsigmoid(-prior))
        return each.sum(1).mean()

    def weights(self, player: str) -> dict[str, float]:
        return {"reconstruction": 1.0, "prior": self.config.prior_weight}

    def encoder(self) -> nn.Module:
        """The EMA copy if there is one: input -> tanh of half the logits, 2 q - 1."""
        return nn.Sequential(self.extractor, self.ema_networks["encoder"], _Relaxed()).eval()
