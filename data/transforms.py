"""Random augmented views of a batch. The draws do not depend on the number of workers."""

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample


def seeded_generator(*numbers: int) -> torch.Generator:
    """A CPU generator seeded by a hash of all the numbers."""
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

    The draws are made for the global batch, and each worker uses its part: W workers make the same views as one.

    Args:
        images: (batch, channels, h, w) uint8, this worker's part.
        generator: with the same state on each worker.
        degrees: maximum rotation.
        shift: maximum translation, as a fraction of the side.
        scale: maximum relative change of size.
        shear: maximum shear, as a tangent.

    Returns:
        Same shape, float32 in 0..255; border pixels are repeated outwards.
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
    """Randomly set features to zero, and rescale the rest to keep the mean (dropout).

    Args:
        features: (batch, features) float32, this worker's part.
        generator, rank, world: as in ``affine_view``.
        drop: probability that a feature is set to zero.

    Returns:
        Same shape, float32.
    """
    n, width = features.shape
    keep = (torch.rand(n * world, width, generator=generator) >= drop)[rank * n : (rank + 1) * n]
    return features.float() * keep.to(features.device) / (1 - drop)


def contrastive_view(images: Tensor, generator: torch.Generator, rank: int = 0, world: int = 1, *, crop: float = 0.2, flip: float = 0.5) -> Tensor:
    """Randomly crop, flip, recolour and blur each image, as in MoCo v2 (Chen et al. 2020, section 3); the size stays the same.

    Steps: a crop with a random area and an aspect ratio in 3/4..4/3, resized to the full image; with probability 0.8, brightness,
    contrast and saturation changed by up to 0.4 and hue by up to 0.1 of the colour circle; greyscale with probability 0.2;
    Gaussian blur with probability 0.5 and a standard deviation of 0.1 to 2 pixels at side 224, scaled to other sizes.

    Args:
        images: (batch, channels, h, w) uint8, this worker's part.
        generator, rank, world: as in ``affine_view``.
        crop: minimum area of the crop, as a fraction.
        flip: probability of a horizontal flip; use 0 if left and right matter, as for digits.

    Returns:
        Same shape, float32 in 0..255.
    """
    n = len(images)
    draws = torch.rand(n * world, 13, generator=generator)[rank * n : (rank + 1) * n].tolist()
    return torch.stack([_contrastive(image, draw, crop, flip) for image, draw in zip(images, draws, strict=True)]).float()


def _contrastive(image: Tensor, draw: list[float], crop: float, flip: float) -> Tensor:
    """One view (channels, h, w) uint8 of an image, determined by 13 draws in [0, 1]."""
    from torchvision.transforms.v2 import functional as change  # noqa: PLC0415  torchvision is slow to import

    height, width = image.shape[1:]
    area, ratio = crop + (1 - crop) * draw[0], (4 / 3) ** (2 * draw[1] - 1)
    tall, wide = (max(1, round(side * min(1.0, share**0.5))) for side, share in ((height, area / ratio), (width, area * ratio)))
    top, left = round((height - tall) * draw[2]), round((width - wide) * draw[3])
    image = change.resized_crop(image, top, left, tall, wide, [height, width], antialias=True)
    if draw[4] < flip:
        image = change.horizontal_flip(image)
    if draw[5] < 0.8:
        image = change.adjust_brightness(image, 0.6 + 0.8 * draw[6])
        image = change.adjust_contrast(image, 0.6 + 0.8 * draw[7])
        if len(image) == 3:
            image = change.adjust_hue(change.adjust_saturation(image, 0.6 + 0.8 * draw[8]), 0.2 * draw[9] - 0.1)
    if len(image) == 3 and draw[10] < 0.2:
        image = change.rgb_to_grayscale(image, 3)
    if draw[11] < 0.5:
        reach = max(1, round(0.05 * width))
        image = change.gaussian_blur(image, [2 * reach + 1] * 2, [(0.1 + 1.9 * draw[12]) * width / 224])
    return image


def random_view(x: Tensor, generator: torch.Generator, rank: int = 0, world: int = 1, kind: str = "affine", **options: float) -> Tensor:
    """One augmented view: dropout for feature vectors, an image transform otherwise. Same shape, float32.

    Args:
        kind: image transform, ``affine`` or ``contrastive``.
        options: of ``affine_view`` or ``contrastive_view``.
    """
    if x.dim() == 2:
        return feature_view(x, generator, rank, world)
    return (affine_view if kind == "affine" else contrastive_view)(x, generator, rank, world, **options)
