"""Classic unsupervised hashes, fitted in one pass: LSH, PCA, ITQ, spectral hashing, k-means hashing.

They take feature vectors, or images as their pixels, of one domain or of both. The fitted values are buffers of a module, so
the encoder is exported and registered like any other.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from models.components import fit_components
from models.fitting import fitting_rows
from models.hyperparameters import Preset, hyperparameter
from models.itq import Projection, fit_itq
from models.method import Method, Player, RowSource, Wants
from models.networks.extractors import EXTRACTORS, Extractor

SUBSPACE_BITS = 4  # b, bits of a k-means codebook: 16 centroids
AFFINITY_WEIGHT = 10.0  # lambda of k-means hashing
KMEANS_ROUNDS = 30


@dataclass(frozen=True)
class ClassicConfig:
    """Settings of a fitted hash."""

    fit_rows: int = hyperparameter(50_000, "training images of each domain, at most, that it is fitted on: the first of the shuffled rows")
    extractor: str = hyperparameter("auto", "what makes vectors of images: none takes the pixels; auto: EfficientNet-Lite0 from 64 pixels", choices=EXTRACTORS)
    pretrained: str = hyperparameter("default", "the extractor's weights: default, torchvision name, file path, or none")


class Classic(Method):
    """Base class of the fitted hashes: ``build`` creates the module whose buffers ``fit`` computes."""

    Config: ClassVar[Any] = ClassicConfig
    presets: ClassVar[dict[str, Preset]] = {"paper": Preset("all of the paper", 1, {})}
    fitted: ClassVar[bool] = True
    source_optional: ClassVar[bool] = True
    config: ClassicConfig

    def __init__(self, config: ClassicConfig, shape: tuple[int, ...], classes: int, bits: int) -> None:
        super().__init__(config, shape, classes, bits)
        self.extractor = Extractor(config.extractor, shape, config.pretrained).requires_grad_(False).eval()
        self.hashing: Any = self.build(self.extractor.features, bits)
        self.players: dict[str, Player] = {}

    @property
    def wants(self) -> Wants:
        return Wants(source_labels=False, target=True, per_class=0, batch_size=512, views=0)

    def state_modules(self) -> nn.ModuleDict:
        """The extractor and the fitted module."""
        return nn.ModuleDict({"extractor": self.extractor, "hashing": self.hashing})

    @torch.no_grad()
    def begin(self, source: RowSource | None, target: RowSource | None) -> None:
        """Fit on the rows of the given domains, float32, on the CPU."""
        parts = [fitting_rows(rows, self.config.fit_rows, self.extractor, self.device)[0] for rows in (source, target) if rows]
        self.fit(torch.cat(parts).float().cpu())

    def build(self, features: int, bits: int) -> nn.Module:
        """The module (batch, features) -> real (batch, bits); the codes are its signs."""
        return Projection(features, bits)

    def fit(self, x: Tensor) -> None:
        """Compute the module's buffers from (n, features) float32 on the CPU."""
        raise NotImplementedError

    def encoder(self) -> nn.Module:
        return nn.Sequential(self.extractor, self.hashing).eval()


class LSH(Classic):
    """Signs of random projections of the centred vectors."""

    name: ClassVar[str] = "lsh"
    reference: ClassVar[str] = "Charikar, Similarity Estimation Techniques from Rounding Algorithms, STOC 2002"

    def fit(self, x: Tensor) -> None:
        self.hashing.mean.copy_(x.mean(0))
        self.hashing.axes.copy_(torch.randn(self.hashing.axes.shape, generator=self.draw()))


class PCA(Classic):
    """Signs of the principal components after a random rotation: what ITQ starts from."""

    name: ClassVar[str] = "pca"
    reference: ClassVar[str] = "Jegou et al., Aggregating Local Descriptors into a Compact Image Representation, CVPR 2010"

    def fit(self, x: Tensor) -> None:
        self.hashing.load_state_dict(fit_itq(x, self.bits, self.draw().initial_seed(), rounds=0).state_dict())


