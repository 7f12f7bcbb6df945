"""Random views of a batch, drawn so that they do not depend on the number of workers."""

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample, pad


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


def contrastive_view(images: Tensor, generator: torch.Generator, rank: int = 0, world: int = 1, *, crop: float = 0.2, flip: float = 0.5) -> Tensor:
    """Randomly crop, flip, recolour and blur each image, as MoCo v2 does (Chen et al. 2020, section 3), at the images' own size.

    A crop of a random share of the area and of a ratio in 3/4..4/3, stretched to the whole; with probability 0.8 brightness,
    contrast and saturation changed by up to 0.4 and the hue by up to 0.1 of its circle; grey with probability 0.2; with
    probability 0.5 a Gaussian blur whose deviation is 0.1 to 2 pixels for a side of 224, and in proportion for others.

    Args:
        images: (batch, channels, h, w) uint8, this worker's part.
        generator, rank, world: as in :func:`affine_view`.
        crop: smallest share of the area.
        flip: probability of a mirror image; 0 where left and right mean something, as in digits.

    Returns:
        The same shape, float32 in 0..255.
    """
    n = len(images)
    draws = torch.rand(n * world, 14, generator=generator)[rank * n : (rank + 1) * n].to(images.device)
    area, ratio = crop + (1 - crop) * draws[:, 0], (math.log(4 / 3) * (2 * draws[:, 1] - 1)).exp()
    height, width = (area / ratio).sqrt().clamp(max=1), (area * ratio).sqrt().clamp(max=1)
    mirrored = torch.where(draws[:, 4] < flip, -1.0, 1.0)
    zero = torch.zeros_like(area)
    matrix = torch.stack([width * mirrored, zero, (1 - width) * (2 * draws[:, 2] - 1), zero, height, (1 - height) * (2 * draws[:, 3] - 1)], 1)
    grid = affine_grid(matrix.view(n, 2, 3), list(images.shape), align_corners=False)
    x = grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    x = torch.where((draws[:, 5] < 0.8).view(-1, 1, 1, 1), _recoloured(x, draws[:, 6:10]), x)
    if images.shape[1] == 3:
        x = torch.where((draws[:, 10] < 0.2).view(-1, 1, 1, 1), _grey(x).expand_as(x), x)
    deviation = (0.1 + 1.9 * draws[:, 12]) * images.shape[-1] / 224
    return torch.where((draws[:, 11] < 0.5).view(-1, 1, 1, 1), _blurred(x, deviation), x).clamp(0, 255)


def _grey(x: Tensor) -> Tensor:
    """Luma of colour images, (batch, 1, h, w); grey images as they are."""
    return x if x.shape[1] == 1 else (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _recoloured(x: Tensor, draws: Tensor) -> Tensor:
    """Change brightness, contrast, and of colour images saturation and hue; ``draws`` is (batch, 4) in [0, 1]."""
    bright, contrast, saturation = (1 + 0.4 * (2 * draws[:, i].view(-1, 1, 1, 1) - 1) for i in range(3))
    x = (x * bright).clamp(0, 255)
    x = torch.lerp(_grey(x).mean((2, 3), keepdim=True), x, contrast).clamp(0, 255)
    if x.shape[1] == 1:
        return x
    x = torch.lerp(_grey(x), x, saturation)
    angle = (2 * draws[:, 3] - 1) * 0.1 * 2 * math.pi
    cos, sin, one, zero = angle.cos(), angle.sin(), torch.ones_like(angle), torch.zeros_like(angle)
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], 1).view(-1, 3, 3)  # about the luma axis of YIQ
    to_yiq = x.new_tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    whole = torch.linalg.inv(to_yiq) @ turn @ to_yiq
    return torch.einsum("nij,njhw->nihw", whole, x).clamp(0, 255)


def _blurred(x: Tensor, deviation: Tensor) -> Tensor:
    """Blur each image with a Gaussian of its own deviation, in pixels."""
    reach = max(1, round(0.05 * x.shape[-1]))
    place = torch.arange(-reach, reach + 1, device=x.device)
    weights = torch.softmax(-(place**2) / (2 * deviation.view(-1, 1) ** 2), 1)  # (batch, 2 reach + 1)
    n, channels, height, width = x.shape
    kernels = weights.repeat_interleave(channels, 0)
    rows = x.reshape(1, n * channels, height, width)
    for shape in ((-1, 1, 2 * reach + 1, 1), (-1, 1, 1, 2 * reach + 1)):
        padding = [reach if each > 1 else 0 for each in (shape[3], shape[3], shape[2], shape[2])]
        rows = conv2d(pad(rows, padding, mode="replicate"), kernels.view(shape), groups=n * channels)
    return rows.view(n, channels, height, width)


def random_view(x: Tensor, generator: torch.Generator, rank: int = 0, world: int = 1, kind: str = "affine", **options: float) -> Tensor:
    """One augmented view, same shape, float32: of feature vectors with dropped features, of images by ``kind``.

    Args:
        kind: ``affine`` or ``contrastive``.
        options: those of :func:`affine_view` or :func:`contrastive_view`.
    """
    if x.dim() == 2:
        return feature_view(x, generator, rank, world)
    return (affine_view if kind == "affine" else contrastive_view)(x, generator, rank, world, **options)
