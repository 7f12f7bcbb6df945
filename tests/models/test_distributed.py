"""Batch-norm over two ranks, simulated in one process."""

import pytest
import torch

from models import distributed


@pytest.mark.parametrize("centre", [0.0, 300.0, -5000.0])
def test_batch_norm_of_two_ranks_is_that_of_one_process_far_from_zero_too(centre: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x = centre + 0.02 * torch.randn(16, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    exact = torch.nn.BatchNorm2d(3, eps=1e-5).double()
    wanted = exact(x.double()).float()
    halves = x.chunk(2)
    moments = torch.stack([torch.stack([half.mean((0, 2, 3)), half.var((0, 2, 3), unbiased=False)]) for half in halves])
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather", lambda own: moments)
    for half, part in zip(halves, wanted.chunk(2), strict=True):
        norm = distributed.BatchNorm(3)
        found = norm(half)
        assert torch.isfinite(found).all()
        assert (found - part).abs().max() < 0.1  # float32 holds 0.02 beside 5,000 to two digits
        if not centre:
            torch.testing.assert_close(found, part, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(norm.running_var, exact.running_var.float(), rtol=0.02, atol=1e-6)
