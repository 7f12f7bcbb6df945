"""SIGAN, semantic invariant GAN (Mao et al., Neurocomputing 2018).

Symbols: x image, s source, t target, y label, E encoder, h its features, F classifier, G generator, D critic, g translated
image, u relaxed code. E and F are pretrained on the source; then G translates source images into the target's style, and a
hash layer on h is trained on the labelled source images and their translations.

Extensions beyond the paper: random affine views for E; confident pseudo-labels of the target; the source's classification
after pretraining; a semantic term that trains G with the pretrained E and F; attention maps scaled by their width; EMA
copies; a cosine learning rate. Each has a field that switches it off.
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, log_softmax, mse_loss

from models.distributed import gather, rank_slice, world_size
from models.losses.adversarial import critic_loss, generator_loss, gradient_penalty
from models.losses.alignment import confident_classes, imbalance_loss, pseudo_label_loss
from models.losses.hashing import quantisation_loss, similarity_loss
from models.method import AblationRow, Batch, Method, Player, Wants, hyperparameter
from models.networks.generative import stored
from models.networks.layers import HashLayer
from models.networks.translation import (
    FEATURES,
    Activations,
    Critic,
    Decoder,
    Encoder,
    TranslatedCode,
    attention_map,
    resize_to,
    to_network_input,
    total_variation,
)
from models.optimisers import build_optimizer, set_learning_rate

S_M = "svhn -> mnist"
DTN_TERMS: dict[str, Any] = {"adversarial_objective": "gan", "label_weight": 0.0, "semantic_weight": 0.0, "attention_weight": 0.0, "constancy_weight": 15.0}


@dataclass(frozen=True)
class SIGANConfig:
    """Hyper-parameters of SIGAN. The defaults work best here; ``paper()`` is the paper's setting."""

    adversarial_objective: str = hyperparameter("wasserstein", "adversarial objective", choices=("wasserstein", "gan"))
    adversarial_weight: float = hyperparameter(1.0, "weight of the adversarial term; 0 leaves the critic out", 0.1, 3.0, log=True)
    label_weight: float = hyperparameter(1.0, "weight of the label consistency", 0.1, 10.0, log=True)
    label_interval: int = hyperparameter(1, "t, steps from one update by label consistency to the next; 20 in the paper")
    semantic_weight: float = hyperparameter(1.0, "weight of the label as E and F when pretrained see it, which moves G; 0 in the paper", 0.1, 10.0, log=True)
    constancy_weight: float = hyperparameter(0.0, "weight of DTN's f-constancy; 0 in SIGAN", 1.0, 100.0, log=True)
    attention_weight: float = hyperparameter(0.01, "alpha, weight of the attention term", 1e-3, 1.0, log=True)
    attention_scaled: bool = hyperparameter(True, "attention maps divided by their number of channels; off in the paper")
    reconstruction_weight: float = hyperparameter(10.0, "beta, weight of the reconstruction of target images; 1 in the paper", 0.1, 30.0, log=True)
    variation_weight: float = hyperparameter(1e-4, "gamma, weight of the total variation", 1e-5, 1e-2, log=True)
    source_weight: float = hyperparameter(1.0, "weight of the source's classification after pretraining; 0 in the paper", 0.1, 3.0, log=True)
    pseudo_weight: float = hyperparameter(1.0, "weight of confident pseudo-labels of target images, which move E; 0 in the paper", 0.1, 3.0, log=True)
    balance_weight: float = hyperparameter(1.0, "weight of the classes' equal share in the target's guesses, with these; 0 in the paper", 0.1, 3.0, log=True)
    threshold: float = hyperparameter(0.9, "class probability above which a target image has a pseudo-label", 0.5, 0.99)
    hash_weight: float = hyperparameter(1.0, "weight of the hash loss on source and translated images (not in the paper)", 0.1, 10.0, log=True)
    relaxation_weight: float = hyperparameter(0.1, "weight of the relaxation beside the hash loss", 1e-3, 1.0, log=True)
    lipschitz: str = hyperparameter(
        "penalty", "what bounds a Wasserstein critic's slope", choices=("penalty", "clip"), when={"adversarial_objective": ("wasserstein",)}
    )
    penalty_weight: float = hyperparameter(
        10.0, "weight of the gradient penalty", 1.0, 30.0, log=True, when={"adversarial_objective": ("wasserstein",), "lipschitz": ("penalty",)}
    )
    clip: float = hyperparameter(0.01, "bound of the critic's weights under clipping")
    pretrain_epochs: int = hyperparameter(3, "epochs that train encoder and classifier alone")
    average: float = hyperparameter(0.99, "decay of the averaged copy that encodes and translates; 0 is the paper (no copy)", 0.9, 0.999)
    augment: bool = hyperparameter(True, "E learns from randomly transformed views; off in the paper")
    view_scale: float = hyperparameter(0.4, "largest relative change of an image's size in a view; USPS to MNIST needs 0.3", 0.1, 0.5)
    per_class: int = hyperparameter(10, "source images per class in a batch", 5, 40)
    width: int = hyperparameter(16, "channels of the encoder's first layer; 64 in the paper")
    optimizer: str = hyperparameter("adam", "optimiser", choices=("rmsprop", "adam"))
    learning_rate: float = hyperparameter(1e-3, "first learning rate of encoder, generator and hash layer", 1e-5, 1e-2, log=True)
    critic_rate: float = hyperparameter(1.0, "the critic's share of the learning rate", 0.1, 10.0, log=True)
    final_rate: float = hyperparameter(0.0, "last learning rate, as a share of the first: log-spaced between, cosine if 0; 1 in the paper")

    @classmethod
    def paper(cls) -> Self:
        """The paper's setting of SVHN -> MNIST. It names no learning rate and no Lipschitz constraint: 3e-4 and clipping are our readings."""
        return cls(
            label_interval=20, semantic_weight=0.0, pretrain_epochs=2, reconstruction_weight=1.0, attention_scaled=False, source_weight=0.0,
            pseudo_weight=0.0, balance_weight=0.0, lipschitz="clip", average=0.0, augment=False, width=64, optimizer="rmsprop",
            learning_rate=3e-4, final_rate=1.0,
        )  # fmt: skip


