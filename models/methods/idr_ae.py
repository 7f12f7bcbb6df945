"""IDR-AE, independent relaxed Wasserstein autoencoder (Doan et al. 2020), and its variants AE, WGAN-AE and OT-AE.

Symbols: x input, h feature extractor, f encoder, g decoder, b = f(h(x)) probabilities of the bits, z fair random bits. An
autoencoder whose codes are matched to the distribution of z; ``matching`` selects how. It needs no labels and only one
domain; with two it learns from both.

Extensions beyond the paper: an EMA copy; feature vectors less their mean; a reconstruction error relative to the features'
variance, so that one lambda fits all features; a matching weight that grows (with the full weight from the start, bits settle
before they differ); a learning rate that falls, but not to zero (otherwise some bits stay unbalanced). Each has a field that
switches it off.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.distributed import gather
from models.hyperparameters import AblationRow, Preset, hyperparameter
from models.losses.adversarial import critic_loss, generator_loss, gradient_penalty
from models.losses.matching import assignment_distance, bitwise_distance
from models.method import Batch, Method, Player, Wants
from models.networks.extractors import EXTRACTORS, Extractor
from models.optimisers import build_optimizer, set_learning_rate

CIFAR = "CIFAR10, 64 bits"


@dataclass(frozen=True)
class IDRAEConfig:
    """Hyper-parameters of IDR-AE. The defaults work best here."""

    matching: str = hyperparameter(
        "bitwise", "distance of codes to fair bits: none is AE, critic WGAN-AE, assignment OT-AE, bitwise IDR-AE",
        choices=("none", "critic", "assignment", "bitwise"),
    )  # fmt: skip
    matching_weight: float = hyperparameter(
        0.75, "lambda, weight of the matching beside the reconstruction error; 0.01 in the paper", 1e-3, 10.0, log=True,
        when={"matching": ("critic", "assignment", "bitwise")},
    )  # fmt: skip
    ramp: float = hyperparameter(
        0.8, "share of the training over which the matching's weight grows from zero; 0 in the paper", 0.1, 1.0,
        when={"matching": ("critic", "assignment", "bitwise")},
    )  # fmt: skip
    error: str = hyperparameter(
        "relative", "the reconstruction's squared error: a share of the features' variance, a mean over them, or eq. 2's sum",
        choices=("relative", "mean", "sum"),
    )  # fmt: skip
    penalty_weight: float = hyperparameter(10.0, "weight of the critic's gradient penalty", 1.0, 30.0, log=True, when={"matching": ("critic",)})
    extractor: str = hyperparameter("auto", "h: none takes the input as it is; auto: EfficientNet-Lite0 from 64 pixels", choices=EXTRACTORS)
    normalised: bool = hyperparameter(True, "feature vectors of h are scaled to a mean square of 1; off in the paper")
    centred: bool = hyperparameter(True, "the encoder takes feature vectors of h less their mean; off in the paper")
    pretrained: str = hyperparameter("default", "h's weights: default, torchvision name, file path, or none")
    train_extractor: bool = hyperparameter(False, "train h too")
    width: int = hyperparameter(1024, "units of the encoder's first hidden layer, half as many in its second")
    batch: int = hyperparameter(256, "images in a batch of a domain; 128 in the paper", 64, 512)
    average: float = hyperparameter(0.99, "decay of the averaged copy that encodes; 0 is the paper (no copy)", 0.9, 0.999)
    learning_rate: float = hyperparameter(1e-3, "first learning rate", 1e-4, 1e-2, log=True)
    critic_rate: float = hyperparameter(1.0, "the critic's share of the learning rate", 0.1, 10.0, log=True, when={"matching": ("critic",)})
    final_rate: float = hyperparameter(0.3, "last learning rate, as a share of the first: log-spaced between, cosine if 0; 1 in the paper")
    weight_decay: float = hyperparameter(0.0, "weight decay", 1e-6, 1e-2, log=True)


def _layers(*widths: int) -> nn.Sequential:
    """Fully connected layers with ReLU between them."""
    parts: list[nn.Module] = []
    for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
        parts += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


class _Probabilities(nn.Module):
    """f: features -> probabilities of the bits (batch, bits)."""

    def __init__(self, features: int, width: int, bits: int, centred: bool) -> None:
        super().__init__()
        self.centre: nn.Module = _Centre(features) if centred else nn.Identity()
        self.layers = _layers(features, width, width // 2, bits)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.layers(self.centre(x)))


class _Centre(nn.Module):
    """Features (batch, features) less the mean of all that training has seen so far, of all workers."""

    mean: Tensor
    batches: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.batches += 1
                self.mean += (gather(x.mean(0, keepdim=True)).mean(0) - self.mean) / self.batches
        return x - self.mean


class _Codes(nn.Module):
    """Input -> relaxed codes 2 f(h(x)) - 1; the sign corresponds to b > 0.5."""

    def __init__(self, extractor: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.extractor, self.encoder = extractor, encoder

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.encoder(self.extractor(x)) - 1


class IDRAE(Method):
    """Reconstruction of features from bits (eq. 2) and the bits' distance to fair ones (eq. 10): L = L_A + lambda L_G."""

    name: ClassVar[str] = "idr-ae"
    reference: ClassVar[str] = "Doan et al., Image Hashing by Minimizing Independent Relaxed Wasserstein Distance, 2020"
    Config: ClassVar[Any] = IDRAEConfig
    presets: ClassVar[dict[str, Preset]] = {  # the paper names lambda, Adam, batches of 128 and VGG's fc7; rate and widths are our readings
        "paper": Preset("Tables 1 and 2, CIFAR10 and Flickr25k; Places365 has 50 epochs", 100, {
            "matching_weight": 0.01, "ramp": 0.0, "error": "sum", "extractor": "vgg16", "normalised": False, "centred": False, "batch": 128,
            "average": 0.0, "final_rate": 1.0,
        }),
    }  # fmt: skip
    ablation: ClassVar[tuple[AblationRow, ...]] = (  # Table 2, with its names of the variants; weights with the best mAP on USPS
        AblationRow("AE", {"matching": "none"}, {}),
        AblationRow("WGAN-AE (AE-WGAN)", {"matching": "critic", "matching_weight": 0.01}, {CIFAR: 17.75}),
        AblationRow("OT-AE (AE-LP)", {"matching": "assignment", "matching_weight": 0.01}, {CIFAR: 17.77}),
        AblationRow("IDR-AE (AE-IW)", {"matching": "bitwise"}, {CIFAR: 20.84}),
    )
    table: ClassVar[tuple[str, ...]] = ("target/map", "target/precision_at_1000")
    source_optional: ClassVar[bool] = True
    config: IDRAEConfig

    def __init__(self, config: IDRAEConfig, shape: tuple[int, ...], classes: int, bits: int) -> None:
        super().__init__(config, shape, classes, bits)
        c, self.matched = config, 1.0
        extractor = Extractor(c.extractor, shape, c.pretrained, c.normalised).requires_grad_(c.train_extractor)
        features, widths = extractor.features, (c.width, c.width // 2)
        encoder = _Probabilities(features, c.width, bits, c.centred and extractor.gives_vectors)
        self.networks = nn.ModuleDict({"extractor": extractor, "encoder": encoder, "decoder": _layers(bits, *reversed(widths), features)})
        self.players = {"autoencoder": Player(self.networks, self._optimizer(self.networks, 1.0))}
        if c.matching == "critic":
            critic = nn.ModuleDict({"critic": nn.Sequential(_layers(bits, 256, 256, 1), nn.Flatten(0))})
            self.players["critic"] = Player(critic, self._optimizer(critic, c.critic_rate))
        self.track_average(self.networks, c.average)
        self.made = torch.empty(0)

    def _optimizer(self, networks: nn.Module, share: float) -> torch.optim.Optimizer:
        groups = [{"params": [p for p in networks.parameters() if p.requires_grad], "share": share}]
        return build_optimizer("adam", groups, self.config.learning_rate, self.config.weight_decay)

    @property
    def wants(self) -> Wants:
        return Wants(source_labels=False, target=True, per_class=0, batch_size=self.config.batch, views=0)

    def begin_step(self, progress: float) -> None:
        self.matched = min(1.0, progress / self.config.ramp) if self.config.ramp else 1.0
        for player in self.players.values():
            set_learning_rate(player.optimizer, self.config.learning_rate, self.config.final_rate, progress)

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        """Autoencoder: ``reconstruction`` and ``matching``. Critic: its objective on the output of the autoencoder's step."""
        if player == "critic":
            return self._judge()
        parts = [part.x for part in batch if part is not None]
        features = self.networks["extractor"](torch.cat(parts))
        b = self.networks["encoder"](features)
        terms = {"reconstruction": self._error(self.networks["decoder"](b), features.detach())}
        if self.config.matching != "none":
            each = b.split([len(part) for part in parts])
            terms["matching"] = self._matching(torch.cat([gather(part) for part in each]))  # in the row order of one process
        return terms

    def _error(self, made: Tensor, features: Tensor) -> Tensor:
        """Squared error of the reconstruction (eq. 2), mean over the images."""
        squares = (made - features).square()
        if self.config.error == "sum":
            return squares.sum(1).mean()
        return squares.mean() / gather(features).var(0).mean().clamp_min(1e-8) if self.config.error == "relative" else squares.mean()

    def weights(self, player: str) -> dict[str, float]:
        c = self.config
        return {"reconstruction": 1.0, "matching": c.matching_weight * self.matched, "critic": 1.0, "penalty": c.penalty_weight}

    def _matching(self, b: Tensor) -> Tensor:
        """Distance between the global batch's codes and as many fair random codes."""
        if self.config.matching == "critic":
            self.made = b.detach()
            return generator_loss(self.players["critic"].networks["critic"](b), "wasserstein")
        z = torch.randint(2, b.shape, generator=self.draw()).to(b)
        return (bitwise_distance if self.config.matching == "bitwise" else assignment_distance)(b, z)

    def _judge(self) -> dict[str, Tensor]:
        """The Wasserstein critic's objective on fair bits and codes, and its gradient penalty between them."""
        generator = self.draw()
        z = torch.randint(2, self.made.shape, generator=generator).to(self.made)
        share = torch.rand(len(z), generator=generator).to(z)
        critic = self.players["critic"].networks["critic"]
        return {"critic": critic_loss(critic(z), critic(self.made), "wasserstein"), "penalty": gradient_penalty(critic, z, self.made, share)}

    def encoder(self) -> nn.Module:
        """The EMA copy if there is one: input -> codes."""
        return _Codes(self.ema_networks["extractor"], self.ema_networks["encoder"]).eval()
