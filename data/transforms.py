"""Random views of a batch, drawn so that they do not depend on the number of workers."""

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator whose stream is a function of the numbers alone."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number + 0x7F4A7C15)) * 0xBF58476D1CE4E5B9 % 2**64
        state ^= state >> 31
    return torch.Generator().manual_seed(state % 2**63)


def affine_view(
    images: Tensor, generator: torch.Generator, rank: int = 0, world: int = 1, *, degrees: float = 15.0,
    shift: float = 0.1, scale: float = 0.2, shear: float = 0.2,
) -> Tensor:  # fmt: skip
    """Randomly rotate, shift, scale and shear each image.

    The draws are those of the global batch, of which this worker takes its part: W workers make the views of one.

    Args:
        images: (batch, channels, h, w) uint8, this worker's part.
        generator: the same stream on each worker.
        degrees: largest rotation.
        shift: largest translation, as a share of the side.
        scale: largest relative change of size.
        shear: largest shear, as a tangent.

    Returns:
        The same shape, float32 in 0..255; borders are continued outwards.
    """
    n = len(images)
    draws = (torch.rand(n * world, 6, generator=generator) * 2 - 1)[rank * n : (rank + 1) * n]
    angle = draws[:, 0] * math.radians(degrees)
    width, height = 1 + draws[:, 1] * scale, 1 + draws[:, 2] * scale
    cos, sin, slant = angle.cos(), angle.sin(), draws[:, 5] * shear
    matrix = torch.stack(
        [cos * width, (cos * slant - sin) * width, 2 * shift * draws[:, 3], sin * height, (sin * slant + cos) * height, 2 * shift * draws[:, 4]], 1
    ).view(n, 2, 3)
    grid = affine_grid(matrix.to(images.device), list(images.shape), align_corners=False)
    return grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


def feature_view(features: Tensor, generator: torch.Generator, rank: int = 0, world: int = 1, *, drop: float = 0.1) -> Tensor:
    """Randomly set a share of each feature vector to zero, scaled to keep its mean.

    Args:
        features: (batch, features) float32, this worker's part.
        generator, rank, world: as in :func:`affine_view`.
        drop: probability that a feature is set to zero.

    Returns:
        The same shape, float32.
    """
    n, width = features.shape
    keep = (torch.rand(n * world, width, generator=generator) >= drop)[rank * n : (rank + 1) * n]
    return features.float() * keep.to(features.device) / (1 - drop)


def random_view(x: Tensor, generator: torch.Generator, rank: int = 0, world: int = 1, scale: float = 0.2) -> Tensor:
    """One augmented view of images (affine, with a largest change of ``scale``) or feature vectors (dropped features); same shape, float32."""
    return affine_view(x, generator, rank, world, scale=scale) if x.dim() == 4 else feature_view(x, generator, rank, world)