class SIGAN(Method):
    """Translates source images into the target's style with their labels (Algorithm 1), and trains a hash layer on both."""

    name: ClassVar[str] = "sigan"
    reference: ClassVar[str] = "Mao et al., Semantic Invariant Cross-domain Image Generation with Generative Adversarial Networks, Neurocomputing 2018"
    Config: ClassVar[Any] = SIGANConfig
    ablation: ClassVar[tuple[AblationRow, ...]] = (  # Table 1
        AblationRow("SIGAN without TV", {"variation_weight": 0.0}, {S_M: 83.63}),
        AblationRow("SIGAN", {}, {S_M: 83.41}),
        AblationRow("without attention", {"attention_weight": 0.0}, {S_M: 78.56}),
        AblationRow("without label consistency", {"label_weight": 0.0, "semantic_weight": 0.0}, {S_M: 51.77}),
        AblationRow("without GAN", {"adversarial_weight": 0.0}, {S_M: 32.60}),
        AblationRow("without attention and label", {"attention_weight": 0.0, "label_weight": 0.0, "semantic_weight": 0.0}, {S_M: 10.39}),
        AblationRow("DTN", DTN_TERMS, {S_M: 80.23}),
        AblationRow("source only", {"pretrain_epochs": 1_000_000, "pseudo_weight": 0.0}, {S_M: 60.21}),
    )
    config: SIGANConfig

    def __init__(self, config: SIGANConfig, shape: tuple[int, ...], classes: int, bits: int) -> None:
        super().__init__(config, shape, classes, bits)
        if len(shape) != 3:
            raise ValueError(f"{self.name} translates images, and these are feature vectors: ingest images, or take another method")
        c = config
        self.encode_part, self.generator = Encoder(shape[0], c.width), Decoder(shape[0], c.width)
        self.classifier, self.hash = nn.Linear(FEATURES, classes), HashLayer(FEATURES, bits)
        networks = {"encoder": self.encode_part, "classifier": self.classifier, "generator": self.generator, "hash": self.hash}
        self.networks = nn.ModuleDict(networks)
        self.players = {"generator": Player(self.networks, self._optimizer(self.networks, 1.0), partial=True)}
        if c.adversarial_weight:
            critic = nn.ModuleDict({"critic": Critic(shape[0], c.width)})
            self.players["critic"] = Player(critic, self._optimizer(critic, c.critic_rate))
        self.track_average(self.networks, c.average)
        self.pretrained = copy.deepcopy(nn.ModuleDict({"encoder": self.encode_part, "classifier": self.classifier})).eval().requires_grad_(False)
        self.pretraining, self.guessing, self.steps, self.draws = c.pretrain_epochs > 0, False, 0, 0
        self.made: tuple[Tensor, Tensor] | None = None

    def _optimizer(self, network: nn.Module, share: float) -> torch.optim.Optimizer:
        groups = [{"params": [*network.parameters()], "share": share}]
        return build_optimizer(self.config.optimizer, groups, self.config.learning_rate, 0.0, betas=(0.5, 0.999))

    @property
    def critic(self) -> nn.Module:
        """D."""
        return self.players["critic"].networks["critic"]

    @property
    def can_translate(self) -> bool:
        return True

    @property
    def wants(self) -> Wants:
        c = self.config
        return Wants(source_labels=True, target=True, per_class=c.per_class, batch_size=0, views=int(c.augment), view={"scale": c.view_scale})

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Pretrain in the first epochs, then keep a copy of the result; start the epoch's sequences of draws and of intervals t.

        The first epoch makes no pseudo-labels: wrong guesses of an untrained network would persist.
        """
        self.pretraining, self.guessing, self.steps, self.draws = epoch < self.config.pretrain_epochs, epoch > 0, 0, epoch << 32
        if epoch == self.config.pretrain_epochs:
            for name, network in self.pretrained.items():
                network.load_state_dict(self.ema_networks[name].state_dict())

    def begin_step(self, progress: float) -> None:
        """Set the learning rates. After pretraining the classifier F stays fixed, as it receives no gradient."""
        for player in self.players.values():
            set_learning_rate(player.optimizer, self.config.learning_rate, self.config.final_rate, progress)

    def end_step(self) -> None:
        self.steps += 1
        if "critic" in self.players and self.config.adversarial_objective == "wasserstein" and self.config.lipschitz == "clip":
            with torch.no_grad():
                for parameter in self.critic.parameters():
                    parameter.clamp_(-self.config.clip, self.config.clip)
        super().end_step()

    def is_active(self, player: str) -> bool:
        return player == "generator" or not self.pretraining

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        """Generator, encoder and hash layer: the terms of Algorithm 1. Critic: its objective on the output of the generator's step."""
        assert batch.source is not None and batch.source.label is not None and batch.target is not None
        if player == "critic":
            return self._judge()
        labels, c = batch.source.label, self.config
        x_s, x_t = to_network_input(batch.source.views[0] if c.augment else batch.source.x), to_network_input(batch.target.x)
        view = [to_network_input(batch.target.views[0] if c.augment else batch.target.x)] if c.pseudo_weight and self.guessing else []
        if self.pretraining:
            return self._pretrain(x_s, labels, x_t, view)
        s, t = slice(None, len(x_s)), slice(len(x_s), len(x_s) + len(x_t))
        seen = self.encode_part(torch.cat([x_s, x_t, *view]))
        made = self.generator(seen.out[: t.stop])
        again = self.encode_part(made.out[s].detach())  # translations serve as labelled images
        self.made = (x_t, made.out[s].detach())
        terms = self._keep_meaning(Activations(*(each[s] for each in seen)), Activations(*(each[s] for each in made)), labels)
        if c.label_weight and self.steps % max(c.label_interval, 1) == 0:
            terms["label"] = cross_entropy(self._fixed_classifier(again.out), labels)
        if view:
            terms |= self._guess(self._fixed_classifier(seen.out[t.stop :]), x_t)
        if c.adversarial_weight:
            terms["adversarial"] = generator_loss(self.critic(made.out[s]), c.adversarial_objective)
        if c.reconstruction_weight:
            terms["reconstruction"] = mse_loss(made.out[t], x_t)
        if c.variation_weight:
            terms["variation"] = total_variation(made.out[s])
        return terms | self._hash(torch.cat([seen.out[s], again.out]), torch.cat([labels, labels]))

    def _pretrain(self, x_s: Tensor, labels: Tensor, x_t: Tensor, view: list[Tensor]) -> dict[str, Tensor]:
        """E and F on the labelled source and, if their weight is not zero, on pseudo-labels of the target."""
        h = self.encode_part(torch.cat([x_s, *view])).out
        h_s, h_t = h[: len(x_s)], h[len(x_s) :]
        terms = {"source": cross_entropy(self.classifier(h_s), labels)}
        if view:
            terms |= self._guess(self.classifier(h_t), x_t)
        return terms | self._hash(h_s, labels)

    def weights(self, player: str) -> dict[str, float]:
        c = self.config
        return {
            "source": 1.0 if self.pretraining else c.source_weight, "label": c.label_weight, "semantic": c.semantic_weight,
            "pseudo": c.pseudo_weight, "balance": c.balance_weight, "constancy": c.constancy_weight,
            "attention": c.attention_weight, "reconstruction": c.reconstruction_weight, "variation": c.variation_weight,
            "adversarial": c.adversarial_weight, "hash": c.hash_weight, "relaxation": c.hash_weight * c.relaxation_weight,
            "critic": 1.0, "penalty": c.penalty_weight,
        }  # fmt: skip

    def _fixed_classifier(self, h: Tensor) -> Tensor:
        """F without gradient, for the time after pretraining."""
        return linear(h, self.classifier.weight.detach(), self.classifier.bias.detach())

    def _keep_meaning(self, seen: Activations, made: Activations, labels: Tensor) -> dict[str, Tensor]:
        """Terms that preserve a source image's meaning in its translation: semantic, f-constancy (DTN), attention (eq. 9-10).

        Args:
            seen: output of E for the source images.
            made: output of G for ``seen``.
        """
        c, terms = self.config, {}
        if c.source_weight:
            terms["source"] = cross_entropy(self._fixed_classifier(seen.out), labels)
        if c.semantic_weight:
            terms["semantic"] = cross_entropy(self.pretrained["classifier"](self.pretrained["encoder"](made.out).out), labels)
        if c.constancy_weight:
            terms["constancy"] = mse_loss(self.encode_part(made.out).out, seen.out)
        if c.attention_weight:
            of_made, of_seen = ([attention_map(layer, c.attention_scaled) for layer in (each.at_8, each.at_4)] for each in (made, seen))
            terms["attention"] = torch.stack([mse_loss(*pair) for pair in zip(of_made, of_seen, strict=True)]).sum()
        return terms

    def _guess(self, logits: Tensor, x: Tensor) -> dict[str, Tensor]:
        """Terms on the target's views, with pseudo-labels that the EMA copy gives to the plain images."""
        terms = {"pseudo": pseudo_label_loss(logits, self._pseudo_labels(x))}
        return terms | ({"balance": imbalance_loss(gather(logits))} if self.config.balance_weight else {})

    @torch.no_grad()
    def _pseudo_labels(self, x: Tensor) -> Tensor:
        """Classes of the target images that E and F are confident of, -1 for the others."""
        return confident_classes(self.ema_networks["classifier"](self.ema_networks["encoder"](x).out), self.config.threshold)

    def _hash(self, h: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Hash loss of source images and, after pretraining, of their translations, as one labelled set; E receives no gradient."""
        if not self.config.hash_weight:
            return {}
        u = gather(self.hash(h.detach())[1])
        return {"hash": similarity_loss(u, gather(labels)), "relaxation": quantisation_loss(u)}

    def _judge(self) -> dict[str, Tensor]:
        """The critic's objective on target images and translations, and its gradient penalty between them."""
        assert self.made is not None
        c, (real, made) = self.config, self.made
        scores = self.critic(torch.cat([real, made]))
        terms = {"critic": critic_loss(scores[: len(real)], scores[len(real) :], c.adversarial_objective)}
        if c.adversarial_objective == "wasserstein" and c.lipschitz == "penalty":
            self.draws += 1
            generator = torch.Generator().manual_seed(self.draws)
            share = rank_slice(torch.rand(len(real) * world_size(), generator=generator)).to(real.device)
            terms["penalty"] = gradient_penalty(self.critic, real, made, share)
        return terms

    def failure(self, terms: dict[str, float]) -> str:
        """A critic without errors, or with unbounded scores, gives the generator no useful signal."""
        if "critic" not in terms:
            return ""
        if self.config.adversarial_objective == "gan" and terms["critic"] < 1e-4:
            return "the critic tells every translated image: lower --critic-rate"
        if self.config.adversarial_objective == "wasserstein" and abs(terms["critic"]) > 1e4:
            return f"the critic's scores run away ({terms['critic']:.3g}): raise --penalty-weight, or lower --critic-rate"
        return ""

    def state_modules(self) -> nn.ModuleDict:
        """Also the pretrained encoder and classifier."""
        kept = super().state_modules()
        kept["pretrained"] = self.pretrained
        return kept

    def encoder(self) -> nn.Module:
        """E and the hash layer: input -> codes."""
        return TranslatedCode(self.ema_networks["encoder"], self.ema_networks["hash"]).eval()

    def classify(self, x: Tensor) -> Tensor:
        """Class log-probabilities by F on the features of the adapted E."""
        return log_softmax(self.ema_networks["classifier"](self.ema_networks["encoder"].eval()(to_network_input(x)).out), 1)

    def translate(self, x: Tensor) -> Tensor:
        """g = G(E(x)) (eq. 2), at the size of ``x``."""
        made = self.ema_networks["generator"].eval()(self.ema_networks["encoder"].eval()(to_network_input(x)).out).out
        return stored(resize_to(made, tuple(x.shape[1:])))
