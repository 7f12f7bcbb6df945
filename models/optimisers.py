"""Optimisers, learning-rate schedules, EMA copies and re-initialisation, shared by the methods."""

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

MOMENTUM = 0.9


def build_optimizer(
    name: str, groups: list[dict[str, Any]], rate: float, decay: float, betas: tuple[float, float] = (0.9, 0.999)
) -> Optimizer:
    """Build an optimiser: ``adam`` (AdamW), ``amsgrad`` (with its largest second moment), ``sgd`` (momentum 0.9) or ``rmsprop``.

    Args:
        groups: parameter groups; ``share`` of each scales its learning rate.
        rate: learning rate.
        decay: weight decay.
        betas: of Adam.
    """
    for group in groups:
        group["lr"] = rate * group["share"]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=MOMENTUM, weight_decay=decay)
    if name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=rate, weight_decay=decay)
    return torch.optim.AdamW(groups, lr=rate, weight_decay=decay, betas=betas, amsgrad=name == "amsgrad")


def layers_of(network: nn.Module) -> list[nn.Module]:
    """The layers that have parameters of their own, from the input on."""
    return [layer for layer in network.modules() if [*layer.parameters(recurse=False)]]


def depth_groups(network: nn.Module, share: float, decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser.

    Args:
        share: of the learning rate that the last layer gets.
        decay: share of its rate that the layer before a layer gets.

    Raises:
        ValueError: ``decay`` is not above 0 and at most 1.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"--depth-decay is {decay}, but must be above 0 and at most 1")
    if decay == 1:
        return [{"params": [*network.parameters()], "share": share}]
    layers = layers_of(network)
    return [{"params": [*layer.parameters(recurse=False)], "share": share * decay**depth} for depth, layer in enumerate(reversed(layers))]


def set_learning_rate(optimizer: Optimizer, first: float, final: float, progress: float) -> None:
    """Set the learning rate: log-spaced from ``first`` to ``final * first``, or a cosine to zero if ``final`` is 0.

    Args:
        progress: 0 at the start of training, 1 at its end.
    """
    factor = final**progress if final else (1 + math.cos(math.pi * progress)) / 2
    for group in optimizer.param_groups:
        group["lr"] = first * factor * group["share"]


def averaged_copy(network: nn.Module, decay: float) -> AveragedModel | None:
    """EMA copy of a network and its buffers, in evaluation mode; None if ``decay`` is 0."""
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True).eval() if decay else None


class MomentumEncoder(nn.Module):
    """A copy whose parameters follow a network's by an EMA, and whose batch-norm statistics are those of its own batches (He et al., CVPR 2020, MoCo).

    Attributes:
        module: the copy.
    """

    def __init__(self, network: nn.Module, momentum: float) -> None:
        super().__init__()
        self.module, self.momentum = copy.deepcopy(network).requires_grad_(False), momentum

    @torch.no_grad()
    def update_parameters(self, network: nn.Module) -> None:
        """Move the parameters towards the network's."""
        for own, trained in zip(self.module.parameters(), network.parameters(), strict=True):
            own.lerp_(trained, 1 - self.momentum)


def reset_network(network: nn.Module, fresh: nn.Module, optimizer: Optimizer) -> None:
    """Reset a network to the parameters and buffers of a fresh one, and clear its optimiser state."""
    network.load_state_dict(fresh.state_dict())
    for parameter in network.parameters():
        optimizer.state.pop(parameter, None)
