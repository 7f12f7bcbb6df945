"""TCA, JDA, GFK and CORAL, with our hash head: a linear map of frozen features is fitted on both domains, then the head trains on the mapped source.

The papers classify the mapped features by a nearest neighbour or an SVM; here our classifier and hash head do, as in all rows. TCA has a linear kernel.
CORAL maps the source alone; its encoder takes images of both domains as the target's.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from models.distributed import broadcast_from_rank_0, gather
from models.fitting import fitting_rows
from models.hyperparameters import Preset, hyperparameter
from models.method import Batch, RowSource
from models.methods.adaptation import PLAIN, HashHead, HeadConfig
from models.networks.build import build_network
from models.networks.extractors import EXTRACTORS, Extractor
from models.networks.layers import CodesOnly, HashNetwork
from models.subspaces import flow_axes, joint_axes, recolouring, transfer_axes


@dataclass(frozen=True)
class SubspaceConfig(HeadConfig):
    """Hyper-parameters of TCA and CORAL."""

    fit_rows: int = hyperparameter(20_000, "training images of each domain, at most, that the map is fitted on: each worker's first of the shuffled rows")
    dimensions: int = hyperparameter(100, "axes of the subspace", 20, 200)
    ridge: float = hyperparameter(1.0, "lambda of the fit", 1e-2, 10.0, log=True)
    extractor: str = hyperparameter("auto", "what makes vectors of images: none takes the pixels; auto: EfficientNet-Lite0 from 64 pixels", choices=EXTRACTORS)


class Affine(nn.Module):
    """x -> (x - mean) A' of the rows of a domain, with fitted values: (batch, features) -> (batch, width)."""

    mean: Tensor
    axes: Tensor

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("axes", torch.eye(width, features))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) @ self.axes.T

    def take(self, mean: np.ndarray, axes: np.ndarray) -> None:
        """Take fitted values."""
        self.load_state_dict({"mean": torch.from_numpy(np.asarray(mean)), "axes": torch.from_numpy(np.asarray(axes))})


