"""Classic unsupervised hashes, fitted in one pass: LSH, ITQ, spectral hashing, k-means hashing.

They take feature vectors, or images as their pixels, of one domain or of both. The fitted values are buffers of a module, so
the encoder is exported and registered like any other.
"""

import math
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from models.itq import Projection, fit_itq
from models.method import Method, Player, RowSource, Wants, hyperparameter
from models.networks.extractors import Extractor

SUBSPACE_BITS = 4  # bits of a k-means codebook: 16 centroids
OPQ_ROUNDS = 20
ANNEALING_STEPS = 20_000  # swaps tried to number the 16 centroids


@dataclass(frozen=True)
class ClassicConfig:
    """Settings of a fitted hash."""

    fit_rows: int = hyperparameter(50_000, "training images of each domain, at most, that it is fitted on: the first of the shuffled rows")
    extractor: str = hyperparameter("auto", "what makes feature vectors of images: none takes the pixels", choices=("auto", "none", "alexnet", "vgg16"))
    pretrained: str = hyperparameter("IMAGENET1K_V1", "the extractor's weights: torchvision name, file path, or none")

    @classmethod
    def paper(cls) -> Self:
        """The same as the defaults: there is nothing to choose."""
        return cls()


class Classic(Method):
    """Base class of the fitted hashes: ``build`` creates the module whose buffers ``fit`` computes."""

    Config: ClassVar[Any] = ClassicConfig
    fitted: ClassVar[bool] = True
    source_optional: ClassVar[bool] = True
    config: ClassicConfig

    def __init__(self, config: ClassicConfig, shape: tuple[int, ...], classes: int, bits: int) -> None:
        super().__init__(config, shape, classes, bits)
        self.extractor = Extractor(config.extractor, shape, config.pretrained).requires_grad_(False).eval()
        self.hashing: Any = self.build(self.extractor.features, bits)
        self.players: dict[str, Player] = {}
        self.seed = torch.initial_seed()

    @property
    def wants(self) -> Wants:
        return Wants(source_labels=False, target=True, per_class=0, batch_size=512, views=0)

    def state_modules(self) -> nn.ModuleDict:
        """The extractor and the fitted module."""
        return nn.ModuleDict({"extractor": self.extractor, "hashing": self.hashing})

    @torch.no_grad()
    def begin(self, source: RowSource | None, target: RowSource | None) -> None:
        """Fit on the rows of the given domains."""
        self.fit(torch.cat([self._first(rows) for rows in (source, target) if rows]))

    def _first(self, rows: RowSource, size: int = 512) -> Tensor:
        """Feature vectors of a domain's first ``fit_rows`` rows, float32, on the CPU."""
        most, device = self.config.fit_rows, next(self.hashing.buffers()).device
        parts = islice(rows.rows(size), math.ceil(most / size))
        return torch.cat([self.extractor(part.x.to(device)).float().cpu() for part in parts])[:most]

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
        self.hashing.axes.copy_(torch.randn(self.hashing.axes.shape, generator=torch.Generator().manual_seed(self.seed)))


class ITQ(Classic):
    """Principal components, rotated towards their signs."""

    name: ClassVar[str] = "itq"
    reference: ClassVar[str] = "Gong and Lazebnik, Iterative Quantization: A Procrustean Approach to Learning Binary Codes, CVPR 2011"

    def fit(self, x: Tensor) -> None:
        self.hashing.load_state_dict(fit_itq(x, self.bits).state_dict())


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
        from sklearn.decomposition import PCA  # noqa: PLC0415

        pca = PCA(min(self.bits, *x.shape), svd_solver="full" if min(x.shape) < 500 else "covariance_eigh").fit(x.numpy())
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
    """K-means in each subspace of a rotation; the centroids are numbered so that Hamming distances follow their distances."""

    name: ClassVar[str] = "kmeans-hash"
    reference: ClassVar[str] = "He et al., K-means Hashing: An Affinity-Preserving Quantization Method for Learning Binary Compact Codes, CVPR 2013"

    def build(self, features: int, bits: int) -> nn.Module:
        return _Codebooks(features, bits)

    def fit(self, x: Tensor) -> None:
        """Fit with faiss: an optimised rotation (OPQ), a product quantizer, and its numbering by simulated annealing."""
        import faiss  # noqa: PLC0415  slow to import, and optional for training

        books, width = self.hashing.books, self.hashing.width
        if min(len(x), x.shape[1]) < books * width:
            raise ValueError(f"{self.bits} bits by k-means need {books * width} features and images: there are {x.shape[1]} and {len(x)}")
        mean = x.mean(0)
        centred = np.ascontiguousarray((x - mean).numpy())
        rotation = faiss.OPQMatrix(x.shape[1], books, books * width)
        quantizer = faiss.ProductQuantizer(books * width, books, SUBSPACE_BITS)
        rotation.pq, rotation.niter = quantizer, OPQ_ROUNDS
        rotation.train(centred)
        rotated = rotation.apply(centred)
        quantizer.train(rotated)
        numbering = faiss.PolysemousTraining()  # type: ignore[attr-defined]
        numbering.n_iter = ANNEALING_STEPS
        numbering.optimize_pq_for_hamming(quantizer, len(rotated), faiss.swig_ptr(rotated))
        axes = faiss.vector_to_array(rotation.A).reshape(books * width, -1)
        centroids = faiss.vector_to_array(quantizer.centroids).reshape(self.hashing.centroids.shape)
        self.hashing.load_state_dict({"mean": mean, "axes": torch.from_numpy(axes), "centroids": torch.from_numpy(centroids)})
