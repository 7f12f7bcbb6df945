"""CPH, comparative prototype hashing (Cui et al., AAAI 2024).

Symbols: z frozen features, f = ReLU(BN(W z)) in the width of z, h relaxed code, s source, t target, p class prototypes of f. A target image
belongs to the class of the nearest source prototype.

The cosines of codes are clamped to 0..1, a reading. Extensions beyond the paper: random views; an EMA copy that encodes; a cosine learning
rate. Each has a field that switches it off.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, normalize

from models.distributed import BatchNorm, gather
from models.hyperparameters import Preset, hyperparameter
from models.losses.hashing import quantisation_loss
from models.losses.prototypes import kept_relation, label_relation, nearest_prototype, prototype_contrast, renewed_prototypes
from models.method import Batch, Method, Player, Wants
from models.networks.extractors import EXTRACTORS, Extractor
from models.optimisers import build_optimizer, set_learning_rate

DOMAINS = ("source", "target")


@dataclass(frozen=True)
class CPHConfig:
    """Hyper-parameters of CPH: the paper's for Office, but for the rate, the views and the averaged copy, which were not compared."""

    contrast_weight: float = hyperparameter(1.0, "weight of the contrast of prototypes", 1e-2, 10.0, log=True)
    quantisation_weight: float = hyperparameter(1.0, "weight of the quantisation of both domains' codes", 1e-2, 10.0, log=True)
    relation_weight: float = hyperparameter(100.0, "weight of the relations that codes keep", 0.1, 300.0, log=True)
    across: float = hyperparameter(0.1, "share of the relations across the domains, beside those of the source's labels", 0.0, 0.5)
    scale: float = hyperparameter(1.1, "what the cosine of two codes of a class should be")
    temperature: float = hyperparameter(0.07, "temperature of the contrast", 0.02, 0.5, log=True)
    extractor: str = hyperparameter("auto", "what makes z of images: none takes the pixels; auto: EfficientNet-Lite0 from 64 pixels", choices=EXTRACTORS)
    pretrained: str = hyperparameter("default", "the extractor's weights: default, torchvision name, file path, or none")
    width: int = hyperparameter(1024, "units of the layer between f and the code")
    batch: int = hyperparameter(256, "images of each domain in a batch", 64, 512)
    average: float = hyperparameter(0.99, "decay of the averaged copy that encodes; 0 is the paper (no copy)", 0.9, 0.999)
    augment: bool = hyperparameter(True, "train on randomly transformed views; off in the paper")
    learning_rate: float = hyperparameter(1e-3, "first learning rate; 1e-4 in the paper", 1e-5, 1e-2, log=True)
    final_rate: float = hyperparameter(0.0, "last learning rate, as a share of the first: log-spaced between, cosine if 0; 1 in the paper")
    weight_decay: float = hyperparameter(8e-6, "weight decay", 1e-6, 1e-2, log=True)


PAPER = {"average": 0.0, "augment": False, "learning_rate": 1e-4, "final_rate": 1.0}


class CPH(Method):
    """Prototypes of both domains that attract each other, and codes that keep the relations of labels and of features."""

    name: ClassVar[str] = "cph"
    reference: ClassVar[str] = "Cui et al., Effective Comparative Prototype Hashing for Unsupervised Domain Adaptation, AAAI 2024"
    Config: ClassVar[Any] = CPHConfig
    presets: ClassVar[dict[str, Preset]] = {
        "paper": Preset("Office-Home and Office-31", 70, PAPER),
        "paper-digits": Preset("MNIST and USPS", 70, PAPER | {"contrast_weight": 0.01, "quantisation_weight": 0.01, "relation_weight": 0.01}),
    }
    config: CPHConfig

    def __init__(self, config: CPHConfig, shape: tuple[int, ...], classes: int, bits: int) -> None:
        super().__init__(config, shape, classes, bits)
        c = config
        self.extractor = Extractor(c.extractor, shape, c.pretrained).requires_grad_(False).eval()
        z = self.extractor.features
        hidden = nn.Sequential(nn.Linear(z, z), BatchNorm(z), nn.ReLU())
        code = nn.Sequential(nn.Linear(z, c.width), BatchNorm(c.width), nn.ReLU(), nn.Linear(c.width, bits), nn.Tanh())
        self.networks = nn.ModuleDict({"hidden": hidden, "code": code})
        groups: list[dict[str, Any]] = [{"params": [*self.networks.parameters()], "share": 1.0}]
        self.players = {"encoder": Player(self.networks, build_optimizer("adam", groups, c.learning_rate, c.weight_decay))}
        self.track_average(self.networks, c.average)
        self.prototypes = nn.ParameterDict({domain: nn.Parameter(torch.zeros(classes, z), requires_grad=False) for domain in DOMAINS})

    @property
    def wants(self) -> Wants:
        c = self.config
        return Wants(source_labels=True, target=True, per_class=0, batch_size=c.batch, views=int(c.augment))

    def state_modules(self) -> nn.ModuleDict:
        """Also the extractor and the prototypes."""
        return nn.ModuleDict({**super().state_modules(), "extractor": self.extractor, "prototypes": self.prototypes})

    def begin_step(self, progress: float) -> None:
        set_learning_rate(self.players["encoder"].optimizer, self.config.learning_rate, self.config.final_rate, progress)

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        """Terms ``contrast``, ``quantisation``, ``labels`` and ``across``; renews the prototypes."""
        assert batch.source is not None and batch.source.label is not None and batch.target is not None
        c, n = self.config, len(batch.source.x)
        with torch.no_grad():
            z = self.extractor(torch.cat([part.views[0] if c.augment else part.x for part in (batch.source, batch.target)]))
        f = self.networks["hidden"](z)
        h = self.networks["code"](f)
        f_s, f_t, h_s, h_t = (gather(part) for each in (f, h) for part in (each[:n], each[n:]))
        labels = gather(batch.source.label)
        p_s = renewed_prototypes(self.prototypes["source"], f_s, labels)
        guesses = nearest_prototype(f_t.detach(), p_s.detach())
        p_t = renewed_prototypes(self.prototypes["target"], f_t, guesses)
        for domain, renewed in zip(DOMAINS, (p_s, p_t), strict=True):
            self.prototypes[domain].copy_(renewed.detach())
        present = torch.bincount(guesses, minlength=self.classes) > 0
        return {
            "contrast": prototype_contrast(p_s, p_t, present, c.temperature), "quantisation": (quantisation_loss(h_s) + quantisation_loss(h_t)) / 2,
            "labels": label_relation(h_s, labels, c.scale), "across": kept_relation(f_s, f_t, h_s, h_t),
        }  # fmt: skip

    def weights(self, player: str) -> dict[str, float]:
        c = self.config
        return {
            "contrast": c.contrast_weight, "quantisation": c.quantisation_weight, "labels": c.relation_weight * (1 - c.across),
            "across": c.relation_weight * c.across,
        }  # fmt: skip

    def encoder(self) -> nn.Module:
        """The EMA copy if there is one: input -> codes."""
        return nn.Sequential(self.extractor, self.ema_networks["hidden"], self.ema_networks["code"]).eval()

    def classify(self, x: Tensor) -> Tensor:
        """Class log-probabilities by the cosines of f with the source's prototypes."""
        f = self.ema_networks["hidden"].eval()(self.extractor(x))
        return log_softmax(normalize(f) @ self.prototypes["source"].T / self.config.temperature, 1)