class Subspace(HashHead):
    """Base class: ``fit`` computes the maps of both domains."""

    Config: ClassVar[Any] = SubspaceConfig
    presets: ClassVar[dict[str, Preset]] = {"paper": Preset("its map beside our hash head", 0, PLAIN)}
    config: SubspaceConfig

    def __init__(self, config: SubspaceConfig, shape: tuple[int, ...], classes: int, bits: int) -> None:
        self.extractor = Extractor(config.extractor, shape, config.pretrained).requires_grad_(False).eval()
        self.width = self.mapped_width(self.extractor.features, config)
        super().__init__(config, shape, classes, bits)
        self.maps: Any = nn.ModuleDict({domain: Affine(self.extractor.features, self.width) for domain in ("source", "target")})

    @staticmethod
    def mapped_width(features: int, config: SubspaceConfig) -> int:
        """Width of the mapped features."""
        return min(config.dimensions, features)

    def build_network(self) -> HashNetwork:
        return build_network("shallow", (self.width,), self.bits, self.config.norm, self.config.dropout, "none")

    def state_modules(self) -> nn.ModuleDict:
        """Also the extractor and the maps."""
        return nn.ModuleDict({**super().state_modules(), "extractor": self.extractor, "maps": self.maps})

    @torch.no_grad()
    def begin(self, source: RowSource | None, target: RowSource | None) -> None:
        """Fit the maps on the rows of all workers; the first one's result holds."""
        assert source is not None and target is not None
        (x_s, labels), (x_t, _) = (fitting_rows(rows, self.config.fit_rows, self.extractor, self.device) for rows in (source, target))
        assert labels is not None
        maps = self.fit(x_s.cpu().double().numpy(), labels.cpu().numpy(), x_t.cpu().double().numpy())
        fitted = broadcast_from_rank_0({name: [*pair] for name, pair in maps.items()})
        for domain, (mean, axes) in fitted.items():
            self.maps[domain].take(mean, axes)

    def fit(self, source: np.ndarray, labels: np.ndarray, target: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The mean (features,) and the axes (width, features) of each domain's map.

        Args:
            source, target: (n, features) and (m, features).
            labels: (n,), of the source.
        """
        raise NotImplementedError

    def losses(self, player: str, batch: Batch) -> dict[str, Tensor]:
        """The head's terms of the mapped source."""
        assert batch.source is not None and batch.source.label is not None
        with torch.no_grad():
            x = self.maps["source"](self.extractor(self.seen(batch.source)))
        u, labels = gather(self.network(x)[1]), gather(batch.source.label)
        return self.head_terms(u, self.classifier(u), labels)

    def encoder(self) -> nn.Module:
        """The target's map and the EMA copy of the head if there is one: input -> codes."""
        return nn.Sequential(self.extractor, self.maps["target"], CodesOnly(self.ema_networks["network"])).eval()


def _centred(source: np.ndarray, target: np.ndarray, axes: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The same map for both domains, around the mean of all rows."""
    mean = np.concatenate([source, target]).mean(0)
    return {"source": (mean, axes), "target": (mean, axes)}


class TCA(Subspace):
    """Axes on which the domains' means are near and the variance is large."""

    name: ClassVar[str] = "tca"
    reference: ClassVar[str] = "Pan et al., Domain Adaptation via Transfer Component Analysis, IEEE Transactions on Neural Networks 2011"

    def fit(self, source: np.ndarray, labels: np.ndarray, target: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return _centred(source, target, transfer_axes(source, target, self.width, self.config.ridge))


@dataclass(frozen=True)
class JDAConfig(SubspaceConfig):
    """Hyper-parameters of JDA."""

    rounds: int = hyperparameter(10, "T, times that the target's classes are guessed", 1, 10)


class JDA(Subspace):
    """TCA's axes, on which the classes' means are near, too; those of the target by guessed classes."""

    name: ClassVar[str] = "jda"
    reference: ClassVar[str] = "Long et al., Transfer Feature Learning with Joint Distribution Adaptation, ICCV 2013"
    Config: ClassVar[Any] = JDAConfig
    config: JDAConfig

    def fit(self, source: np.ndarray, labels: np.ndarray, target: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        c, known = self.config, labels >= 0
        return _centred(source, target, joint_axes(source[known], target, labels[known], self.classes, self.width, c.ridge, c.rounds))


@dataclass(frozen=True)
class GFKConfig(SubspaceConfig):
    """Hyper-parameters of GFK."""

    dimensions: int = hyperparameter(50, "axes of each domain's subspace; the kernel has twice as many", 10, 100)


class GFK(Subspace):
    """A root of the kernel that integrates over all subspaces between the domains' principal subspaces."""

    name: ClassVar[str] = "gfk"
    reference: ClassVar[str] = "Gong et al., Geodesic Flow Kernel for Unsupervised Domain Adaptation, CVPR 2012"
    Config: ClassVar[Any] = GFKConfig

    @staticmethod
    def mapped_width(features: int, config: SubspaceConfig) -> int:
        return 2 * min(config.dimensions, features // 2)

    def fit(self, source: np.ndarray, labels: np.ndarray, target: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        if min(len(source), len(target)) < self.width // 2:
            raise ValueError(f"gfk needs at least --dimensions {self.width // 2} images of each domain: there are {len(source)} and {len(target)}")
        return _centred(source, target, flow_axes(source, target, self.width // 2))


class CORAL(Subspace):
    """The source gets the target's covariance and mean; the target stays."""

    name: ClassVar[str] = "coral"
    reference: ClassVar[str] = "Sun et al., Return of Frustratingly Easy Domain Adaptation, AAAI 2016"

    @staticmethod
    def mapped_width(features: int, config: SubspaceConfig) -> int:
        return features

    def fit(self, source: np.ndarray, labels: np.ndarray, target: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {"source": (source.mean(0), recolouring(source, target, self.config.ridge)), "target": (target.mean(0), np.eye(self.width))}
