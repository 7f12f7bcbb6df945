"""Small networks trained from random weights: LeNet, conv4, and two for feature vectors, each ending in a hash layer."""

import itertools

from torch import Tensor, nn
from torch.nn.functional import normalize

from models.distributed import BatchNorm
from models.networks.layers import HashNetwork


def _fully_connected(inputs: int, width: int, norm: bool, dropout: float) -> nn.Module:
    parts: list[nn.Module] = [nn.Dropout(dropout)] if dropout else []
    parts += [nn.Linear(inputs, width)] + ([BatchNorm(width)] if norm else [])
    return nn.Sequential(*parts)


def lenet(shape: tuple[int, ...], bits: int, norm: bool, dropout: float) -> HashNetwork:
    """LeNet of the digits experiments: conv5x5 20, pool, conv5x5 50, pool, fc 500, hash.

    Args:
        shape: (channels, height, width) of the images, at least 16 by 16.
        norm: batch-norm after each layer (not in the paper).
        dropout: probability before fc 500 (not in the paper).
    """
    channels, height, width = shape
    side = [((n - 4) // 2 - 4) // 2 for n in (height, width)]
    if min(side) < 1:
        raise ValueError(f"LeNet needs images of at least 16x16 pixels, not {height}x{width}: ingest with a larger --size")

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        normed = [BatchNorm(outputs)] if norm else []
        return [nn.Conv2d(inputs, outputs, 5), *normed, nn.MaxPool2d(2), nn.ReLU()]

    trunk = nn.Sequential(*block(channels, 20), *block(20, 50), nn.Flatten())
    layers = [_fully_connected(50 * side[0] * side[1], 500, norm, dropout)]
    return HashNetwork(trunk, layers, 500, bits, images=True)


def conv4(shape: tuple[int, ...], bits: int, norm: bool, dropout: float) -> HashNetwork:
    """Four convolutions of stride 2 without fully connected layers: IGAN's encoder for 32x32 colour digits (section 3.2).

    Args:
        shape: (channels, height, width), at least 16 by 16.
        norm: batch-norm after each layer (not specified in the paper).
        dropout: probability before the hash layer (not in the paper).
    """
    channels, height, width = shape
    if min(height, width) < 16:
        raise ValueError(f"conv4 needs images of at least 16x16 pixels, not {height}x{width}: ingest with a larger --size")
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((channels, 32, 64, 128, 256)):
        normed = [BatchNorm(outputs)] if norm else []
        layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), *normed, nn.ReLU()]
    trunk = nn.Sequential(*layers, nn.Flatten(), *([nn.Dropout(dropout)] if dropout else []))
    return HashNetwork(trunk, [], 256 * (height // 16) * (width // 16), bits, images=True)


def mlp(shape: tuple[int, ...], bits: int, norm: bool, dropout: float) -> HashNetwork:
    """Two fully connected layers of 512 units on feature vectors, then the hash layer."""
    features = shape[0]
    layers = [_fully_connected(features, 512, norm, 0.0), _fully_connected(512, 512, norm, dropout)]
    return HashNetwork(nn.Identity(), layers, 512, bits, images=False)


class UnitLength(nn.Module):
    """Scale feature vectors to the same length, the square root of their width, so that a mean value is about 1."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width), the same shape."""
        return normalize(x) * x.shape[1] ** 0.5


def shallow(shape: tuple[int, ...], bits: int, norm: bool, dropout: float) -> HashNetwork:
    """Feature vectors of equal length, one fully connected layer of 512 units, then the hash layer.

    A pretrained network's features are classified across domains by their directions; a second layer loses more than it gains.
    """
    layers = [_fully_connected(shape[0], 512, norm, dropout)]
    return HashNetwork(UnitLength(), layers, 512, bits, images=False)
