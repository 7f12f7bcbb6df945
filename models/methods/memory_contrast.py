"""What UCDIR and ProtoOT share: MoCo v2's networks, a memory slot for each image of two domains without labels, and codes of the features.

Symbols: x feature (128-d, L2-normalised), x' the momentum encoder's, A and B the two domains, K clusters. Each image of each domain
has a memory slot x'. The papers have no codes: here they are the signs of a learned head on x, or ITQ of x; neither sends gradients to x.

Extensions beyond the papers: other kinds of views, more clusters than classes, and a limit on the slots that a step compares
with. Each has a field that switches it off.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from models.distributed import gather, on_rank_0, world_size
from models.hyperparameters import hyperparameter
from models.itq import fit_itq
from models.losses.contrastive import neighbour_loss
from models.losses.hashing import quantisation_loss
from models.memory_bank import MemoryBank
from models.method import Batch, Method, Player, RowSource, Wants, chosen_view
from models.networks.extractors import BACKBONES, Backbone
from models.networks.layers import HashLayer
from models.networks.pretrained import is_backbone
from models.optimisers import MomentumEncoder, build_optimizer, depth_groups, set_learning_rate

WIDTH = 128
DOMAINS = ("source", "target")


@dataclass(frozen=True)
class MemoryContrastConfig:
    """Hyper-parameters of every method with memory slots. The defaults were chosen with UCDIR."""

    temperature: float = hyperparameter(0.2, "tau, temperature of the contrast", 0.05, 1.0, log=True)
    clusters: int = hyperparameter(0, "K, clusters of a domain; 0 for the number of classes times the next")
    clusters_per_class: int = hyperparameter(3, "clusters for each class, where K is not given; 1 in the paper", 1, 5)
    negatives: int = hyperparameter(65536, "slots of a domain that a step compares with, drawn anew each step; 0 for all, as in the paper")
    average: float = hyperparameter(0.99, "momentum of the momentum encoder; 0.999 in the paper", 0.9, 0.999)
    ranking: str = hyperparameter("momentum", "encoder whose features and codes rank images; trained, f, in the paper", choices=("momentum", "trained"))
    views: str = hyperparameter("affine", "kind of the two views", choices=("affine", "contrastive"))
    crop: float = hyperparameter(0.2, "contrastive views: smallest share of the image's area", 0.08, 0.6, when={"views": ("contrastive",)})
    flip: float = hyperparameter(0.5, "contrastive views: probability of a mirror image; 0 for digits")
    batch: int = hyperparameter(128, "images of each domain in a batch; 64 in the paper", 32, 512)
    network: str = hyperparameter("auto", "network; auto: EfficientNet-Lite0 from 64 pixels", choices=BACKBONES)
    pretrained: str = hyperparameter(
        "default", "weights of a ResNet or a pretrained backbone: default, a file, MoCo v2's too, torchvision name, or none; moco asks for that file"
    )
    freeze: float = hyperparameter(0.0, "share of a pretrained backbone's layers, from the input on, that stay as they are")
    train_norm: bool = hyperparameter(False, "batch-norms of a pretrained backbone take the moments of the batches, not those of its weights")
    pretrained_rate: float = hyperparameter(0.1, "share of the learning rate for the pretrained backbone")
    depth_decay: float = hyperparameter(1.0, "share of a pretrained layer's learning rate that the layer before it gets")
    codes: str = hyperparameter("head", "what makes the codes of the features", choices=("head", "itq"))
    code_temperature: float = hyperparameter(0.2, "temperature of a code's neighbours in the head's loss", 0.05, 1.0, log=True, when={"codes": ("head",)})
    neighbour_temperature: float = hyperparameter(
        0.1, "temperature of a feature's neighbours in the head's loss", 0.02, 0.5, log=True, when={"codes": ("head",)}
    )
    quantisation_weight: float = hyperparameter(0.1, "weight of the quantisation of the head's codes", 1e-3, 1.0, log=True, when={"codes": ("head",)})
    head_rate: float = hyperparameter(10.0, "the hash head's share of the learning rate", 1.0, 30.0, log=True, when={"codes": ("head",)})
    optimizer: str = hyperparameter("adam", "optimiser", choices=("adam", "amsgrad", "sgd"))
    learning_rate: float = hyperparameter(1e-3, "first learning rate; a cosine to zero", 1e-5, 1e-2, log=True)
    weight_decay: float = hyperparameter(1e-4, "weight decay", 1e-6, 1e-2, log=True)


class Embedding(nn.Module):
    """Input -> L2-normalised feature: the backbone and MoCo v2's head of two layers, with the weights of a MoCo checkpoint if there is one."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(nn.Linear(backbone.features, backbone.features), nn.ReLU(), nn.Linear(backbone.features, WIDTH))
        if backbone.head:
            self.head.load_state_dict(backbone.head)

    def forward(self, x: Tensor) -> Tensor:
        return normalize(self.head(self.backbone(x)))


