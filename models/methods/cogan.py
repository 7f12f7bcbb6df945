"""CoGAN, coupled generative adversarial networks (Liu and Tuzel, NIPS 2016), with our hash head, on small images.

Two generators make a pair of images, one of each domain, from the same noise; two discriminators judge them. The generators share their first layers, the
discriminators all but their first, so that what is learnt of labelled source images holds for the target. The hash head and the classifier sit on the
discriminators' last hidden layer. The encoder is the target's: it also encodes the source's images for searches across the domains.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.distributed import BatchNorm, gather, rank_slice
from models.hyperparameters import Preset, hyperparameter
from models.losses.adversarial import critic_loss, generator_loss
from models.method import Batch, Player
from models.methods.adaptation import PLAIN, HashHead, HeadConfig
from models.networks.generative import halvings
from models.networks.layers import HashLayer, unit
from models.networks.precision import HeavyModule, reducible
from models.optimisers import build_optimizer

NOISE, HIDDEN = 100, 500
DOMAINS = ("source", "target")


@dataclass(frozen=True)
class CoGANConfig(HeadConfig):
    """Hyper-parameters of CoGAN."""

    augment: bool = hyperparameter(False, "train on randomly transformed views")
    adversarial_weight: float = hyperparameter(0.1, "weight of the discriminators' loss beside the head's; 1 in the paper", 1e-2, 1.0, log=True)
    generator_rate: float = hyperparameter(0.1, "the generators' share of the learning rate", 0.01, 1.0, log=True)
    width: int = hyperparameter(16, "channels of the generators' last hidden layer")


class CoupledJudge(HeavyModule):
    """LeNet with a first convolution for each domain: images as stored, or generated ones in [-1, 1] -> the last hidden layer, (batch, 500)."""

    def __init__(self, shape: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        channels, height, width = shape
        side = [((n - 4) // 2 - 4) // 2 for n in (height, width)]
        if min(side) < 1:
            raise ValueError(f"cogan needs images of at least 16x16 pixels, not {height}x{width}: ingest with a larger --size")
        self.first = nn.ModuleDict({domain: nn.Sequential(nn.Conv2d(channels, 20, 5), nn.MaxPool2d(2), nn.LeakyReLU(0.2)) for domain in DOMAINS})
        self.shared = nn.Sequential(
            nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(50 * side[0] * side[1], HIDDEN), nn.LeakyReLU(0.2),
            nn.Dropout(dropout),
        )  # fmt: skip

    @reducible
    def forward(self, x: Tensor, domain: str) -> Tensor:
        return self.shared(self.first[domain](x))


class CoupledGenerator(HeavyModule):
    """Noise (batch, 100) -> images of both domains in [-1, 1], by transposed convolutions of which the last is each domain's own."""

    def __init__(self, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        steps = halvings(shape, 3)
        small, outputs = (shape[1] >> steps, shape[2] >> steps), width << (steps - 1)
        layers = [nn.Linear(NOISE, outputs * small[0] * small[1]), nn.Unflatten(1, (outputs, *small)), BatchNorm(outputs), nn.ReLU()]
        for step in range(1, steps):
            less = outputs >> step
            layers += [nn.ConvTranspose2d(2 * less, less, 4, 2, 1), BatchNorm(less), nn.ReLU()]
        self.shared = nn.Sequential(*layers)
        self.last = nn.ModuleDict({domain: nn.Sequential(nn.ConvTranspose2d(width, shape[0], 4, 2, 1), nn.Tanh()) for domain in DOMAINS})

    @reducible
    def forward(self, noise: Tensor) -> tuple[Tensor, ...]:
        hidden = self.shared(noise)
        return tuple(self.last[domain](hidden) for domain in DOMAINS)


class _TargetCodes(nn.Module):
    """Images as stored -> codes, by the target's discriminator."""

    def __init__(self, judge: nn.Module, hashing: nn.Module) -> None:
        super().__init__()
        self.judge, self.hashing = judge, hashing

    def forward(self, x: Tensor) -> Tensor:
        codes: Tensor = self.hashing(self.judge(unit(x, images=True), "target"))[1]
        return codes


class CoGAN(HashHead):
    """Coupled discriminators that classify the source and judge generated pairs."""

    name: ClassVar[str] = "cogan"
    reference: ClassVar[str] = "Liu and Tuzel, Coupled Generative Adversarial Networks, NIPS 2016"
    Config: ClassVar[Any] = CoGANConfig
    presets: ClassVar[dict[str, Preset]] = {"paper": Preset("its losses beside our hash head", 0, PLAIN | {"adversarial_weight": 1.0})}
    config: CoGANConfig

    def __init__(self, config: CoGANConfig, shape: tuple[int, ...], classes: int, bits: int) -> None:
        if len(shape) == 1 or min(shape[1:]) >= 64:
            raise ValueError(f"cogan generates small images, not data of shape {list(shape)}: take digits, of at most 63 pixels")
        super().__init__(config, shape, classes, bits)
        generator = nn.ModuleDict({"generator": CoupledGenerator(shape, config.width)})
        groups: list[dict[str, Any]] = [{"params": [*generator.parameters()], "share": config.generator_rate}]
        self.players["generator"] = Player(generator, build_optimizer(config.optimizer, groups, config.learning_rate, 0.0, betas=(0.5, 0.999)))

    def build_network(self) -> nn.Module:
        return nn.ModuleDict({"judge": CoupledJudge(self.shape, self.config.dropout), "hash": HashLayer(HIDDEN, self.bits)})

    def network_groups(self) -> list[dict[str, Any]]:
        return [{"params": [*self.network.parameters()], "share": 1.0}]

    def added(self) -> dict[str, nn.Module]:
        return {"real": nn.Linear(HIDDEN, 1)}

    def _made(self) -> tuple[Tensor, ...]:
        """A pair of generated batches, as many as the source's; the noise is that of the global batch."""
        n = self.config.per_class * self.classes
        noise = rank_slice(torch.randn(n, NOISE, generator=self.draw()))
        pair: tuple[Tensor, ...] = self.players["generator"].networks["generator"](noise.to(self.device, torch.get_default_dtype()))
        return pair

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        """Encoder: the head's terms and ``judgement``. Generator: ``deceiving``."""
        assert batch.source is not None and batch.source.label is not None and batch.target is not None
        judge, real = self.network["judge"], self.networks["real"]
        if player == "generator":
            scores = [real(judge(made, domain)).flatten() for made, domain in zip(self._made(), DOMAINS, strict=True)]
            return {"deceiving": torch.stack([generator_loss(each, "gan") for each in scores]).sum()}
        with torch.no_grad():
            made = self._made()
        hidden = [judge(unit(self.seen(part), images=True), domain) for part, domain in zip((batch.source, batch.target), DOMAINS, strict=True)]
        judged = [
            critic_loss(real(true).flatten(), real(judge(false, domain)).flatten(), "gan") for true, false, domain in zip(hidden, made, DOMAINS, strict=True)
        ]
        u, labels = gather(self.network["hash"](hidden[0])[1]), gather(batch.source.label)
        self.network["hash"](hidden[1].detach())  # its batch-norm sees both domains
        return self.head_terms(u, self.classifier(u), labels) | {"judgement": torch.stack(judged).sum()}

    def weights(self, player: str) -> dict[str, float]:
        return super().weights(player) | {"judgement": self.config.adversarial_weight, "deceiving": 1.0}

    def encoder(self) -> nn.Module:
        """The EMA copy if there is one: the target's images -> codes."""
        network = self.ema_networks["network"]
        return _TargetCodes(network["judge"], network["hash"]).eval()
