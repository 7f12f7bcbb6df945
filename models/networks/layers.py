"""Building blocks of hash networks: input scaling, the hash layer, and trunk plus layers plus hash layer.

A hash network returns the output of each fully connected layer before its nonlinearity, and the relaxed code:
``forward(x) -> (layers, u_BD)``, B batch, D bits. Images are uint8, or float32 in 0..255 after augmentation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.distributed import BatchNorm
from models.networks.precision import HeavyModule, reducible
from models.optimisers import depth_groups

Output = tuple[list[Tensor], Tensor]


def unit(x: Tensor, images: bool) -> Tensor:
    """Convert stored images (0..255) to floats in [-1, 1], the range of the generators; feature vectors to floats."""
    x = x.to(torch.get_default_dtype())
    return x / 127.5 - 1 if images else x


class HashLayer(nn.Module):
    """Fully connected, batch-norm, tanh: the hash-fc8 of DAH (section 3.4)."""

    def __init__(self, features: int, bits: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, bits)
        self.norm: nn.Module = BatchNorm(bits)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the linear output and the code in [-1, 1], both (batch, bits)."""
        linear = self.linear(x)
        return linear, torch.tanh(self.norm(linear))


class HashNetwork(HeavyModule):
    """A trunk, its fully connected layers, which are the heavy part, and a hash layer."""

    def __init__(
        self, trunk: nn.Module, layers: Sequence[nn.Module], features: int, bits: int, images: bool, pretrained: bool = False,
        fresh_layers: bool = False,
    ) -> None:  # fmt: skip
        """Args:
            features: width of what the hash layer takes.
            pretrained: whether the trunk trains at a lower rate, and the layers too unless they are ``fresh_layers``.
        """
        super().__init__()
        self.pretrained, self.fresh_layers = pretrained, fresh_layers
        self.trunk = trunk
        self.layers = nn.ModuleList(layers)
        self.widths = [[part for part in layer.modules() if isinstance(part, nn.Linear)][-1].out_features for layer in layers]
        self.hash = HashLayer(features, bits)
        self.images = images
        self.to(memory_format=torch.channels_last)  # LeNet trains 1.4 times as fast with it on CPUs

    def forward(self, x: Tensor) -> Output:
        """Outputs of the layers, each (batch, width), and the code (batch, bits)."""
        return self.with_features(x)[1:]

    def with_features(self, x: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """The trunk's output (batch, width), the outputs of the layers, and the code."""
        features, outputs, activated = self._body(x)
        linear, code = self.hash(activated)
        return features, [*outputs, linear], code

    @reducible
    def _body(self, x: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """The trunk's output, those of the fully connected layers, and what the hash layer takes."""
        x = unit(x, self.images)
        x = features = self.trunk(x.contiguous(memory_format=torch.channels_last) if self.images else x)
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
            x = torch.relu(x)
        return features, outputs, x

    def parameter_groups(self, share: float, decay: float = 1.0) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser; the last pretrained layer gets ``share`` of the learning rate, the hash layer all of it.

        Args:
            decay: share of its rate that the layer before a pretrained layer gets.
        """
        body, top = nn.ModuleList([self.trunk]), [*self.hash.parameters()]
        if self.fresh_layers:
            top.extend(self.layers.parameters())
        else:
            body.extend(self.layers)
        return [*depth_groups(body, share if self.pretrained else 1.0, decay if self.pretrained else 1.0), {"params": top, "share": 1.0}]


class CodesOnly(nn.Module):
    """A hash network that returns only its codes: input -> (batch, bits)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[1]
