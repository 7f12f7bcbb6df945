"""Networks that turn images or feature vectors into relaxed codes.

A network returns every fully connected layer's output before its nonlinearity, and the relaxed code:
``forward(x) -> (layers, u_BD)``. Images are uint8, or float32 in the same range 0..255 after augmentation.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.distributed import BatchNorm

Output = tuple[list[Tensor], Tensor]


def unit(x: Tensor, images: bool) -> Tensor:
    """Stored images (0..255) as real numbers in [-1, 1], what a generator makes; feature vectors as real numbers."""
    x = x.to(torch.get_default_dtype())
    return x / 127.5 - 1 if images else x


class HashLayer(nn.Module):
    """Fully connected, batch-norm, tanh: the hash-fc8 of DAH (section 3.4)."""

    def __init__(self, features: int, bits: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, bits)
        self.norm = BatchNorm(bits)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the linear output and the code in [-1, 1], both (batch, bits)."""
        linear = self.linear(x)
        return linear, torch.tanh(self.norm(linear))


class HashNetwork(nn.Module):
    """A trunk, its fully connected layers and a hash layer."""

    def __init__(
        self, trunk: nn.Module, layers: Sequence[nn.Module], features: int, bits: int, images: bool, pretrained: bool = False
    ) -> None:
        super().__init__()
        self.pretrained = pretrained  # trunk and layers, which then learn at a lower rate
        self.trunk = trunk
        self.layers = nn.ModuleList(layers)
        self.hash = HashLayer(features, bits)
        self.images = images
        self.to(memory_format=torch.channels_last)  # on CPUs LeNet then trains 1.4 times as fast

    def forward(self, x: Tensor) -> Output:
        """Layers' outputs, each (batch, width), and the code (batch, bits)."""
        x = unit(x, self.images)
        x = self.trunk(x.contiguous(memory_format=torch.channels_last) if self.images else x)
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
            x = torch.relu(x)
        linear, code = self.hash(x)
        return [*outputs, linear], code

    def groups(self, share: float) -> list[dict[str, Any]]:
        """Parameter groups of an optimiser: pretrained layers learn at a ``share`` of the rate, the hash layer at the whole."""
        body = [*self.trunk.parameters(), *self.layers.parameters()]
        return [
            {"params": body, "share": share if self.pretrained else 1.0},
            {"params": [*self.hash.parameters()], "share": 1.0},
        ]


class CodeOnly(nn.Module):
    """A hash network without its layers' outputs: input -> codes (batch, bits)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[1]


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
    """Four convolutions of stride 2 without fully connected layers: IGAN's encoder of 32x32 colour digits (section 3.2).

    Args:
        shape: (channels, height, width), at least 16 by 16.
        norm: batch-norm after each layer (the paper does not say).
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
    """Two fully connected layers of 512 on pre-extracted features, then the hash layer."""
    features = shape[0]
    layers = [_fully_connected(features, 512, norm, 0.0), _fully_connected(512, 512, norm, dropout)]
    return HashNetwork(nn.Identity(), layers, 512, bits, images=False)


class ImageNetInput(nn.Module):
    """Scale [-1, 1] to ImageNet's normalisation and give grey images three channels."""

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (((x + 1) / 2).expand(-1, 3, -1, -1) - self.mean) / self.deviation


def alexnet(shape: tuple[int, ...], bits: int, weights: str) -> HashNetwork:
    """AlexNet's conv1 to fc7 from torchvision, with hash-fc8 in place of fc8 (nearest to the paper's VGG-F).

    Args:
        shape: (channels, height, width), at least 63 by 63.
        weights: a torchvision name (``IMAGENET1K_V1``, downloaded), a path of a .safetensors or weights-only .pth
            file, or ``none`` for random weights.
    """
    from torchvision.models import alexnet as build  # noqa: PLC0415  torchvision is slow to import

    if min(shape[1:]) < 63:
        raise ValueError(f"AlexNet needs images of at least 63x63 pixels, not {shape[1]}x{shape[2]}: ingest with --size 224")
    network = build(weights=None)
    if weights != "none":
        network.load_state_dict(pretrained_weights("alexnet", weights))
    fc6, fc7 = network.classifier[1], network.classifier[4]
    trunk = nn.Sequential(ImageNetInput(), network.features, network.avgpool, nn.Flatten(), nn.Dropout())
    return HashNetwork(trunk, [fc6, nn.Sequential(nn.Dropout(), fc7)], fc7.out_features, bits, True, weights != "none")


def pretrained_weights(network: str, weights: str) -> dict[str, Tensor]:
    """State dict of a torchvision network by weights name or file path; nothing is unpickled but tensors.

    Raises:
        ValueError: the weights cannot be had; says what was tried.
    """
    advice = "give the path of a state-dict file (.safetensors or .pth), or 'none' for random weights"
    path = Path(weights)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # noqa: PLC0415

            return load_file(path)
        if path.suffix in {".pth", ".pt", ".tar"}:
            return torch.load(path, map_location="cpu", weights_only=True)
        from torchvision.models import get_model_weights  # noqa: PLC0415

        return get_model_weights(network)[weights].get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # a network, a file or a name can fail in a dozen ways; each means the same to the user
        raise ValueError(f"weights {weights!r} of {network} cannot be had ({type(error).__name__}: {error}): {advice}") from error


def build_network(name: str, shape: tuple[int, ...], bits: int, norm: bool, dropout: float, weights: str) -> HashNetwork:
    """The network of a name; ``auto`` is MLP for features, AlexNet from 64 pixels; below, conv4 for colour, LeNet for grey.

    Args:
        name: ``auto``, ``lenet``, ``conv4``, ``alexnet`` or ``mlp``.
        shape: (features,) or (channels, height, width).

    Raises:
        ValueError: the network does not take this shape.
    """
    if name == "auto":
        small = "conv4" if shape[0] == 3 else "lenet"
        name = "mlp" if len(shape) == 1 else "alexnet" if min(shape[1:]) >= 64 else small
    if (name == "mlp") != (len(shape) == 1):
        raise ValueError(f"network {name!r} does not take data of shape {list(shape)}: mlp takes features, the others images")
    if name == "mlp":
        return mlp(shape, bits, norm, dropout)
    if name in ("lenet", "conv4"):
        return (lenet if name == "lenet" else conv4)(shape, bits, norm, dropout)
    return alexnet(shape, bits, weights)
