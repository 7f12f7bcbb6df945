"""Generators of images or feature vectors from codes, and discriminators."""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from models.distributed import BatchNorm
from models.networks.precision import HeavyModule, reducible


def stored(x: Tensor) -> Tensor:
    """Convert generated images in [-1, 1] to stored ones, uint8 (inverse of ``models.networks.layers.unit``)."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def halvings(shape: tuple[int, ...], most: int = 4) -> int:
    """Number of times the sides of an image can be halved, down to at least 2.

    Raises:
        ValueError: not even once.
    """
    common = math.gcd(shape[1], shape[2])
    steps = min(most, (common & -common).bit_length() - 1)
    while steps and min(shape[1], shape[2]) >> steps < 2:
        steps -= 1
    if not steps:
        raise ValueError(f"images of {shape[1]}x{shape[2]} pixels cannot be generated: their sides must be even; ingest with --size 28 or 32")
    return steps


class Generator(HeavyModule):
    """Codes to images in [-1, 1] by transposed convolutions of stride 2, or to feature vectors by two linear layers.

    It starts from the smallest side that halving reaches exactly, at most four times: 28 from 7, 32 from 2.
    """

    def __init__(self, inputs: int, shape: tuple[int, ...], width: int) -> None:
        """Args:
            inputs: length of a code.
            shape: (channels, height, width) or (features,).
            width: channels of the last hidden layer; each earlier layer has twice as many as the next. The hidden layer for
                feature vectors has 16 times as many.
        """
        super().__init__()
        if len(shape) == 1:
            self.layers = nn.Sequential(nn.Linear(inputs, 16 * width), BatchNorm(16 * width), nn.ReLU(), nn.Linear(16 * width, shape[0]))
            return
        channels, height, wide = shape
        steps = halvings(shape)
        small, outputs = (height >> steps, wide >> steps), width << (steps - 1)
        layers = [nn.Linear(inputs, outputs * small[0] * small[1]), nn.Unflatten(1, (outputs, *small)), BatchNorm(outputs), nn.ReLU()]
        for step in range(1, steps):
            less = outputs >> step
            layers += [nn.ConvTranspose2d(2 * less, less, 4, 2, 1), BatchNorm(less), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.ConvTranspose2d(width, channels, 4, 2, 1), nn.Tanh())

    @reducible
    def forward(self, codes: Tensor) -> Tensor:
        """(batch, inputs) to (batch, *shape)."""
        return self.layers(codes)


class Discriminator(HeavyModule):
    """Images or feature vectors to logits, by convolutions of stride 2 or one hidden layer, without batch-norm."""

    def __init__(self, shape: tuple[int, ...], outputs: int, width: int, spectral: bool) -> None:
        """Args:
            shape: (channels, height, width) or (features,).
            outputs: number of logits.
            width: channels of the first hidden layer; each later layer has twice as many as the one before. The hidden layer for
                feature vectors has 16 times as many.
            spectral: divide each layer's weights by their largest singular value (spectral normalisation).
        """
        super().__init__()
        layers: list[nn.Module] = []
        if len(shape) == 1:
            features = 16 * width
            layers += [nn.Linear(shape[0], features), nn.LeakyReLU(0.2)]
        else:
            steps, inputs = halvings(shape), shape[0]
            for step in range(steps):
                layers += [nn.Conv2d(inputs, width << step, 4, 2, 1), nn.LeakyReLU(0.2)]
                inputs = width << step
            features = inputs * (shape[1] >> steps) * (shape[2] >> steps)
            layers.append(nn.Flatten())
        layers.append(nn.Linear(features, outputs))
        normed = [spectral_norm(layer) if spectral and isinstance(layer, nn.Linear | nn.Conv2d) else layer for layer in layers]
        self.layers = nn.Sequential(*normed)

    @reducible
    def forward(self, x: Tensor) -> Tensor:
        """(batch, *shape) to (batch, outputs)."""
        return self.layers(x)
