"""DAH, domain adaptive hashing (Venkateswara et al., CVPR 2017), and DPSH, its pairwise hash loss alone.

Symbols: u relaxed code, s source, t target, d bits, C classes, K images per class.

Extensions beyond the paper: pseudo-labels of confident target images by an EMA copy of the network, random affine views, a
cosine learning rate. Each has a field that switches it off.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.distributed import gather
from models.hyperparameters import AblationRow, Preset, hyperparameter
from models.losses.alignment import confident_classes
from models.losses.hashing import class_log_probabilities, entropy_loss, pairwise_hash_loss, quantisation_loss
from models.losses.mmd import linear_mmd, quadratic_mmd
from models.method import Batch, Method, Player, Wants, chosen_view
from models.networks.build import NETWORKS, build_network
from models.networks.layers import CodesOnly, HashNetwork
from models.optimisers import build_optimizer, set_learning_rate

REFERENCES_PER_CLASS = 200
PAIRS = ("amazon -> dslr", "amazon -> webcam", "dslr -> amazon", "dslr -> webcam", "webcam -> amazon", "webcam -> dslr")


@dataclass(frozen=True)
class DAHConfig:
    """Hyper-parameters of DAH. The defaults work best here."""

    like_weight: float = hyperparameter(10.0, "weight of like pairs in the hash loss", 1.0, 100.0, log=True)
    quantisation_weight: float = hyperparameter(0.1, "weight of the quantisation term", 1e-3, 1.0, log=True)
    mmd_weight: float = hyperparameter(1.0, "gamma, weight of the MK-MMD term", 1e-2, 100.0, log=True)
    mmd_estimate: str = hyperparameter("quadratic", "estimate of MK-MMD", choices=("linear", "quadratic"))
    entropy_weight: float = hyperparameter(0.1, "eta, weight of the target's entropy", 1e-3, 1.0, log=True)
    entropy_scale: float = hyperparameter(0.125, "inverse temperature of eq. 6 in the entropy and pseudo-label terms", 0.03, 1.0, log=True)
    sums: bool = hyperparameter(False, "terms are the paper's sums over pairs, images and bits, divided by the batch's images; otherwise means")
    self_pairs: bool = hyperparameter(True, "the hash loss counts the pair of an image with itself; off in the paper's program")
    activated: bool = hyperparameter(False, "the MMD takes the outputs of hidden layers after their ReLU; on in the paper's program")
    pseudo_weight: float = hyperparameter(1.0, "weight of the hash loss on confident target images; 0 is the paper", 0.1, 3.0, log=True)
    pseudo_threshold: float = hyperparameter(0.9, "class probability above which a target image is taken as labelled", 0.5, 0.99)
    average: float = hyperparameter(0.99, "decay of the averaged copy that labels and encodes; 0 is the paper (no copy)", 0.9, 0.999)
    augment: bool = hyperparameter(True, "train on randomly transformed views; off in the paper")
    views: str = hyperparameter("affine", "kind of the views: affine; crop, of photographs: random crops and mirror images", choices=("affine", "crop"))
    crop: float = hyperparameter(0.2, "crop views: smallest share of the image's area", 0.08, 0.6, when={"views": ("crop",)})
    per_class: int = hyperparameter(20, "K, source images per class in a batch", 5, 40)
    network: str = hyperparameter("auto", "network; auto: EfficientNet-Lite0 from 64 pixels, AlexNet there with papers", choices=NETWORKS)
    pretrained: str = hyperparameter("default", "weights of AlexNet or a pretrained backbone: default, file path, or none")
    freeze: float = hyperparameter(0.0, "share of a pretrained backbone's layers, from the input on, that stay as they are")
    train_norm: bool = hyperparameter(False, "batch-norms of a pretrained backbone take the moments of the batches, not those of its weights")
    norm: bool = hyperparameter(True, "batch-norm in the trunk; off in the paper")
    dropout: float = hyperparameter(0.3, "dropout before the last trunk layer; 0 in the paper's LeNet", 0.0, 0.6)
    optimizer: str = hyperparameter("adam", "optimiser", choices=("adam", "sgd"))
    learning_rate: float = hyperparameter(2e-3, "first learning rate", 1e-4, 1e-2, log=True)
    final_rate: float = hyperparameter(0.0, "last learning rate, as a share of the first: log-spaced between, cosine if 0")
    pretrained_rate: float = hyperparameter(0.1, "share of the learning rate for pretrained layers")
    depth_decay: float = hyperparameter(1.0, "share of a pretrained layer's learning rate that the layer before it gets")
    weight_decay: float = hyperparameter(5e-4, "weight decay", 1e-5, 1e-2, log=True)


OFFICE = {
    "quantisation_weight": 1.0, "mmd_weight": 5e3, "mmd_estimate": "linear", "entropy_weight": 1.0, "entropy_scale": 1.0, "sums": True,
    "self_pairs": False, "activated": True, "pseudo_weight": 0.0, "average": 0.0, "augment": False, "per_class": 5, "norm": False, "dropout": 0.0,
    "optimizer": "sgd", "learning_rate": 1e-4, "final_rate": 0.1, "network": "papers",
}  # fmt: skip


class DAH(Method):
    """Supervised hash loss on the source, entropy on the target, MK-MMD between them (eq. 8)."""

    name: ClassVar[str] = "dah"
    reference: ClassVar[str] = "Venkateswara et al., Deep Hashing Network for Unsupervised Domain Adaptation, CVPR 2017"
    Config: ClassVar[Any] = DAHConfig
    presets: ClassVar[dict[str, Preset]] = {
        "paper": Preset("Tables 2 to 4, Office and Office-Home; gamma is the authors' program's", 300, OFFICE),
        "program-digits": Preset("the authors' program on digits; the paper has none", 40, OFFICE | {"like_weight": 100.0, "per_class": 20}),
    }
    ablation: ClassVar[tuple[AblationRow, ...]] = (  # Table 2
        AblationRow("DAH-e", {"entropy_weight": 0.0}, dict(zip(PAIRS, (66.27, 66.16, 55.97, 94.59, 53.91, 96.99), strict=True))),
        AblationRow("DAH", {}, dict(zip(PAIRS, (66.47, 68.30, 55.54, 96.10, 53.02, 98.80), strict=True))),
    )
    config: DAHConfig

    def __init__(self, config: DAHConfig, shape: tuple[int, ...], classes: int, bits: int) -> None:
        super().__init__(config, shape, classes, bits)
        network = build_network(config.network, shape, bits, config.norm, config.dropout, config.pretrained, config.freeze, config.train_norm)
        self.network = network
        self.players = {"encoder": Player(nn.ModuleDict({"network": network}), self._optimizer(network))}
        self.track_average(network, config.average)
        self.references: tuple[Tensor, Tensor] | None = None
        self.n = config.per_class * classes

    @property
    def adapts(self) -> bool:
        """Whether any term uses the target."""
        c = self.config
        return bool(c.mmd_weight or c.entropy_weight or c.pseudo_weight)

    @property
    def wants(self) -> Wants:
        return Wants(
            source_labels=True, target=self.adapts, per_class=self.config.per_class, batch_size=0, views=int(self.config.augment),
            view=chosen_view(self.config.views, self.config.crop),
        )

    def _optimizer(self, network: HashNetwork) -> torch.optim.Optimizer:
        c = self.config
        return build_optimizer(c.optimizer, network.parameter_groups(c.pretrained_rate, c.depth_decay), c.learning_rate, c.weight_decay)

    def begin_step(self, progress: float) -> None:
        """Set the learning rate: log-spaced to ``final_rate``, or a cosine to zero."""
        set_learning_rate(self.players["encoder"].optimizer, self.config.learning_rate, self.config.final_rate, progress)

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        """Terms ``hash``, ``quantisation`` and, by weight, ``mmd``, ``entropy``, ``pseudo`` (eq. 1, 5, 7)."""
        assert batch.source is not None and batch.source.label is not None
        source = batch.source.views[0] if self.config.augment else batch.source.x
        if not self.adapts:
            _, u_s = self.network(source)
            labels = gather(batch.source.label)
            self.n = len(labels)
            return self._source_terms(gather(u_s), labels)
        assert batch.target is not None
        target = batch.target.views[0] if self.config.augment else batch.target.x
        layers, u = self.network(torch.cat([source, target]))
        u_s, u_t = (gather(part) for part in u.split([len(source), len(target)]))
        labels = gather(batch.source.label)
        self.n = len(labels)
        terms = self._source_terms(u_s, labels) | {"quantisation": quantisation_loss(torch.cat([u_s, u_t]))}
        if self.config.mmd_weight:
            compared = [*map(torch.relu, layers[:-1]), layers[-1]] if self.config.activated else layers
            terms["mmd"] = torch.stack([self._mmd(layer, len(source)) for layer in compared]).sum()
        if self.config.entropy_weight:
            terms["entropy"] = entropy_loss(self._probabilities(u_t, u_s, labels))
        if self.config.pseudo_weight:
            terms["pseudo"] = self._pseudo_loss(batch.target.x, u_t, u_s, labels)
        return terms

    def weights(self, player: str) -> dict[str, float]:
        c, n = self.config, self.n
        given = {"hash": 1.0, "quantisation": c.quantisation_weight, "mmd": c.mmd_weight, "entropy": c.entropy_weight, "pseudo": c.pseudo_weight}
        if not c.sums:
            return given
        images = 2 * n if self.adapts else n
        # a term's mean times this is its sum
        summed = {"hash": n * n, "quantisation": images * self.bits, "mmd": n // 2, "entropy": n, "pseudo": n * n}
        return {name: weight * summed[name] / images for name, weight in given.items()}

    def _source_terms(self, u_s: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {
            "hash": pairwise_hash_loss(u_s, labels, u_s, labels, self.config.like_weight, self.config.self_pairs),
            "quantisation": quantisation_loss(u_s),
        }

    def _mmd(self, layer: Tensor, sources: int) -> Tensor:
        """MK-MMD of one layer. The linear estimate pairs rows anew each step, the same way on every rank."""
        source, target = gather(layer[:sources]), gather(layer[sources:])
        if self.config.mmd_estimate == "quadratic":
            return quadratic_mmd(source, target)
        return linear_mmd(*(part[torch.randperm(len(part), generator=self.draw())] for part in (source, target)))

    def _probabilities(self, queries: Tensor, codes: Tensor, labels: Tensor) -> Tensor:
        return class_log_probabilities(queries, codes, labels, self.classes, self.config.entropy_scale)

    def _pseudo_loss(self, x: Tensor, u_t: Tensor, u_s: Tensor, labels: Tensor) -> Tensor:
        """Hash loss of confident target images against the source, labelled by the EMA copy on plain images.

        Soft codes give no confident guess, so the term starts by itself once the source's codes have settled.
        """
        with self.guessing() as network:
            guess = confident_classes(self._probabilities(gather(network(x)[1]), u_s, labels), self.config.pseudo_threshold)
        return pairwise_hash_loss(u_t, guess, u_s, labels, self.config.like_weight)

    def encoder(self) -> nn.Module:
        """The EMA copy if there is one: input -> codes."""
        return CodesOnly(self.ema_networks).eval()

    def set_references(self, codes: Tensor, labels: Tensor) -> None:
        """Keep the first 200 codes of each class (section 5.2: the target classifier compares hash codes)."""
        chosen = torch.cat([torch.nonzero(labels == c).flatten()[:REFERENCES_PER_CLASS] for c in range(self.classes)])
        self.references = torch.where(codes[chosen] > 0, 1.0, -1.0), labels[chosen]

    def classify_codes(self, codes: Tensor) -> Tensor:
        """Class log-probabilities (batch, classes) of codes, by their similarity to the reference codes (eq. 6)."""
        assert self.references is not None, "set_references comes first"
        references, labels = self.references
        return class_log_probabilities(torch.where(codes > 0, 1.0, -1.0), references, labels, self.classes, scale=1.0)


@dataclass(frozen=True)
class DPSHConfig(DAHConfig):
    """DAH with every term that uses the target switched off."""

    mmd_weight: float = hyperparameter(0.0, "gamma, off: DPSH does not adapt")
    entropy_weight: float = hyperparameter(0.0, "eta, off: DPSH does not adapt")
    sums: bool = hyperparameter(False, "terms are the paper's sums over pairs, images and bits, divided by the batch's images; otherwise means")
    self_pairs: bool = hyperparameter(True, "the hash loss counts the pair of an image with itself; off in the paper's program")
    activated: bool = hyperparameter(False, "the MMD takes the outputs of hidden layers after their ReLU; on in the paper's program")
    pseudo_weight: float = hyperparameter(0.0, "off: DPSH does not adapt")


class DPSH(DAH):
    """The source's hash loss alone: NoDA if source and target differ, SuH if they are the same."""

    name: ClassVar[str] = "dpsh"
    reference: ClassVar[str] = "Li et al., Feature Learning based Deep Supervised Hashing with Pairwise Labels, IJCAI 2016"
    Config: ClassVar[Any] = DPSHConfig
    presets: ClassVar[dict[str, Preset]] = {
        "paper": Preset("its loss without a weight of like pairs, beside DAH's settings: NoDA and SuH of DAH's Table 4", 300, OFFICE | {
            "like_weight": 1.0, "mmd_weight": 0.0, "entropy_weight": 0.0,
        }),
    }  # fmt: skip
    ablation: ClassVar[tuple[AblationRow, ...]] = ()  # the table is about DAH's terms
