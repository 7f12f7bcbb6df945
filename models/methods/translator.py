"""What SIGAN and DTN share: networks, pretraining on the source, and a hash layer on the encoder's features.

Symbols: x image, s source, t target, y label, E encoder, h its features, F classifier, G generator, D critic, g translated
image, u relaxed code. E and F are pretrained on the source; then G translates source images into the target's style, and a
hash layer on h is trained on the labelled source images and their translations.

Of photographs, and of feature vectors, the networks translate vectors: features by a frozen backbone, scaled to a mean square of 1.

Extensions beyond the papers: random affine views for E, confident pseudo-labels of the target, EMA copies, a cosine learning
rate, vectors in place of pixels. Each has a field that switches it off.
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from models.distributed import gather
from models.hyperparameters import hyperparameter
from models.losses.alignment import confident_classes, imbalance_loss, pseudo_label_loss
from models.losses.hashing import quantisation_loss, similarity_loss
from models.method import Batch, Method, Player, RowSource, Wants
from models.networks.extractors import EXTRACTORS, Extractor
from models.networks.generative import stored
from models.networks.layers import HashLayer
from models.networks.translation import FEATURES, Critic, Decoder, Encoder, Pixels, TranslatedCode, dense_networks, resize_to
from models.optimisers import build_optimizer, set_learning_rate


@dataclass(frozen=True)
class TranslatorConfig:
    """Hyper-parameters of every translation method. The defaults work best here."""

    adversarial_weight: float = hyperparameter(1.0, "weight of the adversarial term; 0 leaves the critic out", 0.1, 3.0, log=True)
    reconstruction_weight: float = hyperparameter(10.0, "beta, weight of the reconstruction of target images; 1 in the paper", 0.1, 30.0, log=True)
    variation_weight: float = hyperparameter(1e-4, "gamma, weight of the total variation", 1e-5, 1e-2, log=True)
    pseudo_weight: float = hyperparameter(1.0, "weight of confident pseudo-labels of target images, which move E; 0 in the paper", 0.1, 3.0, log=True)
    balance_weight: float = hyperparameter(1.0, "weight of the classes' equal share in the target's guesses, with these; 0 in the paper", 0.1, 3.0, log=True)
    threshold: float = hyperparameter(0.9, "class probability above which a target image has a pseudo-label", 0.5, 0.99)
    hash_weight: float = hyperparameter(1.0, "weight of the hash loss on source and translated images (not in the paper)", 0.1, 10.0, log=True)
    relaxation_weight: float = hyperparameter(0.1, "weight of the relaxation beside the hash loss", 1e-3, 1.0, log=True)
    pretrain_epochs: int = hyperparameter(3, "epochs that train encoder and classifier alone")
    average: float = hyperparameter(0.99, "decay of the averaged copy that encodes and translates; 0 is the paper (no copy)", 0.9, 0.999)
    augment: bool = hyperparameter(True, "E learns from randomly transformed views; off in the paper")
    view_scale: float = hyperparameter(0.4, "largest relative change of an image's size in a view; USPS to MNIST needs 0.3", 0.1, 0.5)
    per_class: int = hyperparameter(10, "source images per class in a batch", 5, 40)
    extractor: str = hyperparameter(
        "auto", "what makes vectors of images: none translates pixels at 32x32; auto: EfficientNet-Lite0 from 64 pixels", choices=EXTRACTORS
    )
    pretrained: str = hyperparameter("default", "the extractor's weights: default, torchvision name, file path, or none")
    width: int = hyperparameter(16, "channels of the encoder's first layer, of vectors 32 times as many; 64 in the paper")
    optimizer: str = hyperparameter("adam", "optimiser", choices=("rmsprop", "adam"))
    learning_rate: float = hyperparameter(1e-3, "first learning rate of encoder, generator and hash layer", 1e-5, 1e-2, log=True)
    critic_rate: float = hyperparameter(1.0, "the critic's share of the learning rate", 0.1, 10.0, log=True)
    final_rate: float = hyperparameter(0.0, "last learning rate, as a share of the first: log-spaced between, cosine if 0; 1 in the paper")


class Translator(Method):
    """Base class: pretrains E and F; a subclass trains G and D, and E if it moves, in ``translation``.

    Attributes:
        scores: outputs of the critic.
    """

    Config: ClassVar[Any] = TranslatorConfig
    scores: ClassVar[int] = 1
    config: TranslatorConfig

    def __init__(self, config: Any, shape: tuple[int, ...], classes: int, bits: int) -> None:
        super().__init__(config, shape, classes, bits)
        c = config
        extractor = Extractor(c.extractor, shape, c.pretrained).requires_grad_(False).eval()
        self.translates_pixels = len(shape) == 3 and extractor.trunk is None
        self.taken: nn.Module = Pixels() if self.translates_pixels else extractor
        parts: tuple[nn.Module, ...] = (Encoder(shape[0], c.width), Decoder(shape[0], c.width), Critic(shape[0], c.width, self.scores))
        self.encode_part, self.generator, judge = parts if self.translates_pixels else dense_networks(extractor.features, c.width, self.scores)
        self.classifier, self.hash = nn.Linear(FEATURES, classes), HashLayer(FEATURES, bits)
        networks = {"encoder": self.encode_part, "classifier": self.classifier, "generator": self.generator, "hash": self.hash}
        self.networks = nn.ModuleDict(networks)
        self.players = {"generator": Player(self.networks, self._optimizer(self.networks, 1.0), partial=True)}
        if c.adversarial_weight:
            critic = nn.ModuleDict({"critic": judge})
            self.players["critic"] = Player(critic, self._optimizer(critic, c.critic_rate))
        self.track_average(self.networks, c.average)
        self.pretrained = copy.deepcopy(nn.ModuleDict({"encoder": self.encode_part, "classifier": self.classifier})).eval().requires_grad_(False)
        self.pretraining, self.labelling, self.steps = c.pretrain_epochs > 0, False, 0
        self.made: tuple[Tensor, ...] | None = None

    def _optimizer(self, network: nn.Module, share: float) -> torch.optim.Optimizer:
        groups = [{"params": [*network.parameters()], "share": share}]
        return build_optimizer(self.config.optimizer, groups, self.config.learning_rate, 0.0, betas=(0.5, 0.999))

    @property
    def critic(self) -> nn.Module:
        """D."""
        return self.players["critic"].networks["critic"]

    @property
    def can_translate(self) -> bool:
        return self.translates_pixels

    @property
    def wants(self) -> Wants:
        c = self.config
        return Wants(source_labels=True, target=True, per_class=c.per_class, batch_size=0, views=int(c.augment), view={"scale": c.view_scale})

    def begin_epoch(self, epoch: int, epochs: int, source: RowSource | None = None, target: RowSource | None = None) -> None:
        """Pretrain in the first epochs, then keep a copy of the result.

        The first epoch makes no pseudo-labels: wrong guesses of an untrained network would persist.
        """
        self.pretraining, self.labelling, self.steps = epoch < self.config.pretrain_epochs, epoch > 0, 0
        if epoch == self.config.pretrain_epochs:
            for name, network in self.pretrained.items():
                network.load_state_dict(self.ema_networks[name].state_dict())

    def begin_step(self, progress: float) -> None:
        """Set the learning rates."""
        for player in self.players.values():
            set_learning_rate(player.optimizer, self.config.learning_rate, self.config.final_rate, progress)

    def end_step(self) -> None:
        self.steps += 1
        super().end_step()

    def is_active(self, player: str) -> bool:
        return player == "generator" or not self.pretraining

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        """Generator, encoder and hash layer: pretraining, then ``translation``. Critic: its objective on the output of the generator's step."""
        assert batch.source is not None and batch.source.label is not None and batch.target is not None
        if player == "critic":
            return self.judgement()
        labels, c = batch.source.label, self.config
        x_s, x_t = self._taken(batch.source.views[0] if c.augment else batch.source.x), self._taken(batch.target.x)
        view = [self._taken(batch.target.views[0] if c.augment else batch.target.x)] if c.pseudo_weight and self.labelling else []
        return self._pretrain(x_s, labels, x_t, view) if self.pretraining else self.translation(x_s, labels, x_t, view)

    @torch.no_grad()
    def _taken(self, x: Tensor) -> Tensor:
        """What the networks take of images or vectors as stored: (n, channels, 32, 32) in [-1, 1], or vectors with a mean square of 1."""
        taken: Tensor = self.taken(x)
        return taken

    def _pretrain(self, x_s: Tensor, labels: Tensor, x_t: Tensor, view: list[Tensor]) -> dict[str, Tensor]:
        """E and F on the labelled source and, if their weight is not zero, on pseudo-labels of the target."""
        h = self.encode_part(torch.cat([x_s, *view])).out
        h_s, h_t = h[: len(x_s)], h[len(x_s) :]
        terms = {"source": cross_entropy(self.classifier(h_s), labels)}
        if view:
            terms |= self.guess(self.classifier(h_t), x_t)
        return terms | self.hashed(h_s, labels)

    def translation(self, x_s: Tensor, labels: Tensor, x_t: Tensor, view: list[Tensor]) -> dict[str, Tensor]:
        """Terms of a step after pretraining; sets ``made`` for the critic.

        Args:
            x_s: source images or vectors as ``_taken`` gives them, transformed if the config says so.
            labels: (n,) int64.
            x_t: plain target images or vectors.
            view: a transformed copy of ``x_t``, or nothing without pseudo-labels.
        """
        raise NotImplementedError

    def judgement(self) -> dict[str, Tensor]:
        """The critic's terms on ``made``."""
        raise NotImplementedError

    def weights(self, player: str) -> dict[str, float]:
        c = self.config
        return {
            "source": 1.0, "pseudo": c.pseudo_weight, "balance": c.balance_weight, "reconstruction": c.reconstruction_weight,
            "variation": c.variation_weight, "adversarial": c.adversarial_weight, "hash": c.hash_weight,
            "relaxation": c.hash_weight * c.relaxation_weight, "critic": 1.0,
        }  # fmt: skip

    def guess(self, logits: Tensor, x: Tensor) -> dict[str, Tensor]:
        """Terms on the target's views, with pseudo-labels that the EMA copy gives to the plain images."""
        terms = {"pseudo": pseudo_label_loss(logits, self._pseudo_labels(x))}
        return terms | ({"balance": imbalance_loss(gather(logits))} if self.config.balance_weight else {})

    def _pseudo_labels(self, x: Tensor) -> Tensor:
        """Classes of the target images that E and F are confident of, -1 for the others."""
        with self.guessing() as networks:
            return confident_classes(networks["classifier"](networks["encoder"](x).out), self.config.threshold)

    def hashed(self, h: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Hash loss of source images and, after pretraining, of their translations, as one labelled set; E receives no gradient."""
        if not self.config.hash_weight:
            return {}
        u = gather(self.hash(h.detach())[1])
        return {"hash": similarity_loss(u, gather(labels)), "relaxation": quantisation_loss(u)}

    def state_modules(self) -> nn.ModuleDict:
        """Also the pretrained encoder and classifier, and the extractor."""
        kept = super().state_modules()
        kept["pretrained"], kept["taken"] = self.pretrained, self.taken
        return kept

    def encoder(self) -> nn.Module:
        """E and the hash layer: input -> codes."""
        return TranslatedCode(self.taken, self.ema_networks["encoder"], self.ema_networks["hash"]).eval()

    def classify(self, x: Tensor) -> Tensor:
        """Class log-probabilities by F on the features of E."""
        return log_softmax(self.ema_networks["classifier"](self.ema_networks["encoder"].eval()(self._taken(x)).out), 1)

    def translate(self, x: Tensor) -> Tensor:
        """g = G(E(x)) (SIGAN eq. 2), at the size of ``x``; vectors with a mean square of 1 if the networks are of vectors."""
        made: Tensor = self.ema_networks["generator"].eval()(self.ema_networks["encoder"].eval()(self._taken(x)).out).out
        return stored(resize_to(made, tuple(x.shape[1:]))) if self.translates_pixels else made
