"""The hash encoder: the part of a trained method that is registered and deployed."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from models.codes import pack
from models.method import Method


class HashEncoder(nn.Module):
    """Maps stored images or features to packed codes. The exported program needs only PyTorch."""

    def __init__(self, network: nn.Module) -> None:
        """Args:
            network: maps raw input to relaxed codes; in evaluation mode.
        """
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Encode a batch.

        Args:
            x: (batch, channels, h, w) uint8, or (batch, features) float32.

        Returns:
            (batch, bits / 8) uint8.
        """
        return pack(self.network(x))


class OnImages:
    """A method that was trained on a backbone's features, as a method of images; everything but what takes rows is the method's own."""

    def __init__(self, method: Method, backbone: nn.Module, shape: tuple[int, ...]) -> None:
        """Args:
            backbone: images to features, in evaluation mode, on the method's device.
            shape: of the images.
        """
        self.method, self.backbone, self.shape = method, backbone, shape

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def encoder(self) -> nn.Module:
        """Images to relaxed codes, in evaluation mode."""
        return nn.Sequential(self.backbone, self.method.encoder()).eval()

    def encode(self, x: Tensor) -> Tensor:
        """Relaxed codes of images."""
        return self.method.encode(self.backbone(x))

    def features(self, x: Tensor) -> Tensor:
        """The method's features of images."""
        return self.method.features(self.backbone(x))

    def classify(self, x: Tensor) -> Tensor:
        """Class log-probabilities of images."""
        return self.method.classify(self.backbone(x))


@torch.no_grad()
def encode_all(encoder: nn.Module, x: Tensor, batch: int = 512) -> Tensor:
    """Apply a module to many rows in batches; (n, ...) in, (n, ...) out, on the CPU."""
    device = next(chain(encoder.parameters(), encoder.buffers())).device
    return torch.cat([encoder(part.to(device)).cpu() for part in x.split(batch)])
