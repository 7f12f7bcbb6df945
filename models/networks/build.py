"""Builds a hash network by name."""

from models.networks.backbones import alexnet
from models.networks.layers import HashNetwork
from models.networks.pretrained import BUNDLED, NAMES, Trunk, is_backbone
from models.networks.small import conv4, lenet, mlp, shallow

NETWORKS = ("auto", "papers", "lenet", "conv4", "alexnet", "mlp", "shallow", *NAMES)  # patterns of the names that ``build_network`` takes


def build_network(
    name: str, shape: tuple[int, ...], bits: int, norm: bool, dropout: float, weights: str, freeze: float = 0.0,
    train_norm: bool = False,
) -> HashNetwork:  # fmt: skip
    """Build a hash network.

    Args:
        name: ``lenet``, ``conv4``, ``alexnet``, ``mlp``, ``shallow``, or a pretrained backbone with the layers of mlp. ``auto`` is mlp for features,
            EfficientNet-Lite0 from 64 pixels, and below that conv4 for colour or lenet for grey; ``papers`` the same with AlexNet from 64 pixels.
        shape: (features,) or (channels, height, width).
        weights: of AlexNet or a pretrained backbone: ``default``, a file, ``none`` for random ones; see ``models.networks.pretrained``.
        freeze, train_norm: of a pretrained backbone, as in ``models.networks.pretrained.Trunk``.

    Raises:
        ValueError: the network does not support this shape.
    """
    if name in ("auto", "papers"):
        small, large = "conv4" if shape[0] == 3 else "lenet", BUNDLED if name == "auto" else "alexnet"
        name = "mlp" if len(shape) == 1 else large if min(shape[1:]) >= 64 else small
    if (name in ("mlp", "shallow")) != (len(shape) == 1):
        raise ValueError(f"network {name!r} does not take data of shape {list(shape)}: mlp and shallow take features, the others images")
    if len(shape) == 1:
        return (mlp if name == "mlp" else shallow)(shape, bits, norm, dropout)
    if name in ("lenet", "conv4"):
        return (lenet if name == "lenet" else conv4)(shape, bits, norm, dropout)
    if not is_backbone(name):
        return alexnet(shape, bits, weights)
    trunk = Trunk(name, shape, weights, freeze, train_norm)
    head = mlp((trunk.features,), bits, norm, dropout)
    return HashNetwork(trunk, [*head.layers], 512, bits, images=True, pretrained=True, fresh_layers=True)
