"""DTN's networks at 32x32 (Taigman et al., ICLR 2017), which SIGAN also uses: encoder, decoder, critic; and fully connected ones of feature vectors.

``width`` w is the number of channels of the encoder's first layer, 64 in DTN and SIGAN. Images of another size are resized.
"""

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.functional import interpolate

from models.distributed import BatchNorm
from models.networks.layers import unit
from models.networks.precision import HeavyModule, reducible

SIDE = 32
FEATURES = 128  # length of h


class Activations(NamedTuple):
    """Output of an encoder or decoder, with the layers that the attention term compares.

    ``out`` is (batch, 128) features h, or (batch, channels, 32, 32) images in [-1, 1]; ``at_8`` and ``at_4`` are (batch, *, 8, 8)
    and (batch, *, 4, 4). Of networks of vectors, ``out`` is h or the vectors, and the layers have no places: (batch, *).
    """

    out: Tensor
    at_8: Tensor
    at_4: Tensor


def to_network_input(x: Tensor) -> Tensor:
    """Convert stored images (0..255) of any size to (batch, channels, 32, 32) in [-1, 1]."""
    x = unit(x, images=True)
    return x if x.shape[-2:] == (SIDE, SIDE) else interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)


class Pixels(nn.Module):
    """What the networks of images take: images as stored -> ``to_network_input``."""

    def forward(self, x: Tensor) -> Tensor:
        return to_network_input(x)


def _block(layer: nn.Conv2d | nn.ConvTranspose2d) -> nn.Sequential:
    return nn.Sequential(layer, BatchNorm(layer.out_channels), nn.ReLU())


class Encoder(HeavyModule):
    """E: conv3x3/2 of w, 2w, 4w, then conv4x4, batch-norm, tanh to h."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.to_8 = nn.Sequential(_block(nn.Conv2d(channels, width, 3, 2, 1)), _block(nn.Conv2d(width, 2 * width, 3, 2, 1)))
        self.to_4 = _block(nn.Conv2d(2 * width, 4 * width, 3, 2, 1))
        self.to_1 = nn.Sequential(nn.Conv2d(4 * width, FEATURES, 4), BatchNorm(FEATURES), nn.Tanh(), nn.Flatten())

    @reducible
    def forward(self, x: Tensor) -> Activations:
        """(batch, channels, 32, 32) in [-1, 1] to features (batch, 128)."""
        at_8 = self.to_8(x)
        at_4 = self.to_4(at_8)
        return Activations(self.to_1(at_4), at_8, at_4)


class Decoder(HeavyModule):
    """G: deconv4x4 of 8w, deconv3x3/2 of 4w and 2w, then to the image, tanh."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.to_4 = nn.Sequential(nn.Unflatten(1, (FEATURES, 1, 1)), _block(nn.ConvTranspose2d(FEATURES, 8 * width, 4)))
        self.to_8 = _block(nn.ConvTranspose2d(8 * width, 4 * width, 3, 2, 1, 1))
        to_16 = _block(nn.ConvTranspose2d(4 * width, 2 * width, 3, 2, 1, 1))
        self.to_32 = nn.Sequential(to_16, nn.ConvTranspose2d(2 * width, channels, 3, 2, 1, 1), nn.Tanh())

    @reducible
    def forward(self, h: Tensor) -> Activations:
        """Features (batch, 128) to (batch, channels, 32, 32) in [-1, 1]."""
        at_4 = self.to_4(h)
        at_8 = self.to_8(at_4)
        return Activations(self.to_32(at_8), at_8, at_4)


class Critic(HeavyModule):
    """D: conv3x3/2 of 2w, 4w, 8w, then conv4x4 to its scores; no batch-norm, because a gradient penalty excludes it."""

    def __init__(self, channels: int, width: int, scores: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((channels, 2 * width), (2 * width, 4 * width), (4 * width, 8 * width)):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * width, scores, 4), nn.Flatten(0 if scores == 1 else 1))

    @reducible
    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, 32, 32) to (batch,), or (batch, scores) of several."""
        return self.layers(x)


class _Dense(HeavyModule):
    """Two hidden layers with batch-norm and an output layer; the hidden layers in the order that ``Activations`` has."""

    def __init__(self, widths: tuple[int, int, int, int], end: tuple[nn.Module, ...]) -> None:
        super().__init__()
        inputs, first, second, outputs = widths
        self.first = nn.Sequential(nn.Linear(inputs, first), BatchNorm(first), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(first, second), BatchNorm(second), nn.ReLU())
        self.last = nn.Sequential(nn.Linear(second, outputs), *end)

    @reducible
    def forward(self, x: Tensor) -> Activations:
        first = self.first(x)
        second = self.second(first)
        wide, narrow = (first, second) if first.shape[1] > second.shape[1] else (second, first)
        return Activations(self.last(second), wide, narrow)


def dense_networks(features: int, width: int, scores: int = 1) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Encoder, decoder and critic of feature vectors with a mean square of 1: hidden layers of 32w and 16w.

    Args:
        features: width of the vectors.
        width, scores: as of the networks of images.
    """
    wide, narrow = 32 * width, 16 * width
    encoder = _Dense((features, wide, narrow, FEATURES), (BatchNorm(FEATURES), nn.Tanh()))
    critic = nn.Sequential(
        nn.Linear(features, wide), nn.LeakyReLU(0.2), nn.Linear(wide, narrow), nn.LeakyReLU(0.2), nn.Linear(narrow, scores),
        nn.Flatten(0 if scores == 1 else 1),
    )  # fmt: skip
    return encoder, _Dense((FEATURES, narrow, wide, features), ()), critic


class TranslatedCode(nn.Module):
    """What the encoder takes of an input, encoder and hash layer: input -> codes (batch, bits)."""

    def __init__(self, taken: nn.Module, encoder: nn.Module, hash_layer: nn.Module) -> None:
        super().__init__()
        self.taken, self.encoder, self.hash = taken, encoder, hash_layer

    def forward(self, x: Tensor) -> Tensor:
        return self.hash(self.encoder(self.taken(x)).out)[1]


def attention_map(layer: Tensor, scaled: bool) -> Tensor:
    """Sum of absolute activations over the channels (SIGAN eq. 8), (batch, h, w).

    Args:
        layer: (batch, channels, h, w).
        scaled: divide by the number of channels, so that layers of different width are comparable.
    """
    total = layer.abs().sum(1)
    return total / layer.shape[1] if scaled else total


def total_variation(images: Tensor) -> Tensor:
    """Anisotropic total variation (SIGAN eq. 6 with B = 1), summed over pixels and channels, mean over images.

    Args:
        images: (batch, channels, h, w).
    """
    across = images[..., :-1, 1:] - images[..., :-1, :-1]
    down = images[..., 1:, :-1] - images[..., :-1, :-1]
    return (across.square() + down.square() + 1e-8).sqrt().sum((1, 2, 3)).mean()  # the square root has no gradient at zero


def resize_to(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Resize images (batch, channels, 32, 32) to the height and width of ``shape``, (channels, h, w)."""
    return images if images.shape[-2:] == shape[1:] else interpolate(images, shape[1:], mode="bilinear", antialias=True)
