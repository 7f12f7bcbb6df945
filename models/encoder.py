"""The hash encoder: the part of a trained method that is registered and deployed."""

from itertools import chain

import torch
from torch import Tensor, nn

from models.codes import pack


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


@torch.no_grad()
def encode_all(encoder: nn.Module, x: Tensor, batch: int = 512) -> Tensor:
    """Apply a module to many rows in batches; (n, ...) in, (n, ...) out, on the CPU."""
    device = next(chain(encoder.parameters(), encoder.buffers())).device
    return torch.cat([encoder(part.to(device)).cpu() for part in x.split(batch)])
