"""ITQ, iterative quantisation (Gong and Lazebnik, CVPR 2011): PCA, then the rotation that brings the components nearest to their signs."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from models.components import fit_components


class Projection(nn.Module):
    """Centres and L2-normalises vectors (batch, features) and projects them to (batch, bits); the codes are the signs."""

    mean: Tensor
    axes: Tensor

    def __init__(self, features: int, bits: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("axes", torch.zeros(bits, features))

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x - self.mean) @ self.axes.T


def fit_itq(x: Tensor, bits: int, seed: int, rounds: int = 50) -> Projection:
    """Fit ITQ: the components by scikit-learn, the rotation by faiss. The result depends on the seed, and not on the number of threads.

    Args:
        x: (n, features) float32; n and features at least ``bits``.
        seed: of the first rotation.
        rounds: of the search for a better rotation; 0 keeps the first.

    Raises:
        ValueError: there are fewer features, or fewer vectors, than bits.
    """
    import faiss  # noqa: PLC0415  slow to import, and optional for training

    n, features = x.shape
    if min(n, features) < bits:
        raise ValueError(f"PCA and ITQ make at most one bit of a feature and of a training image: {bits} bits of {features} features, {n} images")
    made = Projection(features, bits)
    made.mean.copy_(x.mean(0))
    z = normalize(x.cpu() - made.mean).double().numpy()
    axes = fit_components(z, bits).components_
    itq = faiss.ITQMatrix(bits)
    itq.seed, itq.max_iter = seed % 2**31, rounds
    itq.train(np.ascontiguousarray(z @ axes.T, np.float32))
    made.axes.copy_(torch.from_numpy(faiss.vector_to_array(itq.A).reshape(bits, bits) @ axes))
    return made.to(x.device)
