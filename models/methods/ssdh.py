"""SSDH, semantic structure-based unsupervised deep hashing (Yang et al., IJCAI 2018).

The cosine distances of frozen features, of pairs of images, have a histogram like two half Gaussians that meet at its peak. Pairs well left of the peak
are taken as alike, pairs well right of it as unlike, and the codes learn these; the others do not count.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from models.distributed import broadcast_from_rank_0, gather
from models.fitting import fitting_rows
from models.hyperparameters import Preset, hyperparameter
from models.losses.hashing import structure_loss
from models.method import Batch, Method, Player, RowSource, Wants
from models.networks.build import build_network
from models.networks.extractors import EXTRACTORS, Extractor
from models.networks.layers import CodesOnly
from models.optimisers import build_optimizer, set_learning_rate

PEAK_ROWS = 2000  # images of each domain whose pairs give the histogram
BINS = 200


@dataclass(frozen=True)
class SSDHConfig:
    """Hyper-parameters of SSDH."""

    left: float = hyperparameter(2.0, "alpha, deviations left of the peak from which a pair is alike", 0.5, 3.0)
    right: float = hyperparameter(2.0, "beta, deviations right of the peak from which a pair is unlike", 0.5, 3.0)
    extractor: str = hyperparameter("auto", "what makes vectors of images: none takes the pixels; auto: EfficientNet-Lite0 from 64 pixels", choices=EXTRACTORS)
    pretrained: str = hyperparameter("default", "the extractor's weights: default, torchvision name, file path, or none")
    batch: int = hyperparameter(256, "images in a batch of a domain; 24 in the paper", 64, 512)
    average: float = hyperparameter(0.99, "decay of the averaged copy that encodes; 0 is the paper (no copy)", 0.9, 0.999)
    learning_rate: float = hyperparameter(1e-3, "first learning rate; a cosine to zero", 1e-5, 1e-2, log=True)
    weight_decay: float = hyperparameter(5e-4, "weight decay", 1e-5, 1e-2, log=True)


def half_gaussians(distances: Tensor) -> tuple[float, float, float]:
    """Place of the peak of a histogram of distances (n,), and the deviations from it to the left and to the right."""
    low, high = float(distances.min()), float(distances.max())
    counts = torch.histc(distances, BINS, low, high)
    peak = low + (float(counts.argmax()) + 0.5) * (high - low) / BINS
    apart = distances - peak
    left, right = apart[apart <= 0], apart[apart >= 0]
    return peak, float(left.square().mean().sqrt()), float(right.square().mean().sqrt())


class SSDH(Method):
    """Codes whose products are the similarities that the features' distances tell."""

    name: ClassVar[str] = "ssdh"
    reference: ClassVar[str] = "Yang et al., Semantic Structure-based Unsupervised Deep Hashing, IJCAI 2018"
    Config: ClassVar[Any] = SSDHConfig
    presets: ClassVar[dict[str, Preset]] = {"paper": Preset("its loss on frozen features", 0, {"average": 0.0, "batch": 24})}
    table: ClassVar[tuple[str, ...]] = ("target/map", "target/precision_at_1000")
    source_optional: ClassVar[bool] = True
    config: SSDHConfig

    def __init__(self, config: SSDHConfig, shape: tuple[int, ...], classes: int, bits: int) -> None:
        super().__init__(config, shape, classes, bits)
        c = config
        self.extractor = Extractor(c.extractor, shape, c.pretrained).requires_grad_(False).eval()
        self.networks = nn.ModuleDict({"network": build_network("mlp", (self.extractor.features,), bits, norm=True, dropout=0.0, weights="none")})
        groups: list[dict[str, Any]] = [{"params": [*self.networks.parameters()], "share": 1.0}]
        self.players = {"encoder": Player(self.networks, build_optimizer("adam", groups, c.learning_rate, c.weight_decay))}
        self.track_average(self.networks, c.average)
        self.bounds = nn.ParameterDict({"both": nn.Parameter(torch.zeros(2), requires_grad=False)})

    @property
    def wants(self) -> Wants:
        return Wants(source_labels=False, target=True, per_class=0, batch_size=self.config.batch, views=0)

    def state_modules(self) -> nn.ModuleDict:
        """Also the extractor, and the distances below and above which pairs count."""
        return nn.ModuleDict({**super().state_modules(), "extractor": self.extractor, "bounds": self.bounds})

    @torch.no_grad()
    def begin(self, source: RowSource | None, target: RowSource | None) -> None:
        """Find the distances from which pairs are alike or unlike, on the first rows."""
        found = [fitting_rows(rows, PEAK_ROWS, self.extractor, self.device)[0] for rows in (source, target) if rows]
        x = normalize(torch.cat(found))
        pairs = torch.triu_indices(len(x), len(x), 1)
        distances = (1 - x @ x.T)[pairs[0], pairs[1]]
        peak, left, right = half_gaussians(distances)
        bounds = broadcast_from_rank_0({"both": [peak - self.config.left * left, peak + self.config.right * right]})
        self.bounds["both"].copy_(torch.tensor(bounds["both"]))

    def begin_step(self, progress: float) -> None:
        set_learning_rate(self.players["encoder"].optimizer, self.config.learning_rate, 0.0, progress)

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        """Term ``structure``."""
        parts = [part.x for part in batch if part is not None]
        with torch.no_grad():
            x = self.extractor(torch.cat(parts))
        u = self.networks["network"](x)[1]
        sizes = [len(part) for part in parts]
        whole_x, whole_u = (torch.cat([gather(part) for part in each.split(sizes)]) for each in (x, u))
        unit = normalize(whole_x)
        low, high = self.bounds["both"].unbind()
        distance = 1 - unit @ unit.T
        return {"structure": structure_loss(whole_u, (distance <= low).to(u.dtype) - (distance >= high).to(u.dtype))}

    def weights(self, player: str) -> dict[str, float]:
        return {"structure": 1.0}

    def encoder(self) -> nn.Module:
        """The EMA copy if there is one: input -> codes."""
        return nn.Sequential(self.extractor, CodesOnly(self.ema_networks["network"])).eval()
