"""Data parallelism: W workers compute the gradient that one process computes on the same global batch.

Losses that compare samples use features gathered from all ranks; batch-norm uses the moments of the global batch. Outside
a process group these functions change nothing.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import batch_norm

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


def gather_divided(x: Tensor, total: int) -> Tensor:
    """Concatenate, on every rank, tensors that are divided among the ranks by ``own_rows``, which have one row more on some: (own, ...) to (total, ...)."""
    world = world_size()
    if world == 1:
        return x
    most = -(-total // world)
    parts = gather(torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])).split(most)
    return torch.cat([part[: total * (each + 1) // world - total * each // world] for each, part in enumerate(parts)])


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of a tensor over the ranks, without gradient."""
    if world_size() == 1:
        return x
    total = x.detach().clone()
    with part("gathering"):
        dist.all_reduce(total)
    return total


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of a tensor over the ranks, without gradient."""
    return x if world_size() == 1 else sum_over_ranks(x) / world_size()


def own_rows(total: int) -> tuple[int, int]:
    """First row of this rank and the row after its last, where ``total`` rows are divided among the ranks."""
    return total * rank() // world_size(), total * (rank() + 1) // world_size()


def on_rank_0(x: Tensor) -> Tensor:
    """Concatenate, on rank 0's CPU, tensors that are divided among the ranks by ``own_rows``; other ranks get their own part. All ranks call it together."""
    counts = gather(torch.tensor([len(x)], device=x.device)).tolist()
    if rank():
        if len(x):
            dist.send(x.contiguous(), 0)
        return x
    parts = [x.cpu()]
    for other, count in enumerate(counts[1:], 1):
        arriving = x.new_empty(count, *x.shape[1:])
        if count:
            dist.recv(arriving, other)
        parts.append(arriving.cpu())
    return torch.cat(parts) if counts[1:] else x


def rank_slice(draw: Tensor) -> Tensor:
    """This rank's part, along the first axis, of a random draw that every rank made for the global batch."""
    return draw.chunk(world_size())[rank()]


def drawn_bits(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Bits drawn by their probabilities, with the gradient of the probabilities; this rank's part of the global batch's draws (SGH).

    Args:
        probabilities: (batch, bits), the same number of rows on each rank.
        generator: the same on each rank.

    Returns:
        (batch, bits), 0 or 1 up to rounding.
    """
    threshold = rank_slice(torch.rand(world_size() * len(probabilities), probabilities.shape[1], generator=generator)).to(probabilities)
    return (probabilities > threshold).to(probabilities) + probabilities - probabilities.detach()


class _Normalise(torch.autograd.Function):
    """Normalise with the moments of the global batch, with the fused kernels that torch has for fixed moments.

    The gradient through the moments needs two sums over the global batch: of the output's gradient, and of its product with the
    normalised input.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps = eps
        return batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        given = gradient.contiguous(memory_format=_memory_format(x)), x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        of_input, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(*given)
        sums = torch.stack([of_bias, of_weight])
        with part("gathering"):
            dist.all_reduce(sums)
        mean_gradient, mean_product = sums / (x.numel() // x.shape[1] * world_size())
        scale = torch.rsqrt(variance + ctx.eps)
        slope = -weight * scale.square() * mean_product
        shape = [1, -1] + [1] * (x.dim() - 2)
        of_input.addcmul_(x, slope.view(shape)).sub_((weight * scale * mean_gradient + slope * mean).view(shape))
        return of_input, of_weight, of_bias, None, None, None


def _memory_format(x: Tensor) -> torch.memory_format:
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


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
            return BatchNorm.forward(self, input.float()).to(input.dtype)  # not a subclass's, which adds to it
        with torch.no_grad():
            means, variances = gather(torch.stack(torch.batch_norm_update_stats(input, None, None, 0.0)).unsqueeze(0)).unbind(1)
            mean = means.mean(0)
            variance = (variances + (means - mean).square()).mean(0)  # centred on each rank: E[x^2] - E[x]^2 would cancel far from zero
        self._track(mean, variance, input.numel() // input.shape[1] * world_size())
        normalised: Tensor = _Normalise.apply(input, self.weight, self.bias, mean, variance, self.eps)  # type: ignore[no-untyped-call]
        return normalised

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.momentum is not None and self.running_mean is not None and self.running_var is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (count / max(count - 1, 1)), self.momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
