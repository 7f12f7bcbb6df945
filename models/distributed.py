"""Data parallelism: W workers compute the gradient that one process computes on the same global batch.

Losses that compare samples use features gathered from all ranks; batch-norm uses the moments of the global batch. Outside
a process group these functions change nothing.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import Tensor, nn

from models.clock import part


def world_size() -> int:
    """Number of ranks in the process group; 1 outside one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process; 0 outside a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def broadcast_from_rank_0(value: dict[str, Any]) -> dict[str, Any]:
    """Broadcast a picklable dict from rank 0; returns it on every rank."""
    if world_size() == 1:
        return value
    shared = [value]
    dist.broadcast_object_list(shared)
    return shared[0]


def gather(x: Tensor) -> Tensor:
    """Concatenate a tensor of every rank along its first axis, in rank order (all-gather with gradients).

    Each rank receives the gradient of its own part, summed over the ranks. Every rank computes the same loss on the gathered
    batch and DDP divides by W, so the parameters receive exactly the gradient of that loss.

    Args:
        x: (batch, ...), the same shape on each rank.

    Returns:
        (W * batch, ...).
    """
    if world_size() == 1:
        return x
    with part("gathering"):
        if x.requires_grad:
            return torch.cat(dist_nn.all_gather(x.contiguous()))
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of a tensor over the ranks, without gradient."""
    if world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def rank_slice(draw: Tensor) -> Tensor:
    """This rank's part, along the first axis, of a random draw that every rank made for the global batch."""
    return draw.chunk(world_size())[rank()]


class BatchNorm(nn.BatchNorm2d):
    """Batch-norm over (batch, features) or (batch, channels, h, w) with the moments of the global batch.

    ``torch.nn.SyncBatchNorm`` supports GPUs only; this class also supports CPUs (gloo), so that results do not depend on the
    number of workers.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ValueError(f"BatchNorm takes 2 or 4 axes, not {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input``; same shape."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        if input.dtype in (torch.bfloat16, torch.float16):
            return self.forward(input.float()).to(input.dtype)
        axes = [0] if input.dim() == 2 else [0, 2, 3]
        means, variances = gather(torch.stack([input.mean(axes), input.var(axes, unbiased=False)]).unsqueeze(0)).unbind(1)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)  # centred on each rank: E[x^2] - E[x]^2 would cancel far from zero
        self._track(mean.detach(), variance.detach(), input.numel() // input.shape[1] * world_size())
        shape = [1, -1] + [1] * (input.dim() - 2)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (input - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.momentum is not None and self.running_mean is not None and self.running_var is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (count / max(count - 1, 1)), self.momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
