"""Networks that turn images into feature vectors: frozen ones for the unsupervised hashes, trainable ones for UCDIR."""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from models.distributed import BatchNorm
from models.networks.backbones import FC7, fc7_network, resnet
from models.networks.layers import unit
from models.networks.precision import HeavyModule, reducible
from models.networks.pretrained import BUNDLED, NAMES, Trunk, is_backbone
from models.networks.small import conv4, lenet

EXTRACTORS = ("auto", "none", "alexnet", "vgg16", *NAMES)  # patterns of an extractor's names
BACKBONES = ("auto", "lenet", "conv4", "resnet18", "resnet50", "mlp", *NAMES)  # of a backbone's


class Extractor(HeavyModule):
    """Frozen extractor: input -> vectors (batch, features). Pixels are scaled to [0, 1]; vectors and fc7 to a mean square of 1, if ``normalised``.

    Images below 63 pixels, the least that the networks take, are enlarged to their 224.

    Attributes:
        features: width of the vectors.
        gives_vectors: whether they are a network's or the data's own, not pixels.
    """

    def __init__(self, name: str, shape: tuple[int, ...], weights: str, normalised: bool = True) -> None:
        """Args:
            name: ``none``, ``alexnet``, ``vgg16`` or a pretrained backbone; ``auto`` is EfficientNet-Lite0 for images from 64 pixels, otherwise none.
            shape: (features,) or (channels, height, width).
            weights: see ``models.networks.pretrained`` and ``models.networks.backbones.pretrained_weights``; ``none`` for random weights.

        Raises:
            ValueError: the network does not support this shape.
        """
        super().__init__()
        self.images = len(shape) == 3
        if name == "auto":
            name = BUNDLED if self.images and min(shape[1:]) >= 64 else "none"
        if name != "none" and not self.images:
            raise ValueError(f"extractor {name} needs images, not data of shape {list(shape)}: take --extractor none")
        self.normalised, self.enlarged = normalised, self.images and min(shape[1:]) < 63
        self.trunk: nn.Module | None = None
        self.features = int(torch.Size(shape).numel()) if name == "none" else FC7
        if is_backbone(name):
            trunk = Trunk(name, (shape[0], 224, 224) if self.enlarged else shape, weights)
            self.trunk, self.features = trunk, trunk.features
        elif name != "none":
            self.trunk = fc7_network(name, weights)
        self.gives_vectors = self.trunk is not None or not self.images

    @reducible
    def forward(self, x: Tensor) -> Tensor:
        x = unit(x, self.images)
        if not self.gives_vectors:
            return ((x + 1) / 2).flatten(1)
        if self.trunk is not None:
            x = self.trunk(interpolate(x, (224, 224), mode="bilinear") if self.enlarged else x)
        return normalize(x) * self.features**0.5 if self.normalised else x


class Backbone(HeavyModule):
    """Trainable backbone: input -> vectors (batch, features), by a ResNet, the trunk of LeNet or conv4, or one layer on vectors.

    Attributes:
        name: of the network, never ``auto``.
        features: width of the vectors.
        head: state dict of the projection head of two layers that came with the weights; empty if none did.
    """

    def __init__(self, name: str, shape: tuple[int, ...], weights: str, freeze: float = 0.0, train_norm: bool = False) -> None:
        """Args:
            name: ``lenet``, ``conv4``, ``resnet18``, ``resnet50``, ``mlp`` or a pretrained backbone; ``auto`` is mlp for vectors, EfficientNet-Lite0
                from 64 pixels, and below that conv4 for colour or LeNet for grey.
            shape: (features,) or (channels, height, width).
            weights: of a ResNet or a backbone: ``default``, the path of a state dict or of a MoCo checkpoint, or ``none``; ``moco`` asks for that path.
            freeze, train_norm: of a pretrained backbone, as in ``models.networks.pretrained.Trunk``.

        Raises:
            ValueError: the network does not support this shape.
        """
        super().__init__()
        self.images = len(shape) == 3
        if name == "auto":
            small = "conv4" if shape[0] == 3 else "lenet"
            name = "mlp" if not self.images else BUNDLED if min(shape[1:]) >= 64 else small
        if (name == "mlp") == self.images:
            raise ValueError(f"network {name!r} does not take data of shape {list(shape)}: mlp takes features, the others images")
        self.name = name
        self.trunk: nn.Module
        self.head: dict[str, Tensor] = {}
        if name == "mlp":
            self.trunk, self.features = nn.Sequential(nn.Linear(shape[0], 512), BatchNorm(512), nn.ReLU()), 512
        elif name in ("lenet", "conv4"):
            self.trunk, self.features = _small(name, shape)
        elif is_backbone(name):
            trunk = Trunk(name, shape, weights, freeze, train_norm)
            self.trunk, self.features = trunk, trunk.features
        else:
            self.trunk, self.features, self.head = resnet(name, weights)
        self.to(memory_format=torch.channels_last)

    @reducible
    def forward(self, x: Tensor) -> Tensor:
        x = unit(x, self.images)
        return self.trunk(x.contiguous(memory_format=torch.channels_last) if self.images else x)


def _small(name: str, shape: tuple[int, ...]) -> tuple[nn.Module, int]:
    """Trunk of LeNet (with its fully connected layer) or conv4, with batch-norm, and its output width."""
    network = (lenet if name == "lenet" else conv4)(shape, 8, True, 0.0)
    activated = [part for layer in network.layers for part in (layer, nn.ReLU())]
    return nn.Sequential(network.trunk, *activated), network.hash.linear.in_features