class ITQ(Classic):
    """Principal components, rotated towards their signs."""

    name: ClassVar[str] = "itq"
    reference: ClassVar[str] = "Gong and Lazebnik, Iterative Quantization: A Procrustean Approach to Learning Binary Codes, CVPR 2011"

    def fit(self, x: Tensor) -> None:
        self.hashing.load_state_dict(fit_itq(x, self.bits, self.draw().initial_seed()).state_dict())


class _Waves(nn.Module):
    """cos(frequency (x . axis - low)), the eigenfunctions of a uniform distribution on a box."""

    mean: Tensor
    axes: Tensor
    low: Tensor
    frequency: Tensor

    def __init__(self, features: int, bits: int) -> None:
        super().__init__()
        for name, shape in (("mean", (features,)), ("axes", (bits, features)), ("low", (bits,)), ("frequency", (bits,))):
            self.register_buffer(name, torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cos(((x - self.mean) @ self.axes.T - self.low) * self.frequency)


class SpectralHashing(Classic):
    """Signs of the smoothest eigenfunctions along the principal components."""

    name: ClassVar[str] = "spectral"
    reference: ClassVar[str] = "Weiss et al., Spectral Hashing, NIPS 2008"

    def build(self, features: int, bits: int) -> nn.Module:
        return _Waves(features, bits)

    def fit(self, x: Tensor) -> None:
        """Choose the ``bits`` waves of the lowest frequency over all components (section 3)."""
        pca = fit_components(x.numpy(), self.bits)
        places = pca.transform(x.numpy())
        low, length = places.min(0), np.ptp(places, 0).clip(1e-9)
        waves = np.arange(1, self.bits + 1)[:, None] * np.pi / length  # (mode, component)
        modes, components = np.unravel_index(np.argsort(waves, axis=None, kind="stable")[: self.bits], waves.shape)
        found = {
            "mean": pca.mean_, "axes": pca.components_[components], "low": low[components], "frequency": waves[modes, components],
        }  # fmt: skip
        self.hashing.load_state_dict({name: torch.from_numpy(np.asarray(value, np.float32)) for name, value in found.items()})


class _Codebooks(nn.Module):
    """Index of the nearest centroid in each subspace, as bits in {-1, +1}."""

    mean: Tensor
    axes: Tensor
    centroids: Tensor
    place: Tensor

    def __init__(self, features: int, bits: int) -> None:
        super().__init__()
        self.books = bits // SUBSPACE_BITS
        self.width = max(1, min(features, 2 * bits) // self.books)  # of a subspace
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("axes", torch.zeros(self.books * self.width, features))
        self.register_buffer("centroids", torch.zeros(self.books, 2**SUBSPACE_BITS, self.width))
        self.register_buffer("place", 2 ** torch.arange(SUBSPACE_BITS), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = ((x - self.mean) @ self.axes.T).unflatten(1, (self.books, self.width)).transpose(0, 1)
        apart = self.centroids.square().sum(2).unsqueeze(1) - 2 * parts @ self.centroids.transpose(1, 2)  # minus the squared norms of the parts
        nearest = apart.argmin(2).T  # (batch, books)
        return ((nearest.unsqueeze(2) // self.place) % 2).flatten(1).to(x.dtype) * 2 - 1


class KMeansHashing(Classic):
    """K-means in subspaces, with centroids whose distances follow the Hamming distances of their numbers.

    Minimises E_quan + lambda E_aff (eq. 10): the mean squared distance of the vectors to their centroids, and the weighted squared difference
    between the centroids' distances and s times the square root of their numbers' Hamming distances. The update of the centroids is
    one quasi-Newton minimisation over all of them, where the paper takes them in turn.
    """

    name: ClassVar[str] = "kmeans-hash"
    reference: ClassVar[str] = "He et al., K-means Hashing: An Affinity-Preserving Quantization Method for Learning Binary Compact Codes, CVPR 2013"

    def build(self, features: int, bits: int) -> nn.Module:
        return _Codebooks(features, bits)

    def fit(self, x: Tensor) -> None:
        """Rotate to principal components, deal them to the subspaces, and alternate between assignment and update (section 3)."""
        books, width = self.hashing.books, self.hashing.width
        if min(len(x), x.shape[1]) < books * width:
            raise ValueError(f"{self.bits} bits by k-means need {books * width} features and images: there are {x.shape[1]} and {len(x)}")
        mean = x.mean(0)
        axes = _balanced_axes(x - mean, books, width)
        parts = ((x - mean) @ axes.T).unflatten(1, (books, width)).transpose(0, 1)  # (books, n, width)
        numbers = torch.arange(2**SUBSPACE_BITS)
        place = self.hashing.place.cpu()  # as x; the module may be on a GPU
        bits = (numbers.unsqueeze(1) // place) % 2  # (16, b)
        near = (bits.unsqueeze(0) != bits.unsqueeze(1)).sum(2).sqrt()  # square root of the Hamming distance
        members = ((parts[:, :, :SUBSPACE_BITS] > 0) * place[:width]).sum(2)  # (books, n): first by the signs of the components
        centroids, counts = _cluster_means(parts, members, parts.new_zeros(books, len(numbers), width))
        pairs = (counts.unsqueeze(2) * counts.unsqueeze(1)) / len(x) ** 2  # w_ij
        scale = ((pairs * torch.cdist(centroids, centroids) * near).sum((1, 2)) / (pairs * near.square()).sum((1, 2))).view(-1, 1, 1)
        for _ in range(KMEANS_ROUNDS):
            means, counts = _cluster_means(parts, members, centroids)
            centroids = _updated(centroids, means, counts / len(x), scale * near)
            members = torch.stack([torch.cdist(part, own).argmin(1) for part, own in zip(parts, centroids, strict=True)])
        self.hashing.load_state_dict({"mean": mean, "axes": axes, "centroids": centroids})


def _balanced_axes(x: Tensor, books: int, width: int) -> Tensor:
    """Principal axes (books * width, features) of centred vectors, dealt so that the books' products of variances are about equal (Ge et al. 2013)."""
    values, axes = torch.linalg.eigh(x.T @ x / len(x))
    order = values.argsort(descending=True)[: books * width].tolist()
    dealt: list[list[int]] = [[] for _ in range(books)]
    products = [0.0] * books
    for place in order:
        book = min((each for each in range(books) if len(dealt[each]) < width), key=products.__getitem__)
        dealt[book].append(place)
        products[book] += math.log(max(float(values[place]), 1e-12))
    return axes.T[[place for book in dealt for place in book]].contiguous()


def _cluster_means(parts: Tensor, members: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """Means (books, clusters, width) of the vectors (books, n, width) of each cluster, those of ``empty`` for clusters without any; their counts."""
    index = members.unsqueeze(2).expand_as(parts)
    sums = torch.zeros_like(empty).scatter_add_(1, index, parts)
    counts = torch.zeros(empty.shape[:2]).scatter_add_(1, members, torch.ones(members.shape))
    return torch.where(counts.unsqueeze(2) > 0, sums / counts.clamp(min=1).unsqueeze(2), empty), counts


def _updated(centroids: Tensor, means: Tensor, shares: Tensor, wanted: Tensor) -> Tensor:
    """Centroids that minimise E_quan + lambda E_aff with the assignment kept.

    Args:
        centroids, means: (books, clusters, width).
        shares: (books, clusters), the clusters' shares of the vectors.
        wanted: (books, clusters, clusters), s times the square root of the Hamming distances.
    """
    found, pairs = centroids.clone().requires_grad_(), shares.unsqueeze(2) * shares.unsqueeze(1)
    search = torch.optim.LBFGS([found], max_iter=20, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        search.zero_grad()
        apart = ((found.unsqueeze(2) - found.unsqueeze(1)).square().sum(3) + 1e-12).sqrt()
        quantisation = (shares * (found - means).square().sum(2)).sum()
        loss = quantisation + AFFINITY_WEIGHT * (pairs * (apart - wanted).square()).sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        search.step(objective)  # type: ignore[no-untyped-call]
    return found.detach()
