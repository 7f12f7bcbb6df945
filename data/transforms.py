"""Random augmented views of a batch. The draws do not depend on the number of workers."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import conv2d, grid_sample, pad

BLOCK = 2**20  # values of a block of images that a CPU changes at a time


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
    )
    return _sampled(images, matrix)


def _by_blocks(change: Callable[..., Tensor], images: Tensor, *given: Tensor) -> Tensor:
    """Change images, and the rows of ``given`` that belong to them, in blocks that fit into a CPU's cache; at once on a GPU.

    Returns:
        Same shape as ``images``, float32.
    """
    size = max(1, BLOCK // images[0].numel()) if images.device.type == "cpu" else len(images)
    made = torch.empty(images.shape, device=images.device)
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        made[part] = change(images[part], *(each[part].to(images.device) for each in given))
    return made


def _sampled(images: Tensor, matrix: Tensor) -> Tensor:
    """Sample images (batch, channels, h, w) at affine coordinates, float32; ``matrix`` as in ``sample_colour``."""
    sample = _sampler(images)
    return _by_blocks(sample, images, matrix) if sample is _sample else sample(images, matrix)


def _sampler(images: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """What samples such images."""
    if images.device.type != "cpu" or images.dtype != torch.uint8 or images.shape[1] != 3:
        return _sample
    from data.sampling import sample_colour  # noqa: PLC0415  numba is slow to import, and digits do not need it

    return sample_colour


def _sample(images: Tensor, matrix: Tensor) -> Tensor:
    """As ``sample_colour``, of any type and channels and anywhere, by torch."""
    height, width = images.shape[2:]
    y, x = ((2 * torch.arange(side, device=images.device) + 1) / side - 1 for side in (height, width))
    a, b, c, d, e, f = matrix.view(-1, 6, 1, 1).unbind(1)
    grid = torch.empty(len(images), height, width, 2, device=images.device)
    torch.add(a * x, b * y.unsqueeze(1) + c, out=grid[..., 0])
    torch.add(d * x, e * y.unsqueeze(1) + f, out=grid[..., 1])
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


def crop_view(images: Tensor, generator: torch.Generator, rank: int = 0, world: int = 1, *, crop: float = 0.2, flip: float = 0.5) -> Tensor:
    """Randomly crop and flip each image; the size stays the same.

    Args:
        images: (batch, channels, h, w) uint8, this worker's part.
        generator, rank, world: as in ``affine_view``.
        crop: minimum area of the crop, as a fraction; its aspect ratio lies in 3/4..4/3.
        flip: probability of a horizontal flip; use 0 if left and right matter, as for digits.

    Returns:
        Same shape, float32 in 0..255.
    """
    n = len(images)
    draws = torch.rand(n * world, 5, generator=generator)[rank * n : (rank + 1) * n]
    return _sampled(images, _crop_matrix(draws, images.shape[2:], crop, flip))


def _crop_matrix(draws: Tensor, side: torch.Size, crop: float, flip: float) -> Tensor:
    """The maps (batch, 6) of ``_sample`` to crops of whole pixels, from five draws in [0, 1] each."""
    area, ratio = crop + (1 - crop) * draws[:, 0], (4 / 3) ** (2 * draws[:, 1] - 1)
    scales, centres = [], []
    for pixels, share, place in ((side[0], area / ratio, draws[:, 2]), (side[1], area * ratio, draws[:, 3])):
        size = (pixels * share.sqrt().clamp(max=1)).round().clamp(min=1)
        first = ((pixels - size) * place).round()
        scales.append(size / pixels)
        centres.append((2 * first + size) / pixels - 1)
    mirrored, none = torch.where(draws[:, 4] < flip, -1.0, 1.0), torch.zeros(len(draws))
    return torch.stack([scales[1] * mirrored, none, centres[1], none, scales[0], centres[0]], 1)


def contrastive_view(images: Tensor, generator: torch.Generator, rank: int = 0, world: int = 1, *, crop: float = 0.2, flip: float = 0.5) -> Tensor:
    """Randomly crop, flip, recolour and blur each image, as in MoCo v2 (Chen et al. 2020, section 3); the size stays the same.

    Steps: a crop with a random area and an aspect ratio in 3/4..4/3, resized to the full image; with probability 0.8, brightness,
    contrast and saturation changed by up to 0.4 and hue by up to 0.1 of the colour circle; greyscale with probability 0.2;
    Gaussian blur with probability 0.5 and a standard deviation of 0.1 to 2 pixels at side 224, scaled to other sizes.

    Args:
        images, generator, rank, world, crop, flip: as in ``crop_view``.

    Returns:
        Same shape, float32 in 0..255.
    """
    n = len(images)
    draws = torch.rand(n * world, 13, generator=generator)[rank * n : (rank + 1) * n]
    colours, blur = draws[:, 5:11], torch.where(draws[:, 11] < 0.5, (0.1 + 1.9 * draws[:, 12]) * images.shape[3] / 224, 0.0)

    sample = _sampler(images)

    def change(part: Tensor, matrix: Tensor, colour: Tensor, deviation: Tensor) -> Tensor:
        return _blurred(_recoloured(sample(part, matrix), colour), deviation)

    return _by_blocks(change, images, _crop_matrix(draws, images.shape[2:], crop, flip), colours, blur)


def _grey(images: Tensor) -> Tensor:
    """Luma (batch, 1, h, w) of colour images; grey images as they are."""
    return images if images.shape[1] == 1 else 0.2989 * images[:, :1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:]


def _recoloured(images: Tensor, draws: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue of some images, and make some grey, by six draws in [0, 1] each."""
    changed = draws[:, 0] < 0.8
    bright, contrast, saturation = (torch.where(changed, 0.6 + 0.8 * draws[:, i], 1.0).view(-1, 1, 1, 1) for i in (1, 2, 3))
    images = (images * bright).clamp(0, 255)
    images = torch.lerp(_grey(images).mean((1, 2, 3), keepdim=True).expand_as(images), images, contrast).clamp(0, 255)
    if images.shape[1] == 1:
        return images
    images = torch.lerp(_grey(images).expand_as(images), images, saturation).clamp(0, 255)
    images = _turned(images, torch.where(changed, 0.2 * draws[:, 4] - 0.1, 0.0))
    return torch.where((draws[:, 5] < 0.2).view(-1, 1, 1, 1), _grey(images), images)


