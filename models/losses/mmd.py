"""Multi-kernel maximum mean discrepancy between two samples (DAH eq. 1-2, 9-11)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

KERNELS = 17  # bandwidths 2^-8 .. 2^8 times the median squared distance
LEAST = -87.0  # exponent below which exp is subnormal in float32: ten times as slow, and too small to change the sum


def _bandwidths(squared_distances: Tensor) -> Tensor:
    """(KERNELS,) bandwidths around the median distance; they receive no gradient."""
    median = squared_distances.detach().median().clamp(min=1e-6)
    return median * 2.0 ** torch.arange(-(KERNELS // 2), KERNELS // 2 + 1, device=median.device)


def _kernels(squared_distances: Tensor, bandwidths: Tensor) -> Tensor:
    """Mean of the Gaussian kernels exp(-d / bandwidth); same shape as the distances."""
    scaled = squared_distances.unsqueeze(-1) / bandwidths
    return torch.exp(-scaled).mean(-1)


class _SummedKernels(torch.autograd.Function):
    """Sum of the Gaussian kernels exp(-d / bandwidth): (n, n), (KERNELS,) -> (n, n). What autograd would do, in place; no second derivative."""

    @staticmethod
    def forward(ctx: Any, distances: Tensor, bandwidths: Tensor) -> Tensor:
        kernels = [(distances / -bandwidth).clamp_(min=LEAST).exp_() for bandwidth in bandwidths]
        ctx.save_for_backward(bandwidths, *kernels)
        total = kernels[0].clone()
        for kernel in kernels[1:]:
            total += kernel
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        bandwidths, *kernels = ctx.saved_tensors
        found = torch.zeros_like(gradients[0])
        for bandwidth, kernel in zip(bandwidths.flip(0), reversed(kernels), strict=True):
            found += (gradients[0] * kernel).div_(-bandwidth)
        return found, None


def linear_mmd(source: Tensor, target: Tensor) -> Tensor:
    """Linear-time unbiased estimate over consecutive pairs (DAH eq. 11).

    The kernels are averaged, as in the paper; a program that sums them has KERNELS times this value. The rows must be in random
    order, shuffled anew each step.

    Args:
        source, target: (n, features) each; an odd last row is ignored.

    Returns:
        Scalar; may be negative, because the estimate is unbiased.
    """
    pairs = min(len(source), len(target)) // 2
    u1, u2 = source[: 2 * pairs].unflatten(0, (pairs, 2)).unbind(1)
    v1, v2 = target[: 2 * pairs].unflatten(0, (pairs, 2)).unbind(1)
    distances = torch.stack([(a - b).square().sum(1) for a, b in ((u1, u2), (v1, v2), (u1, v2), (u2, v1))])
    k_uu, k_vv, k_uv, k_vu = _kernels(distances, _bandwidths(distances))
    return (k_uu + k_vv - k_uv - k_vu).mean()


def quadratic_mmd(source: Tensor, target: Tensor) -> Tensor:
    """Unbiased quadratic-time estimate of the squared discrepancy (DAH eq. 2; Gretton et al. 2012, eq. 3).

    Args:
        source: (n, features), n at least 2.
        target: (m, features), m at least 2.

    Returns:
        Scalar; may be negative, because the estimate is unbiased.
    """
    n, m = len(source), len(target)
    both = torch.cat([source, target])
    norms = both.square().sum(1)
    distances = (norms.unsqueeze(1) + norms.unsqueeze(0) - 2 * both @ both.T).clamp(min=0)
    others = distances.flatten()[1:].view(n + m - 1, n + m + 1)[:, :-1]  # all but the diagonal
    kernel = _SummedKernels.apply(distances, _bandwidths(others)) / KERNELS
    kernel = kernel * ~torch.eye(n + m, dtype=torch.bool, device=both.device)
    within_source = kernel[:n, :n].sum() / (n * (n - 1))
    within_target = kernel[n:, n:].sum() / (m * (m - 1))
    return within_source + within_target - 2 * kernel[:n, n:].mean()