class _Codes(nn.Module):
    """Input -> relaxed codes, by a module on top of the features."""

    def __init__(self, embedding: nn.Module, hashing: nn.Module) -> None:
        super().__init__()
        self.embedding, self.hashing = embedding, hashing

    def forward(self, x: Tensor) -> Tensor:
        made = self.hashing(self.embedding(x))
        return made[1] if isinstance(made, tuple) else made


class MemoryContrast(Method):
    """Base class: features by contrast with memory slots, which a subclass defines in ``contrasted``, and codes of them.

    Attributes:
        Bank: the class of a domain's memory bank.
    """

    Config: ClassVar[Any] = MemoryContrastConfig
    Bank: ClassVar[type[MemoryBank]] = MemoryBank
    has_features: ClassVar[bool] = True
    table: ClassVar[tuple[str, ...]] = tuple(f"cross/cosine_precision_at_{k}" for k in (50, 100, 200))
    config: MemoryContrastConfig

    def __init__(self, config: MemoryContrastConfig, shape: tuple[int, ...], classes: int, bits: int) -> None:
        super().__init__(config, shape, classes, bits)
        c = config
        backbone = Backbone(c.network, shape, c.pretrained, c.freeze, c.train_norm)
        self.backbone = backbone.name
        embedding, hashing = Embedding(backbone), HashLayer(WIDTH, bits)
        self.networks = nn.ModuleDict({"embedding": embedding, "hash": hashing})
        lower = is_backbone(backbone.name)
        groups: list[dict[str, Any]] = [
            {"params": [*(embedding.head if lower else embedding).parameters()], "share": 1.0}, {"params": [*hashing.parameters()], "share": c.head_rate},
        ]  # fmt: skip
        if lower:
            groups += depth_groups(backbone, c.pretrained_rate, c.depth_decay)
        self.players = {"encoder": Player(self.networks, build_optimizer(c.optimizer, groups, c.learning_rate, c.weight_decay))}
        self.moving, self.averaged = self.networks, MomentumEncoder(self.networks, c.average)
        self.memory: Any = nn.ModuleDict({domain: self.Bank(c.clusters or c.clusters_per_class * classes, WIDTH) for domain in DOMAINS})

    @property
    def wants(self) -> Wants:
        c = self.config
        view = chosen_view(c.views, c.crop, c.flip)
        return Wants(source_labels=False, target=True, per_class=0, batch_size=c.batch, views=2, view=view)

    @property
    def notes(self) -> list[str]:
        """Whether a large network starts from random weights, which few photographs can train."""
        name = self.backbone
        random = name.startswith("resnet") and self.config.pretrained == "none"
        return [f"{name} starts from random weights: --pretrained FILE gives it those of MoCo v2"] if random else []

    def state_modules(self) -> nn.ModuleDict:
        """Also the memory banks."""
        kept = super().state_modules()
        kept["memory"] = self.memory
        return kept

    def whole_state(self) -> dict[str, Tensor]:
        state = super().whole_state()
        divided = {f"memory.{domain}.{name}" for domain in DOMAINS for name in self.Bank.DIVIDED}
        return {name: on_rank_0(tensor) if name in divided else tensor for name, tensor in state.items()}

    @torch.no_grad()
    def begin(self, source: RowSource | None, target: RowSource | None) -> None:
        """Fill each domain's slots with the momentum encoder (UCDIR, section 4.1)."""
        for domain, rows in zip(DOMAINS, (source, target), strict=True):
            assert rows is not None
            self.memory[domain].fill(self._encoded(rows), rows.total)

    def _encoded(self, rows: RowSource | None) -> Tensor:
        """Features of this rank's plain images of a domain by the momentum encoder, (own images, width)."""
        assert rows is not None
        encode, device = self.ema_networks["embedding"].eval(), self.device
        return torch.cat([encode(part.x.to(device)) for part in rows.rows()])

    def begin_step(self, progress: float) -> None:
        set_learning_rate(self.players["encoder"].optimizer, self.config.learning_rate, 0.0, progress)

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        """The terms of ``contrasted`` on both domains' batches, summed, and those of the codes."""
        assert batch.source is not None and batch.target is not None
        parts = {"source": batch.source, "target": batch.target}
        seen = self.networks["embedding"](torch.cat([part.views[0] for part in parts.values()]))
        keys = self._keys(torch.cat([part.views[1] for part in parts.values()]))
        n = len(batch.source.x)
        x = {domain: gather(each) for domain, each in zip(DOMAINS, seen.split([n, len(seen) - n]), strict=True)}
        terms: dict[str, list[Tensor]] = {}
        key_of = dict(zip(DOMAINS, keys.split([n, len(seen) - n]), strict=True))
        for domain, key in key_of.items():
            self.memory[domain].store(parts[domain].row, key)
        for domain, key in key_of.items():
            for name, term in self.contrasted(domain, x[domain], gather(key), parts[domain].row).items():
                terms.setdefault(name, []).append(term)
        features = gather(seen.detach())
        u = gather(self.networks["hash"](seen.detach())[1])
        both = {name: torch.stack(each).sum() for name, each in terms.items()}
        c = self.config
        return both | {"neighbours": neighbour_loss(u, features, c.code_temperature, c.neighbour_temperature), "quantisation": quantisation_loss(u)}

    @torch.no_grad()
    def _keys(self, views: Tensor) -> Tensor:
        """The momentum encoder's features of views, with the batch's own statistics, which also update those that it encodes images with."""
        networks = self.ema_networks.train()
        keys = networks["embedding"](views)
        networks["hash"](keys)
        networks.eval()
        return keys

    def contrasted(self, domain: str, x: Tensor, keys: Tensor, row: Tensor) -> dict[str, Tensor]:
        """A domain's terms.

        Args:
            x: (batch, width), of a whole (gathered) batch.
            keys: (batch, width), the momentum encoder's features of other views of the same images; this rank's are in their slots already.
            row: (own batch,) int64, of this rank's part of the batch.
        """
        raise NotImplementedError

    def weights(self, player: str) -> dict[str, float]:
        """Those of the codes' terms."""
        return {"neighbours": 1.0, "quantisation": self.config.quantisation_weight}

    def sampled(self, memory: MemoryBank, row: Tensor) -> tuple[Tensor, Tensor | None]:
        """The slots that a step compares with, and where those of the batch's own images are: (batch, slots) bool, or None if all slots are compared."""
        if not self.config.negatives or memory.total <= self.config.negatives:
            return memory.slots, None
        chosen = memory.sample(torch.randperm(memory.total, generator=self.draw())[: self.config.negatives])
        return memory.slots[chosen], gather(row).unsqueeze(1) == chosen + memory.first

    @property
    def _ranking(self) -> Any:
        """The networks that rank images: the momentum encoder's, or f's (UCDIR, section 3.1)."""
        return self.ema_networks if self.config.ranking == "momentum" else self.networks

    def features(self, x: Tensor) -> Tensor:
        """Features of the encoder that ranks."""
        return self._ranking["embedding"].eval()(x)

    def encoder(self) -> nn.Module:
        """The encoder that ranks, with the learned head, or with ITQ fitted on both domains' slots."""
        hashing = self._ranking["hash"]
        if self.config.codes == "itq":
            assert world_size() == 1, "ITQ needs the slots of all ranks"
            hashing = fit_itq(torch.cat([memory.slots for memory in self.memory.values()]), self.bits, self.seed)
        return _Codes(self._ranking["embedding"], hashing).eval()
