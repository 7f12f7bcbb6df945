"""IGAN, intersectant generative adversarial networks (He et al., IJCAI 2019).

Symbols: u relaxed code (the common space), s source, t target, d bits, N classes, T confidence threshold, x~ a generated
image.

Extensions beyond the paper: random affine views; batch-norm and dropout in the trunk; an EMA copy of encoder and classifier
that gives the pseudo-labels and encodes; entropy of the target and equal shares of its classes; spectral norm; a separate
rate for the discriminators; "real, of any class" for target images without a confident label; for photographs and their
features, pseudo-labels spread over neighbours, a label smoothing and MK-MMD before they begin. Each has a field that switches
it off.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from models.distributed import gather, gather_divided
from models.hyperparameters import AblationRow, Preset, hyperparameter
from models.losses.adversarial import deceiving_loss, generated_loss, real_class_loss
from models.losses.alignment import centroid_distance, confident_classes, imbalance_loss, pseudo_label_loss
from models.losses.hashing import entropy_loss, quantisation_loss, similarity_loss
from models.losses.mmd import quadratic_mmd
from models.method import Batch, Method, Player, RowSource, Wants, chosen_view
from models.networks.build import NETWORKS, build_network
from models.networks.generative import Discriminator, Generator, stored
from models.networks.layers import CodesOnly, unit
from models.optimisers import build_optimizer, reset_network, set_learning_rate
from models.propagation import neighbour_graph, propagated_classes

DOMAINS = ("source", "target")
U_M, M_U = "usps -> mnist", "mnist -> usps"
DIGITS = {  # rates and weights are our readings; the paper has one rate for all players, with which the losses overflow
    "pseudo_weight": 0.1, "relaxation_weight": 1e-3, "centroid_weight": 0.1, "adversarial_weight": 1.0, "l1_weight": 1.0, "entropy_weight": 0.0,
    "balance_weight": 0.0, "real_unlabelled": False, "spectral": False, "average": 0.0, "augment": False, "pretrain_epochs": 2, "stages": 2,
    "per_class": 10, "norm": False, "dropout": 0.0, "hash_norm": False, "width": 32, "optimizer": "sgd", "learning_rate": 1e-2, "discriminator_rate": 0.1,
}  # fmt: skip


@dataclass(frozen=True)
class IGANConfig:
    """Hyper-parameters of IGAN. The defaults work best here."""

    pseudo_weight: float = hyperparameter(1.0, "epsilon, weight of pseudo-labels in the label prediction", 0.1, 3.0, log=True)
    labels: str = hyperparameter(
        "confident", "pseudo-labels: confident, the classifier's as in the paper; propagated, all of an epoch at once over neighbours: of rows, or of what the "
        "network makes of photographs",
        choices=("confident", "propagated"),
    )  # fmt: skip
    smoothing: float = hyperparameter(0.0, "label smoothing of the classification; 0 in the paper", 0.0, 0.2)
    mmd_weight: float = hyperparameter(0.0, "weight of DAH's MK-MMD, of activated layers and codes, from the pretraining on; 0 in the paper", 0.0, 1.0)
    threshold: float = hyperparameter(0.9, "T, class probability above which a target image has a pseudo-label", 0.5, 0.99)
    hash_weight: float = hyperparameter(1.0, "alpha, weight of the hash term", 1e-2, 10.0, log=True)
    relaxation_weight: float = hyperparameter(0.1, "upsilon, weight of the relaxation beside the hash term", 1e-3, 1.0, log=True)
    centroid_weight: float = hyperparameter(0.1, "beta, weight of the semantic centroid alignment", 1e-3, 1.0, log=True)
    adversarial_weight: float = hyperparameter(0.01, "weight of the adversarial term for encoder and generators; 1 in the paper", 1e-3, 1.0, log=True)
    l1_weight: float = hyperparameter(0.01, "chi, weight of the pixel-wise reconstruction", 1e-3, 10.0, log=True)
    entropy_weight: float = hyperparameter(0.1, "weight of the target's entropy; 0 is the paper", 1e-3, 1.0, log=True)
    balance_weight: float = hyperparameter(0.3, "weight of the classes' equal share in the target's probabilities; 0 is the paper", 0.03, 3.0, log=True)
    real_unlabelled: bool = hyperparameter(True, "target images without a confident label are shown as real; off in the paper")
    spectral: bool = hyperparameter(True, "spectral norm in the discriminators; off in the paper")
    average: float = hyperparameter(0.99, "decay of the averaged copy that labels and encodes; 0 is the paper (no copy)", 0.9, 0.999)
    augment: bool = hyperparameter(True, "train on randomly transformed views; off in the paper")
    views: str = hyperparameter("affine", "kind of the views: affine; crop, of photographs: random crops and mirror images", choices=("affine", "crop"))
    crop: float = hyperparameter(0.2, "crop views: smallest share of the image's area", 0.08, 0.6, when={"views": ("crop",)})
    pretrain_epochs: int = hyperparameter(1, "epochs on the source alone before the first stage")
    stages: int = hyperparameter(1, "stages; at the start of each, all but the encoder begins anew")
    per_class: int = hyperparameter(20, "source images per class in a batch", 5, 40)
    network: str = hyperparameter("auto", "network; auto: EfficientNet-Lite0 from 64 pixels, AlexNet there with papers", choices=NETWORKS)
    pretrained: str = hyperparameter("default", "weights of AlexNet or a pretrained backbone: default, file path, or none")
    freeze: float = hyperparameter(0.0, "share of a pretrained backbone's layers, from the input on, that stay as they are")
    train_norm: bool = hyperparameter(False, "batch-norms of a pretrained backbone take the moments of the batches, not those of its weights")
    norm: bool = hyperparameter(True, "batch-norm in the trunk; off in the paper")
    dropout: float = hyperparameter(0.3, "dropout before the last trunk layer; 0 in the paper's LeNet", 0.0, 0.6)
    hash_norm: bool = hyperparameter(True, "batch-norm before the codes' tanh; off in the paper")
    made: str = hyperparameter(
        "auto", "what the generators make: the input, or the output of the first fully connected layer (the paper's fc6 on Office); auto: layer from 64 pixels",
        choices=("auto", "input", "layer"),
    )  # fmt: skip
    width: int = hyperparameter(8, "channels of the outermost hidden layers of generators and discriminators")
    optimizer: str = hyperparameter("adam", "optimiser", choices=("adam", "sgd"))
    learning_rate: float = hyperparameter(2e-3, "first learning rate of encoder, classifier and generators", 1e-4, 1e-2, log=True)
    discriminator_rate: float = hyperparameter(0.2, "the discriminators' share of the learning rate; 1 in the paper", 0.05, 5.0, log=True)
    pretrained_rate: float = hyperparameter(0.1, "share of the learning rate for pretrained layers")
    depth_decay: float = hyperparameter(1.0, "share of a pretrained layer's learning rate that the layer before it gets")
    weight_decay: float = hyperparameter(5e-4, "weight decay of all but the discriminators", 1e-5, 1e-2, log=True)


FEATURES = {"labels": "propagated", "smoothing": 0.1, "mmd_weight": 1.0, "pretrain_epochs": 2, "adversarial_weight": 0.0, "l1_weight": 0.0}


class Guesses(nn.Module):
    """The class of each target row in this epoch, (rows,) int64, where they are propagated; a checkpoint has them."""

    classes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("classes", torch.empty(0, dtype=torch.int64))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        self.classes = torch.empty_like(state_dict[f"{prefix}classes"], device=self.classes.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class IGAN(Method):
    """Common codes shaped by a classifier, class centres, and two generators with their discriminators (eq. 11)."""

    name: ClassVar[str] = "igan"
    reference: ClassVar[str] = (
        "He et al., One Network for Multi-Domains: Domain Adaptive Hashing with Intersectant Generative Adversarial Networks, IJCAI 2019"
    )
    Config: ClassVar[Any] = IGANConfig
    presets: ClassVar[dict[str, Preset]] = {
        "paper": Preset("Tables 1 and 4, MNIST and USPS, batches of 100", 0, DIGITS),
        "paper-svhn": Preset("Table 1, SVHN -> MNIST, batches of 200", 0, DIGITS | {"per_class": 20, "network": "conv4"}),
        "paper-office": Preset("Tables 2 and 3, Office-31 by AlexNet, one stage", 0, DIGITS | {
            "network": "alexnet", "made": "layer", "pretrain_epochs": 0, "stages": 1, "learning_rate": 3e-3, "discriminator_rate": 1.0,
        }),
        "features": Preset("ours, features of photographs by a pretrained network, with line drawings as views", 6, FEATURES | {"network": "shallow"}),
        "photographs": Preset("ours, photographs by a pretrained network that is trained in place", 6, FEATURES | {"views": "crop"}),
    }  # fmt: skip
    ablation: ClassVar[tuple[AblationRow, ...]] = (  # Table 4; each row adds a term to the row above
        AblationRow("Lc", {"centroid_weight": 0.0, "hash_weight": 0.0, "adversarial_weight": 0.0, "l1_weight": 0.0}, {U_M: 61.8, M_U: 85.5}),
        AblationRow("Lc + Ls", {"hash_weight": 0.0, "adversarial_weight": 0.0, "l1_weight": 0.0}, {U_M: 88.8, M_U: 89.5}),
        AblationRow("Lc + Ls + Lh", {"adversarial_weight": 0.0, "l1_weight": 0.0}, {U_M: 89.5, M_U: 90.3}),
        AblationRow("Lc + Ls + Lh + La", {"l1_weight": 0.0}, {U_M: 97.2, M_U: 96.1}),
        AblationRow("Lc + Ls + Lh + La + L1", {}, {U_M: 97.8, M_U: 96.8}),
    )
    config: IGANConfig

    def __init__(self, config: IGANConfig, shape: tuple[int, ...], classes: int, bits: int) -> None:
        super().__init__(config, shape, classes, bits)
        c, self.pretraining = config, config.pretrain_epochs > 0
        self.images = len(shape) == 3
        self.network = build_network(c.network, shape, bits, c.norm, c.dropout, c.pretrained, c.freeze, c.train_norm)
        if not c.hash_norm:
            self.network.hash.norm = nn.Identity()
        self.photographs = self.images and min(shape[1:]) >= 64
        self.makes_input = c.made == "input" or (c.made == "auto" and not (self.photographs and self.network.widths))
        if not self.makes_input and not self.network.widths:
            raise ValueError("--made layer needs a network with a hidden fully connected layer: alexnet, lenet, mlp or a pretrained backbone")
        self.output = shape if self.makes_input else (self.network.widths[0],)
        self.heads = self._fresh_heads()
        groups = [*self.network.parameter_groups(c.pretrained_rate, c.depth_decay), {"params": [*self.heads.parameters()], "share": 1.0}]
        optimizer = build_optimizer(c.optimizer, groups, c.learning_rate, c.weight_decay)
        self.networks = nn.ModuleDict({"network": self.network, **self.heads})
        self.players = {"encoder": Player(self.networks, optimizer, partial=self.pretraining and self.generates)}
        self.judges = self._fresh_judges()
        if c.adversarial_weight:
            rates: list[dict[str, Any]] = [{"params": [*self.judges.parameters()], "share": c.discriminator_rate}]
            self.players["discriminator"] = Player(self.judges, build_optimizer(c.optimizer, rates, c.learning_rate, 0.0, betas=(0.5, 0.999)))
        self.track_average(self.networks, c.average)
        self.made: dict[str, Tensor] = {}
        self.guesses = Guesses()
        self.graph: tuple[Tensor, Tensor] | None = None
        if c.labels == "propagated" and not self.pretraining:
            raise ValueError("--labels propagated needs --pretrain-epochs of at least 1")

    @property
    def generates(self) -> bool:
        """Whether any term needs the generators."""
        return bool(self.config.adversarial_weight or self.config.l1_weight)

    @property
    def can_translate(self) -> bool:
        """Whether there are generators, and they make input."""
        return self.generates and self.makes_input

    @property
    def wants(self) -> Wants:
        c = self.config
        return Wants(True, True, c.per_class, batch_size=0, views=int(c.augment), view=chosen_view(c.views, c.crop))

    def _fresh_heads(self) -> nn.ModuleDict:
        """The classifier C and, if a term needs them, the generators G_s and G_t."""
        heads = nn.ModuleDict({"classifier": nn.Linear(self.bits, self.classes)})
        for domain in DOMAINS if self.generates else ():
            heads[domain] = Generator(self.bits, self.output, self.config.width)
        return heads

    def _fresh_judges(self) -> nn.ModuleDict:
        """The discriminators D_s and D_t, with N classes and one for generated images, if a term needs them."""
        c = self.config
        needed = DOMAINS if c.adversarial_weight else ()
        return nn.ModuleDict({domain: Discriminator(self.output, self.classes + 1, c.width, c.spectral) for domain in needed})

    def _stage(self, epoch: int, epochs: int) -> int:
        """Number of an epoch's stage, from 0; -1 while pretraining."""
        first = self.config.pretrain_epochs
        return -1 if epoch < first else (epoch - first) * self.config.stages // max(epochs - first, 1)

    def begin_epoch(self, epoch: int, epochs: int, source: RowSource | None = None, target: RowSource | None = None) -> None:
        """Pretrain in the first epochs; at the start of each stage, re-initialise everything but the encoder (section 3.2)."""
        stage = self._stage(epoch, epochs)
        self.pretraining = stage < 0
        if self.config.labels == "propagated" and not self.pretraining:
            assert target is not None
            self._propagate(target)  # by the classifier of the stage before
        if epoch == 0 or stage == self._stage(epoch - 1, epochs):
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.draw().initial_seed())  # the same on every rank
            reset_network(self.heads, self._fresh_heads(), self.players["encoder"].optimizer)
            if "discriminator" in self.players:
                reset_network(self.judges, self._fresh_judges(), self.players["discriminator"].optimizer)
        for name, head in self.heads.items() if self.averaged is not None else ():
            self.ema_networks[name].load_state_dict(head.state_dict())

    @torch.no_grad()
    def _propagate(self, target: RowSource) -> None:
        """Guess the classes of all target rows, from the mean over each row and its embedded views."""
        rows, guessed = list[Tensor](), list[Tensor]()
        with self.guessing() as networks:
            for part in target.rows():
                views = [part.x, *(view for pool in part.views for view in pool.unbind(1))]
                seen = [networks["network"].with_features(view.to(self.device)) for view in views]
                guessed.append(torch.stack([networks["classifier"](codes).softmax(1) for _, _, codes in seen]).mean(0))
                rows += [] if self.graph else [seen[0][0] if self.photographs else part.x.to(self.device)]
        graph = self.graph or neighbour_graph(gather_divided(torch.cat(rows).to(torch.get_default_dtype()).flatten(1), target.total))
        self.guesses.classes = propagated_classes(gather_divided(torch.cat(guessed), target.total), graph)
        self.graph = None if self.photographs else graph  # what the network makes of photographs changes

    def state_modules(self) -> nn.ModuleDict:
        """With the propagated pseudo-labels, if there are any."""
        modules = super().state_modules()
        return nn.ModuleDict({**modules, "guesses": self.guesses}) if self.config.labels == "propagated" else modules

    def begin_step(self, progress: float) -> None:
        """Set the learning rates: a cosine to zero with Adam, constant with the paper's SGD."""
        for player in self.players.values():
            set_learning_rate(player.optimizer, self.config.learning_rate, 1.0 if self.config.optimizer == "sgd" else 0.0, progress)

    def is_active(self, player: str) -> bool:
        return player == "encoder" or not self.pretraining

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        """Encoder: the terms of eq. 11. Discriminators: ``real`` and ``generated`` of eq. 10, on the output of the encoder's step."""
        assert batch.source is not None and batch.source.label is not None and batch.target is not None
        if player == "discriminator":
            return self._judge(batch.source.label)
        x_s, x_t = (part.views[0] if self.config.augment else part.x for part in (batch.source, batch.target))
        layers, u = self.network(torch.cat([x_s, x_t]))
        u_s, u_t = u.split([len(x_s), len(x_t)])
        all_s, labels = gather(u_s), gather(batch.source.label)
        classifier = self.heads["classifier"]
        terms = {"classification": cross_entropy(classifier(all_s), labels, label_smoothing=self.config.smoothing)}
        if self.config.hash_weight:
            terms |= {"hash": similarity_loss(all_s, labels), "relaxation": quantisation_loss(all_s)}
        if self.config.mmd_weight:
            compared = [*map(torch.relu, layers[:-1]), u]
            terms["mmd"] = torch.stack([quadratic_mmd(*map(gather, each.split([len(x_s), len(x_t)]))) for each in compared]).sum()
        if self.pretraining:
            return terms
        guess = self.guesses.classes[batch.target.row] if self.config.labels == "propagated" else self._pseudo_labels(batch.target.x)
        terms |= self._align(all_s, labels, gather(u_t), gather(guess))
        if self.generates:
            both = unit(torch.cat([x_s, x_t]), self.images) if self.makes_input else torch.relu(layers[0]).detach()
            self.made = {"real source": both[: len(x_s)], "real target": both[len(x_s) :], "guess": guess}
            terms |= self._generate(u_s, u_t, batch.source.label, guess)
        return terms

    def weights(self, player: str) -> dict[str, float]:
        c = self.config
        return {
            "classification": 1.0, "pseudo": c.pseudo_weight, "hash": c.hash_weight, "relaxation": c.hash_weight * c.relaxation_weight,
            "centroid": c.centroid_weight, "adversarial": c.adversarial_weight, "l1": c.l1_weight, "entropy": c.entropy_weight,
            "balance": c.balance_weight, "mmd": c.mmd_weight, "real": 1.0, "generated": 1.0,
        }  # fmt: skip

    def _pseudo_labels(self, x: Tensor) -> Tensor:
        """Classes of the target images that the classifier is confident of, -1 for the others (eq. 4)."""
        with self.guessing() as networks:
            return confident_classes(networks["classifier"](networks["network"](x)[1]), self.config.threshold)

    def _align(self, u_s: Tensor, labels: Tensor, u_t: Tensor, guesses: Tensor) -> dict[str, Tensor]:
        """Terms that align the target's codes with the source's (eq. 3 and the second part of eq. 5)."""
        logits = self.heads["classifier"](u_t)
        terms = {"pseudo": pseudo_label_loss(logits, guesses)}
        if self.config.entropy_weight:
            terms["entropy"] = entropy_loss(log_softmax(logits, 1))
        if self.config.balance_weight:
            terms["balance"] = imbalance_loss(logits)
        if self.config.centroid_weight:
            terms["centroid"] = centroid_distance(u_s, labels, u_t, guesses, self.classes)
        return terms

    def _generate(self, u_s: Tensor, u_t: Tensor, labels: Tensor, guess: Tensor) -> dict[str, Tensor]:
        """Both generators on both domains' codes: x~_s, x~_t of eq. 6 for the L1 term, x~_ts, x~_st of eq. 8 for the adversarial term."""
        c, terms = self.config, {}
        own = {"source": u_s, "target": u_t}
        other = {"source": u_t, "target": u_s}
        made = {domain: self.heads[domain](torch.cat([other[domain], own[domain]]) if c.l1_weight else other[domain]) for domain in DOMAINS}
        crossed = {domain: made[domain][: len(other[domain])] for domain in DOMAINS}
        if c.adversarial_weight:
            wanted = {"source": guess, "target": labels}
            terms["adversarial"] = torch.stack([deceiving_loss(self.judges[domain](crossed[domain]), wanted[domain]) for domain in DOMAINS]).sum()
        if c.l1_weight:
            errors = [(made[domain][len(other[domain]) :] - self.made[f"real {domain}"]).abs().mean() for domain in DOMAINS]
            terms["l1"] = torch.stack(errors).sum()
        self.made |= {f"generated {domain}": crossed[domain].detach() for domain in DOMAINS}
        return terms

    def _judge(self, labels: Tensor) -> dict[str, Tensor]:
        """The discriminators' cross-entropies of real images of their domain, and of images generated for it."""
        known, made = {"source": labels, "target": self.made["guess"]}, self.made
        real, generated = [], []
        for domain in DOMAINS:
            logits = self.judges[domain](torch.cat([made[f"real {domain}"], made[f"generated {domain}"]]))
            of_real, of_generated = logits.split([len(labels), len(logits) - len(labels)])
            real.append(real_class_loss(of_real, known[domain], self.config.real_unlabelled))
            generated.append(generated_loss(of_generated))
        return {"real": torch.stack(real).sum(), "generated": torch.stack(generated).sum()}

    def failure(self, terms: dict[str, float]) -> str:
        """Discriminators that make no errors give the generators no signal."""
        if "generated" in terms and terms["real"] + terms["generated"] < 1e-4:
            return "the discriminators tell every generated image: lower --discriminator-rate, or set --spectral"
        return ""

    def encoder(self) -> nn.Module:
        """The EMA copy if there is one: input -> codes."""
        return CodesOnly(self.ema_networks["network"]).eval()

    def classify_codes(self, codes: Tensor) -> Tensor:
        """Class log-probabilities by the classifier on the relaxed codes."""
        return log_softmax(self.ema_networks["classifier"](codes), 1)

    def translate(self, x: Tensor) -> Tensor:
        """Target images from source images, x~_st = G_t(E(x)) (eq. 8); feature vectors if the data are feature vectors."""
        made = self.ema_networks["target"].eval()(self.encode(x))
        return stored(made) if self.images else made
