"""Builds a hash network by name."""

from models.networks.backbones import alexnet
from models.networks.layers import HashNetwork
from models.networks.small import conv4, lenet, mlp


def build_network(name: str, shape: tuple[int, ...], bits: int, norm: bool, dropout: float, weights: str) -> HashNetwork:
    """Build a hash network. ``auto`` chooses mlp for features, alexnet from 64 pixels, and below that conv4 for colour or lenet for grey.

    Args:
        name: ``auto``, ``lenet``, ``conv4``, ``alexnet`` or ``mlp``.
        shape: (features,) or (channels, height, width).

    Raises:
        ValueError: the network does not support this shape.
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