def _turned(images: Tensor, share: Tensor) -> Tensor:
    """Turn the hue of colour images by shares (batch,) of the colour circle, at equal value and saturation (HSV)."""
    most, least = images.amax(1), images.amin(1)
    red, green, blue = images.unbind(1)
    spread = (most - least).clamp(min=1e-6)
    sector = torch.where(most == red, (green - blue) / spread, torch.where(most == green, (blue - red) / spread + 2, (red - green) / spread + 4))
    hue = sector + 6 * share.view(-1, 1, 1)
    hue += 6 * (hue < 0)  # 0..6
    chroma = most - least
    planes = ((hue - 3).abs_().sub_(1), (hue - 2).abs_().neg_().add_(2), (hue - 4).abs_().neg_().add_(2))
    return torch.stack([plane.clamp_(0, 1).mul_(chroma).add_(least) for plane in planes], 1)


def _blurred(images: Tensor, deviation: Tensor) -> Tensor:
    """Blur images by Gaussians of standard deviations (batch,) in pixels, cut at four of the largest; 0 leaves an image as it is."""
    chosen = torch.nonzero(deviation > 0).flatten()
    if not len(chosen):
        return images
    picked, wide = images[chosen], deviation[chosen]
    reach = max(1, math.ceil(8 * images.shape[3] / 224))
    weights = torch.exp(-((torch.arange(-reach, reach + 1, device=images.device) / wide.unsqueeze(1)) ** 2) / 2)
    kernel = (weights / weights.sum(1, keepdim=True)).repeat_interleave(images.shape[1], 0).unsqueeze(1)
    rows = picked.flatten(0, 1).unsqueeze(0)
    rows = conv2d(pad(rows, [0, 0, reach, reach], mode="replicate"), kernel.unsqueeze(3), groups=len(kernel))
    rows = conv2d(pad(rows, [reach, reach, 0, 0], mode="replicate"), kernel.unsqueeze(2), groups=len(kernel))
    return images.index_copy(0, chosen, rows.view_as(picked))


def drawing_view(images: Tensor, generator: torch.Generator, rank: int = 0, world: int = 1, *, flip: float = 0.5) -> Tensor:
    """A line drawing of each image, black on white, by an extended difference of Gaussians (Winnemoeller et al. 2012); mirrored at random.

    Lines are where the image is darker than a wider blur of it: D = G(s) - 0.98 G(1.6 s) of the luma in 0..1, drawn with brightness 1 + tanh(200 min(D, 0)).
    The standard deviation s is 0.8 to 1.2 pixels at side 224, scaled to other sizes down to 134; on smaller images it stays, or there would be no lines.

    Args:
        images, generator, rank, world, flip: as in ``crop_view``.

    Returns:
        Same shape, float32 in 0..255; its channels are equal.
    """
    n = len(images)
    draws = torch.rand(n * world, 2, generator=generator)[rank * n : (rank + 1) * n]

    def change(part: Tensor, deviation: Tensor, mirrored: Tensor) -> Tensor:
        grey = _grey(part.float()) / 255
        below = (_blurred(grey, deviation) - 0.98 * _blurred(grey, 1.6 * deviation)).clamp(max=0)
        drawn = 255 * (1 + torch.tanh(200 * below))
        return torch.where(mirrored.view(-1, 1, 1, 1), drawn.flip(3), drawn).expand_as(part)

    return _by_blocks(change, images, (0.8 + 0.4 * draws[:, 0]) * max(images.shape[3] / 224, 0.6), draws[:, 1] < flip)


VIEWS: dict[str, Callable[..., Tensor]] = {"affine": affine_view, "crop": crop_view, "contrastive": contrastive_view, "drawing": drawing_view}


def random_view(x: Tensor, generator: torch.Generator, rank: int = 0, world: int = 1, kind: str = "affine", **options: float) -> Tensor:
    """One augmented view: dropout for feature vectors, an image transform otherwise. Same shape, float32.

    Args:
        kind: image transform, one of ``VIEWS``.
        options: of the function of that name.
    """
    if x.dim() == 2:
        return feature_view(x, generator, rank, world)
    return VIEWS[kind](x, generator, rank, world, **options)
