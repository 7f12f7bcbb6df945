"""Large pretrained networks from torchvision: AlexNet, VGG and ResNet, and how their weights are loaded."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.distributed import BatchNorm
from models.networks.layers import HashNetwork

FC7 = 4096  # width of fc7 in AlexNet and VGG


class ImageNetInput(nn.Module):
    """Converts [-1, 1] to ImageNet's normalisation and grey images to three channels."""

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (((x + 1) / 2).expand(-1, 3, -1, -1) - self.mean) / self.deviation


def alexnet(shape: tuple[int, ...], bits: int, weights: str) -> HashNetwork:
    """AlexNet's conv1 to fc7 from torchvision, with hash-fc8 in place of fc8 (closest to the paper's VGG-F).

    Args:
        shape: (channels, height, width), at least 63 by 63.
        weights: a torchvision name (``IMAGENET1K_V1``, downloaded, is the default), the path of a .safetensors or weights-only .pth file, or
            ``none`` for random weights.
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
    """Load a state dict by torchvision name, ``default`` for its first ImageNet weights, or by file path. Only tensors are unpickled.

    Raises:
        ValueError: the weights cannot be loaded; says what was tried.
    """
    advice = "give the path of a state-dict file (.safetensors or .pth), or 'none' for random weights (--extractor none hashes pixels)"
    path = Path(weights)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # noqa: PLC0415

            return load_file(path)
        if path.suffix in {".pth", ".pt", ".tar"}:
            return torch.load(path, map_location="cpu", weights_only=True)
        from torchvision.models import get_model_weights  # noqa: PLC0415

        return get_model_weights(network)["IMAGENET1K_V1" if weights == "default" else weights].get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # downloads, files and names can fail in many ways, and all mean the same to the user
        raise ValueError(f"weights {weights!r} of {network} cannot be loaded ({type(error).__name__}: {error}): {advice}") from error


def fc7_network(name: str, weights: str) -> nn.Module:
    """A torchvision network up to fc7 and its ReLU."""
    from torchvision import models  # noqa: PLC0415  torchvision is slow to import

    network = getattr(models, name)(weights=None)
    if weights != "none":
        network.load_state_dict(pretrained_weights(name, weights))
    classifier = [layer for layer in network.classifier[:-1] if not isinstance(layer, nn.Dropout)]  # no dropout in a frozen extractor
    return nn.Sequential(ImageNetInput(), network.features, network.avgpool, nn.Flatten(), *classifier)


def resnet(name: str, weights: str) -> tuple[nn.Module, int, dict[str, Tensor]]:
    """A torchvision ResNet without its last layer, with distributed batch-norm; its output width; the weights' head of two layers, if they have one.

    Raises:
        ValueError: the weights cannot be loaded, or are not of this network.
    """
    from torchvision import models  # noqa: PLC0415  torchvision is slow to import

    network = getattr(models, name)(weights=None, norm_layer=BatchNorm)
    width = network.fc.in_features
    network.fc = nn.Identity()
    state: dict[str, Tensor] = {}
    if weights == "moco":
        raise ValueError(f"this setting starts from MoCo v2's {name}: give its checkpoint's path by --pretrained, or none for random weights")
    if weights != "none":
        state = trunk_weights(pretrained_weights(name, weights))
        missing = [key for key in network.state_dict() if key not in state and "num_batches" not in key]
        if missing:
            raise ValueError(f"weights {weights!r} are not those of a {name}: they lack {', '.join(missing[:3])}")
        network.load_state_dict({key: state[key] for key in network.state_dict() if key in state}, strict=False)
    head = {key.removeprefix("fc."): tensor for key, tensor in state.items() if key.startswith("fc.")}
    return nn.Sequential(ImageNetInput(), network), width, head if "0.weight" in head else {}


def trunk_weights(saved: dict[str, Any]) -> dict[str, Tensor]:
    """The network's own state dict; in a MoCo checkpoint the query encoder's, with the prefix ``module.encoder_q.`` removed."""
    state: dict[str, Tensor] = saved.get("state_dict", saved)
    prefix = "module.encoder_q."
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)} or state
